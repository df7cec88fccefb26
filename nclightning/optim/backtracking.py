"""Backtracking on the Armijo condition along one direction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from nclightning.optim.evaluation import Evaluation
from nclightning.optim.objectives import LineObjective
from nclightning.optim.options import largest_step
from nclightning.optim.outcome import SearchStatus

__all__ = ["SearchResult", "backtrack", "grown"]

Options = Mapping[str, Any]

_SMALLEST_FACTOR = 0.01  # A parabola through a trial is a poor model at steps over a hundred times shorter.
_FACTOR_AFTER_NON_FINITE = 0.1  # There is no parabola through a value that is not finite.
_SAFE_STEP = 1e38  # Steps up to this length can multiply gradients of any dtype.


class SearchResult(NamedTuple):
    """The result of backtracking.

    Attributes:
        status: How it ended.
        end: Value and gradient at the accepted trial; None if no trial was accepted.
        size: The accepted step; 0 if there is none.
        trials: Number of trials.
        relative_curvature: The accepted step over the step to the minimum of the parabola along the direction;
            ``inf`` if no trial was accepted.
    """

    status: SearchStatus
    end: Evaluation | None
    size: float
    trials: int
    relative_curvature: float = math.inf


def backtrack(
    options: Options,
    first: float,
    objective: LineObjective,
    start: Evaluation,
    descent: float,
    params: Sequence[Tensor],
    interpolate: bool = False,
) -> SearchResult:
    """Shorten the step until a trial is accepted, and leave the parameters there.

    Args:
        options: ``c1``, ``shrink``, ``max_trials`` and ``noise``, as for :class:`nclightning.optim.ArmijoGD`.
        first: Step of the first trial.
        objective: The objective, after ``begin`` with the descent vector.
        start: Value and gradient at the start.
        descent: Inner product of the gradient at the start and the descent vector, positive.
        params: The parameters that are moved.
        interpolate: How to choose the next trial after a rejected one. A parabola is fitted to value and slope at the
            start and to the value, or the slope, at the rejected trial. If True, the next trial is its minimum, but at
            least a hundredth of the rejected step and at most ``shrink`` times it. If False, the rejected step is
            multiplied by ``shrink``; if slopes decided, as often as needed for the parabola to be accepted.

    Returns:
        The accepted trial, or the reason why there is none.
    """
    size, fell_beyond_numbers, number = first, False, 0
    status = SearchStatus.EXHAUSTED
    if size > _SAFE_STEP:
        size = min(size, largest_step(params))
    for number in range(1, options["max_trials"] + 1):
        value = objective.trial(size)
        fell_beyond_numbers |= value == -math.inf
        # The comparison costs a pass over the parameters, so it is made only if the step may be too short.
        if number > 1 and (number > 2 or value == start.value) and objective.stands_still():
            status = SearchStatus.STALLED
            break
        verdict = _judge(options, start, descent, value, size, objective)
        if verdict.status is not None:
            end = objective.accept()
            if end.finite:
                return SearchResult(verdict.status, end, size, number, verdict.relative_curvature)
            fell_beyond_numbers |= end.value < start.value and math.isinf(end.square)
        if interpolate:
            size *= min(_factor_to_minimum(verdict.relative_curvature), options["shrink"])
            continue
        for _ in range(verdict.rejections):  # A power would round differently from plain backtracking.
            size *= options["shrink"]
    return SearchResult(SearchStatus.UNBOUNDED if fell_beyond_numbers else status, None, 0.0, number)


def grown(options: Options, streak: int, found: SearchResult, params: Sequence[Tensor]) -> tuple[float, bool]:
    """Choose the first trial of the next search.

    Args:
        options: ``grow``, ``patience`` and ``c1``, as for :class:`nclightning.optim.ArmijoGD`.
        streak: Number of consecutive searches that accepted their first trial.
        found: Result of the last search.
        params: The parameters that are moved.

    Returns:
        The step, and whether it ought to be longer than the dtype of the parameters can represent.
    """
    size = found.size
    if streak < options["patience"] or options["grow"] * found.relative_curvature > 2 * (1 - options["c1"]):
        return size, False
    longer: float = size * options["grow"]
    if longer <= _SAFE_STEP or longer <= largest_step(params):
        return longer, False
    return size, longer > size


class _Verdict(NamedTuple):
    """The decision on a trial.

    Attributes:
        status: How the trial was accepted; None if it was rejected.
        relative_curvature: The step of the trial over the step to the minimum of the fitted parabola. Both conditions
            accept a quadratic exactly up to 2 (1 - c1).
        rejections: How often to multiply a rejected step by ``shrink`` before the next trial.
    """

    status: SearchStatus | None
    relative_curvature: float
    rejections: int = 1


def _judge(
    options: Options, start: Evaluation, descent: float, value: float, size: float, objective: LineObjective
) -> _Verdict:
    """Decide on a trial: by values, or by slopes where the change of the value is below round-off."""
    if not math.isfinite(value):
        return _Verdict(None, math.inf)
    c1, change = options["c1"], value - start.value
    noise = _noise(options, start)
    if noise > 0 and abs(change) <= noise * abs(start.value):  # With noise=0 an unchanged objective is rejected.
        slope = objective.slope()
        accepted = slope >= -(1 - 2 * c1) * descent
        relative_curvature = 1 - slope / descent
        return _Verdict(
            SearchStatus.ACCEPTED_BY_SLOPE if accepted else None,
            relative_curvature,
            _count_rejections(options, relative_curvature),
        )
    linear = size * descent
    relative_curvature = 2 * (1 + change / linear) if linear > 0 else math.inf
    return _Verdict(SearchStatus.ACCEPTED if change <= -c1 * linear else None, relative_curvature)


def _factor_to_minimum(relative_curvature: float) -> float:
    """Return the step to the minimum of the fitted parabola, as a fraction of the rejected step."""
    if relative_curvature == math.inf:
        return _FACTOR_AFTER_NON_FINITE
    return max(1 / relative_curvature, _SMALLEST_FACTOR) if relative_curvature > 1 else 1.0


def _count_rejections(options: Options, relative_curvature: float) -> int:
    """Count the consecutive trials that a quadratic rejects, this one included; at most ``max_trials``."""
    excess = relative_curvature / (2 * (1 - options["c1"]))
    if not 1 < excess < math.inf:
        return 1
    limit: int = options["max_trials"]
    return min(max(1, math.ceil(math.log(excess) / -math.log(options["shrink"]))), limit)


def _noise(options: Options, start: Evaluation) -> float:
    noise = options["noise"]
    return min(64 * start.epsilon, 2.0**-5) if noise is None else noise
