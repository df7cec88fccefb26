"""A description of a problem in words, on one line."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from nclightning.problems.loss import Loss
    from nclightning.problems.problem import Problem

__all__ = ["bias_in_words", "loss_in_words", "one_line", "sizes_in_words"]

_MOST_LETTERS = 20


def one_line(problem: Problem) -> str:
    """Write loss, sizes and penalties on one line.

    Args:
        problem: A problem of any size: of long lists only the least and the greatest number are written.

    Returns:
        The line, without a full stop.
    """
    sizes = [f"{symbol} = {size}" for symbol, size in sizes_in_words(problem).items()]
    penalties = [f"lambda_w = {problem.lambda_w:g}", f"lambda_h = {problem.lambda_h:g}"]
    return ", ".join([loss_in_words(problem), *sizes, *penalties, bias_in_words(problem)])


def loss_in_words(problem: Problem) -> str:
    """Name the loss, its arguments and the kind of its targets.

    Args:
        problem: Any.

    Returns:
        Words such as ``"CE loss, label smoothing 0.1"``.
    """
    name = problem.loss.short_name or type(problem.loss).__name__
    return ", ".join(filter(None, [f"{name} loss", _targets_in_words(problem), *_arguments_in_words(problem.loss)]))


def bias_in_words(problem: Problem) -> str:
    """Say whether the head has a bias, and its penalty.

    Args:
        problem: Any.

    Returns:
        ``"no bias"``, ``"free bias"``, or such as ``"lambda_b = 0.1"``.
    """
    penalty = problem.lambda_b
    return "no bias" if penalty is None else f"lambda_b = {penalty:g}" if penalty else "free bias"


def sizes_in_words(problem: Problem) -> dict[str, str]:
    """Give the sizes by their symbols.

    Args:
        problem: Any.

    Returns:
        Sizes by symbol. M, the number of groups, is included only if it is not K; N, the number of samples, only if
        groups differ in size.
    """
    counts = problem.counts
    groups = {} if problem.num_groups == problem.num_classes else {"M": str(problem.num_groups)}
    samples = {} if bool((counts == counts[0]).all()) else {"N": str(problem.num_samples)}
    return {"K": str(problem.num_classes)} | groups | {"n": _ends(counts)} | samples | {"d": str(problem.feature_dim)}


def _targets_in_words(problem: Problem) -> str:
    """Describe the targets; the empty string for hard labels."""
    if problem.has_hard_labels:
        return ""
    table, classes = problem.targets, problem.num_classes
    if problem.groups_are_classes and classes > 1:
        smoothing = classes * float(table[0, 1])
        pattern = torch.full_like(table, smoothing / classes).fill_diagonal_(1 - smoothing + smoothing / classes)
        if torch.allclose(table, pattern, rtol=1e-12, atol=1e-15):
            return f"label smoothing {smoothing:.6g}"
    if bool(((table == 0) | (table == 1)).all()):
        return "binary targets"
    return "soft targets" if bool(((table >= 0) & (table <= 1)).all()) else "real targets"


def _arguments_in_words(loss: Loss) -> list[str]:
    """Describe the arguments of the loss, such as class weights."""
    values = {name: getattr(loss, name, None) for name in inspect.signature(type(loss)).parameters}
    return [f"{name.replace('_', ' ')} {_ends(value)}" for name, value in values.items() if value is not None]


def _ends(value: Any) -> str:
    """Write one number as it is, and several by the least and the greatest."""
    try:
        numbers = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # A user's loss may have arguments of any type.
        return str(value)[:_MOST_LETTERS]
    if not numbers.numel():
        return "none"
    least, greatest = numbers.min().item(), numbers.max().item()
    if least == greatest or numbers.dtype == torch.int64:
        return " to ".join(dict.fromkeys((f"{least:.6g}", f"{greatest:.6g}")))
    return f"{least:.3g} to {greatest:.3g}"
