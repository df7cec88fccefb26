"""Seven optimizers on one problem from one start: their rates, their evaluations, and NC0 at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nclightning.figures import Run, draw_optimizers, fit_rate, read_run
from nclightning.objective import LossName
from nclightning.quantities import DISTANCE, EVALUATIONS, GAP, NC0, NC1, NC2, NC3
from nclightning.reproduction.claims import Claim
from nclightning.reproduction.experiments import OPTIMIZERS, Experiment
from nclightning.theory import UFMProblem

__all__ = [
    "Runs",
    "check_optimizers",
    "draw_comparison",
    "optimizer_experiments",
    "optimizer_section",
    "read_optimizers",
]

# By loss and name of the optimizer.
Runs = Mapping[tuple[LossName, str], Run]

_COLLAPSE = tuple(each.tag("train") for each in (NC0, NC1, NC2, NC3))
_LOSSES: tuple[LossName, ...] = ("mse", "ce")
# One number for head and features, because AdamW has one.
_PENALTY = 5e-3
# Momentum with a fixed step diverges from entries of size 1, and converges from these.
_INIT_SCALE = 0.1
_DISTANCE = 1e-10  # To the optimal set, at which evaluations are counted.
_SAME_RATE = 0.05
_COUPLED_NC0, _DECOUPLED_NC0 = 1e-10, 1e-3
_FEWER = 0.4


@dataclass(frozen=True)
class Method:
    """An optimizer of the comparison.

    Attributes:
        title: In figure and table.
        words: Of the command line, which choose it.
        has_rate: Whether a claim is made about its rate.
        is_coupled: Whether the penalties are in the objective.
    """

    title: str
    words: tuple[str, ...]
    has_rate: bool = False
    is_coupled: bool = True


def _chosen(path: str, **options: str) -> tuple[str, ...]:
    optimizer = "--model.init_args.optimizer"
    further = [word for name, value in options.items() for word in (f"{optimizer}.init_args.{name}", value)]
    return optimizer, path, *further


# Without amsgrad, Adam with a constant lr circles round the optimum and comes no nearer.
_ADAM = {"lr": "0.01", "amsgrad": "true"}
METHODS = {
    "gradient_descent": Method("gradient descent", _chosen("torch.optim.SGD"), has_rate=True),
    "armijo_gd": Method("ArmijoGD", _chosen("nclightning.optim.ArmijoGD")),
    "nesterov": Method("Nesterov", _chosen("nclightning.optim.Nesterov"), has_rate=True),
    "heavy_ball": Method("heavy ball", _chosen("nclightning.optim.HeavyBall"), has_rate=True),
    "armijo_lbfgs": Method("ArmijoLBFGS", _chosen("nclightning.optim.ArmijoLBFGS")),
    "adam": Method("Adam", _chosen("torch.optim.Adam", **_ADAM)),
    "adamw": Method(
        "AdamW",
        _chosen("torch.optim.AdamW", **_ADAM | {"lr": "0.03", "weight_decay": f"{_PENALTY:g}"}),
        is_coupled=False,
    ),
}


def problem_of(loss: LossName) -> UFMProblem:
    """Build the problem of a loss, at the sizes of the shipped configurations."""
    return UFMProblem(loss, 10, 10, 20, _PENALTY, _PENALTY)


def optimizer_experiments(quick: bool = False) -> list[Experiment]:
    """List the runs, the long ones last.

    Args:
        quick: Whether AdamW, which takes most of the time, stops early.

    Returns:
        One for each optimizer and loss.
    """
    return [
        Experiment(f"{OPTIMIZERS}_{loss}_{name}", (OPTIMIZERS,), (*_common(loss), *_own(loss, name, quick)))
        for name in METHODS
        for loss in _LOSSES
    ]


def _common(loss: LossName) -> Iterator[str]:
    yield from ("--config", f"ufm_{loss}", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
    yield from ("--model.init_args.init_scale", f"{_INIT_SCALE:g}", "--neural_collapse.measures", "[nc0,nc1,nc2,nc3]")


def _own(loss: LossName, name: str, quick: bool) -> Iterator[str]:
    method = METHODS[name]
    penalty = f"{_PENALTY:g}" if method.is_coupled else "0"
    yield from method.words
    yield from ("--model.init_args.lambda_w", penalty, "--model.init_args.lambda_h", penalty)
    cadence = "1" if method.is_coupled else "10"
    for monitor in ("optimality", "neural_collapse"):
        yield from (f"--{monitor}.every_n_iterations", cadence)
    if name == "gradient_descent":
        # To six digits: the same words on every machine.
        yield from ("--model.init_args.optimizer.init_args.lr", f"{problem_of(loss).best_step:.6g}")
    if not method.is_coupled:
        yield from ("--optimality.theory", "false", "--optimality.stop_distance", "null")
        yield from ("--optimality.stop_at_floor", "false", "--trainer.max_steps", "4000" if quick else "16000")


def read_optimizers(folder: Path) -> Runs:
    """Read the runs of all optimizers.

    Args:
        folder: Of the sweep.

    Returns:
        The runs by loss and optimizer.
    """
    return {
        (loss, name): read_run(folder / "runs" / f"{OPTIMIZERS}_{loss}_{name}", fit_rate)
        for loss in _LOSSES
        for name in METHODS
    }


def draw_comparison(runs: Runs, folder: Path) -> list[Path]:
    """Draw the figure.

    Args:
        runs: Of :func:`read_optimizers`.
        folder: Where to write.

    Returns:
        The PNG and the PDF.
    """
    titled: dict[str, dict[str, Run]] = {}
    for (loss, name), run in runs.items():
        titled.setdefault(loss, {})[METHODS[name].title] = run
    return draw_optimizers(titled, folder / OPTIMIZERS)


def check_optimizers(runs: Runs) -> list[Claim]:
    """Decide what is claimed of the optimizers.

    Args:
        runs: Of :func:`read_optimizers`.

    Returns:
        The claims.
    """
    return [_rates_are_predicted(runs), _nc0_vanishes(runs), _nc0_stays(runs), *_needs_fewer(runs)]


def _rates_are_predicted(runs: Runs) -> Claim:
    held, parts = True, []
    for loss in _LOSSES:
        ratios = {}
        for name, method in METHODS.items():
            if method.has_rate:
                measured, predicted = _rates(runs[loss, name])
                ratios[method.title] = measured / predicted
        held &= all(abs(ratio - 1) <= _SAME_RATE for ratio in ratios.values())
        parts.append(f"{loss.upper()}: {', '.join(f'{title} {ratio:.3f}' for title, ratio in ratios.items())}")
    return Claim(
        OPTIMIZERS,
        "Gradient descent, Nesterov's method and the heavy ball, each with its best fixed step, converge as fast as "
        "the ends of the Hessian's spectrum say.",
        f"iterations per decade of the gap within {_SAME_RATE:.0%} of those predicted, for both losses",
        held,
        f"measured over predicted: {'; '.join(parts)}",
    )


def _rates(run: Run) -> tuple[float, float]:
    """Iterations per decade of the gap, as measured and as predicted; nan where there is no line."""
    lines = run.summary.fits.get(GAP.tag()), run.summary.predicted
    measured, predicted = (float("nan") if line is None else line.iterations_per_decade for line in lines)
    return measured, predicted


def _last(run: Run, tag: str) -> float:
    return float(run.readings.values[tag][-1])


def _nc0_vanishes(runs: Runs) -> Claim:
    last = [_last(run, _COLLAPSE[0]) for (_, name), run in runs.items() if METHODS[name].is_coupled]
    return Claim(
        OPTIMIZERS,
        "With the penalties in the objective NC0 vanishes, whatever the optimizer.",
        f"NC0 at most {_COUPLED_NC0:g} at the end of each run",
        all(value <= _COUPLED_NC0 for value in last),
        f"{len(last)} runs, NC0 at most {max(last):.1e} at the end",
    )


def _nc0_stays(runs: Runs) -> Claim:
    held, parts = True, []
    for (loss, name), run in runs.items():
        if not METHODS[name].is_coupled:
            half = float(
                np.interp(run.summary.iteration / 2, run.readings.iterations, run.readings.values[NC0.tag("train")])
            )
            last = _last(run, _COLLAPSE[0])
            held &= last >= max(_DECOUPLED_NC0, half / 2)
            parts.append(f"{loss.upper()}: {half:.2g} at half of the run, {last:.2g} at its end")
    return Claim(
        OPTIMIZERS,
        "With decoupled decay, AdamW's, NC0 does not vanish.",
        f"at least {_DECOUPLED_NC0:g} at the end, and at least half of what it was at half of the run",
        held,
        "; ".join(parts),
    )


def _needs_fewer(runs: Runs) -> Iterator[Claim]:
    for loss in _LOSSES:
        counts = [_evaluations(runs[loss, name]) for name in ("armijo_lbfgs", "armijo_gd")]
        ours, theirs = (float("nan") if count is None else count for count in counts)
        yield Claim(
            OPTIMIZERS,
            f"{loss.upper()}: ArmijoLBFGS needs far fewer evaluations than ArmijoGD.",
            f"at most {_FEWER:g} times as many to a distance of {_DISTANCE:g} to the optimal set",
            ours <= _FEWER * theirs,
            f"{ours:g} of {theirs:g}: {ours / theirs:.2f}",
        )


def _evaluations(run: Run) -> int | None:
    """Count the evaluations of F and its gradient until the distance was reached; None if it was not."""
    values = run.readings.values
    near = np.flatnonzero(values.get(DISTANCE.tag(), np.full_like(run.readings.iterations, np.nan)) <= _DISTANCE)
    counts = values.get(EVALUATIONS.tag(), run.readings.iterations)  # Others evaluate once in an iteration.
    return int(counts[near[0]]) if len(near) else None


def optimizer_section(runs: Runs) -> Iterator[str]:
    """Write the section of the report.

    Args:
        runs: Of :func:`read_optimizers`.

    Yields:
        Lines of Markdown.
    """
    yield "## Seven optimizers on one problem"
    yield ""
    yield f"![Gap and NC0 with seven optimizers]({OPTIMIZERS}.png)"
    yield ""
    yield (
        f"The unconstrained feature model with K = n = 10, d = 20 and lambda_W = lambda_H = {_PENALTY:g}. All runs of "
        f"a loss begin at the same point, whose entries have standard deviation {_INIT_SCALE:g}: from entries of size "
        "1, the start of the other figures, momentum with a fixed step diverges. Gradient descent has the step "
        "2/(L + mu), heavy ball and Nesterov's method have the step and momentum of their fastest convergence. Adam "
        "trains the same objective with lr 0.01. AdamW has lr 0.03 and no penalties in its objective, but a decoupled "
        f"decay of {_PENALTY:g}. Both are the variant AMSGrad: with a constant lr Adam itself ends in a cycle round "
        "the optimum."
    )
    yield ""
    yield (
        "Iterations per decade are here those of a line through the last 15 decades of the gap, or three quarters of "
        "all decades if that is less. Predicted ones are those of the predicted decay over the same iterations. "
        f"Evaluations of F and its gradient are counted to a distance of {_DISTANCE:g} to the optimal set. NC0 is the "
        "norm of the sum of the head's rows. NC0 to NC3 are those at the end, which is a distance of 1e-12, and for "
        "AdamW, whose objective has no minimum, a number of iterations."
    )
    yield ""
    columns = ["loss", "optimizer", "it./decade", "predicted", "iterations", "evaluations", "NC0", "NC1", "NC2", "NC3"]
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for (loss, name), run in runs.items():
        rates = ("-" if np.isnan(rate) else f"{rate:.4g}" for rate in _rates(run))
        cells = [loss.upper(), METHODS[name].title, *rates, str(run.summary.iteration), str(_evaluations(run) or "-")]
        yield f"| {' | '.join([*cells, *(f'{_last(run, tag):.1e}' for tag in _COLLAPSE)])} |"
