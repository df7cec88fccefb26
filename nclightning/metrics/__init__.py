"""Neural collapse as torchmetrics."""

from nclightning.metrics.measures import MEASURES
from nclightning.metrics.nearest_centre import NearestClassCentre
from nclightning.metrics.neural_collapse import NeuralCollapse

__all__ = ["MEASURES", "NearestClassCentre", "NeuralCollapse"]
