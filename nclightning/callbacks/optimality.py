"""How far a run, or any network, is from the optimum of the unconstrained feature model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from nclightning.callbacks.attach import Attachment
from nclightning.callbacks.full_batch import full_batch, full_batch_head, full_batch_method
from nclightning.callbacks.modules import only_loader
from nclightning.callbacks.monitor import Batch, Readings, ReadingsMonitor
from nclightning.callbacks.problem import (
    check_balance,
    check_data_set,
    check_features,
    check_optimizer,
    check_value,
    gap_and_distance,
)
from nclightning.callbacks.publishing import Publisher, changed_settings
from nclightning.callbacks.search import search_readings, step_taken
from nclightning.callbacks.stopping import StopRule, goes_on
from nclightning.callbacks.swept_optimality import sweep_optimality
from nclightning.compat.lightning import batches_read, trainer_of
from nclightning.errors import UserError
from nclightning.metrics.optimality import check_linear
from nclightning.probe.detection import HeadArgument
from nclightning.probe.likeness import Like
from nclightning.probe.sweep import has_lazy_parts, limited_batches
from nclightning.ranks import count_over_ranks
from nclightning.theory import UFMProblem

__all__ = ["OptimalityMonitor"]

# Arguments that do not say which values are logged.
_OTHER_ARGUMENTS = frozenset(
    {"every_n_iterations", "every_n_epochs", "stop_distance", "stop_at_floor", "batch_fn", "forward_fn"}
)


class OptimalityMonitor(ReadingsMonitor):
    r"""Logs objective, optimality gap, distance to the optimal set, gradient norm and the cost of the line search.

    | tag | value at the iterate |
    |---|---|
    | ``loss`` | F, the training objective |
    | ``optimality/gap`` | F - F*, without cancellation; for a network F* of the UFM, a lower bound |
    | ``optimality/distance`` | Euclidean distance of head and features to the optimal set |
    | ``optimality/grad_norm`` | norm of the gradient of F over all trainable parameters |
    | ``optimality/error_bound_ratio`` | distance / grad_norm, the paper's kappa when it is largest; nan at 0/0 |
    | ``optimality/predicted_decay`` | what the gap's slowest mode has become: :math:`\prod_k (1 - t_k \mu)^2` |
    | ``line_search/step_size`` | step that led to the iterate; nan at iterate 0 |
    | ``line_search/evaluations`` | evaluations of F and its gradient since the run began |

    Gap and distance are computed in float64 whatever the precision of the run. The line-search tags appear for
    optimizers that report an ``outcome``.

    The predicted decay is for runs of the unconstrained feature model, with :math:`\mu` the least nonzero eigenvalue of
    the Hessian at the optimal set and :math:`t_k` the steps taken: those of a line search or the constant one of plain
    ``torch.optim.SGD``. It starts at 1, so that its slope is what compares with the gap near the optimum, where the
    slowest mode is what is left. There is no free parameter.

    On any other module, with ``loss`` given, it sweeps the training set twice at ends of epochs, without a trace, and
    logs of the features before the head ``optimality/gap``, ``optimality/distance`` and
    ``optimality/relative_distance``, that divided by the norm of the optimum. Without penalties given, those are
    taken at which the scales of the nearest collapsed configuration
    (:func:`nclightning.functional.distance_to_collapse`) are the optimal ones, and logged as ``optimality/lambda_w``
    and ``optimality/lambda_h``. All are ``nan`` at scales that no penalties make optimal: zero, as far from collapse,
    and for MSE logits that are too large.

    The samples are those that :class:`NeuralCollapseMonitor` reads, at the number of optimizer steps done.

    Args:
        every_n_iterations: Cadence on full-batch modules.
        theory: False leaves out gap, distance and ratio. Needed where no closed form exists: a zero penalty, or
            cross-entropy with ``feature_dim < num_classes - 1``.
        stop_distance: End the fit at the first reading whose distance is at most this; None never does.
        stop_at_floor: End the fit when the distance has come to the floor that round-off sets: when it is below a
            thousandth of the optimum's norm and has had no new minimum for the second half of the run, at least 20
            readings. With either option each reading brings one number to the host.
        loss: For other modules: ``"mse"`` or ``"ce"``.
        lambda_w: For other modules: penalty on the head in Problem (2). None with ``lambda_h`` fits both.
        lambda_h: For other modules: penalty on the features, on the sum over all samples.
        every_n_epochs: Cadence on other modules.
        head: Their head: a dotted name, the module, or a function ``(model) -> (weight, bias)``; None finds it.
        batch_fn: Splits their batches into input and labels; None takes pairs and mappings.
        forward_fn: Runs them on the inputs of a batch, ``(module, inputs) -> output``; None calls them.

    Raises:
        ValueError: If an argument is out of range, or at the start of a fit if the theory does not cover what the
            module trains; at the latest with its first batch, before anything is logged.
    """

    log10_tags = frozenset(
        {"optimality/gap", "optimality/distance", "optimality/grad_norm", "optimality/predicted_decay"}
    )

    def __init__(
        self,
        every_n_iterations: int = 10,
        theory: bool = True,
        stop_distance: float | None = None,
        stop_at_floor: bool = False,
        loss: Literal["mse", "ce"] | None = None,
        lambda_w: float | None = None,
        lambda_h: float | None = None,
        every_n_epochs: int = 1,
        head: HeadArgument = None,
        batch_fn: Callable[[Any], tuple[Any, Tensor]] | None = None,
        forward_fn: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        given = dict(locals())
        super().__init__(every_n_iterations)
        self._settings = changed_settings(OptimalityMonitor.__init__, given, _OTHER_ARGUMENTS)
        if stop_distance is not None and not (theory and 0 < stop_distance < math.inf):
            raise UserError(f"stop_distance must be None or positive, and needs theory=True, got {stop_distance!r}.")
        if stop_at_floor and not theory:
            raise UserError("stop_at_floor=True needs theory=True: without it no distance is read.")
        for name, value in (("lambda_w", lambda_w), ("lambda_h", lambda_h)):
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be None or positive and finite, got {value!r}: the optimum needs both.")
        if loss not in (None, "mse", "ce") or (lambda_w is None) != (lambda_h is None) or every_n_epochs < 1:
            raise UserError(
                "loss must be 'mse' or 'ce', lambda_w and lambda_h come both or not at all, and every_n_epochs must be "
                f"at least 1, got {loss!r}, {lambda_w}, {lambda_h} and {every_n_epochs}."
            )
        self.loss = loss
        self.penalties = None if lambda_w is None or lambda_h is None else (lambda_w, lambda_h)
        self.every_n_epochs = every_n_epochs
        like: Like = "equal" if loss == "mse" else "shift"
        self._attachment = Attachment(head, batch_fn=batch_fn, forward_fn=forward_fn, like=like)
        self.theory = theory
        self.stop_distance = stop_distance
        self.stop_at_floor = stop_at_floor
        self._rule = StopRule(stop_distance, stop_at_floor, every_n_iterations)
        self._problem: UFMProblem | None = None
        self._mu: float | None = None
        self._decay = 1.0
        self._followed = 0  # The last iterate whose step is in the decay.
        self._is_checked = False  # Whether what is trained has been compared with the problem.
        self._most_read = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a full-batch fit whose optimum is not known, before anything is written."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and full_batch(pl_module):
            self.find_problem(pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell full-batch modules from others, and refuse what can be read in neither way."""
        self._attachment.forget()
        self._is_checked, self._most_read = False, 0
        if self.theory and full_batch(pl_module):
            check_optimizer(pl_module)
        if full_batch(pl_module) or self.loss is None:
            super().on_fit_start(trainer, pl_module)
        else:
            Publisher.on_fit_start(self, trainer, pl_module)
        self._attachment.check(trainer)

    def tags(self, pl_module: L.LightningModule) -> set[str]:
        """Return tags that each of these monitors logs."""
        return {"loss", "optimality/grad_norm"} if full_batch(pl_module) else {"optimality/gap", "optimality/distance"}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse loaders that cannot be swept."""
        if not full_batch(pl_module):
            self._attachment.check_loader(trainer, pl_module, *self._training_set(trainer))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Read the first iterate of a full-batch run; of other modules, check what their first batch shows."""
        if full_batch(pl_module):
            begins = self._batch is None
            if trainer.global_step == 0:
                self._decay, self._followed = 1.0, 0
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if begins and trainer.global_step > 0:
                self._go_on(trainer)
        elif not self._is_checked and not has_lazy_parts(pl_module):  # Else with the second batch.
            self._check_first_batch(trainer, pl_module, batch)
            self._is_checked = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Read iterates of full-batch modules; of others, say where the first step is not the forward."""
        if full_batch(pl_module):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._attachment.end_first_step(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._attachment.unwatch()
        super().on_exception(trainer, pl_module, exception)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sweep the training set of a module that is not full-batch."""
        if not full_batch(pl_module) and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            assert self.loss is not None
            training_set = self._training_set(trainer)
            values = sweep_optimality(trainer, pl_module, self._attachment, training_set, self.loss, self.penalties)
            self._publish(pl_module, values)

    def _check_first_batch(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Refuse a batch, a head, penalties or labels that have no known optimum."""
        loader, limit = self._training_set(trainer)
        self._attachment.check_first(trainer, pl_module, batch)
        head = self._attachment.head_of(pl_module)
        assert self.loss is not None
        check_linear(self.loss, head)
        if self.penalties is not None:
            UFMProblem(self.loss, head.out_features, 1, head.in_features, *self.penalties)
        if self._attachment.splits_plainly:
            check_data_set(loader, head.out_features, limit)

    def _training_set(self, trainer: L.Trainer) -> tuple[Any, int | None]:
        """Return the training loader, and the number of batches to which training is held."""
        loader = only_loader(trainer)
        self._most_read = max(self._most_read, batches_read(trainer))
        return loader, limited_batches(loader, trainer.limit_train_batches, self._most_read)

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Find the problem and check that the labels are balanced."""
        self._problem = self.find_problem(pl_module)
        self._is_checked = False
        if self._problem is not None:
            check_balance(self._problem, batch[1])
            check_features(pl_module, batch[0])
        self._mu = self._problem.mu if self._problem is not None and self.predicts(pl_module) else None
        if trainer_of(pl_module) is not None and self._followed == pl_module.trainer.global_step - 1:
            self._follow(pl_module)  # An error in a callback had ended the run within this iteration.

    def predicts(self, pl_module: L.LightningModule) -> bool:
        """Say whether the decay of a run can be predicted.

        Args:
            pl_module: A full-batch module in a fit.

        Returns:
            Whether its parameters are those of the unconstrained feature model and its steps are known.
        """
        problem = self.find_problem(pl_module)
        if problem is None or step_taken(pl_module) is None or not getattr(pl_module, "features_are_free", False):
            return False
        free = full_batch_method(pl_module, "count_free_parameters")()
        return bool(free == sum(entry.multiplicity for entry in problem.spectrum()))

    def find_problem(self, pl_module: L.LightningModule) -> UFMProblem | None:
        """Take the module's UFM, or None with ``theory=False``.

        Args:
            pl_module: A module with an attribute ``problem``.

        Returns:
            Its closed forms.

        Raises:
            ValueError: If there are none.
        """
        if not self.theory:
            return None
        try:
            problem = getattr(pl_module, "problem", None)
            if not isinstance(problem, UFMProblem):
                raise UserError(f"{type(pl_module).__name__} has no attribute 'problem'.")
        except UserError as error:
            raise UserError(
                f"OptimalityMonitor knows no optimum for this run: {error} To train without gap and distance, set "
                "OptimalityMonitor(theory=False), on the command line --optimality.theory false "
                "--optimality.stop_distance null --optimality.stop_at_floor false."
            ) from error
        return problem

    @torch.no_grad()
    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Measure at the current parameters."""
        value, grad_norm = full_batch_method(pl_module, "value_and_grad_norm")(batch)
        readings: dict[str, Tensor | float] = {"loss": value}
        if self._problem is not None:
            features = full_batch_method(pl_module, "features_of")(batch[0])
            head = full_batch_head(pl_module).read()
            gap, distance = gap_and_distance(self._problem, head, features, batch[1])
            if not self._is_checked:
                check_value(self._problem, value, gap, head.weight.dtype)
                self._is_checked = True
            readings |= {"optimality/gap": gap, "optimality/distance": distance}
        readings["optimality/grad_norm"] = grad_norm
        if self._problem is not None:
            readings["optimality/error_bound_ratio"] = distance / grad_norm
        if self._mu is not None:
            readings["optimality/predicted_decay"] = self._decay
        return readings | search_readings(pl_module)

    def on_iteration_end(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, iteration: int) -> None:
        """Read at the cadence, and stop once close enough."""
        self._follow(pl_module)
        super().on_iteration_end(trainer, pl_module, batch, iteration)
        if self._last_iteration == iteration and self._rule.is_on:
            self._stop(trainer, self._decide(trainer))

    def _follow(self, pl_module: L.LightningModule) -> None:
        self._followed += 1
        if self._mu is not None:
            step = step_taken(pl_module)
            assert step is not None
            self._decay *= (1 - step * self._mu) ** 2

    def _decide(self, trainer: L.Trainer) -> str | None:
        """Say why the run is to stop at the last reading, if it is."""
        assert self._problem is not None
        distance = float(Readings.of(trainer).value(self._last_iteration, "optimality/distance"))
        return self._rule.follow(self._last_iteration, distance, self._problem.optimum_norm)

    @staticmethod
    def _stop(trainer: L.Trainer, sentence: str | None) -> None:
        if sentence is not None:
            trainer.should_stop = True
            trainer.print(f"{sentence} Stopping.")

    def _go_on(self, trainer: L.Trainer) -> None:
        """Stop a resumed run again that had been stopped, unless the settings that did it have changed."""
        iteration, sentence = trainer.global_step, None
        had_stopped = self._rule.stopped_at == iteration
        if self._problem is not None and self._rule.is_on:
            if self._last_iteration == iteration:
                sentence = self._decide(trainer)
            elif had_stopped:  # By another cadence.
                sentence = self._rule.stands(self._problem.optimum_norm)
        self._stop(trainer, sentence)
        if had_stopped and sentence is None:
            trainer.print(goes_on(iteration))

    def ending_of(self, checkpoint: Mapping[str, Any], pl_module: L.LightningModule) -> str | None:
        """Say why the run of a checkpoint is stopped, also by the present settings.

        Args:
            checkpoint: Lightning's.
            pl_module: The module.

        Returns:
            A sentence; None if the run goes on.
        """
        state, problem = checkpoint["callbacks"].get(self.state_key), self.find_problem(pl_module)
        if state is None or problem is None:
            return None
        rule = StopRule(self.stop_distance, self.stop_at_floor, self.every_n_iterations, state)
        return rule.stands(problem.optimum_norm) if rule.stopped_at == checkpoint["global_step"] else None

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say that a run goes on which was stopped by a monitor with other options, such as one with the theory."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        iteration, states = checkpoint["global_step"], checkpoint.get("callbacks", {})
        others = [key for key in states if key.startswith(type(self).__qualname__) and key != self.state_key]
        if trainer.training and any(states[key].get("stopped_at") == iteration for key in others):
            trainer.print(goes_on(iteration))

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from: last values, distances so far, whether they stop it, the decay."""
        return super().state() | self._rule.state_dict() | {"decay": self._decay, "followed": self._followed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state_dict)
        self._rule.load_state_dict(state_dict)
        self._decay = state_dict.get("decay", math.nan)  # Checkpoints of before it was logged have none.
        self._followed = state_dict.get("followed", 0)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Log the readings of a full-batch validation."""
        self._log_pass(pl_module, batch)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Log the readings of a full-batch test."""
        self._log_pass(pl_module, batch)

    def _log_pass(self, pl_module: L.LightningModule, batch: Batch) -> None:
        if not full_batch(pl_module):
            return
        if count_over_ranks(len(batch[1]), batch[1].device) != getattr(pl_module, "num_samples", None):
            return  # A part of the data has no optimality gap.
        self._problem, self._mu, self._is_checked = self.find_problem(pl_module), None, False
        if self._problem is not None:
            check_balance(self._problem, batch[1])
        with torch.inference_mode(False):
            readings = self.read(pl_module, (batch[0].clone(), batch[1].clone()))
        # As tensors: of plain numbers Lightning makes float32.
        own = {tag: torch.as_tensor(v, dtype=torch.float64) for tag, v in readings.items() if tag[:11] == "optimality/"}
        # The same on all processes; weights by their numbers of samples would come to one only up to rounding down.
        pl_module.log_dict(own, sync_dist=True, batch_size=1)
