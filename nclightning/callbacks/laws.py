"""Laws that the steps of an optimizer obey, checked along any run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import lightning as L
from torch import Tensor

from nclightning.arguments import check_cadences, check_scales
from nclightning.callbacks.either import EitherMonitor
from nclightning.callbacks.full_batch import full_batch, warn_of_steps
from nclightning.callbacks.laws_at_iterates import LawsAtIterates
from nclightning.callbacks.laws_at_steps import LawsAtSteps
from nclightning.callbacks.monitor import Batch
from nclightning.callbacks.publishing import changed_settings
from nclightning.callbacks.row_sums import StepFn
from nclightning.callbacks.sharpness import LossFn, TrainingLoss
from nclightning.errors import UserError, UserTypeError
from nclightning.probe.detection import HeadArgument
from nclightning.probe.reader import PairReader
from nclightning.quantities import HEAD_SUM

__all__ = ["OptimizerLaws"]

_EVERY_N_STEPS = 50  # Unless the user says another number.
# Arguments that do not say which values are logged.
_OTHER_ARGUMENTS = frozenset(
    {"every_n_iterations", "every_n_steps", "batch_fn", "forward_fn", "data", "loss_fn", "step_fn"}
)


class OptimizerLaws(EitherMonitor[LawsAtIterates, LawsAtSteps]):
    r"""Logs how far a run deviates from laws that gradient descent obeys exactly, and its sharpness.

    | tag | value |
    |---|---|
    | ``laws/nc0_norm`` | :math:`\|W^\top 1\|`, the norm of the sum of the head's rows (NC0) |
    | ``laws/nc0_predicted`` | what the steps taken since the start make of that, if the law holds |
    | ``laws/nc0_residual`` | distance from the law since the last reading, relative to :math:`\sqrt K \|W\|_F` |
    | ``laws/nc0_forcing`` | of Adam and AdamW, which have no such law: the norm of what their steps add to the sum |
    | ``laws/bias_sum``, ``..._predicted``, ``..._residual``, ``..._forcing`` | the same of the sum of the bias |
    | ``laws/balance`` | of free features: :math:`\lambda_W W^\top W` against :math:`\lambda_H H^\top H`, relative |
    | ``laws/balance_residual`` | the law by which the last step of gradient descent changed that, relative |
    | ``laws/sharpness`` | largest eigenvalue of the Hessian of the training objective |
    | ``laws/sharpness_over_limit`` | that over the largest that is stable: 2/lr for gradient descent |

    The law of NC0 is that of :func:`nclightning.functional.predict_row_sum`: with ``torch.optim.SGD`` in all its
    forms, or a line search, on a loss whose gradient in the logits sums to zero over the classes, such as
    cross-entropy, the sum of the rows follows a recursion of its own, whatever the data, the batches and the network
    are. Hyperparameters are read from the optimizer at each step, so that schedules are followed. Steps that a gradient
    scaler leaves out change nothing; clipping by norm and accumulated batches leave the law as it is. Where it is
    known not to hold, that is said once with the reason, and only ``laws/nc0_norm`` is logged. Where the residual is
    far above the rounding of the weights (and of the gradients, under mixed precision) the loss is of another kind, or
    something else writes to the weights.

    Following the law takes no operation on the device between readings. Values stay there and come to the host in one
    transfer for each reading.

    Args:
        every_n_iterations: Cadence on full-batch modules.
        every_n_steps: Cadence on other modules, in optimizer steps. The first and the last state are read, too.
        head: The head of other modules: a dotted name, the module, or a function ``(model) -> (weight, bias)``; None
            finds it.
        penalty: Of other modules, whose loss has a term ``penalty / 2 * head.weight.square().sum()``. Weight decay of
            the optimizer does not count.
        bias_penalty: The same of the bias.
        sharpness_every_n_steps: Cadence of the sharpness in steps, or iterations of full-batch modules: it is read
            with the next reading. It takes tens of gradients. None reads none.
        data: Of other modules: batches on whose mean loss the sharpness is read, such as a loader. All of them enter
            one graph.
        loss_fn: Of other modules: ``(module, batch) -> loss``, the mean over the samples of a batch.
        step_fn: ``(optimizer, group) -> GradientStep`` of an optimizer of your own whose steps are linear in the
            gradient, called after each step. Momentum must be in the optimizer's state ``momentum_buffer``, as that
            of ``SGD`` is. None knows ``SGD``, ``Adam``, ``AdamW`` and ``ArmijoGD``.
        batch_fn: Splits batches into input and labels, to find the head; None takes pairs and mappings.
        forward_fn: Runs other modules on the inputs of a batch, ``(module, inputs) -> output``; None calls them.

    Raises:
        ValueError: If an argument is out of range; at the start of a fit, if weights are sharded, or there is nothing
            to read the sharpness of; with the first batch, if the head cannot be found; at a reading, if the loss has
            no second derivative.

    Example:
        >>> from nclightning.callbacks import OptimizerLaws
        >>> laws = OptimizerLaws(every_n_steps=10)  # Pass it as Trainer(callbacks=[laws]).
    """

    def __init__(
        self,
        every_n_iterations: int = 10,
        every_n_steps: int = _EVERY_N_STEPS,
        head: HeadArgument = None,
        penalty: float = 0.0,
        bias_penalty: float = 0.0,
        sharpness_every_n_steps: int | None = None,
        data: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        step_fn: StepFn | None = None,
        batch_fn: Callable[[Any], tuple[Any, Tensor]] | None = None,
        forward_fn: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__()
        self._settings = changed_settings(OptimizerLaws.__init__, given, _OTHER_ARGUMENTS)
        check_cadences(
            every_n_iterations=every_n_iterations,
            every_n_steps=every_n_steps,
            sharpness_every_n_steps=sharpness_every_n_steps,
        )
        check_scales(penalty=penalty, bias_penalty=bias_penalty)
        if step_fn is not None and not callable(step_fn):
            raise UserTypeError(
                "step_fn must be a function (optimizer, group) -> nclightning.functional.GradientStep, or None, got "
                f"{step_fn!r}."
            )
        if (data is None) != (loss_fn is None):
            missing = "loss_fn" if loss_fn is None else "data"
            raise UserError(
                f"data and loss_fn belong together, and {missing} is missing: the sharpness is of the loss."
            )
        if data is not None and (not isinstance(data, Iterable) or isinstance(data, Iterator)):
            raise UserTypeError(
                f"data must be batches that can be read in each fit, such as a loader, got {type(data).__name__}."
            )
        if data is not None and sharpness_every_n_steps is None:
            raise UserError(
                "data and loss_fn are for the sharpness alone, which is not read: set sharpness_every_n_steps, or "
                "leave them out."
            )
        loss = None if data is None or loss_fn is None else TrainingLoss(data, loss_fn)
        reader = PairReader(head, batch_fn=batch_fn, forward_fn=forward_fn)
        self._iterates = every_n_iterations, step_fn, sharpness_every_n_steps
        self._epochs = every_n_steps, reader, (penalty, bias_penalty), step_fn, loss, sharpness_every_n_steps
        # A full-batch module says these itself.
        of_others = ("head", "data", "loss_fn", "batch_fn", "forward_fn")
        self._of_others = [name for name in of_others if given[name] is not None]
        self._of_others += [name for name in ("penalty", "bias_penalty") if given[name]]

    def make_at_iterates(self) -> LawsAtIterates:
        """Make the callback for full-batch modules."""
        return LawsAtIterates(*self._iterates)

    def make_at_epochs(self) -> LawsAtSteps:
        """Make the callback for other modules."""
        return LawsAtSteps(*self._epochs)

    def tags(self, pl_module: L.LightningModule) -> set[str]:
        """Return tags that each of these monitors logs."""
        return {HEAD_SUM[0].tag()}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse arguments that mean nothing for a full-batch module."""
        if full_batch(pl_module) and self._of_others:
            raise UserError(
                f"{' and '.join(self._of_others)} of OptimizerLaws mean nothing for {type(pl_module).__name__}, which "
                "says its head, objective and data itself: leave them out."
            )
        if full_batch(pl_module) and self._epochs[0] != _EVERY_N_STEPS:
            warn_of_steps(pl_module, self._epochs[0])
        super().on_fit_start(trainer, pl_module)

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """See which law the head of a full-batch module follows."""
        self.at_iterates().prepare(pl_module, batch)

    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Read the laws of a full-batch module at its parameters."""
        return self.at_iterates().read(pl_module, batch)
