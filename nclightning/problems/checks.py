"""Checks of a problem's arguments and of points, with errors that name them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.problems.frames import one_hot
from nclightning.problems.loss import Loss
from nclightning.problems.orbit import Moments, Solution

if TYPE_CHECKING:
    from nclightning.problems.problem import Problem
    from nclightning.problems.with_optimum import WithOptimum

__all__ = [
    "check_arguments",
    "check_groups",
    "check_labels",
    "check_point",
    "check_table",
    "checked_moments",
    "checked_point",
    "read_numbers",
    "rows_are_classes",
]

# Number of segments of each kind on which convexity of a loss is tested.
_SEGMENTS = 256


def check_groups(
    targets: Tensor | Sequence[Sequence[float]] | str | None, counts: Tensor | Sequence[int], loss: Loss
) -> tuple[Tensor, Tensor]:
    """Return checked targets ``(M, K)``, float64, and counts ``(M,)``, int64."""
    if not isinstance(loss, Loss):
        raise UserError(f"loss must be a Loss such as CrossEntropy(), got {loss!r}.")
    numbers = read_numbers(counts, "counts must be integers")
    if targets is None or (isinstance(targets, str) and targets == "hard"):
        targets = one_hot(numbers.numel())
    rows = check_table(targets, loss)
    if tuple(numbers.shape) != rows.shape[:1]:
        raise UserError(
            f"counts must hold a number for each of the {len(rows)} rows of targets, got the shape "
            f"{tuple(numbers.shape)}."
        )
    if not (bool((numbers == numbers.round()).all()) and bool((numbers >= 0).all()) and bool((numbers > 0).any())):
        given = torch.as_tensor(counts, device="cpu").tolist()
        raise UserError(f"counts must be integers, none negative and one positive, got {given}.")
    if not type(loss).__module__.startswith("nclightning."):
        _probe(loss, rows)
    return rows, numbers.long()


def check_table(targets: Tensor | Sequence[Sequence[float]] | str, loss: Loss) -> Tensor:
    """Return a checked copy of the targets ``(M, K)``, float64 on the host."""
    rows = read_numbers(targets, "targets must be numbers (M, K)").clone()
    if rows.ndim != 2 or not rows.numel() or not bool(rows.isfinite().all()):
        raise UserError(f"targets must be a finite matrix (M, K), got the shape {tuple(rows.shape)}.")
    loss.check_targets(rows)
    return rows


def _probe(loss: Loss, targets: Tensor) -> None:
    """Refuse a loss that is not convex or falls below its lower bound: certified bounds would be wrong.

    At the middle of a segment, a convex loss is at most the mean of its values at both ends. This is tested on some
    thousand random segments of several lengths, along single coordinates and in general directions. The test finds
    mistakes; it proves nothing.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    K = targets.shape[1]
    draw: Any = {"generator": generator, "device": "cpu"}  # Whatever torch's default device is.
    rows = targets[torch.randint(len(targets), (_SEGMENTS,), **draw)]
    axes = one_hot(K)[torch.randint(K, (_SEGMENTS,), **draw)]
    for size in (0.1, 1.0, 3.0, 10.0):
        middle, dense = torch.randn(2, _SEGMENTS, K, dtype=targets.dtype, **draw)
        for step in (0.1 * size * axes, size * axes, 0.1 * size * dense, size * dense):
            low, high = (loss.value(size * middle + sign * step, rows) for sign in (-1, 1))
            here = loss.value(size * middle, rows)
            least = float(torch.stack([low, here, high]).min())
            if least < loss.lower_bound - 1e-9 * (1 + abs(loss.lower_bound)):
                raise UserError(
                    f"{type(loss).__name__} takes the value {least:.6g}, below its lower_bound={loss.lower_bound:.6g}, "
                    "which certified bounds depend on: set lower_bound to a number that it never falls below."
                )
            excess = here - (low + high) / 2
            if bool((excess > 1e-9 * (1 + low.abs() + high.abs())).any()):
                worst = int(excess.argmax())
                raise UserError(
                    f"loss must be convex in the logits, and {type(loss).__name__} is not: between two points it is "
                    f"{float(excess[worst]):.3g} above their mean. Optimum and bounds are known of convex losses only."
                )


