"""A reference to an object that a metric uses without owning it."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

__all__ = ["Borrowed"]

T = TypeVar("T")


class Borrowed(Generic[T]):
    """A reference to an object that is not copied along with its holder.

    A metric that is copied, or cloned with a whole ``MetricCollection``, must refer to the head that is being trained;
    a copy of the head would never change. Only if head and metric are copied together, as parts of one module, does the
    copy of the metric refer to the copy of the head.

    Args:
        value: The object.
    """

    def __init__(self, value: T) -> None:
        self._value, self._memo = value, None

    def get(self) -> T:
        """Return the object."""
        memo: dict[int, Any] | None = self._memo
        if memo is not None:  # Which objects were copied together is known only after copying has ended.
            self._value, self._memo = memo.get(id(self._value), self._value), None
        return self._value

    def __deepcopy__(self, memo: dict[int, Any]) -> Borrowed[T]:
        copy = Borrowed(self.get())
        copy._memo = memo  # type: ignore[assignment]
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"_value": self.get(), "_memo": None}
