"""Checks of a problem's arguments and of points, with errors that name them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.problems.loss import Loss
from nclightning.problems.optimal_set import Moments, Solution

if TYPE_CHECKING:
    from nclightning.problems.problem import Problem

__all__ = ["admit", "admit_moments", "check_arguments", "check_labels", "check_shapes", "table"]


def table(
    targets: Tensor | Sequence[Sequence[float]] | None, counts: Tensor | Sequence[int], loss: Loss
) -> tuple[Tensor, Tensor]:
    """Targets ``(M, K)`` float64 and counts ``(M,)`` int64, checked."""
    if not isinstance(loss, Loss):
        raise UserError(f"loss must be a Loss such as CrossEntropy(), got {loss!r}.")
    if targets is None:
        targets = torch.eye(len(counts))
    # Numbers of Python are read in full, which torch's default dtype would not do.
    rows = torch.as_tensor(targets, dtype=torch.float64, device="cpu").detach().clone()
    if rows.ndim != 2 or not rows.numel() or not bool(rows.isfinite().all()):
        raise UserError(f"targets must be a finite matrix (M, K), got the shape {tuple(rows.shape)}.")
    numbers = torch.as_tensor(counts, dtype=torch.float64, device="cpu").detach()
    if tuple(numbers.shape) != rows.shape[:1]:
        raise UserError(
            f"counts must hold a number for each of the {len(rows)} rows of targets, got the shape "
            f"{tuple(numbers.shape)}."
        )
    if not (bool((numbers == numbers.round()).all()) and bool((numbers >= 0).all()) and bool((numbers > 0).any())):
        raise UserError(
            f"counts must be integers, none negative and one positive, got {torch.as_tensor(counts).tolist()}."
        )
    loss.check_targets(rows)
    return rows, numbers.long()


def check_arguments(problem: Problem) -> None:
    """Raise unless sizes and penalties are in range."""
    dim, bias = problem.feature_dim, problem.bias
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise UserError(f"feature_dim must be an integer of at least 1, got {dim!r}.")
    for name in ("lambda_w", "lambda_h", "tolerance"):
        if not _is_positive(getattr(problem, name)):
            raise UserError(f"{name} must be positive and finite, got {getattr(problem, name)!r}.")
    if bias not in ("none", "free") and not _is_positive(bias):
        raise UserError(f"bias must be 'none', 'free' or a positive penalty, got {bias!r}.")


def _is_positive(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]


def check_shapes(problem: Problem, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    """Raise unless a point has the sizes of the problem."""
    K, d, N = problem.num_classes, problem.feature_dim, problem.num_samples
    for name, tensor, shape in (
        ("weight", weight, (K, d)),
        ("features", features, (N, d)),
        ("labels", labels, (N,)),
    ):
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} must have shape {shape} for this problem, got {tuple(tensor.shape)}.")
    _check_bias(problem, bias)


def _check_bias(problem: Problem, bias: Tensor | None) -> None:
    if problem.has_bias and (bias is None or tuple(bias.shape) != (problem.num_classes,)):
        came = None if bias is None else tuple(bias.shape)
        raise UserError(f"bias must have shape ({problem.num_classes},) for bias={problem.bias!r}, got {came}.")
    if not problem.has_bias and bias is not None:
        raise UserError("bias must be None for a problem with bias='none'.")


def check_labels(problem: Problem, labels: Tensor) -> None:
    """Raise unless each group occurs as often as the counts say. One transfer to the host."""
    if labels.dtype != torch.int64:
        raise UserError(f"labels must be int64, got {labels.dtype}.")
    if not torch.equal(labels.sort().values, problem.labels(labels.device)):
        raise UserError(
            f"labels must hold each of the groups 0..{problem.num_groups - 1} as often as counts says: the answers are "
            "those of these counts."
        )


def admit(
    problem: Problem,
    weight: Tensor,
    features: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    labels_too: bool = True,
) -> Solution:
    """Check a point against the problem and cast it to float64."""
    check_shapes(problem, weight, features, labels, bias)
    if labels_too:
        check_labels(problem, labels)
    bias = None if bias is None else bias.detach().double()
    return Solution(weight.detach().double(), features.detach().double(), labels, bias)


def admit_moments(problem: Problem, weight: Tensor, means: Tensor, spread: Tensor, bias: Tensor | None) -> Moments:
    """The same for a point that is given by its moments."""
    K, M, d = problem.num_classes, problem.num_groups, problem.feature_dim
    for name, tensor, shape in (("weight", weight, (K, d)), ("means", means, (M, d))):
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} must have shape {shape} for this problem, got {tuple(tensor.shape)}.")
    _check_bias(problem, bias)
    bias = None if bias is None else bias.detach().double()
    return Moments(weight.detach().double(), means.detach().double(), spread.detach().double(), bias)
