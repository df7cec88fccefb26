"""Checks at the start of an optimizer step: parameters, objective and closure."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from torch import Tensor

from nclightning.errors import UserError
from nclightning.optim.evaluation import Evaluation
from nclightning.optim.objectives import ClosureObjective, LineObjective
from nclightning.optim.unchanged import differ_between_ranks

__all__ = ["check_parameters", "evaluate_start", "missing_closure_error", "warn_if_random"]


def check_parameters(
    objective: LineObjective, params: Sequence[Tensor], last_gradients: Sequence[Tensor | None] | None, owner: str
) -> None:
    """Raise unless a step can be taken with these parameters.

    Args:
        objective: The objective of the step.
        params: The parameters of the optimizer.
        last_gradients: The gradients that the last step stored in ``grad``, or None before the first step.
        owner: Name of the optimizer's class, for messages.

    Raises:
        ValueError: If a parameter has a gradient that the last step did not store, if all parameters are frozen, if one
            is on the meta device, or if they differ between processes.
    """
    for p, g in zip(params, last_gradients or [None] * len(params), strict=True):
        if p.grad is not None and p.grad is not g:
            raise UserError(
                f"a parameter had a gradient before {owner}.step: the search evaluates the objective itself and "
                "cannot add to accumulated gradients. Set accumulate_grad_batches=1 (Lightning), or call "
                "zero_grad() before the first step."
            )
    if not any(p.requires_grad for p in params):
        raise UserError(
            f"no parameter of {owner} requires a gradient: all are frozen. Call requires_grad_(True) on the parameters "
            "to be trained."
        )
    if any(p.is_meta for p in params):
        raise UserError(
            f"a parameter of {owner} is on the meta device and has no values: construct the optimizer after the module "
            "has been materialised."
        )
    if type(objective) is ClosureObjective and differ_between_ranks(params):
        raise UserError(
            f"the parameters of {owner} are not the same on all processes: broadcast them before the first step, "
            "as DistributedDataParallel does."
        )


def evaluate_start(objective: LineObjective, params: Sequence[Tensor]) -> Evaluation:
    """Evaluate the objective and its gradient at the current parameters.

    Raises:
        ValueError: If the objective or its gradient is not finite, or there is a gradient for a frozen parameter.
    """
    start = objective.evaluate()
    if any(g is not None and not p.requires_grad for p, g in zip(params, start.gradients, strict=True)):
        raise UserError(
            f"{type(objective).__name__} has a gradient for a parameter that was frozen later: construct the objective "
            "again, or pass a closure."
        )
    if not start.finite:
        raise UserError(
            f"the objective at the start of the step is {start.value} with gradient norm "
            f"{math.sqrt(start.square)}: both must be finite. Check the initial parameters and the data."
        )
    return start


def warn_if_random(known: Evaluation, start: Evaluation, owner: str) -> None:
    """Warn if two evaluations at the same parameters have different values."""
    if abs(start.value - known.value) > 64 * start.epsilon * abs(known.value):
        warnings.warn(
            f"the closure of {owner}.step gave {known.value} and then {start.value} at the same parameters: a "
            "line search needs a deterministic objective (no dropout, the same data). If the objective is constant "
            "within each step and changes only between steps, set reuse_gradient=False.",
            stacklevel=5,
        )


def missing_closure_error(owner: str) -> ValueError:
    """Return the error for a step that was called without a closure."""
    return ValueError(
        f"{owner}.step needs a closure that evaluates the objective; it was called without one. Under "
        "Lightning this is what precision='16-mixed' does (its gradient scaler calls step without one): use "
        "precision='32-true', '64-true' or 'bf16-mixed'."
    )
