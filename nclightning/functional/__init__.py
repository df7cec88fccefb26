"""What we measure on tensors. Pure functions; shares no code with :mod:`nclightning.theory`, which predicts."""

from nclightning.functional.collapse import etf_deviation, self_duality, within_class_variability
from nclightning.functional.statistics import ClassStatistics, class_statistics

__all__ = [
    "ClassStatistics",
    "class_statistics",
    "etf_deviation",
    "self_duality",
    "within_class_variability",
]
