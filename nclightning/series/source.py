"""The interface of the states in a series, and their order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nclightning.errors import UserError

__all__ = ["Source", "in_order", "steps_in_names"]

_TOO_LARGE = 2**53  # Larger steps cannot be distinguished in a table of floats.


class Source(Protocol):
    """One state of a network: a checkpoint, or a file of features. It must be picklable for other processes.

    Attributes:
        name: Path as the user typed it.
        step: Position in the series.
        size: Size on the disk in bytes, from which memory is estimated.
    """

    name: str
    step: int
    size: int

    def fingerprint(self) -> str:
        """Return a fingerprint of the content of its files, without measuring it."""

    def weights(self) -> str:
        """Return a fingerprint that is equal for files with the same weights, or the same arrays."""

    def measure(self) -> dict[str, float]:
        """Measure the state.

        Returns:
            Values by tag.

        Raises:
            ValueError: If it cannot be measured, with the reason.
        """


def in_order(sources: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """Order sources by step. Of several files with the same step and weights, such as ``last.ckpt``, one is kept.

    Args:
        sources: The sources in any order.

    Returns:
        One source per step, and notes for the user.

    Raises:
        ValueError: If two files of a step have different weights.
    """
    # A file with a step in its name is preferred, because training overwrites last.ckpt.
    ordered = sorted(sources, key=lambda each: (each.step, Path(each.name).stem.startswith("last"), each.name))
    for each in ordered:
        if not 0 <= each.step < _TOO_LARGE:
            raise UserError(f"{each.name} has step {each.step}: steps must be from 0 to 2**53.")
    kept, notes = list[Source](), list[str]()
    for each in ordered:
        if not kept or each.step != kept[-1].step:
            kept.append(each)
        elif each.weights() == kept[-1].weights():
            notes.append(f"{each.name} has the same weights as {kept[-1].name} (step {each.step}): they share one row.")
        else:
            raise UserError(
                f"{kept[-1].name} and {each.name} both have step {each.step}, and differ: measure two runs "
                "separately, each with its own --out, and name saved features like x_step100."
            )
    return kept, notes


# A number in a name: 0010, 10k, 2M, 1e3. A part of a decimal number does not count.
_NUMBER = r"(\d+)(?:([kKM])|[eE](\d+))?(?![A-Za-z0-9])(?!\.\d)"
_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6}
_PATTERNS = (
    re.compile(rf"(?<![A-Za-z])(?:global_?step|step|iteration|iter|it)[=_\-]?{_NUMBER}", re.IGNORECASE),
    re.compile(rf"(?<![A-Za-z])(?:epoch|ep)[=_\-]?{_NUMBER}", re.IGNORECASE),
    re.compile(rf"(?<![A-Za-z0-9])(?<!\d\.){_NUMBER}"),
)
_BEHIND_LETTERS = re.compile(rf"(?<![0-9])(?<!\d\.){_NUMBER}")


def steps_in_names(paths: Sequence[Path]) -> list[int | None]:
    """Return the steps in the names of files.

    The step is the number after ``step`` or ``iter``, or that after ``epoch``, or the last separate number: the first
    of these that is not the same in all names. A number directly after other letters, as in ``float16``, is the last
    choice, and only for several files.

    Args:
        paths: Files or folders.

    Returns:
        The steps; None for a name without a number.
    """
    stems = [path.name if path.is_dir() else path.stem for path in paths]
    patterns = _PATTERNS if len(paths) == 1 else (*_PATTERNS, _BEHIND_LETTERS)
    choices = [_last_that_differ(stems, pattern) for pattern in patterns]
    whole = [steps for steps in choices if None not in steps]
    differing = [steps for steps in whole if len(set(steps)) > 1]
    if differing or whole:
        return (differing or whole)[0]
    return [next((step for step in steps if step is not None), None) for steps in zip(*choices, strict=True)]


def _last_that_differ(stems: Sequence[str], pattern: re.Pattern[str]) -> list[int | None]:
    """Return the last number in each name; an earlier one if the last is the same in all names."""
    found = [[_whole(*numbers) for numbers in pattern.findall(stem)] for stem in stems]
    last: list[int | None] = [numbers[-1] if numbers else None for numbers in found]
    if len({len(numbers) for numbers in found}) > 1:
        return last
    places = [list[int | None](each) for each in zip(*found, strict=True)]
    return next((each for each in reversed(places) if len(set(each)) > 1), last)


def _whole(digits: str, factor: str, power: str) -> int:
    tens: int = 10 ** min(int(power or 0), 99)
    return int(digits) * _FACTORS[factor] * tens
