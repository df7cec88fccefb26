"""Names of torchmetrics that its documentation does not promise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchmetrics import Metric

from nclightning.compat.torch import OwnEntries

__all__ = ["OpenMetric"]

_BOOKS = (
    "_update_count",
    "_to_sync",
    "_should_unsync",
    "_enable_grad",
    "_is_synced",
    "_forward_cache",
    "compute_on_cpu",
)


class OpenMetric(OwnEntries, Metric):
    """A metric that has a say in how its states are gathered, merged, saved and put back.

    Non-public: ``Metric._sync_dist``, ``Metric._reduce_states`` (torchmetrics 1.9). The first is overridden to give the
    states equal shapes on all processes, without which gathering them waits for ever. The second is overridden because
    what torchmetrics makes of states with ``dist_reduce_fx=None``, a stack or a list, is no state of these metrics.
    """

    def prepare_sync(self) -> None:
        """Bring the states into the form in which they are gathered from all processes."""

    def merge_states(self, earlier: dict[str, Any]) -> None:
        """Add states that were set aside to those of now, for ``forward`` and ``merge_state``.

        Args:
            earlier: By name.
        """
        super()._reduce_states(earlier)

    @property
    def is_synced(self) -> bool:
        """Whether the states are those of all processes.

        Non-public: ``Metric._is_synced`` (torchmetrics 1.9). Without it states of all processes would stay in a metric
        after an error, and count once more for each process at the next synchronisation.
        """
        return bool(self._is_synced)

    @contextmanager
    def as_before_on_error(self) -> Iterator[None]:
        """Put the states and the books of a metric back if the block raises.

        Non-public: ``Metric._defaults``, ``_update_count``, ``_to_sync``, ``_should_unsync``, ``_enable_grad``,
        ``_is_synced``, ``_forward_cache``, ``_computed`` (torchmetrics 1.9). ``forward`` changes them for
        the time in which it reads a batch. Without them a batch that is refused would empty the metric and leave it
        unable to synchronise.
        """
        states = {name: getattr(self, name) for name in (*self._defaults, *_BOOKS)}
        # Lists are emptied in place.
        before = {name: list(value) if isinstance(value, list) else value for name, value in states.items()}
        try:
            yield
        except BaseException:
            for name, value in before.items():
                setattr(self, name, value)
            self._computed = None
            raise

    def leave_unsaved(self, prefix: str) -> None:
        """Leave states out of ``state_dict`` by the beginning of their names.

        Non-public: ``Metric._persistent`` (torchmetrics 1.9). ``add_state(persistent=False)`` is undone by
        ``persistent(True)``. Without it a ``state_dict`` would hold names that are those of one instance alone.

        Args:
            prefix: Beginning of a name.
        """
        for name in self._persistent:
            if name.startswith(prefix):
                self._persistent[name] = False

    def change_default(self, name: str, value: Any) -> None:
        """Change what ``reset`` sets a state to.

        Non-public: ``Metric._defaults`` (torchmetrics 1.9). ``set_dtype`` changes the dtype of integer defaults, too.
        Without it counts would be floats after the next ``reset``.

        Args:
            name: Of the state.
            value: Its default.
        """
        self._defaults[name] = value

    def draw(self, val: Any, ax: Any) -> Any:
        """Draw values as torchmetrics does.

        Non-public: ``Metric._plot`` (torchmetrics 1.9); metrics of torchmetrics call it in ``plot``. Without it
        ``plot`` fails.

        Args:
            val: As of ``plot``.
            ax: The same.

        Returns:
            Figure and axis, or several.
        """
        return self._plot(val, ax)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        self.prepare_sync()
        super()._sync_dist(*args, **kwargs)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        self.merge_states(incoming_state)
