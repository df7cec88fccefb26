"""Neural collapse, measured and predicted, on PyTorch Lightning.

Where to find what:

- :mod:`nclightning.objective`: the training objective, Problem (2).
- :mod:`nclightning.theory`: closed forms of the unconstrained feature model.
- :mod:`nclightning.functional` and :mod:`nclightning.metrics`: NC1-NC3 as functions and as torchmetrics.
- :mod:`nclightning.optim`: gradient descent with a line search that reaches round-off.
- :mod:`nclightning.models`, :mod:`nclightning.data`, :mod:`nclightning.callbacks`: the Lightning side.
- :mod:`nclightning.figures`: pictures and rates from recorded runs.

Nothing is imported here, so that the tensor parts load without Lightning.
"""

__version__ = "0.1.0"
