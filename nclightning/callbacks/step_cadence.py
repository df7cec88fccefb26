"""When a monitor measures between optimizer steps, and what it measured last."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L

from nclightning.probe.sets import Measured
from nclightning.probe.sweep import fingerprint
from nclightning.ranks import count_over_ranks

__all__ = ["StepCadence"]


class StepCadence:
    """Says when a multiple of a number of optimizer steps was reached, and keeps what was measured there.

    If an epoch ends at that step, the same weights are not measured again.

    Args:
        every_n_steps: The number; None never measures between steps.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        self._every_n_steps, self._step = every_n_steps, 0
        # The last measurement between steps: the step, the weights, and what was measured.
        self._last: tuple[int, tuple[int, ...], Measured] | None = None

    def restart(self, step: int) -> None:
        """Begin a fit at a step."""
        self._step, self._last = step, None

    @property
    def is_on(self) -> bool:
        """Whether there are measurements between steps."""
        return self._every_n_steps is not None

    def is_due(self, step: int) -> bool:
        """Whether a multiple was reached since the last call, or stepped over, as several optimizers do."""
        if self._every_n_steps is None:
            return False
        before, self._step = self._step, step
        return step // self._every_n_steps > before // self._every_n_steps

    def measured(
        self, pl_module: L.LightningModule, measure: Callable[[], Measured], *, keep: bool
    ) -> tuple[Measured, bool]:
        """Measure, unless that was done at this step with these weights.

        Args:
            pl_module: The module.
            measure: Measures it.
            keep: Whether the end of the epoch may take the result.

        Returns:
            What was measured, and whether that was now.
        """
        step, weights = pl_module.trainer.global_step, tuple[int, ...]()
        if self.is_on:
            weights = fingerprint((*pl_module.parameters(), *pl_module.buffers()))
        last = self._last
        differs = last is None or last[:2] != (step, weights)
        is_new = bool(count_over_ranks(int(differs), pl_module.device))
        if is_new:
            last = step, weights, measure()
        assert last is not None
        self._last = last if keep else None
        return last[2], is_new
