"""Undocumented names of torchmetrics."""

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
    """A metric that can change how its states are gathered, merged, saved and restored.

    Non-public: ``Metric._sync_dist``, ``Metric._reduce_states`` (torchmetrics 1.9). The first is overridden to give the
    states equal shapes on all processes, without which gathering never ends. The second is overridden because
    torchmetrics merges states with ``dist_reduce_fx=None`` to a stack or a list, which is no valid state here.
    """

    def prepare_sync(self) -> None:
        """Convert the states to the form in which they are gathered from all processes."""

    def merge_states(self, earlier: dict[str, Any]) -> None:
        """Merge earlier states into the current ones, for ``forward`` and ``merge_state``.

        Args:
            earlier: The earlier states by name.
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
        """Restore states and internal attributes of a metric if the block raises.

        Non-public: ``Metric._defaults``, ``_update_count``, ``_to_sync``, ``_should_unsync``, ``_enable_grad``,
        ``_is_synced``, ``_forward_cache``, ``_computed`` (torchmetrics 1.9). ``forward`` changes them
        temporarily while it evaluates a batch. Without them an error on a batch would empty the metric and leave it
        unable to synchronise.
        """
        states = {name: getattr(self, name) for name in (*self._defaults, *_BOOKS)}
        # Lists are copied, because torchmetrics empties them in place.
        before = {name: list(value) if isinstance(value, list) else value for name, value in states.items()}
        try:
            yield
        except BaseException:
            for name, value in before.items():
                setattr(self, name, value)
            self._computed = None
            raise

    def leave_unsaved(self, prefix: str) -> None:
        """Exclude states from ``state_dict`` by the prefix of their names.

        Non-public: ``Metric._persistent`` (torchmetrics 1.9). ``add_state(persistent=False)`` is undone by
        ``persistent(True)``. Without it a ``state_dict`` would contain names that only one instance has.

        Args:
            prefix: Prefix of the names.
        """
        for name in self._persistent:
            if name.startswith(prefix):
                self._persistent[name] = False

    def change_default(self, name: str, value: Any) -> None:
        """Change the value to which ``reset`` sets a state.

        Non-public: ``Metric._defaults`` (torchmetrics 1.9). ``set_dtype`` changes the dtype of integer defaults, too.
        Without it counts would be floats after the next ``reset``.

        Args:
            name: Name of the state.
            value: The new default.
        """
        self._defaults[name] = value

    def draw(self, val: Any, ax: Any) -> Any:
        """Draw values as torchmetrics does.

        Non-public: ``Metric._plot`` (torchmetrics 1.9); metrics of torchmetrics call it in ``plot``. Without it
        ``plot`` fails.

        Args:
            val: As for ``plot``.
            ax: As for ``plot``.

        Returns:
            Figure and axis, or axes.
        """
        return self._plot(val, ax)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        self.prepare_sync()
        super()._sync_dist(*args, **kwargs)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        self.merge_states(incoming_state)
