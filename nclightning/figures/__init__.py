"""Pictures and rates from recorded runs. Reads run folders; never imports Lightning."""

from nclightning.figures.comparison import draw_collapse, draw_gaps
from nclightning.figures.convergence import draw_convergence
from nclightning.figures.error_bound import draw_error_bound
from nclightning.figures.many import group_runs, thinned
from nclightning.figures.rates import LinearFit, fit_rate, fit_straight
from nclightning.figures.readings import Readings, read_readings
from nclightning.figures.runs import Run, read_run
from nclightning.figures.spectrum import draw_spectrum
from nclightning.figures.summary import RunSummary, summarize

__all__ = [
    "LinearFit",
    "Readings",
    "Run",
    "RunSummary",
    "draw_collapse",
    "draw_convergence",
    "draw_error_bound",
    "draw_gaps",
    "draw_spectrum",
    "fit_rate",
    "fit_straight",
    "group_runs",
    "read_readings",
    "read_run",
    "summarize",
    "thinned",
]
