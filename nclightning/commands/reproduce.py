"""``python -m nclightning reproduce``: the paper's figures from recorded runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from nclightning.command_parser import command_parser
from nclightning.interrupts import SIGINT_STATUS, SIGTERM_STATUS, Terminated
from nclightning.reproduction import reproduce
from nclightning.reproduction.experiments import ERROR_BOUND, FIGURES, OPTIMIZERS

__all__ = ["reproduce_figures"]


def reproduce_figures(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: Arguments that follow ``reproduce``.

    Raises:
        ValueError: If an argument is out of range, or if runs did not finish.
    """
    parser = command_parser(
        "reproduce",
        "Run the experiments behind the paper's four figures, draw the figures, fit the rates, and say for each claim "
        "whether it held.\n\nFinished runs are kept: the same command goes on where it was stopped, and with nothing "
        "left to run it only draws again.",
    )
    of_the_paper = [str(figure) for figure in (*FIGURES, ERROR_BOUND)]
    parser.add_argument(
        "--figures",
        nargs="+",
        choices=[*of_the_paper, OPTIMIZERS],
        default=of_the_paper,
        help="which (default: all of the paper's, without optimizers, which compares seven of them on one problem)",
    )
    parser.add_argument("--out", help="folder for runs, figures and report (default: reproduction[_quick])")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, within four minutes")
    parser.add_argument("--jobs", type=int, help="runs at a time, one thread each (default: number of cores)")
    given = parser.parse_args(words)
    try:
        figures = [int(figure) if figure.isdigit() else figure for figure in given.figures]
        reproduce(figures, given.out, given.quick, given.jobs)
    except (KeyboardInterrupt, Terminated) as stop:
        print("Interrupted. What finished is kept; the same command goes on.", file=sys.stderr)
        sys.exit(SIGTERM_STATUS if isinstance(stop, Terminated) else SIGINT_STATUS)
