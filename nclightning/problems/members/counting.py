"""Checks of the counts that members take as arguments."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nclightning.errors import UserError
from nclightning.problems.checks import read_numbers

__all__ = ["balanced", "counts_of"]


def balanced(num_classes: int, samples_per_class: int) -> list[int]:
    """Return the counts of balanced classes, checked."""
    for name, value, least in (("num_classes", num_classes, 2), ("samples_per_class", samples_per_class, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name} must be an integer of at least {least}, got {value!r}.")
    return [samples_per_class] * num_classes


def counts_of(counts: Sequence[int]) -> Tensor:
    """Return the counts of at least two classes, checked."""
    numbers = read_numbers(counts, "counts must be integers")
    if numbers.ndim != 1 or len(numbers) < 2:
        raise UserError(f"counts must hold the number of samples of each of at least two classes, got {counts!r}.")
    return numbers
