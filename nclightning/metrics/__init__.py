"""torchmetrics classes: state and synchronisation around the functions of :mod:`nclightning.functional`."""

from nclightning.metrics.neural_collapse import NeuralCollapse

__all__ = ["NeuralCollapse"]
