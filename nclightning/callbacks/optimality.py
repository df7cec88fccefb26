"""How far a run, or any network, is from the optimum of the unconstrained feature model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor

from nclightning.arguments import check_cadences
from nclightning.callbacks.decay import predicts
from nclightning.callbacks.either import EitherMonitor
from nclightning.callbacks.full_batch import full_batch
from nclightning.callbacks.monitor import Batch
from nclightning.callbacks.optimality_at_epochs import OptimalityAtEpochs
from nclightning.callbacks.optimality_at_iterates import OptimalityAtIterates
from nclightning.callbacks.problem import AnyProblem
from nclightning.callbacks.publishing import changed_settings
from nclightning.callbacks.stopping import goes_on
from nclightning.errors import UserError
from nclightning.metrics.reference import LossLike, Reference, is_loss
from nclightning.probe.agreement import Agreement
from nclightning.probe.detection import HeadArgument
from nclightning.probe.reader import PairReader
from nclightning.quantities import DISTANCE, GAP, GRAD_NORM, LOSS

__all__ = ["OptimalityMonitor"]

# Arguments that do not say which values are logged.
_OTHER_ARGUMENTS = frozenset(
    {"every_n_iterations", "every_n_epochs", "stop_distance", "stop_at_floor", "batch_fn", "forward_fn", "exact"}
)


class OptimalityMonitor(EitherMonitor[OptimalityAtIterates, OptimalityAtEpochs]):
    r"""Logs objective, optimality gap, distance to the optimal set, gradient norm and the cost of the line search.

    | tag | value at the iterate |
    |---|---|
    | ``loss`` | F, the training objective |
    | ``optimality/gap`` | F - F*, without cancellation; for a network F* of the UFM, a lower bound |
    | ``optimality/distance`` | Euclidean distance of head and features to the optimal set |
    | ``optimality/certified_gap`` | where these two are not known: F minus the bound that the residuals certify |
    | ``optimality/grad_norm`` | norm of the gradient of F over all trainable parameters |
    | ``optimality/error_bound_ratio`` | distance / grad_norm, the paper's kappa when it is largest; nan at 0/0 |
    | ``optimality/predicted_decay`` | what the gap's slowest mode has become: :math:`\prod_k (1 - t_k \mu)^2` |
    | ``line_search/step_size`` | step that led to the iterate; nan at iterate 0 |
    | ``line_search/evaluations`` | evaluations of F and its gradient since the run began |

    The problem is that of the module: any loss, targets, counts and bias. If its optimum has no formula, a solver finds
    it once, before training. If the optimum is not known, as with fewer features than the optimal logits
    need, a message says so once, and ``optimality/certified_gap`` is logged instead of gap and distance: a number that
    is at least F - F*, and exact up to the rounding of F, about 1e-16 of it. It is left out if gap and distance are
    known, because it would make a measurement about 1.5 times as expensive.

    All these are computed in float64 whatever the precision of the run. The line-search tags appear for optimizers that
    report an ``outcome``.

    The predicted decay is for runs of the unconstrained feature model, with :math:`\mu` the least nonzero eigenvalue of
    the Hessian at the optimal set and :math:`t_k` the steps taken: those of a line search along the gradient, or those
    that the options of ``torch.optim.SGD`` set. With its momentum, of either kind, it is the square of what the slowest
    mode becomes under the steps and momenta so far (:class:`nclightning.problems.Rates`). For other optimizers, such as
    Adam, there is none. It starts at 1, so that its slope is what compares with the gap near the optimum, where the
    slowest mode is what is left. There is no free parameter. Where the spectrum is too large, that is said once.

    On any other module, with ``loss`` given, it makes one pass over the training set at ends of epochs, without a
    trace and together with monitors next to it. It logs of the features before the head, against the unconstrained
    feature model with the counts of the classes in the training set:

    | tag | value at the end of the epoch |
    |---|---|
    | ``optimality/gap``, ``optimality/distance`` | as above; ``nan`` where the optimum is not known, and said once |
    | ``optimality/relative_distance`` | distance over the norm of the optimum |
    | ``optimality/certified_bound`` | a number that F* is not below, from the residuals alone |
    | ``optimality/certified_gap`` | F minus that, at least F - F*, for any loss, counts and number of features |
    | ``optimality/lambda_w``, ``optimality/lambda_h`` | the penalties, if none are given |

    Without penalties given, those are taken that make the scales of head and features optimal: for balanced classes the
    scales of the nearest collapsed configuration, else those at which no change of scale lowers F. All values are
    ``nan`` at scales that no penalties make optimal: zero, as far from collapse, and for MSE logits that are too large.

    The samples are those that :class:`NeuralCollapseMonitor` reads, at the number of optimizer steps done, and each of
    them has a class: no label can be ignored.

    Args:
        every_n_iterations: Cadence on full-batch modules.
        theory: False leaves out gap, distance, certified gap and ratio. Needed where what is trained is no known
            problem, as with a penalty of zero, and where finding the optimum would take too long, as with thousands of
            classes of different size.
        stop_distance: End the fit at the first reading whose distance is at most this; None never does.
        stop_at_floor: End the fit when the distance has come to the floor that round-off sets: when it is below a
            thousandth of the optimum's norm and has had no new minimum for the second half of the run, at least 20
            readings. With either option each reading brings one number to the host.
        loss: For other modules: ``"mse"``, ``"ce"``, ``"bce"`` or a :class:`nclightning.problems.Loss`.
        lambda_w: For other modules: penalty on the head in Problem (2). None with ``lambda_h`` fits both.
        lambda_h: For other modules: penalty on the features, on the sum over all samples.
        every_n_epochs: Cadence on other modules.
        head: Their head: a dotted name, the module, or a function ``(model) -> (weight, bias)``; None finds it.
        batch_fn: Splits their batches into input and labels; None takes pairs and mappings.
        forward_fn: Runs them on the inputs of a batch, ``(module, inputs) -> output``; None calls them.
        lambda_b: For other modules: penalty on the bias of the head; 0.0 takes a bias as free.
        targets: For other modules: ``(K, K)``, whose row k is the target of label k, such as smoothed labels; None
            takes hard labels.
        exact: For other modules: as for :class:`nclightning.metrics.Optimality`; False leaves gap and distance out.

    Raises:
        ValueError: If an argument is out of range; at the start of a fit if the theory does not cover what the module
            trains; of other modules with the first batch if head, targets or labels do not fit, and at the end of an
            epoch if a label of a later batch is not a class.

    Example:
        >>> import lightning as L
        >>> from nclightning.callbacks import OptimalityMonitor
        >>> from nclightning.data import IndexDataModule
        >>> from nclightning.models import UFM
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        ...          "enable_model_summary": False}
        >>> trainer = L.Trainer(max_steps=200, accelerator="cpu", callbacks=[OptimalityMonitor()], **quiet)
        >>> model = UFM(num_classes=3, samples_per_class=5, feature_dim=4, loss="mse", lambda_=0.01)
        >>> trainer.fit(model, IndexDataModule())
        >>> bool(trainer.callback_metrics["optimality/gap"] < 1e-6)
        True
    """

    def __init__(
        self,
        every_n_iterations: int = 10,
        theory: bool = True,
        stop_distance: float | None = None,
        stop_at_floor: bool = False,
        loss: LossLike | None = None,
        lambda_w: float | None = None,
        lambda_h: float | None = None,
        every_n_epochs: int = 1,
        head: HeadArgument = None,
        batch_fn: Callable[[Any], tuple[Any, Tensor]] | None = None,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        lambda_b: float = 0.0,
        targets: Sequence[Sequence[float]] | None = None,
        exact: bool | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__()
        self._settings = changed_settings(OptimalityMonitor.__init__, given, _OTHER_ARGUMENTS)
        check_cadences(every_n_iterations=every_n_iterations, every_n_epochs=every_n_epochs)
        if stop_distance is not None and not (theory and 0 < stop_distance < math.inf):
            raise UserError(f"stop_distance must be None or positive, and needs theory=True, got {stop_distance!r}.")
        if stop_at_floor and not theory:
            raise UserError("stop_at_floor=True needs theory=True: without it no distance is read.")
        if loss is not None and not is_loss(loss):
            raise UserError(
                "loss must be 'mse', 'ce', 'bce' or a Loss such as CrossEntropy(), or None for our own modules, got "
                f"{loss!r}."
            )
        # Penalties are checked without a loss, too.
        reference = Reference("ce" if loss is None else loss, lambda_w, lambda_h, lambda_b, targets, exact)
        self._theory, self._reference = theory, None if loss is None else reference
        self._at_iterates = every_n_iterations, theory, stop_distance, stop_at_floor
        self._every_n_epochs = every_n_epochs
        # Logits up to a shift of each row are enough where the loss does not see one.
        agreement: Agreement = "shift" if reference.loss.shift_invariant else "equal"
        self._reader = PairReader(head, batch_fn=batch_fn, forward_fn=forward_fn, agreement=agreement)

    def make_at_iterates(self) -> OptimalityAtIterates:
        """Make the callback for full-batch modules."""
        return OptimalityAtIterates(*self._at_iterates)

    def make_at_epochs(self) -> OptimalityAtEpochs:
        """Make the callback for other modules."""
        return OptimalityAtEpochs(self._reference, self._every_n_epochs, self._reader)

    def tags(self, pl_module: L.LightningModule) -> set[str]:
        """Return tags that each of these monitors logs."""
        return {each.tag() for each in ((LOSS, GRAD_NORM) if full_batch(pl_module) else (GAP, DISTANCE))}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a full-batch fit whose optimum is not known, before anything is written."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and full_batch(pl_module):
            self.find_problem(pl_module)

    def find_problem(self, pl_module: L.LightningModule) -> AnyProblem | None:
        """Take the problem of a full-batch module and find its optimum.

        Args:
            pl_module: The module.

        Returns:
            The problem; None with ``theory=False``, and if its optimum is not known.

        Raises:
            ValueError: If the module has no problem, or if it has no distance although the options stop the run by it.
        """
        gaps = self.at_iterates().find(pl_module)
        return None if gaps is None or gaps.missing is not None else gaps.problem

    def predicts(self, pl_module: L.LightningModule) -> bool:
        """Say whether the decay of a full-batch run can be predicted."""
        return predicts(pl_module, self.find_problem(pl_module))

    def ending_of(self, checkpoint: Mapping[str, Any], pl_module: L.LightningModule) -> str | None:
        """Say why the full-batch run of a checkpoint is stopped, also by the present settings.

        Args:
            checkpoint: Lightning's.
            pl_module: The module.

        Returns:
            A sentence; None if the run goes on.
        """
        return self.at_iterates().ending_of(checkpoint, checkpoint["callbacks"].get(self.state_key), pl_module)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say that a run goes on which was stopped by a monitor with other options, such as one with the theory."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        iteration, states = checkpoint["global_step"], checkpoint.get("callbacks", {})
        others = [key for key in states if key.startswith(type(self).__qualname__) and key != self.state_key]
        if trainer.training and any(states[key].get("stopped_at") == iteration for key in others):
            trainer.print(goes_on(iteration))

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Find the problem of a full-batch module and check that the labels are balanced."""
        self.at_iterates().prepare(pl_module, batch)

    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Measure a full-batch module at its parameters."""
        return self.at_iterates().read(pl_module, batch)
