"""Pictures and rates from recorded runs. Reads run folders; never imports Lightning."""

from nclightning.figures.convergence import draw_convergence
from nclightning.figures.rates import LinearFit, fit_rate
from nclightning.figures.readings import Readings, read_readings
from nclightning.figures.summary import RunSummary, summarize

__all__ = ["LinearFit", "Readings", "RunSummary", "draw_convergence", "fit_rate", "read_readings", "summarize"]
