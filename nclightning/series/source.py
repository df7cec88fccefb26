"""What is measured, one after the other, and in which order."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nclightning.errors import UserError

__all__ = ["Source", "in_order", "step_in_name"]


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
    kept, notes = list[Source](), list[str]()
    for each in ordered:
        if not kept or each.step != kept[-1].step:
            kept.append(each)
        elif each.weights() == kept[-1].weights():
            notes.append(f"{each.name} holds the weights of {kept[-1].name} (step {each.step}): they are one row.")
        else:
            raise UserError(
                f"{kept[-1].name} and {each.name} are both of step {each.step}, and differ: they belong to two runs. "
                "Measure each by itself, with an --out of its own."
            )
    return kept, notes


_AFTER_STEP = re.compile(r"(?:step|iter|iteration|it|global_step)[=_\-]?(\d+)", re.IGNORECASE)
_ALONE = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z])")
_NUMBER = re.compile(r"\d+")


def step_in_name(path: Path, alone: bool = False) -> int | None:
    """Return the step that a name says: the number after ``step`` or ``iter``, else the last that stands alone.

    Args:
        path: Of a file or folder.
        alone: Whether a number behind letters, as in ``float16``, is none; else it is taken where no other is.

    Returns:
        None without a number.
    """
    stem = path.name if path.is_dir() else path.stem
    found = _AFTER_STEP.findall(stem) or _ALONE.findall(stem) or ([] if alone else _NUMBER.findall(stem))
    return int(found[-1]) if found else None
