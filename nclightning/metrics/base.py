"""The base class of this package's metrics: error-safe updates, and states that load into equal metrics."""

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

# Prefix of the names of empty states that keep metrics out of shared compute groups; see
# nclightning.metrics.compute_groups.
SEPARATE = "_apart_"


def without_autocast(method: Method) -> Method:
    """Run a method of a metric with autocast switched off, so that it computes in the dtype of its states.

    Args:
        method: A method of a :class:`torchmetrics.Metric`.

    Returns:
        The method with autocast off on the device of the metric.
    """

    @functools.wraps(method)
    def run(self: Metric, *args: Any, **kwargs: Any) -> Any:
        with autocast_off(self.device):
            return method(self, *args, **kwargs)

    return cast(Method, run)


class StreamingMetric(OpenMetric):
    """A metric that an error leaves unchanged, and whose ``state_dict`` loads into any metric with the same arguments.

    Args:
        **kwargs: Passed to :class:`torchmetrics.Metric`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"distributed_available_fn": are_several, **kwargs})

    @contextmanager
    def sync_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Synchronise the states over processes, and restore those of this process at the end and after an error.

        Args:
            *args: As for :meth:`torchmetrics.Metric.sync_context`.
            **kwargs: As for :meth:`torchmetrics.Metric.sync_context`.
        """
        synced_before = self.is_synced
        try:
            with super().sync_context(*args, **kwargs):
                yield
        except BaseException:
            # torchmetrics would leave the gathered states in place. Adding a batch to them would fail.
            if self.is_synced and not synced_before:
                self.unsync()
            raise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch, and compute the values of this batch alone. If that fails, the batch is not added.

        Args:
            *args: As for ``update``.
            **kwargs: As for ``update``.

        Returns:
            The result of ``compute`` for this batch.
        """
        # torchmetrics resets the states while it computes the values of the batch.
        with self.as_before_on_error():
            return super().forward(*args, **kwargs)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw values.

        Args:
            val: Result of ``compute`` or ``forward``, or a sequence of them; None calls ``compute``.
            ax: Matplotlib axis; None makes one.

        Returns:
            Figure and axis.
        """
        return self.draw(val, ax)

    def persistent(self, mode: bool = False) -> None:
        """Choose whether ``state_dict`` contains the states.

        Args:
            mode: Whether it does.
        """
        super().persistent(mode)
        self.leave_unsaved(SEPARATE)  # These states are empty, and their names may be unique to this instance.

    def change_loaded(self, entries: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Drop the empty states that earlier versions saved."""
        for name in [name for name in entries if name.startswith(prefix + SEPARATE)]:
            del entries[name]
        return entries
