"""Lightning callbacks that read a run without touching it."""

from nclightning.callbacks.checkpoint import LastCheckpoint
from nclightning.callbacks.dashboard import TensorBoardDashboard
from nclightning.callbacks.laws import OptimizerLaws
from nclightning.callbacks.neural_collapse import NeuralCollapseMonitor
from nclightning.callbacks.optimality import OptimalityMonitor
from nclightning.callbacks.progress import IterationProgressBar
from nclightning.callbacks.regression import RegressionCollapseMonitor

__all__ = [
    "IterationProgressBar",
    "LastCheckpoint",
    "NeuralCollapseMonitor",
    "OptimalityMonitor",
    "OptimizerLaws",
    "RegressionCollapseMonitor",
    "TensorBoardDashboard",
]
