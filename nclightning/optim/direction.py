"""Search directions: their interface, and steepest descent."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nclightning.optim.backtracking import Options, SearchResult, grown
from nclightning.optim.evaluation import Evaluation
from nclightning.optim.objectives import LineObjective

__all__ = [
    "ROUNDINGS",
    "Descent",
    "Direction",
    "LearningDirection",
    "Space",
    "SteepestDescent",
    "epsilon_of",
    "is_descent",
]

ROUNDINGS = 8  # A number counts as noise if it is smaller than this many rounding errors.
_GROWTH: Mapping[str, Any] = {"grow": 4.0, "patience": 1}  # Used until a positive curvature has been measured.


class Space(NamedTuple):
    """The parameters of a search, with state and options of their optimizer.

    Attributes:
        params: All parameters of the optimizer, group by group.
        state: The optimizer's state, one dictionary per parameter. A direction keeps its tensors there.
        options: The optimizer's options by name.
    """

    params: Sequence[Tensor]
    state: MutableMapping[Tensor, dict[str, Any]]
    options: Options


class Descent(NamedTuple):
    """A descent vector p: the search evaluates F(x - t p).

    Attributes:
        along: The vector p, one entry per parameter, None where the gradient is None; for a sharded parameter the shard
            of this process. None instead of a list stands for the gradient g.
        slope: The inner product of g and p, positive. To first order the objective decreases by t times the slope.
        evaluations: Number of evaluations that it took to find p.
    """

    along: Sequence[Tensor | None] | None
    slope: float
    evaluations: int = 0


class Direction(ABC):
    """Base class of the objects that choose descent vectors and first trials, and are updated after each step.

    Attributes:
        kind: Name of the direction in a ``state_dict``.
        interpolates: Whether a rejected step is shortened to the minimum of the fitted parabola (True), or by a power
            of the option ``shrink`` (False).
        scale: Approximate norm of the descent vector divided by that of the gradient.
    """

    kind: ClassVar[str]
    interpolates: ClassVar[bool] = True
    scale: float = 1.0

    @abstractmethod
    def find(self, start: Evaluation, objective: LineObjective, space: Space) -> Descent:
        """Choose the descent vector.

        Args:
            start: Value and gradient at the current parameters. The gradient is not zero. It may be overwritten once a
                trial is accepted.
            objective: The objective, which sums inner products over parameters and processes.
            space: The parameters and the optimizer's state.

        Returns:
            A vector whose inner product with the gradient is positive.
        """

    @abstractmethod
    def accept(self, start: Evaluation, found: SearchResult, objective: LineObjective, space: Space) -> None:
        """Update the direction after a step along the last descent vector.

        Args:
            start: Value and gradient before the step. The gradient may have been overwritten.
            found: The accepted step, with value and gradient after it.
            objective: As for :meth:`find`.
            space: As for :meth:`find`.
        """

    @abstractmethod
    def next_trial(self, found: SearchResult, streak: int, space: Space) -> tuple[float, bool]:
        """Choose the first trial of the next search, after :meth:`accept`.

        Args:
            found: Result of the last search.
            streak: Number of consecutive searches that accepted their first trial.
            space: As for :meth:`find`.

        Returns:
            The step size, and whether it is capped because the dtype of the parameters cannot represent a larger one.
        """

    def restart(self) -> bool:
        """Forget earlier steps, so that the next descent vector is parallel to the gradient.

        Returns:
            Whether the last vector depended on earlier steps.
        """
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the direction in plain numbers, without the tensors in the optimizer's state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of :meth:`state_dict`."""
        assert state["kind"] == self.kind

    def saved(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Convert the optimizer's state of one parameter to tensors of the parameter's shape, for a ``state_dict``."""
        return dict(entries)

    def loaded(self, entries: Mapping[str, Any], space: Space) -> dict[str, Any]:
        """Undo :meth:`saved`, after :meth:`load_state_dict`."""
        return dict(entries)


class SteepestDescent(Direction):
    """Steepest descent: the descent vector is the gradient. Options ``grow`` and ``patience`` control the step size."""

    kind = "steepest descent"
    interpolates = False

    def find(self, start: Evaluation, objective: LineObjective, space: Space) -> Descent:
        """Return the gradient."""
        return Descent(None, start.square)

    def accept(self, start: Evaluation, found: SearchResult, objective: LineObjective, space: Space) -> None:
        """Do nothing: steepest descent does not depend on earlier steps."""

    def next_trial(self, found: SearchResult, streak: int, space: Space) -> tuple[float, bool]:
        """Return the last step, or a longer one when growth is due."""
        return grown(space.options, streak, found, space.params)


class LearningDirection(Direction):
    """Base class of directions that use the curvature along accepted steps, and store tensors for each parameter."""

    def __init__(self) -> None:
        self.scale = 1.0
        self._measured = False  # Whether the curvature along the last step was positive.
        self._searched: tuple[bool, ...] | None = None  # Which parameters were trainable at the last step.

    def next_trial(self, found: SearchResult, streak: int, space: Space) -> tuple[float, bool]:
        """Return 1 if the last step measured a positive curvature, else a growing step size."""
        if self._measured:
            return 1.0, False
        return grown({**space.options, **_GROWTH}, streak, found, space.params)

    def trains_the_same(self, space: Space) -> bool:
        """Return whether the same parameters are trainable as at the last call."""
        searched = tuple(p.requires_grad for p in space.params)
        before, self._searched = self._searched, searched
        return before is None or before == searched

    def state_dict(self) -> dict[str, Any]:
        """Return the scale, and which parameters were trainable."""
        return {"scale": self.scale, "searched": None if self._searched is None else list(self._searched)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of :meth:`state_dict`."""
        searched = state.get("searched")  # Older states have none.
        self.scale, self._searched = state["scale"], None if searched is None else tuple(searched)


def epsilon_of(params: Sequence[Tensor]) -> float:
    """Return the machine epsilon of the parameter with the lowest precision."""
    return max(torch.finfo(p.dtype).eps for p in params)


def is_descent(start: Evaluation, slope: float, length: float, space: Space) -> bool:
    """Return whether the slope along a vector is positive and larger than its rounding error.

    Args:
        start: Value and gradient at the start.
        slope: Inner product of gradient and vector.
        length: Norm of the vector.
        space: The parameters, for their precision.
    """
    return ROUNDINGS * epsilon_of(space.params) * math.sqrt(start.square) * length < slope < math.inf
