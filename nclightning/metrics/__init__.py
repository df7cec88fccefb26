"""Neural collapse as torchmetrics."""

from nclightning.metrics.measures import MEASURES
from nclightning.metrics.nearest_centre import NearestClassCentre
from nclightning.metrics.neural_collapse import NeuralCollapse
from nclightning.metrics.optimality import Optimality
from nclightning.metrics.regression_collapse import RegressionCollapse

__all__ = ["MEASURES", "NearestClassCentre", "NeuralCollapse", "Optimality", "RegressionCollapse"]
