"""How a line search ended, as a value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch.optim import Optimizer

from nclightning.optim.momentum import MomentumFromCurvature

__all__ = ["Failure", "SearchOutcome", "SearchStatus", "failure_of"]


class SearchStatus(str, Enum):
    """How one line search ended."""

    ACCEPTED = "accepted"
    ACCEPTED_BY_SLOPE = "accepted_by_slope"
    STATIONARY = "stationary"
    STALLED = "stalled"
    EXHAUSTED = "exhausted"
    UNBOUNDED = "unbounded"
    UNATTAINED = "unattained"

    @property
    def sentence(self) -> str:
        """What happened, and what to do about it."""
        return _SENTENCES[self]


_SENTENCES = {
    SearchStatus.ACCEPTED: "The objective decreased sufficiently.",
    SearchStatus.ACCEPTED_BY_SLOPE: (
        "The change of the objective was below its round-off; the gradients show a sufficient decrease."
    ),
    SearchStatus.STATIONARY: "The gradient is zero: this is a stationary point, and the parameters stay there.",
    SearchStatus.STALLED: (
        "The step became too small to change the parameters: descent has reached the round-off of this precision. "
        "The parameters were left as they are."
    ),
    SearchStatus.EXHAUSTED: (
        "No trial step decreased the objective sufficiently. The parameters were left as they are. Check that the "
        "closure is deterministic and returns the objective whose gradient it computes, or raise max_trials."
    ),
    SearchStatus.UNBOUNDED: (
        "A trial step lowered the objective until it, or its gradient, was beyond the numbers of this precision: "
        "the objective seems to have no lower bound. The parameters were left as they are. Check its sign, or add a "
        "penalty."
    ),
    SearchStatus.UNATTAINED: (
        "The steps grew as long as this precision allows, or until the gradient vanished, and the objective still "
        "fell: it seems to have no minimum, like cross-entropy without a penalty on separable data. The parameters "
        "were left as they are. Add a penalty."
    ),
}


@dataclass(frozen=True)
class SearchOutcome:
    """What one call of :meth:`LineSearchOptimizer.step` did. All numbers belong to the iterate that it left behind.

    Attributes:
        status: How the search ended.
        objective: Value at the new iterate.
        previous_objective: Value at the iterate before.
        grad_norm: Euclidean norm of the gradient at the new iterate, over all parameters.
        previous_grad_norm: The same at the iterate before: along the gradient ``step_size * previous_grad_norm`` is the
            length moved.
        step_size: Step taken, a multiple of the descent vector; 0 unless accepted.
        evaluations: Calls of the closure in this step, and products with the Hessian.
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
        """Whether the parameters moved."""
        return self.status in (SearchStatus.ACCEPTED, SearchStatus.ACCEPTED_BY_SLOPE)


@dataclass(frozen=True)
class Failure:
    """Why no further iteration makes sense.

    Attributes:
        sentence: The reason.
        is_error: False if nothing is wrong: the gradient is zero, or descent has come to the round-off.
    """

    sentence: str
    is_error: bool


def failure_of(optimizer: Optimizer, value: Any) -> Failure | None:
    """Say why no further iteration makes sense; None if one does."""
    outcome = getattr(optimizer, "outcome", None)
    if outcome is not None:
        ended_well = outcome.status in (SearchStatus.STATIONARY, SearchStatus.STALLED)
        return None if outcome.accepted else Failure(str(outcome.status.sentence), not ended_well)
    if math.isfinite(float(value)):
        return None
    reason = "the step is too large. Lower the optimizer's lr."
    if isinstance(optimizer, MomentumFromCurvature):
        reason = (
            f"{type(optimizer).__name__} has diverged, whose step and momentum are for starts near the optimum. "
            "Descend with ArmijoGD first, or let lr grow from a hundredth over some hundred iterations (LinearLR)."
        )
    return Failure(f"The objective is not finite any more: {reason}", True)
