"""When a monitor measures between optimizer steps, and what it measured last."""

from __future__ import annotations

import lightning as L

from nclightning.probe.sets import Measured
from nclightning.probe.sweep import fingerprint_together
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
        self._now: tuple[int, tuple[int, ...]] = 0, ()  # Step and weights of the last question.
        self._last: tuple[tuple[int, tuple[int, ...]], Measured] | None = None  # What was measured where.

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

    def known(self, pl_module: L.LightningModule) -> Measured | None:
        """Return what was measured at this step with these weights, if anything was. All processes must ask."""
        weights = tuple[int, ...]()
        if self.is_on:
            weights = fingerprint_together((*pl_module.parameters(), *pl_module.buffers()))
        self._now = pl_module.trainer.global_step, weights
        differs = self._last is None or self._last[0] != self._now
        if count_over_ranks(int(differs), pl_module.device):
            return None
        assert self._last is not None
        return self._last[1]

    def keep(self, measured: Measured | None) -> None:
        """Keep what was measured after :meth:`known`, for the end of an epoch; None forgets what was kept."""
        self._last = None if measured is None else (self._now, measured)
