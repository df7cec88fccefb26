"""Neural collapse, measured and predicted, on PyTorch Lightning.

Where to find what:

- :func:`nclightning.measure`: neural collapse of any network, or of arrays of features, in one call.
- :class:`nclightning.Probe`: the same in your own training loop.
- :mod:`nclightning.objective`: the training objective, Problem (2) of the paper.
- :mod:`nclightning.problems`: convex unconstrained feature models: optimum, spectrum, rates, certificates.
- :mod:`nclightning.theory`: closed forms of the paper's two balanced problems.
- :mod:`nclightning.functional` and :mod:`nclightning.metrics`: NC1-NC3 as functions and as torchmetrics.
- :mod:`nclightning.optim`: gradient descent, BFGS, conjugate gradients and Newton's method with a line search that
  reaches round-off, and momentum with known constants.
- :mod:`nclightning.models`, :mod:`nclightning.data`, :mod:`nclightning.callbacks`: the Lightning side.
- :mod:`nclightning.figures`: pictures and rates from recorded runs.

Names are imported at their first use, so that the parts for tensors do not import Lightning.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nclightning.probe.measuring import measure
    from nclightning.probe.probing import Probe
    from nclightning.probe.results import Measurement
else:
    from nclightning.lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {"probe.measuring": ("measure",), "probe.probing": ("Probe",), "probe.results": ("Measurement",)},
    )

__all__ = ["Measurement", "Probe", "measure"]
__version__ = "0.1.0"
