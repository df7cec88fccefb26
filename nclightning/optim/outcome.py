"""The outcome of an optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch.optim import Optimizer

from nclightning.optim.momentum import MomentumFromCurvature

__all__ = ["Failure", "SearchOutcome", "SearchStatus", "failure_of"]


class SearchStatus(str, Enum):
    """How one line search ended.

    Example:
        >>> from nclightning.optim import SearchStatus
        >>> SearchStatus("stationary").sentence
        'The gradient is zero: this is a stationary point, and the parameters stay there.'
    """

    ACCEPTED = "accepted"
    ACCEPTED_BY_SLOPE = "accepted_by_slope"
    STATIONARY = "stationary"
    STALLED = "stalled"
    EXHAUSTED = "exhausted"
    UNBOUNDED = "unbounded"
    UNATTAINED = "unattained"

    @property
    def sentence(self) -> str:
        """A sentence that says what happened, and what to do about it."""
        return _SENTENCES[self]


_SENTENCES = {
    SearchStatus.ACCEPTED: "The objective decreased sufficiently.",
    SearchStatus.ACCEPTED_BY_SLOPE: (
        "The change of the objective was below its round-off; the gradients show a sufficient decrease."
    ),
    SearchStatus.STATIONARY: "The gradient is zero: this is a stationary point, and the parameters stay there.",
    SearchStatus.STALLED: (
        "The step became too small to change the parameters: descent has reached round-off in this precision. "
        "The parameters were left unchanged."
    ),
    SearchStatus.EXHAUSTED: (
        "No trial step decreased the objective sufficiently. The parameters were left unchanged. Check that the "
        "closure is deterministic and returns the objective whose gradient it computes, or raise max_trials."
    ),
    SearchStatus.UNBOUNDED: (
        "A trial step lowered the objective until the objective or its gradient overflowed: the objective seems to "
        "have no lower bound. The parameters were left unchanged. Check its sign, or add a penalty."
    ),
    SearchStatus.UNATTAINED: (
        "The objective kept decreasing until the steps were as long as this precision allows, or the gradient "
        "vanished: it seems to have no minimum, like cross-entropy without a penalty on separable data. The "
        "parameters were left unchanged. Add a penalty."
    ),
}


@dataclass(frozen=True)
class SearchOutcome:
    """The result of one call of :meth:`LineSearchOptimizer.step`.

    Attributes:
        status: How the line search ended.
        objective: Objective at the iterate after the step.
        previous_objective: Objective at the iterate before the step.
        grad_norm: Euclidean norm of the gradient after the step, over all parameters.
        previous_grad_norm: The same before the step. A step along the gradient moves the parameters by
            ``step_size * previous_grad_norm``.
        step_size: The step t of x - t p, where p is the descent vector; 0 if no step was accepted.
        evaluations: Number of calls of the closure in this step, plus products with the Hessian.

    Example:
        >>> import torch
        >>> from nclightning.optim import ArmijoGD
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        >>> optimizer = ArmijoGD([x])
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     value = x.square().sum() / 2
        ...     value.backward()
        ...     return value
        >>> _ = optimizer.step(closure)
        >>> outcome = optimizer.outcome
        >>> outcome.accepted, outcome.previous_objective, outcome.previous_grad_norm
        (True, 12.5, 5.0)
    """

    status: SearchStatus
    objective: float
    previous_objective: float
    grad_norm: float
    previous_grad_norm: float
    step_size: float
    evaluations: int

    @property
    def accepted(self) -> bool:
        """Whether a step was accepted, so that the parameters moved."""
        return self.status in (SearchStatus.ACCEPTED, SearchStatus.ACCEPTED_BY_SLOPE)


@dataclass(frozen=True)
class Failure:
    """Why training cannot continue.

    Attributes:
        sentence: The reason.
        is_error: False if nothing is wrong: the gradient is zero, or descent has reached round-off.
    """

    sentence: str
    is_error: bool


def failure_of(optimizer: Optimizer, value: Any) -> Failure | None:
    """Return why training cannot continue after a step, or None if it can.

    Args:
        optimizer: The optimizer that took the step.
        value: The objective that the step returned.
    """
    outcome = getattr(optimizer, "outcome", None)
    if outcome is not None:
        ended_well = outcome.status in (SearchStatus.STATIONARY, SearchStatus.STALLED)
        return None if outcome.accepted else Failure(str(outcome.status.sentence), not ended_well)
    if math.isfinite(float(value)):
        return None
    reason = "the step is too large. Lower the optimizer's lr."
    if isinstance(optimizer, MomentumFromCurvature):
        reason = (
            f"{type(optimizer).__name__} has diverged: its step and momentum are meant for starts near the optimum. "
            "Descend with ArmijoGD first, or let lr grow from a hundredth over some hundred iterations (LinearLR)."
        )
    return Failure(f"The objective is not finite any more: {reason}", True)
