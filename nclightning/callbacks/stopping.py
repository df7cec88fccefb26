"""When a run is close enough to its optimum to stop."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["StopRule", "goes_on"]

# Readings without a new minimum that a floor needs: short runs of other optimizers rise now and then.
_LEAST_READINGS = 20


class StopRule:
    """Decides from the distances that were read so far, so that a resumed run decides alike.

    Args:
        stop_distance: Stop at the first reading of at most this; None never does.
        stop_at_floor: Stop at the floor that round-off sets.
        cadence: Iterations between two readings.
        state: Of another one, to go on from.

    Attributes:
        stopped_at: Iterate at which the run was stopped; None if it was not.
    """

    def __init__(
        self, stop_distance: float | None, stop_at_floor: bool, cadence: int, state: dict[str, Any] | None = None
    ) -> None:
        self.stop_distance = stop_distance
        self.stop_at_floor = stop_at_floor
        self.cadence = cadence
        self.stopped_at: int | None = None
        self._smallest, self._smallest_at = math.inf, 0
        self._last = math.nan
        if state is not None:
            self.load_state_dict(state)

    @property
    def is_on(self) -> bool:
        """Whether it ever stops a run."""
        return self.stop_distance is not None or self.stop_at_floor

    def follow(self, iteration: int, distance: float, norm: float) -> str | None:
        """Take a reading into account.

        Args:
            iteration: Of the reading.
            distance: To the optimal set.
            norm: Of the optimum.

        Returns:
            Why the run is to stop, as a sentence; None if it is not.
        """
        self._last = distance
        if distance < self._smallest:
            self._smallest, self._smallest_at = distance, iteration
        sentence = self._sentence(iteration, norm)
        self.stopped_at = None if sentence is None else iteration
        return sentence

    def stands(self, norm: float) -> str | None:
        """Say why the run stays stopped where it was; None if the present settings let it go on."""
        return None if self.stopped_at is None else self._sentence(self.stopped_at, norm)

    def _sentence(self, iteration: int, norm: float) -> str | None:
        reason = None
        if self.stop_distance is not None and self._last <= self.stop_distance:
            reason = f"at most {self.stop_distance:g}"
        elif self.stop_at_floor and self._is_at_floor(iteration, norm):
            reason = f"at its floor, with no new minimum since iteration {self._smallest_at}"
        return None if reason is None else f"Distance {self._last:.3g} at iteration {iteration}: {reason}."

    def _is_at_floor(self, iteration: int, norm: float) -> bool:
        # Near the saddle at zero the distance stands still, too, but at the norm of the optimum.
        patience = max(self._smallest_at, _LEAST_READINGS * self.cadence)
        return self._smallest < 1e-3 * norm and iteration >= self._smallest_at + patience

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        stopped = {"stopped_at": self.stopped_at, "distance": self._last}
        return {"smallest": self._smallest, "smallest_at": self._smallest_at} | stopped

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it, also that of an earlier version, which did not say whether the run had been stopped."""
        self._smallest, self._smallest_at = state["smallest"], state["smallest_at"]
        self.stopped_at, self._last = state.get("stopped_at"), state.get("distance", math.nan)


def goes_on(iteration: int) -> str:
    """Say that a run goes on from where it had been stopped."""
    return f"The run had been stopped at iteration {iteration}. The settings that did it have changed: it goes on."
