"""Neural regression collapse during a fit."""

from __future__ import annotations

import lightning as L
from torch import Tensor

from nclightning.arguments import check_cadences
from nclightning.callbacks.either import EitherMonitor
from nclightning.callbacks.monitor import Batch
from nclightning.callbacks.publishing import changed_settings
from nclightning.callbacks.regression_at_epochs import RegressionAtEpochs
from nclightning.callbacks.regression_at_iterates import RegressionAtIterates
from nclightning.probe.detection import HeadArgument
from nclightning.probe.reader import BatchFn, ForwardFn
from nclightning.probe.regression import TargetReader
from nclightning.quantities import REGRESSION

__all__ = ["RegressionCollapseMonitor"]

# Arguments that do not say which values are logged.
_OTHER_ARGUMENTS = frozenset({"every_n_iterations", "every_n_epochs", "batch_fn", "forward_fn"})


class RegressionCollapseMonitor(EitherMonitor[RegressionAtIterates, RegressionAtEpochs]):
    """Logs neural regression collapse (NRC) of the training set.

    On a full-batch run, such as of ``UFM(problem=regression(...))``, it reads features, head and the targets of the
    objective at iterates, with ``log10`` versions of the first three; hard labels are one-hot targets. On any other
    module it makes an evaluation pass over the training set at ends of epochs, as :class:`NeuralCollapseMonitor` does
    and leaving as little behind. What that takes for labels are real targets here: ``(B, K)`` for a head with K
    outputs, or ``(B,)`` for one.

    | tag | value (formulas: :class:`nclightning.metrics.RegressionCollapse`) |
    |---|---|
    | ``nrc/train/nrc1`` | share of the features' variance outside of their leading principal components |
    | ``nrc/train/nrc2`` | share of the features' variance outside of the row space of the head |
    | ``nrc/train/nrc3`` | squared distance of the head's Gram matrix from the form that the targets prescribe |
    | ``nrc/train/gamma`` | the gamma of that form; N lambda_w lambda_h at the optimum of the UFM |
    | ``nrc/train/rank`` | directions along which targets spread |

    Args:
        every_n_iterations: Cadence on full-batch modules.
        every_n_epochs: Cadence on other modules.
        head: Their head: a dotted name, the module, or a function ``(model) -> (weight, bias)``; None finds it.
        batch_fn: Splits their batches into input and targets; None takes pairs and mappings. Let it give targets in the
            scale in which the head predicts them.
        forward_fn: Runs them on the inputs of a batch, ``(module, inputs) -> output``; None calls them.

    Raises:
        ValueError: If a cadence is below 1; at the start of a fit, if there are several training loaders; with the
            first batch, if the head cannot be found or there is not one row of targets for each row of features.

    Example:
        >>> import lightning as L
        >>> from nclightning.callbacks import RegressionCollapseMonitor
        >>> from nclightning.data import IndexDataModule
        >>> from nclightning.models import UFM
        >>> from nclightning.problems import regression
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        ...          "enable_model_summary": False}
        >>> trainer = L.Trainer(max_steps=200, accelerator="cpu", callbacks=[RegressionCollapseMonitor()], **quiet)
        >>> problem = regression([[0.0], [1.0], [3.0]], feature_dim=2, lambda_w=0.01, lambda_h=0.01)
        >>> trainer.fit(UFM(problem=problem), IndexDataModule())
        >>> [tag for tag in trainer.callback_metrics if tag.startswith("nrc/")]
        ['nrc/train/nrc1', 'nrc/train/nrc2', 'nrc/train/nrc3', 'nrc/train/gamma', 'nrc/train/rank']
    """

    def __init__(
        self,
        every_n_iterations: int = 10,
        every_n_epochs: int = 1,
        head: HeadArgument = None,
        batch_fn: BatchFn | None = None,
        forward_fn: ForwardFn | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__()
        self._settings = changed_settings(RegressionCollapseMonitor.__init__, given, _OTHER_ARGUMENTS)
        check_cadences(every_n_iterations=every_n_iterations, every_n_epochs=every_n_epochs)
        self._cadences = every_n_iterations, every_n_epochs
        self._reader = TargetReader(head, batch_fn, forward_fn)

    def make_at_iterates(self) -> RegressionAtIterates:
        """Make the callback for full-batch modules."""
        return RegressionAtIterates(self._cadences[0])

    def make_at_epochs(self) -> RegressionAtEpochs:
        """Make the callback for other modules."""
        return RegressionAtEpochs(self._cadences[1], self._reader)

    def tags(self, pl_module: L.LightningModule) -> set[str]:
        """Return tags that are logged."""
        return {each.tag("train") for each in REGRESSION}

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Find head and targets of a full-batch module."""
        self.at_iterates().prepare(pl_module, batch)

    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Measure a full-batch module at its parameters."""
        return self.at_iterates().read(pl_module, batch)
