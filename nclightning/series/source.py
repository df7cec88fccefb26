"""What is measured, one after the other, and in which order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nclightning.errors import UserError

__all__ = ["Source", "in_order", "steps_in_names"]

_TOO_LARGE = 2**53  # A table of floats could not tell larger ones apart.


class Source(Protocol):
    """One state of a network: its checkpoint, or a dump of its features. Other processes get it pickled.

    Attributes:
        name: As the user knows it.
        step: Where it stands in the series.
        size: Bytes on the disk, by which memory is estimated.
    """

    name: str
    step: int
    size: int

    def fingerprint(self) -> str:
        """Return what changes with the content of its files, without measuring it."""

    def weights(self) -> str:
        """Return what is equal for two files that hold the same weights, or the same arrays."""

    def measure(self) -> dict[str, float]:
        """Measure it.

        Returns:
            Values by tag.

        Raises:
            ValueError: In one sentence, if it cannot be measured.
        """


def in_order(sources: Sequence[Source]) -> tuple[list[Source], list[str]]:
    """Order sources by step. Of several files with the same step and weights, such as ``last.ckpt``, one is taken.

    Args:
        sources: In any order.

    Returns:
        One for each step, and what to tell the user.

    Raises:
        ValueError: If two of a step hold different weights.
    """
    # The file that training names after a step stays, and last.ckpt is written anew.
    ordered = sorted(sources, key=lambda each: (each.step, Path(each.name).stem.startswith("last"), each.name))
    for each in ordered:
        if not 0 <= each.step < _TOO_LARGE:
            raise UserError(f"{each.name} is of step {each.step}, and steps from 0 to 2**53 are kept.")
    kept, notes = list[Source](), list[str]()
    for each in ordered:
        if not kept or each.step != kept[-1].step:
            kept.append(each)
        elif each.weights() == kept[-1].weights():
            notes.append(f"{each.name} holds the weights of {kept[-1].name} (step {each.step}): they are one row.")
        else:
            raise UserError(
                f"{kept[-1].name} and {each.name} are both of step {each.step}, and differ: measure two runs each "
                "by itself, with an --out of its own, and name saved features like x_step100."
            )
    return kept, notes


# A number of a name: 0010, 10k, 2M, 1e3. One behind a letter, or a part of a decimal number, is none.
_NUMBER = r"(\d+)(?:([kKM])|[eE](\d+))?(?![A-Za-z0-9])(?!\.\d)"
_FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6}
_PATTERNS = (
    re.compile(rf"(?<![A-Za-z])(?:global_?step|step|iteration|iter|it)[=_\-]?{_NUMBER}", re.IGNORECASE),
    re.compile(rf"(?<![A-Za-z])(?:epoch|ep)[=_\-]?{_NUMBER}", re.IGNORECASE),
    re.compile(rf"(?<![A-Za-z0-9])(?<!\d\.){_NUMBER}"),
)
_BEHIND_LETTERS = re.compile(rf"(?<![0-9])(?<!\d\.){_NUMBER}")


def steps_in_names(paths: Sequence[Path]) -> list[int | None]:
    """Return the steps that names say.

    A step is the number after ``step`` or ``iter``, or after ``epoch``, or the last that stands alone: the first of
    these that is not the same in all names.

    Args:
        paths: Of files or folders.

    Returns:
        None for a name without a number. A number behind letters, as in ``float16``, is only taken to tell several
        files apart.
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
    """Return the last number of each name; an earlier one if the last is the same in all."""
    found = [[_whole(*numbers) for numbers in pattern.findall(stem)] for stem in stems]
    last: list[int | None] = [numbers[-1] if numbers else None for numbers in found]
    if len({len(numbers) for numbers in found}) > 1:
        return last
    places = [list[int | None](each) for each in zip(*found, strict=True)]
    return next((each for each in reversed(places) if len(set(each)) > 1), last)


def _whole(digits: str, factor: str, power: str) -> int:
    tens: int = 10 ** min(int(power or 0), 99)
    return int(digits) * _FACTORS[factor] * tens
