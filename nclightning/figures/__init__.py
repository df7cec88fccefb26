"""Pictures and rates of recorded runs. This package reads run folders and never imports Lightning."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nclightning.figures.comparison import draw_collapse, draw_gaps
    from nclightning.figures.convergence import draw_convergence
    from nclightning.figures.error_bound import draw_error_bound
    from nclightning.figures.many import group_runs, thinned
    from nclightning.figures.optimizers import draw_optimizers
    from nclightning.figures.rates import LinearFit, fit_rate, fit_straight
    from nclightning.figures.readings import Readings, read_readings
    from nclightning.figures.runs import Run, read_run
    from nclightning.figures.spectrum import draw_spectrum
    from nclightning.figures.summary import RunSummary, summarize
else:
    from nclightning.lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "comparison": ("draw_collapse", "draw_gaps"),
            "convergence": ("draw_convergence",),
            "error_bound": ("draw_error_bound",),
            "many": ("group_runs", "thinned"),
            "optimizers": ("draw_optimizers",),
            "rates": ("LinearFit", "fit_rate", "fit_straight"),
            "readings": ("Readings", "read_readings"),
            "runs": ("Run", "read_run"),
            "spectrum": ("draw_spectrum",),
            "summary": ("RunSummary", "summarize"),
        },
    )

__all__ = [
    "LinearFit",
    "Readings",
    "Run",
    "RunSummary",
    "draw_collapse",
    "draw_convergence",
    "draw_error_bound",
    "draw_gaps",
    "draw_optimizers",
    "draw_spectrum",
    "fit_rate",
    "fit_straight",
    "group_runs",
    "read_readings",
    "read_run",
    "summarize",
    "thinned",
]
