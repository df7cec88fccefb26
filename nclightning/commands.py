"""Commands that train nothing themselves: ``python -m nclightning measure|reproduce|plot|theory``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track

from nclightning.command_parser import command_parser
from nclightning.errors import UserError
from nclightning.figures import (
    Run,
    draw_collapse,
    draw_gaps,
    draw_spectrum,
    fit_straight,
    group_runs,
    read_run,
    thinned,
)
from nclightning.figures.prediction import describe_problem, prediction_tables
from nclightning.figures.tables import rates_table, settings_table
from nclightning.files import make_folder
from nclightning.interrupts import SIGINT_STATUS, SIGTERM_STATUS, Terminated
from nclightning.problem_options import problem_names, problem_of, split_options
from nclightning.problems import NoAnswer, Problem
from nclightning.reproduction import reproduce
from nclightning.reproduction.experiments import ERROR_BOUND, FIGURES
from nclightning.theory import UFMProblem

__all__ = ["COMMANDS"]

_GAPS = ("optimality/gap", "optimality/certified_gap")
_MOST_TABLES = 12  # More runs share one table.
_LONG = 400**2  # Groups times classes from which on an optimum may take minutes.


def _reproduce(words: Sequence[str]) -> None:
    parser = command_parser(
        "reproduce",
        "Run the experiments behind the paper's four figures, draw the figures, fit the rates, and say for each claim "
        "whether it held.\n\nFinished runs are kept: the same command goes on where it was stopped, and with nothing "
        "left to run it only draws again.",
    )
    everything = [str(figure) for figure in (*FIGURES, ERROR_BOUND)]
    parser.add_argument("--figures", nargs="+", choices=everything, default=everything, help="which (default: all)")
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


def _plot(words: Sequence[str]) -> None:
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
    for draw, name, prefixes in ((draw_gaps, "gap", _GAPS), (draw_collapse, "collapse", ("nc/train/",))):
        having = [run for run in runs if any(tag.startswith(prefixes) for tag in run.summary.last)]
        if having:
            try:
                make_folder(folder)
                drawn += draw(having, folder / name)
            except OSError as error:
                raise UserError(f"cannot write {folder}: {error.strerror or error}. Choose another --out.") from error
    if not drawn:
        names = given.runs[0] if len(given.runs) == 1 else f"{given.runs[0]} and {len(given.runs) - 1} more"
        raise UserError(f"no reading to draw in {names}: neither optimality/gap nor nc/train/nc1-nc3.")
    for path in drawn:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


def _read_runs(folders: Sequence[str]) -> list[Run]:
    """Read run folders, of many only what is drawn."""
    if len(folders) <= _MOST_TABLES:
        return [read_run(folder) for folder in folders]
    fit = partial(fit_straight, most_points=150)
    console = Console(stderr=True)
    shown = track(folders, "reading", console=console, transient=True, disable=not console.is_terminal)
    return [thinned(read_run(folder, fit)) for folder in shown]


def _theory(words: Sequence[str]) -> None:
    parser = command_parser(
        "theory",
        "Print what the theory predicts for an unconstrained feature model: the optimum, the eigenvalues of the "
        "Hessian there, and how fast gradient descent gets there. Nothing is trained; sizes may be any.",
        "examples:\n  python -m nclightning theory --config ufm_mse --lambda 5e-4\n"
        "  python -m nclightning theory --loss ce --num_classes 1000 --samples_per_class 1300 --feature_dim 2048 "
        "--lambda 5e-9 --picture spectrum.pdf\n"
        '  python -m nclightning theory --problem unbalanced_ce --problem.counts "[100, 10, 1]" --feature_dim 5 '
        f"--lambda_w 1e-3 --lambda_h 1e-3 --thresholds\n\nproblems:\n  {', '.join(problem_names())}",
    )
    parser.add_argument("--config", help="a YAML file, or a shipped configuration; the options below override it")
    parser.add_argument("--loss", choices=("mse", "ce"), help="of balanced classes with hard labels")
    for name, letter in (("num_classes", "K"), ("samples_per_class", "n"), ("feature_dim", "d")):
        parser.add_argument(f"--{name}", type=int, metavar=letter)
    parser.add_argument("--lambda", type=float, dest="lambda_", metavar="X", help="lambda_w = n X and lambda_h = X")
    for name in ("lambda_w", "lambda_h"):
        parser.add_argument(f"--{name}", type=float, metavar="X", help="this penalty alone")
    parser.add_argument(
        "--problem",
        metavar="NAME",
        help="another problem: a name below, or the path of a function that makes one; --problem.ARGUMENT VALUE "
        "gives it an argument",
    )
    parser.add_argument(
        "--thresholds", action="store_true", help="find the penalties at which the rank of the optimum falls"
    )
    parser.add_argument("--picture", metavar="FILE", help="draw the spectrum, too; .png, .pdf, .svg, ...")
    words, arguments = split_options(words)
    given = vars(parser.parse_args(words))
    problem, console = problem_of(given, arguments), Console()
    console.print(describe_problem(problem), highlight=False, soft_wrap=True, markup=False)
    if isinstance(problem, Problem) and problem.num_groups * problem.num_classes > _LONG:
        print(f"Without a formula, solving for {problem.num_groups} groups may take minutes.", file=sys.stderr)
    drawn, missing = None, None
    if given["picture"] is not None:
        try:
            with _waiting(problem):
                drawn = draw_spectrum(problem, given["picture"])
        except NoAnswer as error:
            missing = error
    parts = prediction_tables(problem, given["thresholds"])
    while True:
        with _waiting(problem):
            part = next(parts, None)
        if part is None:
            break
        console.print()
        console.print(part, highlight=False)
    if missing is not None:
        raise UserError(f"--picture {given['picture']}: not drawn. {missing}") from missing
    if drawn is not None:
        console.print(f"wrote {drawn}", highlight=False, soft_wrap=True)


@contextmanager
def _waiting(problem: UFMProblem | Problem) -> Iterator[None]:
    """Say on a terminal that something is being computed."""
    with nullcontext() if isinstance(problem, UFMProblem) else Console(stderr=True).status("computing"):
        yield


def _measure(words: Sequence[str]) -> None:
    from nclightning.series.command import measure_files  # noqa: PLC0415

    measure_files(words)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "measure": _measure,
    "reproduce": _reproduce,
    "plot": _plot,
    "theory": _theory,
}
