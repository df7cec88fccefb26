"""Gap and distance at iterates of full-batch modules, or how far they are above a bound."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from nclightning.callbacks.decay import PredictedDecay
from nclightning.callbacks.full_batch import as_full_batch, head_reader
from nclightning.callbacks.gaps import Gaps, said_if_slow
from nclightning.callbacks.monitor import Batch, MonitorAtIterates
from nclightning.callbacks.problem import check_features, check_optimizer, check_value, find_problem
from nclightning.callbacks.rows import Rows
from nclightning.callbacks.search import search_readings
from nclightning.callbacks.stopping import StopRule, goes_on
from nclightning.compat.lightning import trainer_of
from nclightning.errors import UserError
from nclightning.quantities import (
    CERTIFIED_GAP,
    DISTANCE,
    ERROR_BOUND_RATIO,
    GRAD_NORM,
    LOSS,
    OPTIMALITY,
    PREDICTED_DECAY,
    mirrored_tags,
    parse_tag,
)
from nclightning.ranks import count_over_ranks

__all__ = ["OptimalityAtIterates"]


class OptimalityAtIterates(MonitorAtIterates):
    """Measures the training set at iterates, stops the run, and follows the predicted decay.

    Args:
        every_n_iterations: Cadence.
        theory: Whether gap and distance are measured.
        stop_distance: As for :class:`nclightning.callbacks.stopping.StopRule`.
        stop_at_floor: The same.
    """

    log10_tags = mirrored_tags(OPTIMALITY)

    def __init__(self, every_n_iterations: int, theory: bool, stop_distance: float | None, stop_at_floor: bool) -> None:
        super().__init__(every_n_iterations)
        self._theory = theory
        self._rule = StopRule(stop_distance, stop_at_floor, every_n_iterations)
        self._gaps: Gaps | None = None
        self._is_reported = False  # Whether it has been reported that gap and distance are not known.
        self._decay = PredictedDecay()
        self._is_checked = False  # Whether the trained parameters have been compared with the problem.

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse an optimizer that leaves out parameters of the problem, or has a penalty of its own."""
        self._is_checked = False
        if self._theory:
            check_optimizer(pl_module)
        super().on_fit_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Read the first iterate."""
        begins = self._batch is None
        if trainer.global_step == 0:
            self._decay.restart()
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if begins and trainer.global_step > 0:
            self._stop_again(trainer)

    def find(self, pl_module: L.LightningModule) -> Gaps | None:
        """Find the problem of a module, and its optimum, which may take a while.

        Args:
            pl_module: A full-batch module.

        Returns:
            What reads gap and distance, or a bound; None without the theory.

        Raises:
            ValueError: If there is no problem, or no distance for the options that stop the run.
        """
        gaps = self._find(pl_module)
        if gaps is not None and gaps.missing is not None and self._rule.is_on:
            raise UserError(
                "stop_distance and stop_at_floor need the distance to the optimal set, which is not known: "
                f"{gaps.missing.reason} Set OptimalityMonitor(stop_distance=None, stop_at_floor=False), on the command "
                "line --optimality.stop_distance null --optimality.stop_at_floor false."
            )
        return gaps

    def _find(self, pl_module: L.LightningModule) -> Gaps | None:
        problem = find_problem(pl_module, self._theory)
        if problem is None:
            return None
        if self._gaps is not None and self._gaps.problem is problem:
            return self._gaps
        groups, classes = problem.num_groups, problem.num_classes
        with said_if_slow(
            f"Finding the optimum of {groups} groups of samples and {classes} classes, once, before training; "
            "OptimalityMonitor(theory=False), on the command line --optimality.theory false, does without."
        ):
            return Gaps(problem)

    def _begin(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Check that a batch is that of the problem, and say once if gap and distance are not known."""
        self._is_checked = False
        if self._gaps is None:
            return
        self._gaps.check(batch[1])
        check_features(pl_module, batch[0])
        if self._gaps.missing is not None and not self._is_reported:
            self._is_reported = True
            rank_zero_info(
                f"Gap and distance are not known: {self._gaps.missing.reason} {CERTIFIED_GAP.tag()} is logged "
                "instead, F minus a lower bound of its minimum that the iterate itself certifies."
            )

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Find the problem and check that the labels are those of it."""
        self._gaps = self.find(pl_module)
        self._begin(pl_module, batch)
        known = self._gaps is not None and self._gaps.missing is None
        self._decay.prepare(pl_module, self._gaps.problem if self._gaps is not None and known else None)
        if trainer_of(pl_module) is not None and self._decay.iteration == pl_module.trainer.global_step - 1:
            self._decay.follow(pl_module)  # An error in a callback had ended the run within this iteration.

    @torch.no_grad()
    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Measure at the current parameters."""
        value, grad_norm = as_full_batch(pl_module).value_and_grad_norm(batch)
        readings: dict[str, Tensor | float] = {LOSS.tag(): value}
        if self._gaps is not None:
            features = as_full_batch(pl_module).features_of(batch[0])
            head = head_reader(as_full_batch(pl_module)).read()
            known, own = self._gaps.read(head, features, batch[1])
            if not self._is_checked:
                check_value(value, known, head.weight.dtype)
                self._is_checked = True
            readings |= own
        readings[GRAD_NORM.tag()] = grad_norm
        if DISTANCE.tag() in readings:
            readings[ERROR_BOUND_RATIO.tag()] = readings[DISTANCE.tag()] / grad_norm
        if self._decay.rates is not None:
            readings[PREDICTED_DECAY.tag()] = self._decay.value
        return readings | search_readings(pl_module)

    def on_iteration_end(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, iteration: int) -> None:
        """Read at the cadence, and stop once close enough."""
        self._decay.follow(pl_module)
        super().on_iteration_end(trainer, pl_module, batch, iteration)
        if self._last_iteration == iteration and self._rule.is_on:
            self._stop(trainer, self._reason_to_stop(trainer))

    def _reason_to_stop(self, trainer: L.Trainer) -> str | None:
        """Say why the run is to stop at the last reading, if it is."""
        assert self._gaps is not None
        distance = float(Rows.of(trainer).value(self._last_iteration, DISTANCE.tag()))
        return self._rule.follow(self._last_iteration, distance, self._gaps.problem.optimum_norm)

    @staticmethod
    def _stop(trainer: L.Trainer, sentence: str | None) -> None:
        if sentence is not None:
            trainer.should_stop = True
            trainer.print(f"{sentence} Stopping.")

    def _stop_again(self, trainer: L.Trainer) -> None:
        """Stop a resumed run again that had been stopped, unless the settings that did it have changed."""
        iteration, sentence = trainer.global_step, None
        had_stopped = self._rule.stopped_at == iteration
        if self._gaps is not None and self._rule.is_on:
            if self._last_iteration == iteration:
                sentence = self._reason_to_stop(trainer)
            elif had_stopped:  # By another cadence.
                sentence = self._rule.stands(self._gaps.problem.optimum_norm)
        self._stop(trainer, sentence)
        if had_stopped and sentence is None:
            trainer.print(goes_on(iteration))

    def ending_of(
        self, checkpoint: Mapping[str, Any], state: dict[str, Any] | None, pl_module: L.LightningModule
    ) -> str | None:
        """Say why the run of a checkpoint is stopped, also by the present settings.

        Args:
            checkpoint: Lightning's.
            state: In it, of this callback.
            pl_module: The module.

        Returns:
            A sentence; None if the run goes on.
        """
        if state is None or not self._rule.is_on:
            return None
        gaps = self.find(pl_module)
        assert gaps is not None  # The options need the theory.
        rule = StopRule(self._rule.stop_distance, self._rule.stop_at_floor, self.every_n_iterations, state)
        return rule.stands(gaps.problem.optimum_norm) if rule.stopped_at == checkpoint["global_step"] else None

    def state(self) -> dict[str, Any]:
        """Return what a resumed run goes on from: last values, distances so far, whether they stop it, the decay."""
        return super().state() | self._rule.state_dict() | self._decay.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
        super().load_state_dict(state_dict)
        self._rule.load_state_dict(state_dict)
        self._decay.load_state_dict(state_dict)

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
        if count_over_ranks(len(batch[1]), batch[1].device) != as_full_batch(pl_module).num_samples:
            return  # A part of the data has no optimality gap.
        self._gaps, self._decay.rates = self._find(pl_module), None
        self._begin(pl_module, batch)
        with torch.inference_mode(False):
            readings = self.read(pl_module, (batch[0].clone(), batch[1].clone()))
        # As tensors: of plain numbers Lightning makes float32.
        values = {tag: torch.as_tensor(v, dtype=torch.float64) for tag, v in readings.items() if tag != LOSS.tag()}
        own = {tag: value for tag, value in values.items() if parse_tag(tag).group == OPTIMALITY}
        # The same on all processes; weights by their numbers of samples would come to one only up to rounding down.
        pl_module.log_dict(own, sync_dist=True, batch_size=1)
