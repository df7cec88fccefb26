"""The paper's claims about its figures, each with the rule and the numbers that decide it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nclightning.figures import Run
from nclightning.quantities import GAP, NC1, NC2, NC3
from nclightning.reproduction.error_bound import NEAR, Reading

__all__ = ["METRICS_REACH", "NC_TAGS", "Claim", "check_claims", "check_error_bound"]

NC_TAGS = tuple(each.tag("train") for each in (NC1, NC2, NC3))
_UFM_DECADES = 10.0
# In Figure 3, straight stretches must end at or below this value.
METRICS_REACH = 1e-10
_METRICS_DECADES = 5.0
# Decades for the network. The gap and NC1 are quadratic in deviations and fall twice as far as NC2 and NC3.
_MLP_DECADES = dict(zip((GAP.tag(), *NC_TAGS), (4.0, 4.0, 2.0, 2.0), strict=True))
_EQUAL_RATES = 1.5
_SUBSTANTIALLY = 1.5
_BOUND_SLACK = 1.01
_LOSSES = ("mse", "ce")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and whether the runs confirm it.

    Attributes:
        figure: Number of the figure in the paper, or the theorem.
        sentence: The claim.
        rule: The condition under which it counts as confirmed.
        held: Whether the condition is met.
        evidence: The numbers that decide it.
    """

    figure: str
    sentence: str
    rule: str
    held: bool
    evidence: str


def check_claims(runs: Mapping[int, Sequence[Run]]) -> list[Claim]:
    """Check the claims about the figures whose runs are given.

    Args:
        runs: Runs by figure.

    Returns:
        The claims in the order of the figures.
    """
    checks = {1: (_gap_is_linear, _rate_is_independent), 2: (_network_is_linear_at_some,)}
    checks |= {3: (_metrics_are_linear, _nc1_is_faster), 4: (_network_collapses_at_some,)}
    return [check(runs[figure]) for figure in sorted(runs) for check in checks[figure]]


def check_error_bound(readings: Sequence[Reading]) -> list[Claim]:
    """Check the theorems of the error bound, and the case that the paper leaves open.

    Args:
        readings: The readings of the study.

    Returns:
        A claim for MSE, one for cross-entropy with two classes, and one with more.
    """
    holds = "the error bound holds near the optimal set."
    cases = (
        ("Thm. 2", f"MSE: {holds}", "mse", range(2, 1000)),
        ("Thm. 4", f"CE with K = 2: {holds}", "ce", range(2, 3)),
        ("open", f"CE with K > 2, which the paper leaves open: {holds}", "ce", range(3, 1000)),
    )
    return [
        _bound_holds(name, sentence, [r for r in readings if r.loss == loss and r.num_classes in classes])
        for name, sentence, loss, classes in cases
    ]


def _bound_holds(name: str, sentence: str, readings: Sequence[Reading]) -> Claim:
    near = [r for r in readings if r.kind != "threshold" and r.distance <= NEAR]
    largest, classes = max(r.ratio for r in near), sorted({r.num_classes for r in near})
    tails = [max(r.ratio for r in near if r.kind == "trajectory" and r.num_classes == K) for K in classes]
    return Claim(
        name,
        sentence,
        f"distance at most {_BOUND_SLACK:g} / mu times the gradient norm at all points within {NEAR:g} of the set",
        largest <= _BOUND_SLACK,
        f"{len(near)} points, K = {classes[0]} to {classes[-1]}: mu distance / gradient norm at most {largest:.6f}, "
        f"and at least {min(tails):.3f} on each descent",
    )


def _gap_is_linear(runs: Sequence[Run]) -> Claim:
    decades = [_decades(run, GAP.tag()) for run in runs]
    return Claim(
        "1",
        "Under the unconstrained feature model the optimality gap converges linearly, for every lambda.",
        f"straight over at least {_UFM_DECADES:g} decades at every lambda",
        min(decades) >= _UFM_DECADES,
        f"{len(runs)} curves, straight over {min(decades):.1f} to {max(decades):.1f} decades",
    )


def _decades(run: Run, tag: str) -> float:
    fit = run.summary.fits[tag]
    return 0.0 if fit is None else fit.decades


