"""Writes the table of docs/problems.md: how each question about each problem is answered.

    python docs/problems.py

``tests/problems/test_page.py`` compares the page with the code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nclightning import problems as of
from nclightning.problems import NoAnswer, Problem

PAGE = Path(__file__).with_suffix(".md")
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
OF_THE_PAPER = ("balanced_mse", "balanced_ce")
FEW, MANY = [6, 3, 1], 4
LABELS = [[1, 0, 0], [0, 1, 1], [1, 1, 0]]
SOFT = [[0.9, 0.1, 0.0], [0.2, 0.7, 0.1], [0.0, 0.0, 1.0]]
ROWS = [[0.0, 1.0, 2.0], [1.0, -1.0, 0.0], [2.0, 0.5, 1.0], [-1.0, 0.0, 0.0], [0.3, 0.2, -2.0]]

# The function, what is special in its arguments, and the problem for a number of features.
MEMBERS: list[tuple[str, str, Callable[[int], Problem]]] = [
    ("balanced_mse", "", lambda d: of.balanced_mse(4, 3, d, 0.01, 0.01)),
    ("balanced_ce", "", lambda d: of.balanced_ce(4, 3, d, 0.01, 0.01)),
    ("mse_without_bias", "", lambda d: of.mse_without_bias(FEW, d, 0.01, 0.01)),
    ("mse_with_penalized_bias", "equal counts", lambda d: of.mse_with_penalized_bias([3] * 3, d, 0.01, 0.01, 0.1)),
    ("mse_with_penalized_bias", "other counts", lambda d: of.mse_with_penalized_bias(FEW, d, 0.01, 0.01, 0.1)),
    ("unbalanced_mse", "", lambda d: of.unbalanced_mse([30, 6, 3, 1], d, 0.001, 0.001)),
    ("unbalanced_ce", "", lambda d: of.unbalanced_ce(FEW, d, 0.01, 0.01)),
    ("label_smoothing", "equal counts", lambda d: of.label_smoothing([3] * 3, 0.1, d, 0.01, 0.01)),
    ("label_smoothing", "other counts", lambda d: of.label_smoothing(FEW, 0.1, d, 0.01, 0.01)),
    ("soft_labels", "", lambda d: of.soft_labels(SOFT, [3, 3, 2], d, 0.01, 0.01)),
    ("mixup", "", lambda d: of.mixup(3, 3, 1, d, 0.01, 0.01)),
    ("weighted_ce", "", lambda d: of.weighted_ce(FEW, "inverse", d, 0.01, 0.01)),
    ("logit_adjusted_ce", "", lambda d: of.logit_adjusted_ce(FEW, d, 0.01, 0.01)),
    ("multi_label_bce", "", lambda d: of.multi_label_bce(LABELS, [3, 3, 2], d, 0.01, 0.01)),
    ("regression", "", lambda d: of.regression(ROWS, d, 0.01, 0.01)),
]


def table() -> str:
    """Return the table, asked of the problems themselves."""
    questions = list(MEMBERS[0][2](MANY).answers())
    head = ["problem", "configuration", *(f"`{name}`" for name in questions), "optimum for `d < r`"]
    rows = [head, ["---"] * len(head)]
    for name, special, make in MEMBERS:
        few = make(1).answers()["optimum"]
        answers = [_word(answer) for answer in make(MANY).answers().values()]
        page, config = f"problems/{name}.md", f"`ufm_{name}`" if special != "other counts" else ""
        if name in OF_THE_PAPER:
            page, config = "theory.md", f"`ufm_{name.removeprefix('balanced_')}`"
        rows.append([f"[`{name}`]({page})" + (f", {special}" if special else ""), config, *answers, _word(few)])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _word(answer: str | NoAnswer) -> str:
    return "unknown" if isinstance(answer, NoAnswer) else answer


def main() -> None:
    """Put the table into the page."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])


if __name__ == "__main__":
    main()
