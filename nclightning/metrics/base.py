"""What the metrics of this package share beyond those of torchmetrics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torchmetrics import Metric

from nclightning.compat.torchmetrics import OpenMetric
from nclightning.functional.linear import autocast_off
from nclightning.ranks import are_several

__all__ = ["StreamingMetric", "without_autocast"]

Method = TypeVar("Method", bound=Callable[..., Any])

# Names of states without content, see nclightning.metrics.groups.
APART = "_apart_"


def without_autocast(method: Method) -> Method:
    """Let a method of a metric compute in the dtype of its states, as :func:`autocast_off` does.

    Args:
        method: A method of a :class:`torchmetrics.Metric`.

    Returns:
        The same with autocast off on the device of the metric.
    """

    @functools.wraps(method)
    def run(self: Metric, *args: Any, **kwargs: Any) -> Any:
        with autocast_off(self.device):
            return method(self, *args, **kwargs)

    return cast(Method, run)


class StreamingMetric(OpenMetric):
    """A metric that an error leaves as it was, and whose ``state_dict`` loads into any other one that is made alike.

    Args:
        **kwargs: Passed to :class:`torchmetrics.Metric`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"distributed_available_fn": are_several, **kwargs})

    @contextmanager
    def sync_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Synchronise the states over processes; give back those of this process at the end, after an error, too.

        Args:
            *args: Of :meth:`torchmetrics.Metric.sync_context`.
            **kwargs: The same.
        """
        synced_before = self.is_synced
        try:
            with super().sync_context(*args, **kwargs):
                yield
        except BaseException:
            # torchmetrics would leave the states of all processes here, to which nothing can be added.
            if self.is_synced and not synced_before:
                self.unsync()
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch and read it alone. A batch that cannot be read is not added.

        Args:
            *args: Of ``update``.
            **kwargs: The same.

        Returns:
            As ``compute``, of this batch.
        """
        # torchmetrics resets the states for the time in which it reads the batch.
        with self.as_before_on_error():
            return super().forward(*args, **kwargs)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values.

        Args:
            val: Result of ``compute`` or ``forward``, or a sequence of them; None computes.
            ax: Matplotlib axis; None makes one.

        Returns:
            Figure and axis.
        """
        return self.draw(val, ax)

    def persistent(self, mode: bool = False) -> None:
        """Choose whether ``state_dict`` has the states.

        Args:
            mode: Whether it has.
        """
        super().persistent(mode)
        self.leave_unsaved(APART)  # They have no content, and their names may be of this instance alone.

    def change_loaded(self, entries: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Leave out what earlier versions saved of a metric without need."""
        for name in [name for name in entries if name.startswith(prefix + APART)]:
            del entries[name]
        return entries
