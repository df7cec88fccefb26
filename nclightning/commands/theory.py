"""``python -m nclightning theory``: the predictions of the theory for a problem."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich.console import Console

from nclightning import figures
from nclightning.command_parser import command_parser
from nclightning.errors import UserError
from nclightning.figures.prediction import describe_problem, prediction_tables
from nclightning.problem_options import problem_names, problem_of, split_options
from nclightning.problems import NoAnswer, Problem
from nclightning.theory import UFMProblem

__all__ = ["print_theory"]

_LONG = 400**2  # Product of groups and classes above which the optimum may take minutes to compute.


def print_theory(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: Arguments that follow ``theory``.

    Raises:
        ValueError: If the options describe no problem, or if the picture cannot be drawn.
    """
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
                drawn = figures.draw_spectrum(problem, given["picture"])
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
    """Show on a terminal that a computation is running."""
    with nullcontext() if isinstance(problem, UFMProblem) else Console(stderr=True).status("computing"):
        yield
