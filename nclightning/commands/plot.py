"""``python -m nclightning plot``: figures of run folders."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from nclightning.command_parser import command_parser
from nclightning.errors import UserError
from nclightning.figures import Run, draw_collapse, draw_gaps, fit_straight, group_runs, read_run, thinned
from nclightning.figures.tables import rates_table, settings_table
from nclightning.files import make_folder
from nclightning.quantities import CERTIFIED_GAP, GAP, NC1, NC2, NC3

__all__ = ["plot_runs"]

_GAPS = {GAP.tag(), CERTIFIED_GAP.tag()}
_COLLAPSE = {each.tag("train") for each in (NC1, NC2, NC3)}
_MOST_TABLES = 12  # If there are more runs, one table summarises them.


def plot_runs(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: Arguments that follow ``plot``.

    Raises:
        ValueError: If a run cannot be read or drawn, or a file cannot be written.
    """
    parser = command_parser(
        "plot",
        "Draw run folders as the paper's figures do: the optimality gap of all runs, one panel per loss, and NC1-NC3, "
        "one panel per run; print the fitted rates. Many runs get one small panel per setting, with the median and the "
        "range of its runs.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, such as lightning_logs/version_0")
    parser.add_argument("--out", default=".", help="folder for gap.png, gap.pdf, collapse.png, collapse.pdf")
    given = parser.parse_args(words)
    runs, folder, console = _read_runs(given.runs), Path(given.out), Console()
    if len(runs) > _MOST_TABLES:
        console.print(settings_table(group_runs(runs)))
    else:
        for run in runs:
            console.print(rates_table(run.summary, str(run.folder), run.problem))
    drawn = []
    for draw, name, tags in ((draw_gaps, "gap", _GAPS), (draw_collapse, "collapse", _COLLAPSE)):
        having = [run for run in runs if tags & run.summary.last.keys()]
        if having:
            try:
                make_folder(folder)
                drawn += draw(having, folder / name)
            except OSError as error:
                raise UserError(f"cannot write {folder}: {error.strerror or error}. Choose another --out.") from error
    if not drawn:
        names = given.runs[0] if len(given.runs) == 1 else f"{given.runs[0]} and {len(given.runs) - 1} more"
        raise UserError(f"no reading to draw in {names}: neither {GAP.tag()} nor {NC1.tag('train')}-nc3.")
    for path in drawn:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


def _read_runs(folders: Sequence[str]) -> list[Run]:
    """Read run folders. If there are many, keep only the readings that are drawn."""
    if len(folders) <= _MOST_TABLES:
        return [read_run(folder) for folder in folders]
    fit = partial(fit_straight, most_points=150)
    console = Console(stderr=True)
    shown = track(folders, "reading", console=console, transient=True, disable=not console.is_terminal)
    return [thinned(read_run(folder, fit)) for folder in shown]
