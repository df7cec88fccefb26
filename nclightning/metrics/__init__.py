"""Measures of neural collapse as torchmetrics classes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nclightning.metrics.measures import MEASURES
    from nclightning.metrics.nearest_centre import NearestClassCentre
    from nclightning.metrics.neural_collapse import NeuralCollapse
    from nclightning.metrics.optimality import Optimality
    from nclightning.metrics.registering import register_measure
    from nclightning.metrics.regression_collapse import RegressionCollapse
else:
    from nclightning.lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "measures": ("MEASURES",),
            "nearest_centre": ("NearestClassCentre",),
            "neural_collapse": ("NeuralCollapse",),
            "optimality": ("Optimality",),
            "registering": ("register_measure",),
            "regression_collapse": ("RegressionCollapse",),
        },
    )

__all__ = ["MEASURES", "NearestClassCentre", "NeuralCollapse", "Optimality", "RegressionCollapse", "register_measure"]
