"""What the metrics of this package share beyond those of torchmetrics."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torchmetrics import Metric

__all__ = ["StreamingMetric", "without_autocast"]

Method = TypeVar("Method", bound=Callable[..., Any])

# Names of states without content, see nclightning.metrics.groups.
APART = "_apart_"


def without_autocast(method: Method) -> Method:
    """Let a method of a metric compute in the dtype of its states: autocast would multiply float32 in half precision.

    Args:
        method: A method of a :class:`torchmetrics.Metric`.

    Returns:
        The same with autocast off on the device of the metric.
    """

    @functools.wraps(method)
    def run(self: Metric, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_autocast_enabled(self.device.type):
            return method(self, *args, **kwargs)  # To switch off what is off takes a quarter of an update's time.
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(Method, run)


class StreamingMetric(Metric):
    """A metric that an error leaves as it was, and whose ``state_dict`` loads into any other one that is made alike."""

    @contextmanager
    def sync_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Synchronise the states over processes; give back those of this process at the end, after an error, too.

        Args:
            *args: Of :meth:`torchmetrics.Metric.sync_context`.
            **kwargs: The same.
        """
        synced_before = self._is_synced
        try:
            with super().sync_context(*args, **kwargs):
                yield
        except BaseException:
            # torchmetrics would leave the states of all processes here, to which nothing can be added.
            if self._is_synced and not synced_before:
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
        states = {name: getattr(self, name) for name in self._defaults}
        settings = {name: getattr(self, name) for name in ("_update_count", "_to_sync", "_should_unsync")}
        settings |= {name: getattr(self, name) for name in ("_enable_grad", "compute_on_cpu", "_is_synced")}
        try:
            return super().forward(*args, **kwargs)
        except BaseException:
            for name, value in (states | settings).items():
                setattr(self, name, list(value) if isinstance(value, list) else value)
            self._computed = None
            raise

    def persistent(self, mode: bool = False) -> None:
        """Choose whether ``state_dict`` has the states.

        Args:
            mode: Whether it has.
        """
        super().persistent(mode)
        for name in self._persistent:
            if name.startswith(APART):
                self._persistent[name] = False  # It has no content, and its name may be of this instance alone.

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [name for name in state_dict if name.startswith(prefix + APART)]:
            del state_dict[name]  # Earlier versions saved it.
        super()._load_from_state_dict(state_dict, prefix, *args)
