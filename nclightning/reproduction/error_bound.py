r"""A study of the error bound ``dist <= kappa ||grad F||`` near the optimal set, and of the constants of Fact 1."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.files import replaced
from nclightning.objective import LossName, Objective
from nclightning.optim import ArmijoGD
from nclightning.theory import Solution, UFMProblem

__all__ = [
    "NEAR",
    "Constants",
    "Reading",
    "Study",
    "read",
    "study_constants",
    "study_error_bound",
    "study_problem",
    "write",
]

_LOSSES: tuple[LossName, ...] = ("mse", "ce")
CLASSES = {loss: tuple(range(2, 13)) for loss in _LOSSES}
# Sizes of the paper; K q = 0.3 and equal norms of a feature and its head row.
_SAMPLES_PER_CLASS, _FEATURE_DIM, _KQ = 10, 20, 0.3
# Relative distance up to which the bound is read as local.
NEAR = 1e-3
_RADII = tuple(10.0 ** (-i / 2) for i in range(13))
_DIRECTIONS = 10
_FLOOR = 1e-10
_MOST_ITERATIONS = 20_000


@dataclass(frozen=True)
class Reading:
    """A point near the optimal set.

    Attributes:
        kind: ``"perturbation"`` of a random optimum, ``"trajectory"`` of gradient descent, or ``"threshold"``, a point
            along the flat direction where ``K q = 1``.
        loss: ``"mse"`` or ``"ce"``.
        num_classes: K.
        distance: To the optimal set, relative to its norm.
        ratio: Distance over gradient norm, times mu; at the threshold, where mu is zero, not multiplied.
    """

    kind: str
    loss: str
    num_classes: int
    distance: float
    ratio: float


@dataclass(frozen=True)
class Constants:
    """Constants of Fact 1 along a run: the worst over its accepted steps with a gap below 1e-2 and above 1e-20.

    Attributes:
        loss: ``"mse"`` or ``"ce"``.
        kappa_1: Least decrease of the gap over the squared move (sufficient decrease).
        kappa_2: Largest gap over the sum of squared distance before and squared move (cost-to-go).
        kappa_3: Largest gradient norm over the move (safeguard).
        steps: How many.
    """

    loss: str
    kappa_1: float
    kappa_2: float
    kappa_3: float
    steps: int


Row = TypeVar("Row", Reading, Constants)


class Study(NamedTuple):
    """What the report shows of both studies.

    Attributes:
        readings: Of the error bound.
        constants: Of Fact 1.
    """

    readings: list[Reading]
    constants: list[Constants]


def study_error_bound() -> list[Reading]:
    """Measure distance and gradient norm at perturbed optima, along descents, and at the threshold.

    Returns:
        All readings; the same at each call.
    """
    readings: list[Reading] = []
    for loss, classes in CLASSES.items():
        for num_classes in classes:
            problem = study_problem(loss, num_classes)
            generator = torch.Generator().manual_seed(num_classes)
            readings += _perturb(problem, generator)
            readings += _descend(problem, generator)
    return [*readings, *_approach_threshold()]


def study_constants() -> list[Constants]:
    """Measure the constants of Fact 1 along one line-search run per loss, at the penalties of the shipped runs.

    Returns:
        One entry per loss.
    """
    return [_constants(UFMProblem(loss, 10, 10, 20, 5e-2, 5e-3)) for loss in _LOSSES]


def write(path: Path, rows: Sequence[Reading] | Sequence[Constants]) -> None:
    """Write readings or constants as CSV, floats in full.

    Args:
        path: The file.
        rows: At least one, all of one kind.
    """
    with replaced(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(rows[0])])
        writer.writerows([repr(v) if isinstance(v, float) else v for v in astuple(row)] for row in rows)


def read(path: Path, kind: type[Row]) -> list[Row]:
    """Read what :func:`write` wrote.

    Args:
        path: The file.
        kind: :class:`Reading` or :class:`Constants`.

    Returns:
        Its rows.

    Raises:
        ValueError: If it holds none, or something else.
    """
    convert = {"str": str, "int": int, "float": float}  # Fields carry their types as text.
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                kind(*(convert[str(field.type)](row[field.name]) for field in fields(kind)))
                for row in csv.DictReader(file)
            ]
    except (ValueError, TypeError, KeyError, csv.Error):
        rows = []
    if not rows:
        raise UserError(f"{path} is damaged. Delete it to have it made anew.")
    return rows


def study_problem(loss: str, num_classes: int) -> UFMProblem:
    """Build the problem of a loss and a number of classes."""
    q = _KQ / num_classes
    sizes = num_classes, _SAMPLES_PER_CLASS, _FEATURE_DIM
    return UFMProblem(cast("LossName", loss), *sizes, q, q / _SAMPLES_PER_CLASS)


def _free(point: Solution) -> list[Tensor]:
    return [part for part in (point.weight, point.features, point.bias) if part is not None]


def _solution(parts: Sequence[Tensor], labels: Tensor) -> Solution:
    """Put together what :func:`_free` took apart."""
    return Solution(parts[0], parts[1], labels, parts[2] if len(parts) > 2 else None)


def _gradients(problem: UFMProblem, point: Solution) -> tuple[Tensor, ...]:
    objective = Objective(problem.loss, problem.lambda_w, problem.lambda_h)
    return torch.autograd.grad(objective(point.weight, point.features, point.labels, point.bias), _free(point))


def _measure(problem: UFMProblem, point: Solution, scale: float) -> tuple[float, float]:
    """Distance, and distance over gradient norm times ``scale``."""
    gradients = _gradients(problem, _solution([part.detach().requires_grad_() for part in _free(point)], point.labels))
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    distance = float(problem.distance(point.weight, point.features, point.labels, point.bias, check_labels=False))
    return distance, scale * distance / norm


def _perturb(problem: UFMProblem, generator: torch.Generator) -> Iterator[Reading]:
    optimum, mu = problem.random_optimum(generator), problem.mu
    for radius in _RADII:
        for _ in range(_DIRECTIONS):
            noise = [torch.randn(part.shape, dtype=torch.float64, generator=generator) for part in _free(optimum)]
            size = radius * problem.optimum_norm / math.sqrt(sum(float(part.square().sum()) for part in noise))
            moved = [part + size * n for part, n in zip(_free(optimum), noise, strict=True)]
            distance, ratio = _measure(problem, _solution(moved, optimum.labels), mu)
            yield _reading("perturbation", problem, distance / problem.optimum_norm, ratio)


def _descend(problem: UFMProblem, generator: torch.Generator) -> Iterator[Reading]:
    """Follow gradient descent with the fixed step 1/L from a perturbed optimum, whose slowest mode it ends in."""
    start = problem.random_optimum(generator)
    scale = 0.3 * problem.optimum_norm / math.sqrt(sum(part.numel() for part in _free(start)))
    parts = [
        (part + scale * torch.randn(part.shape, dtype=torch.float64, generator=generator)).requires_grad_()
        for part in _free(start)
    ]
    point, step, mu = _solution(parts, start.labels), 1 / problem.smoothness, problem.mu
    for iteration in range(_MOST_ITERATIONS):
        if iteration % 20 == 0:
            distance, ratio = _measure(problem, point, mu)
            if distance <= _FLOOR * problem.optimum_norm:
                return
            yield _reading("trajectory", problem, distance / problem.optimum_norm, ratio)
        gradients = _gradients(problem, point)
        with torch.no_grad():
            for part, gradient in zip(parts, gradients, strict=True):
                part.sub_(gradient, alpha=step)


def _approach_threshold() -> Iterator[Reading]:
    """Points along which F is flat to third order where ``K q = 1``: the optimum is zero, head and features a frame."""
    for loss in _LOSSES:
        K, n, d = 4, 4, 6
        problem = UFMProblem(loss, K, n, d, 1 / 4, 1 / 16)  # K q = 1 without a rounding.
        bias = problem.random_optimum(torch.Generator().manual_seed(0)).bias
        frame = UFMProblem("mse", K, n, d, 1 / 40, 1 / 160).random_optimum(torch.Generator().manual_seed(0))
        size = math.sqrt(float(frame.weight.square().sum() + frame.features.square().sum()))
        for radius in _RADII[:-2]:  # Nearer, rounding of features of that size is more than the gradient.
            weight, features = (radius / size * part for part in (frame.weight, frame.features))
            distance, ratio = _measure(problem, Solution(weight, features, frame.labels, bias), 1.0)
            yield _reading("threshold", problem, distance, ratio)


def _reading(kind: str, problem: UFMProblem, distance: float, ratio: float) -> Reading:
    return Reading(kind, problem.loss, problem.num_classes, distance, ratio)


def _constants(problem: UFMProblem) -> Constants:
    generator, start = torch.Generator().manual_seed(0), problem.random_optimum(torch.Generator().manual_seed(0))
    params = [
        torch.nn.Parameter(torch.randn(part.shape, dtype=torch.float64, generator=generator)) for part in _free(start)
    ]
    point = _solution(params, start.labels)
    objective, optimizer = Objective(problem.loss, problem.lambda_w, problem.lambda_h), ArmijoGD(params)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(*point)
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def gap_and_distance() -> tuple[float, float]:
        return float(problem.optimality_gap(*point, check_labels=False)), float(
            problem.distance(*point, check_labels=False)
        )

    kappa_1, kappa_2, kappa_3, steps = math.inf, 0.0, 0.0, 0
    gap, distance = gap_and_distance()
    while gap > 1e-20:
        before = [p.detach().clone() for p in params]
        optimizer.step(closure)
        outcome = optimizer.outcome
        assert outcome is not None
        assert outcome.accepted
        moved = math.sqrt(sum(float((p.detach() - x).square().sum()) for p, x in zip(params, before, strict=True)))
        after, distance_after = gap_and_distance()
        if gap < 1e-2:
            kappa_1 = min(kappa_1, (gap - after) / moved**2)
            kappa_2 = max(kappa_2, after / (distance**2 + moved**2))
            kappa_3 = max(kappa_3, outcome.previous_grad_norm / moved)
            steps += 1
        gap, distance = after, distance_after
    return Constants(problem.loss, kappa_1, kappa_2, kappa_3, steps)