def rows_are_classes(targets: Tensor) -> bool:
    """Whether each of K classes has one row of targets ``(M, K)``, in which it is the largest entry."""
    if targets.shape[0] != targets.shape[1]:
        return False
    largest = targets.diagonal().unsqueeze(1)
    return bool(((targets < largest).sum(dim=1) == len(targets) - 1).all())


def read_numbers(given: Any, expected: str) -> Tensor:
    """Convert to float64 on the host. Python floats keep all digits, which torch's default dtype would round.

    Raises:
        ValueError: If they are not numbers; the message begins with ``expected``.
    """
    try:
        return torch.as_tensor(given, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{expected}, got {given!r:.80}.") from error


def check_arguments(problem: Problem) -> None:
    """Raise an error unless sizes and penalties are in range."""
    dim, bias = problem.feature_dim, problem.bias
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise UserError(f"feature_dim must be an integer of at least 1, got {dim!r}.")
    for name in ("lambda_w", "lambda_h", "tolerance"):
        if not _is_positive(getattr(problem, name)):
            raise UserError(f"{name} must be positive and finite, got {getattr(problem, name)!r}.")
    if bias not in ("none", "free") and not _is_positive(bias):
        raise UserError(f"bias must be 'none', 'free' or a positive penalty, got {bias!r}.")


def _is_positive(value: object) -> bool:
    """Whether a value is a positive, finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]


def check_point(
    problem: WithOptimum, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None, *, labels_too: bool
) -> None:
    """Raise an error unless a point has the sizes of the problem and, with a transfer to the host, its counts."""
    K, d, N = problem.num_classes, problem.feature_dim, problem.num_samples
    _check_shapes(("weight", weight, (K, d)), ("features", features, (N, d)), ("labels", labels, (N,)))
    _check_bias(problem, bias, is_needed=problem.has_bias, is_allowed=problem.has_bias)
    if labels_too:
        check_labels(problem, labels)


def _check_shapes(*given: tuple[str, Tensor, tuple[int, ...]]) -> None:
    """Raise an error unless each tensor has its shape."""
    for name, tensor, shape in given:
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} must have shape {shape} for this problem, got {tuple(tensor.shape)}.")


def _check_bias(problem: WithOptimum, bias: Tensor | None, *, is_needed: bool, is_allowed: bool) -> None:
    """Raise an error unless the bias has its shape, or is None where it may be."""
    came, shape = None if bias is None else tuple(bias.shape), (problem.num_classes,)
    if bias is not None and not is_allowed:
        raise UserError(f"bias must be None for {problem.bias_argument}: the optimum is that of a head without one.")
    if came != shape and (is_needed or bias is not None):
        raise UserError(f"bias must have shape {shape} for {problem.bias_argument}, got {came}.")


def check_labels(problem: WithOptimum, labels: Tensor) -> None:
    """Raise an error unless each group occurs as often as the problem says, with one transfer to the host."""
    if labels.dtype != torch.int64:
        raise UserError(f"labels must be int64, got {labels.dtype}.")
    if not torch.equal(labels.sort().values, problem.labels(labels.device)):
        counts = problem.samples_per_group
        often = f"exactly {counts} times" if isinstance(counts, int) else "as often as counts says"
        raise UserError(
            f"labels must hold each of the groups 0..{problem.num_groups - 1} {often}: the optimum depends on the "
            "counts."
        )


def checked_point(
    problem: WithOptimum,
    weight: Tensor,
    features: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    labels_too: bool = True,
) -> Solution:
    """Check a point against the problem and cast it to float64."""
    check_point(problem, weight, features, labels, bias, labels_too=labels_too)
    return Solution(_double(weight), _double(features), labels, None if bias is None else _double(bias))


def checked_moments(
    problem: WithOptimum, weight: Tensor, means: Tensor, spread: Tensor, bias: Tensor | None, *, needs_bias: bool
) -> Moments:
    """Check a point that is given by its moments, and cast it to float64."""
    K, M, d = problem.num_classes, problem.num_groups, problem.feature_dim
    _check_shapes(("weight", weight, (K, d)), ("means", means, (M, d)))
    _check_bias(problem, bias, is_needed=needs_bias, is_allowed=problem.moments_take_bias)
    return Moments(_double(weight), _double(means), _double(spread), None if bias is None else _double(bias))


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()
