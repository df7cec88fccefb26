"""Backtracking on the Armijo condition, along one direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from nclightning.optim.evaluation import Evaluation
from nclightning.optim.line import LineObjective
from nclightning.optim.options import largest_step
from nclightning.optim.outcome import SearchStatus

__all__ = ["Found", "backtrack", "grown"]

Options = Mapping[str, Any]

_LEAST_FACTOR = 0.01  # A parabola says little of what is a hundred times nearer.
_INTO_NUMBERS = 0.1  # The factor after a value that is not finite.
_LONG = 1e38  # Steps up to here can multiply gradients of any precision.


class Found(NamedTuple):
    """How backtracking ended.

    Attributes:
        status: How it ended.
        end: Evaluation where the parameters are left; None if no trial was accepted.
        size: Step taken.
        trials: How many it took.
        bend: The step times the curvature along it; ``inf`` where none was accepted.
    """

    status: SearchStatus
    end: Evaluation | None
    size: float
    trials: int
    bend: float = math.inf


def backtrack(
    options: Options,
    first: float,
    line: LineObjective,
    start: Evaluation,
    descent: float,
    params: Sequence[Tensor],
    interpolate: bool = False,
) -> Found:
    """Shorten the step until a trial is accepted, which the parameters are then left at.

    Args:
        options: ``c1``, ``shrink``, ``max_trials`` and ``noise``, as :class:`nclightning.optim.ArmijoGD` has them.
        first: Step of the first trial.
        line: The objective along a descent vector, begun.
        start: Evaluation at the start.
        descent: Inner product of the gradient at the start and the descent vector, positive.
        params: What is moved.
        interpolate: Whether the next trial is where the parabola through value and slope at the start and the value, or
            the slope, at a rejected trial is least, between a hundredth of the rejected step and ``shrink`` times it.
            Else it is the first power of ``shrink`` that the parabola accepts.

    Returns:
        What was found.
    """
    size, fell_beyond_numbers, number = first, False, 0
    status = SearchStatus.EXHAUSTED
    if size > _LONG:
        size = min(size, largest_step(params))
    for number in range(1, options["max_trials"] + 1):
        value = line.trial(size)
        fell_beyond_numbers |= value == -math.inf
        # A second look costs a pass over the parameters: only where it may show something.
        if number > 1 and (number > 2 or value == start.value) and line.stands_still():
            status = SearchStatus.STALLED
            break
        verdict = _judge(options, start, descent, value, size, line)
        if verdict.status is not None:
            end = line.accept()
            if end.finite:
                return Found(verdict.status, end, size, number, verdict.bend)
            fell_beyond_numbers |= end.value < start.value and math.isinf(end.square)
        if interpolate:
            size *= min(_to_the_minimum(verdict.bend), options["shrink"])
            continue
        for _ in range(verdict.shrinks):  # One by one: the steps are those of plain backtracking, bit for bit.
            size *= options["shrink"]
    return Found(SearchStatus.UNBOUNDED if fell_beyond_numbers else status, None, 0.0, number)


def grown(options: Options, streak: int, found: Found, params: Sequence[Tensor]) -> tuple[float, bool]:
    """Choose the first trial of the next search.

    Args:
        options: ``grow``, ``patience`` and ``c1``.
        streak: How many searches in a row accepted their first trial.
        found: How the last one ended.
        params: What is moved.

    Returns:
        Step, and whether it would be longer than what the parameters can be moved by.
    """
    size = found.size
    if streak < options["patience"] or options["grow"] * found.bend > 2 * (1 - options["c1"]):
        return size, False
    longer: float = size * options["grow"]
    if longer <= _LONG or longer <= largest_step(params):
        return longer, False
    return size, longer > size


class _Verdict(NamedTuple):
    """What a trial showed.

    Attributes:
        status: None rejects it.
        bend: The step times the curvature along it. A quadratic is accepted up to 2 (1 - c1) by either condition.
        shrinks: How often to shrink a rejected step before the next trial.
    """

    status: SearchStatus | None
    bend: float
    shrinks: int = 1


def _judge(
    options: Options, start: Evaluation, descent: float, value: float, size: float, line: LineObjective
) -> _Verdict:
    if not math.isfinite(value):
        return _Verdict(None, math.inf)
    c1, change = options["c1"], value - start.value
    noise = _noise(options, start)
    if noise > 0 and abs(change) <= noise * abs(start.value):  # Zero is plain Armijo: no change, no step.
        slope = line.slope()
        accepted = slope >= -(1 - 2 * c1) * descent
        bend = 1 - slope / descent
        return _Verdict(SearchStatus.ACCEPTED_BY_SLOPE if accepted else None, bend, _shrinks(options, bend))
    linear = size * descent
    bend = 2 * (1 + change / linear) if linear > 0 else math.inf
    return _Verdict(SearchStatus.ACCEPTED if change <= -c1 * linear else None, bend)


def _to_the_minimum(bend: float) -> float:
    """Return the factor by which the minimum of the parabola with this bend is nearer than a rejected step."""
    if bend == math.inf:
        return _INTO_NUMBERS
    return max(1 / bend, _LEAST_FACTOR) if bend > 1 else 1.0


def _shrinks(options: Options, bend: float) -> int:
    """Count the rejections in a row that a quadratic is due from one with this bend on, up to ``max_trials``."""
    excess = bend / (2 * (1 - options["c1"]))
    if not 1 < excess < math.inf:
        return 1
    limit: int = options["max_trials"]
    return min(max(1, math.ceil(math.log(excess) / -math.log(options["shrink"]))), limit)


def _noise(options: Options, start: Evaluation) -> float:
    noise = options["noise"]
    return min(64 * start.epsilon, 2.0**-5) if noise is None else noise