def _rate_is_independent(runs: Sequence[Run]) -> Claim:
    spread = {}
    for loss in _LOSSES:
        fits = [run.summary.fits[GAP.tag()] for run in runs if run.loss == loss]
        rates = [fit.iterations_per_decade for fit in fits if fit is not None]
        # A curve without a straight stretch has no rate to compare.
        spread[loss] = max(rates) / min(rates) if rates and len(rates) == len(fits) else float("nan")
    return Claim(
        "1",
        'It does so "independent of" lambda, read as: at the same rate.',
        f"slowest and fastest curve of a loss within a factor of {_EQUAL_RATES:g}",
        all(factor <= _EQUAL_RATES for factor in spread.values()),
        ", ".join(f"{loss.upper()}: a factor of {factor:.2f}" for loss, factor in spread.items()),
    )


def _metrics_are_linear(runs: Sequence[Run]) -> Claim:
    decades = {tag: [_decades(run, tag) for run in runs] for tag in NC_TAGS}
    listed = [f"NC{i} over {' and '.join(f'{d:.1f}' for d in own)}" for i, own in enumerate(decades.values(), 1)]
    return Claim(
        "3",
        "NC1, NC2 and NC3 converge linearly to 0 for both losses.",
        f"straight over at least {_METRICS_DECADES:g} decades that end at or below {METRICS_REACH:g}, for each",
        min(min(own) for own in decades.values()) >= _METRICS_DECADES,
        f"{', '.join(listed)} decades ({' and '.join(run.loss.upper() for run in runs)})",
    )


def _nc1_is_faster(runs: Sequence[Run]) -> Claim:
    ratios, parts = [], []
    for run in runs:
        fit = run.summary.fits[NC_TAGS[0]]
        if fit is None:
            continue
        nc1, *others = (_fall(run, tag, fit.first, fit.last) for tag in NC_TAGS)
        own = [nc1 / other if other > 0 else math.inf for other in others]
        ratios += own
        reached = float(np.interp(fit.last, run.readings.iterations, run.readings.values[NC_TAGS[0]]))
        parts.append(
            f"{run.loss.upper()}: {own[0]:.2f} times NC2, {own[1]:.2f} times NC3 in iterations {fit.first}-{fit.last}, "
            f"down to NC1 = {reached:.0e}"
        )
    return Claim(
        "3",
        "NC1 converges substantially faster than NC2 and NC3.",
        f"at least {_SUBSTANTIALLY:g} decades of NC1 per decade of NC2 and of NC3, on the straight stretch of NC1, for "
        "both losses; 2 is what one common rate of all deviations gives, because NC1 is quadratic in them and NC2 and "
        "NC3 are not",
        len(ratios) == 2 * len(runs) and min(ratios) >= _SUBSTANTIALLY,
        "; ".join(parts),
    )


def _fall(run: Run, tag: str, first: int, last: int) -> float:
    """Return the decades by which a quantity fell from one iteration to another."""
    values = np.interp([first, last], run.readings.iterations, run.readings.values[tag])
    return float(np.log10(values[0] / values[1]))


def _network_is_linear_at_some(runs: Sequence[Run]) -> Claim:
    return _at_some(
        "2",
        "The network's gap converges linearly for particular lambda only, which require tuning.",
        runs,
        (GAP.tag(),),
        only=True,
    )


def _network_collapses_at_some(runs: Sequence[Run]) -> Claim:
    return _at_some(
        "4",
        "The network's NC1, NC2 and NC3 converge linearly to 0 for both losses using appropriate regularisation.",
        runs,
        NC_TAGS,
    )


def _at_some(figure: str, sentence: str, runs: Sequence[Run], tags: tuple[str, ...], only: bool = False) -> Claim:
    held, parts = True, []
    for loss in _LOSSES:
        own = [run for run in runs if run.loss == loss]
        linear = [run for run in own if all(_decades(run, tag) >= _MLP_DECADES[tag] for tag in tags)]
        held &= bool(linear) and not (only and len(linear) == len(own))
        listed = [", ".join(f"{run.settings['lambda_h']:g}" for run in group) or "none" for group in (linear, own)]
        parts.append(f"{loss.upper()}: lambda {listed[0]} out of {listed[1]}")
    decades = " and ".join(sorted({f"{_MLP_DECADES[tag]:g}" for tag in tags}, reverse=True))
    return Claim(
        figure,
        sentence,
        f"for each loss at some lambda{', not at all' if only else ''}, straight over at least {decades} decades"
        + (" (NC1; NC2 and NC3)" if len(tags) > 1 else "")
        + " within the iterations run",
        held,
        "; ".join(parts),
    )
