"""The table of a measurement, for terminals and for notebooks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import NamedTuple

from nclightning.quantities import measure_named

__all__ = ["Row", "as_html", "as_text"]

_COLUMNS = ("", "value", "at collapse", "meaning")


class Row(NamedTuple):
    """One value and its meaning.

    Attributes:
        group: The data set or layer, in words; empty for the input of the head.
        name: Name of the measure.
        value: The value.
        collapsed: The value at collapse; None if it is not known.
        meaning: The meaning in a few words.
    """

    group: str
    name: str
    value: float
    collapsed: float | None
    meaning: str

    @classmethod
    def of(cls, tag: str, value: float, num_classes: int, feature_dim: int, layers: Sequence[str] = ()) -> Row:
        """Construct the row of a value.

        Args:
            tag: ``<measure>`` or ``<set or layer>/<measure>``.
            value: The value.
            num_classes: Number of classes present.
            feature_dim: Dimension of the features at the head.
            layers: Names of layers. Other groups are data sets.
        """
        group, _, name = tag.rpartition("/")
        quantity = measure_named(name)
        group = f"layer {group}" if group in layers else group
        return cls(group, name, value, quantity.at_collapse(num_classes, feature_dim), quantity.meaning)

    @property
    def distance(self) -> float | None:
        """Distance of the value from that at collapse; None if that is not known."""
        return None if self.collapsed is None else abs(self.value - self.collapsed)

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Name, value, value at collapse and meaning as text."""
        return self.name, _shown(self.value), "" if self.collapsed is None else _shown(self.collapsed), self.meaning


def _shown(value: float) -> str:
    """Format a value: counts as integers, others with four digits."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:  # Counts, and exact zeros and ones.
        return str(int(value))
    return f"{value:.4g}"


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Yield the rows of each group."""
    order = list(dict.fromkeys(row.group for row in rows))
    ordered = sorted(rows, key=lambda row: order.index(row.group))
    yield from ((group, list(own)) for group, own in groupby(ordered, key=lambda row: row.group))


def as_text(headline: str, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Format a table in ASCII, for any terminal.

    Args:
        headline: Title in one line.
        rows: Rows, with groups in any order.
        notes: Sentences below the table.
    """
    cells = [_COLUMNS, *(row.cells for row in rows)]
    name, value, collapsed = (max(len(row[i]) for row in cells) for i in range(3))

    def line(row: Sequence[str], indent: str) -> str:
        return f"{indent}{row[0]:<{name}}  {row[1]:>{value}}  {row[2]:>{collapsed}}  {row[3]}".rstrip()

    lines = [headline, line(_COLUMNS, "  ")]
    for group, own in _groups(rows):
        lines += [f"  {group}:"] if group else []
        lines += [line(row.cells, "  ") for row in own]
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def as_html(headline: str, rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Format a table in HTML, for notebooks in any colours.

    Args:
        headline: Title in one line.
        rows: Rows, with groups in any order.
        notes: Sentences below the table.
    """

    def line(cells: Sequence[str], kind: str) -> str:
        sides = ("left; white-space: nowrap", "right", "right; white-space: nowrap", "left")
        return "".join(
            f'<{kind} style="text-align: {side}; padding: 0.1em 0.7em">{escape(cell)}</{kind}>'
            for cell, side in zip(cells, sides, strict=True)
        )

    parts = [f"<tr>{line(_COLUMNS, 'th')}</tr>"]
    for group, own in _groups(rows):
        if group:
            parts.append(
                f'<tr><th colspan="4" style="text-align: left; padding: 0.4em 0.7em">{escape(group)}</th></tr>'
            )
        parts += [f"<tr>{line(row.cells, 'td')}</tr>" for row in own]
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    table = f'<table style="color: inherit">{"".join(parts)}</table>'
    return f"<div><div><b>{escape(headline)}</b></div>{table}{below}</div>"
