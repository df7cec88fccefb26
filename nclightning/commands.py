"""Commands that train nothing themselves: ``python -m nclightning measure|reproduce|plot|theory``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from nclightning.arguments import resolve_lambdas
from nclightning.command_parser import command_parser
from nclightning.configurations import find_configuration, model_arguments
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
from nclightning.reproduction import reproduce
from nclightning.reproduction.experiments import ERROR_BOUND, FIGURES
from nclightning.theory import UFMProblem

__all__ = ["COMMANDS"]

_MOST_TABLES = 12  # More runs share one table.
_MOST = 10**15  # Products of sizes stay far from the largest float.


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
    for draw, name, prefix in ((draw_gaps, "gap", "optimality/gap"), (draw_collapse, "collapse", "nc/train/")):
        having = [run for run in runs if any(tag.startswith(prefix) for tag in run.summary.last)]
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
        "Print what the theory predicts for the unconstrained feature model: the optimum, the eigenvalues of the "
        "Hessian there, and how fast gradient descent gets there. Nothing is trained; sizes may be any.",
        "examples:\n  python -m nclightning theory --config ufm_mse --lambda 5e-4\n"
        "  python -m nclightning theory --loss ce --num_classes 1000 --samples_per_class 1300 --feature_dim 2048 "
        "--lambda 5e-9 --picture spectrum.pdf",
    )
    parser.add_argument("--config", help="a YAML file, or a shipped configuration; the options below override it")
    parser.add_argument("--loss", choices=("mse", "ce"))
    for name, letter in (("num_classes", "K"), ("samples_per_class", "n"), ("feature_dim", "d")):
        parser.add_argument(f"--{name}", type=int, metavar=letter)
    parser.add_argument("--lambda", type=float, dest="lambda_", metavar="X", help="lambda_w = n X and lambda_h = X")
    for name in ("lambda_w", "lambda_h"):
        parser.add_argument(f"--{name}", type=float, metavar="X", help="this penalty alone")
    parser.add_argument("--picture", metavar="FILE", help="draw the spectrum, too; .png, .pdf, .svg, ...")
    given = vars(parser.parse_args(words))
    problem, console = _problem_of(given), Console()
    drawn = None if given["picture"] is None else draw_spectrum(problem, given["picture"])
    console.print(describe_problem(problem), highlight=False, soft_wrap=True)
    for table in prediction_tables(problem):
        console.print()
        console.print(table)
    if drawn is not None:
        console.print(f"wrote {drawn}", highlight=False, soft_wrap=True)


def _problem_of(given: Mapping[str, Any]) -> UFMProblem:
    """Build the problem from options, over those of a configuration."""
    options: dict[str, Any] = {}
    if given["config"] is not None:
        options = model_arguments(find_configuration(given["config"]))
        if options.get("penalty", "features") != "features":
            raise UserError(
                f"--config {given['config']}: penalty={options['penalty']!r} has no closed form, only 'features' has."
            )
    if given["lambda_"] is not None:  # It overrides both penalties of a configuration, as in a fit.
        options = options | {"lambda_w": None, "lambda_h": None}
    options = options | {name: value for name, value in given.items() if value is not None}
    for name in ("loss", "num_classes", "samples_per_class", "feature_dim"):
        if options.get(name) is None:
            raise UserError(f"{name} is missing: give --{name}, or a --config that has it.")
    single, lambda_w, lambda_h = (_number(name, options.get(name)) for name in ("lambda_", "lambda_w", "lambda_h"))
    sizes = options["num_classes"], options["samples_per_class"], options["feature_dim"]
    for name, size in zip(("num_classes", "samples_per_class", "feature_dim"), sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < _MOST:
            raise UserError(f"{name} must be an integer between 1 and {_MOST:.0e}, got {size!r}.")
    return UFMProblem(options["loss"], *sizes, *resolve_lambdas(lambda_w, lambda_h, single, sizes[1]))


def _number(name: str, value: Any) -> float | None:
    """Take a number of a configuration, where 1e-4 is text to YAML."""
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name.rstrip('_')} must be a number, got {value!r}.") from None
    if math.isfinite(number) and number != 0 and not 1e-100 < abs(number) < 1e100:
        raise UserError(f"{name.rstrip('_')} must be between 1e-100 and 1e100, got {value!r}.")
    return number


def _measure(words: Sequence[str]) -> None:
    from nclightning.series.command import measure_files  # noqa: PLC0415

    measure_files(words)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "measure": _measure,
    "reproduce": _reproduce,
    "plot": _plot,
    "theory": _theory,
}
