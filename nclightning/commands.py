"""Commands that train nothing themselves: ``python -m nclightning reproduce|plot``."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from nclightning.figures import draw_collapse, draw_gaps, read_run
from nclightning.figures.tables import rates_table
from nclightning.reproduction import reproduce
from nclightning.reproduction.experiments import FIGURES

__all__ = ["COMMANDS"]


def _reproduce(words: Sequence[str]) -> None:
    parser = _parser(
        "reproduce",
        "Run the experiments behind the paper's four figures, draw the figures, fit the rates, and say for each claim "
        "whether it held.\n\nFinished runs are kept: the same command goes on where it was stopped, and with nothing "
        "left to run it only draws again.",
    )
    parser.add_argument("--figures", type=int, nargs="+", choices=FIGURES, default=FIGURES, help="which (default: all)")
    parser.add_argument("--out", help="folder for runs, figures and report (default: reproduction[_quick])")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs, within four minutes")
    parser.add_argument("--jobs", type=int, help="runs at a time, one thread each (default: number of cores)")
    given = parser.parse_args(words)
    try:
        reproduce(given.figures, given.out, given.quick, given.jobs)
    except RuntimeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. What finished is kept; the same command goes on.")


def _plot(words: Sequence[str]) -> None:
    parser = _parser(
        "plot",
        "Draw run folders as the paper's figures do: the optimality gap of all runs, one panel per loss, and NC1-NC3, "
        "one panel per run; print the fitted rates.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, such as lightning_logs/version_0")
    parser.add_argument("--out", default=".", help="folder for gap.png, gap.pdf, collapse.png, collapse.pdf")
    given = parser.parse_args(words)
    runs, folder, console = [read_run(run) for run in given.runs], Path(given.out), Console()
    for run in runs:
        console.print(rates_table(run.summary, title=str(run.folder)))
    drawn = []
    for draw, name, prefix in ((draw_gaps, "gap", "optimality/gap"), (draw_collapse, "collapse", "nc/train/")):
        having = [run for run in runs if any(tag.startswith(prefix) for tag in run.summary.last)]
        if having:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                drawn += draw(having, folder / name)
            except OSError as error:
                raise ValueError(f"cannot write {folder}: {error.strerror or error}. Choose another --out.") from error
    if not drawn:
        raise ValueError(f"no reading to draw in {', '.join(given.runs)}: neither optimality/gap nor nc/train/nc1-nc3.")
    for path in drawn:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


def _parser(name: str, description: str) -> ArgumentParser:
    return ArgumentParser(
        f"python -m nclightning {name}", description=description, formatter_class=RawDescriptionHelpFormatter
    )


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"reproduce": _reproduce, "plot": _plot}
