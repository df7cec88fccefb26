"""What a metric reads and does not own."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

__all__ = ["Borrowed"]

T = TypeVar("T")


class Borrowed(Generic[T]):
    """Holds an object of somebody else's, of which a copy of the holder makes no copy.

    A metric that is copied, or cloned with a whole ``MetricCollection``, goes on reading the head that is trained; a
    copy of the head would stay as it was. Only where head and metric are copied together, as parts of one module, the
    copy of the metric reads the copy of the head.

    Args:
        value: The object.
    """

    def __init__(self, value: T) -> None:
        self._value, self._memo = value, None

    def get(self) -> T:
        """Return the object."""
        memo: dict[int, Any] | None = self._memo
        if memo is not None:  # All that was copied together is known only once copying has ended.
            self._value, self._memo = memo.get(id(self._value), self._value), None
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Borrowed[T]:
        copy = Borrowed(self.get())
        copy._memo = memo  # type: ignore[assignment]
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"_value": self.get(), "_memo": None}
