"""One HTML page about recorded runs and measurements. Never imports Lightning."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nclightning.report.page import write_report
    from nclightning.report.recorded import Record, read_records
    from nclightning.report.trends import Trend, trend_of
    from nclightning.report.verdicts import Verdict, verdicts_on
else:
    from nclightning.lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "page": ("write_report",),
            "recorded": ("Record", "read_records"),
            "trends": ("Trend", "trend_of"),
            "verdicts": ("Verdict", "verdicts_on"),
        },
    )

__all__ = ["Record", "Trend", "Verdict", "read_records", "trend_of", "verdicts_on", "write_report"]
