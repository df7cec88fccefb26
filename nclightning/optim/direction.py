"""Where a line search looks: the direction of descent, apart from the search along it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nclightning.optim.backtracking import Found, Options, grown
from nclightning.optim.evaluation import Evaluation
from nclightning.optim.line import LineObjective

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

ROUNDINGS = 8  # What is below so many roundings is taken for noise.
_GROWTH: Mapping[str, Any] = {"grow": 4.0, "patience": 1}  # While no curvature was measured.


class Space(NamedTuple):
    """The parameters that are searched over.

    Attributes:
        params: All that the optimizer has, group by group.
        state: Of the optimizer, by parameter. A direction keeps its tensors there, one dictionary for each parameter.
        options: Of the optimizer.
    """

    params: Sequence[Tensor]
    state: MutableMapping[Tensor, dict[str, Any]]
    options: Options


class Descent(NamedTuple):
    """A descent vector p: the search evaluates F(x - t p).

    Attributes:
        along: p, in the order of the parameters, with None where the gradient is None. Of a sharded parameter it is the
            shard of this process. None in place of the list is the gradient g.
        slope: The inner product of g and p, positive: the objective falls by t times as much to first order.
        evaluations: Spent to find it.
    """

    along: Sequence[Tensor | None] | None
    slope: float
    evaluations: int = 0


class Direction(ABC):
    """Chooses descent vectors, learns from accepted steps, and says how long a step to try first.

    Attributes:
        kind: Names the direction in a ``state_dict``.
        interpolates: Whether a rejected step is shortened to the minimum of the parabola through what is known, or by
            powers of the option ``shrink``.
        scale: What the descent vector is to the gradient, roughly: a step t is about ``t * scale`` gradients long.
    """

    kind: ClassVar[str]
    interpolates: ClassVar[bool] = True
    scale: float = 1.0

    @abstractmethod
    def find(self, start: Evaluation, line: LineObjective, space: Space) -> Descent:
        """Choose the descent vector.

        Args:
            start: Value and gradient at the parameters as they are. The gradient is not zero, and may be overwritten
                once a trial is accepted.
            line: Adds up inner products over parameters and processes.
            space: What is searched over.

        Returns:
            A vector whose inner product with the gradient is positive.
        """

    @abstractmethod
    def accept(self, start: Evaluation, found: Found, line: LineObjective, space: Space) -> None:
        """Learn from a step along the vector that was found last.

        Args:
            start: Where it began. Its gradient may be overwritten by now.
            found: With the evaluation where it ended.
            line: As for :meth:`find`.
            space: As for :meth:`find`.
        """

    @abstractmethod
    def next_trial(self, found: Found, streak: int, space: Space) -> tuple[float, bool]:
        """Choose the first trial of the next search, after :meth:`accept`.

        Args:
            found: How the last one ended.
            streak: How many searches in a row accepted their first trial.
            space: As for :meth:`find`.

        Returns:
            Step, and whether it would be longer than what the parameters can be moved by.
        """

    def restart(self) -> bool:
        """Forget what was learnt, so that the next vector is along the gradient.

        Returns:
            Whether there was something to forget.
        """
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return what was learnt, but for tensors of the parameters' shapes, as plain numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        assert state["kind"] == self.kind

    def saved(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the optimizer's state has of one parameter as tensors of its shape, for a ``state_dict``."""
        return dict(entries)

    def loaded(self, entries: Mapping[str, Any], space: Space) -> dict[str, Any]:
        """Undo :meth:`saved`, after :meth:`load_state_dict`."""
        return dict(entries)


class SteepestDescent(Direction):
    """The gradient itself. The step grows by the options ``grow`` and ``patience``."""

    kind = "steepest descent"
    interpolates = False

    def find(self, start: Evaluation, line: LineObjective, space: Space) -> Descent:
        """Take the gradient."""
        return Descent(None, start.square)

    def accept(self, start: Evaluation, found: Found, line: LineObjective, space: Space) -> None:
        """Do nothing: there is nothing to learn."""

    def next_trial(self, found: Found, streak: int, space: Space) -> tuple[float, bool]:
        """Lengthen the step where that is due."""
        return grown(space.options, streak, found, space.params)


class LearningDirection(Direction):
    """A direction that learns from the curvature along accepted steps, and keeps tensors of the parameters' shapes."""

    def __init__(self) -> None:
        self.scale = 1.0
        self._measured = False  # Whether the last step showed a positive curvature.
        self._searched: tuple[bool, ...] | None = None  # Which parameters were trainable.

    def next_trial(self, found: Found, streak: int, space: Space) -> tuple[float, bool]:
        """Try 1 after a curvature was measured, else longer and longer steps."""
        if self._measured:
            return 1.0, False
        return grown({**space.options, **_GROWTH}, streak, found, space.params)

    def trains_the_same(self, space: Space) -> bool:
        """Say whether the same parameters are trainable as at the last call."""
        searched = tuple(p.requires_grad for p in space.params)
        before, self._searched = self._searched, searched
        return before is None or before == searched

    def state_dict(self) -> dict[str, Any]:
        """Return the scale, and which parameters were trainable."""
        return {"scale": self.scale, "searched": None if self._searched is None else list(self._searched)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        searched = state.get("searched")  # Older states have none.
        self.scale, self._searched = state["scale"], None if searched is None else tuple(searched)


def epsilon_of(params: Sequence[Tensor]) -> float:
    """Return the machine epsilon of the narrowest parameter."""
    return max(torch.finfo(p.dtype).eps for p in params)


def is_descent(start: Evaluation, slope: float, length: float, space: Space) -> bool:
    """Say whether a vector is a direction of descent beyond round-off.

    Args:
        start: Value and gradient.
        slope: Inner product of gradient and vector.
        length: Of the vector.
        space: What is searched over.
    """
    return ROUNDINGS * epsilon_of(space.params) * math.sqrt(start.square) * length < slope < math.inf
