"""Verdicts in words on a run or a measurement, each decided by a rule that is shown beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from nclightning.figures.tables import error_bound_constant_of
from nclightning.problems import NoAnswer, Problem
from nclightning.problems.coincidence import coinciding_groups
from nclightning.quantities import CONVERGING, GAP, parse_tag
from nclightning.report.quantities import OF_COLLAPSE, falls_to_zero, label_of
from nclightning.report.recorded import Record
from nclightning.report.trends import LEAST_READINGS, Trend, trend_of
from nclightning.theory import UFMProblem

__all__ = ["Verdict", "least_nc2", "roundoff_of", "verdicts_on"]

TARGET = 1e-12  # To which a falling curve is continued.
# Deviations of first order at which nothing is left but round-off. In float64 the shipped configurations stop at a
# distance of 1e-12; float32 has 1.2e-7, and sums of a hundred terms lose two digits. NC1 and the gap are quadratic in
# deviations, so that their limit is the square.
_ROUNDOFF = {"float64": 1e-12, "float32": 1e-5}
_SECOND_ORDER = ("gap", "certified_gap", "nc1", "nc1_ratio", "nc1_cdnv")
_FAR = 1e3  # By which an objective or a gradient has grown in a run that is called diverged.
_LARGE = 400**2  # Groups times classes from which on an optimum may take minutes.
_BELOW_FLOOR = 1e-3  # Rounding of a float32 table may put a value below its least one.
_BOUND = 1.01  # As in the reproduction: the constant holds in the limit.


@dataclass(frozen=True)
class Verdict:
    """A sentence about a run, and why it is said.

    Attributes:
        kind: ``"good"``, ``"bad"``, ``"note"``, or ``"open"`` where the data decide nothing.
        words: The sentence, without a full stop.
        number: The number that decided, in words.
        rule: When the sentence is said.
    """

    kind: Literal["good", "bad", "note", "open"]
    words: str
    number: str
    rule: str


def roundoff_of(name: str, dtype: str) -> float:
    """Return the value below which a quantity is round-off.

    Args:
        name: Last part of its tag.
        dtype: Of the run; any other than float32 counts as float64, which claims less.
    """
    first = _ROUNDOFF.get(dtype, _ROUNDOFF["float64"])
    return first**2 if name in _SECOND_ORDER else first


def least_nc2(num_classes: int, feature_dim: int) -> float:
    r"""Return the least NC2 and NC3 of K classes in d dimensions, :math:`\sqrt{2 - 2\sqrt{d/(K-1)}}` for K > d + 1.

    Args:
        num_classes: K, at least 2.
        feature_dim: d, at least 1.

    Returns:
        0 where a simplex ETF fits.
    """
    return math.sqrt(2 - 2 * math.sqrt(min(1.0, feature_dim / (num_classes - 1))))


def verdicts_on(record: Record) -> list[Verdict]:
    """Decide what can be said.

    Args:
        record: A run or a measurement.

    Returns:
        Verdicts on the whole first, then on each quantity.
    """
    if record.fault:
        return [Verdict("open", "Not decided: there are no readings", record.fault, "a report needs one reading")]
    if record.measurement is not None:
        return [*_on_sizes(record.measurement, record.measurement["measures"]), *_on_measurement(record.measurement)]
    assert record.run is not None
    return [*_on_divergence(record), *_on_problem(record), *_on_run(record)]


# A run.


def _on_run(record: Record) -> Iterator[Verdict]:
    assert record.run is not None
    readings, dtype = record.run.readings, str(record.settings.get("dtype", ""))
    trends = {tag: trend_of(readings.iterations, values) for tag, values in readings.values.items()}
    last = {tag.removeprefix("nc/train/"): trend.last for tag, trend in trends.items() if tag.startswith("nc/train/")}
    yield from _on_sizes(record.settings, last)
    yield from _on_collapse(trends, dtype)
    unit = "iterations" if record.has_iterations else "steps"
    for tag in dict.fromkeys((*CONVERGING, *filter(falls_to_zero, trends))):
        if tag in trends:
            yield _on_trend(label_of(tag), parse_tag(tag).name, trends[tag], dtype, unit)
    yield from _on_rate(record)


def _on_collapse(trends: Mapping[str, Trend], dtype: str) -> Iterator[Verdict]:
    """Say whether the training set has collapsed, which needs all three measures."""
    found = {name: trends[tag] for name in OF_COLLAPSE if (tag := f"nc/train/{name}") in trends}
    found = {name: trend for name, trend in found.items() if trend.kind != "none"}
    if not found:
        return
    missing = [name.upper() for name in OF_COLLAPSE if name not in found]
    values = ", ".join(f"{name.upper()} = {trend.last:.2g}" for name, trend in found.items())
    limits = ", ".join(f"{name.upper()} at most {roundoff_of(name, dtype):.2g}" for name in OF_COLLAPSE)
    rule = f"in the last reading {limits}{_said_dtype(dtype)}"
    at_floor = [name for name, trend in found.items() if _is_roundoff(name, trend, dtype)]
    if missing:
        yield Verdict("open", f"Not decided whether collapsed: {_and(missing)} not recorded", values, rule)
    elif len(at_floor) == len(OF_COLLAPSE):
        yield Verdict("good", "Collapsed to round-off", values, rule)
    else:
        far = _and([name.upper() for name in found if name not in at_floor])
        yield Verdict("note", f"Not collapsed to round-off: {far} above it", values, rule)


def _on_trend(label: str, name: str, trend: Trend, dtype: str, unit: str) -> Verdict:
    limit, value = roundoff_of(name, dtype), f"{trend.last:.3g} at {trend.at:,}"
    if trend.kind == "none":
        return Verdict("open", f"{label}: not decided, every reading is nan or infinite", "no finite value", "-")
    if _is_roundoff(name, trend, dtype):
        exactly = " (exactly 0)" if trend.last == 0 else " (negative by rounding)" if trend.last < 0 else ""
        rule = f"last value at most {limit:.2g} in size{_said_dtype(dtype)}"
        return Verdict("good", f"{label}: at round-off{exactly}", value, rule)
    if trend.kind == "negative":
        rule = f"a value below -{limit:.2g} is no rounding"
        return Verdict("open", f"{label}: not decided, the last value is negative", value, rule)
    if trend.kind == "few":
        rule = f"a trend needs {LEAST_READINGS} positive readings"
        return Verdict("open", f"{label}: not decided, too few readings", f"{value}; {trend.number} readings", rule)
    return _on_end(label, trend, value, unit)


def _on_end(label: str, trend: Trend, value: str, unit: str) -> Verdict:
    line = trend.line
    fitted = "" if line is None else f"; R^2 {line.r_squared:.4f} over {line.first:,}-{line.last:,}"
    if trend.kind == "flat":
        rule = f"the last third of the {unit} changes by less than 0.05 decades, all of it within a factor of 2"
        return Verdict("bad", f"{label}: stalled at {trend.last:.3g}", f"{value}{fitted}", rule)
    if trend.kind == "oscillating":
        rule = "values leave their line by a factor of 2 and cross it 6 times or more in the last third"
        words = f"{label}: oscillates between {trend.low:.3g} and {trend.high:.3g}"
        return Verdict("bad", words, f"{value}{fitted}", rule)
    if trend.kind == "rising":
        return Verdict("bad", f"{label}: rising", f"{value}{fitted}", "the last third rises, by at least 0.05 decades")
    if trend.kind in ("falling", "slowing") and line is not None:
        return _on_fall(label, trend, f"{value}; {line.iterations_per_decade:.4g} {unit}/decade{fitted}", unit)
    rule = "the last third is neither flat, nor straight on a log axis (R^2 at least 0.99), nor an oscillation"
    return Verdict("open", f"{label}: not decided, no simple trend", f"{value}{fitted}", rule)


def _on_fall(label: str, trend: Trend, number: str, unit: str) -> Verdict:
    if trend.last <= TARGET:
        rule = "the last third falls along a line with R^2 at least 0.99"
        return Verdict("good", f"{label}: below {TARGET:g} and still falling", number, rule)
    more = trend.iterations_to(TARGET)
    if trend.kind == "falling":
        rule = "R^2 at least 0.99 on the last third, with a slope of at least 0.8 of the slope before"
        words = f"{label}: still falling; at this rate another {_count(more)} {unit} to {TARGET:g}"
        return Verdict("note", words, number, rule)
    rule = "R^2 at least 0.99 on the last third, with less than 0.8 of the slope before"
    words = f"{label}: falling ever more slowly; more than {_count(more)} further {unit} to {TARGET:g}"
    return Verdict("note", words, number, rule)


def _on_rate(record: Record) -> Iterator[Verdict]:
    assert record.run is not None
    summary = record.run.summary
    gap, predicted = summary.fits.get(GAP.tag()), summary.predicted
    if gap is not None and predicted is not None and predicted.slope < 0:
        quotient = gap.iterations_per_decade / predicted.iterations_per_decade
        near = 1 / 1.2 <= quotient <= 1.2
        words = f"The gap falls at {'the rate' if near else 'another rate than'} that the theory predicts"
        words = words.replace("another rate than that", "another rate than")
        number = f"{gap.iterations_per_decade:.4g} iterations/decade measured, "
        number += f"{predicted.iterations_per_decade:.4g} predicted for the steps taken"
        yield Verdict("good" if near else "note", words, number, "quotient of the two between 1/1.2 and 1.2")
    constant = None if record.run.problem is None else error_bound_constant_of(record.run.problem)
    if summary.kappa is not None and constant is not None and math.isfinite(constant):
        holds = summary.kappa <= _BOUND * constant
        number = f"{summary.kappa:.6g} measured, 1/mu = {constant:.6g}"
        rule = "largest distance / gradient norm over the straight stretch, at most 1.01 / mu"
        words = "The error bound holds" if holds else "The error bound of the optimum is exceeded on the way"
        yield Verdict("good" if holds else "note", words, number, rule)


def _on_divergence(record: Record) -> Iterator[Verdict]:
    assert record.run is not None
    readings = record.run.readings
    rule = "a recorded value is infinite; or all values are nan to the end; or loss or gradient norm grew 1000-fold"
    for tag, values in readings.values.items():
        if not tag.startswith("log10/") and np.isinf(values).any() and "error_bound_ratio" not in tag:
            at = readings.iterations[np.isinf(values)][0]
            yield Verdict("bad", "Diverged", f"{tag} is infinite at {at:,.0f}", rule)
            return
    unknown = np.isnan(list(readings.values.values())).all(axis=0)
    if unknown[-1] and not unknown.all():
        at = readings.iterations[np.flatnonzero(~unknown)[-1]]
        yield Verdict("bad", "Diverged", f"all values are nan after {at:,.0f}", rule)
        return
    for tag in ("loss", "optimality/gap", "optimality/grad_norm"):
        values = readings.values.get(tag, np.array([]))
        values = values[np.isfinite(values)]
        if len(values) >= LEAST_READINGS and values[0] > 0 and values[-1] >= _FAR * values[0]:
            number = f"{tag} grew from {values[0]:.3g} to {values[-1]:.3g}"
            yield Verdict("bad", "Diverged", number, rule)
            return


# What the sizes and the problem decide before anything is measured.


def _on_sizes(sizes: Mapping[str, Any], measured: Mapping[str, float]) -> Iterator[Verdict]:
    K, d = sizes.get("num_classes"), sizes.get("feature_dim")
    if not isinstance(K, int) or not isinstance(d, int) or K < 2 or d < 1:
        return
    found = {name: measured[name] for name in ("nc2", "nc3") if math.isfinite(measured.get(name, math.nan))}
    if found and d + 1 < K:
        least = least_nc2(K, d)
        values = ", ".join(f"{name.upper()} = {value:.4g}" for name, value in found.items())
        rule = "a simplex ETF of K classes needs K - 1 dimensions; the least value is sqrt(2 - 2 sqrt(d / (K - 1)))"
        number = f"K = {K}, d = {d}: at least {least:.4g}; {values}"
        if min(found.values()) < least * (1 - _BELOW_FLOOR):
            yield Verdict("open", "Not decided: a value is below the least that these sizes allow", number, rule)
        else:
            yield Verdict("note", f"{_and([name.upper() for name in found])} cannot vanish: K > d + 1", number, rule)
    rank = measured.get("nc1_rank", math.nan)
    present = K - _absent(sizes)
    if math.isfinite(rank) and rank < min(present - 1, d):
        rule = "nc1_rank below min(K - 1, d), with K the classes that have samples"
        number = f"{rank:.0f} of {min(present - 1, d)} directions"
        yield Verdict("note", "Class means spread along fewer directions than they could", number, rule)


def _on_problem(record: Record) -> Iterator[Verdict]:
    assert record.run is not None
    problem = record.run.problem
    if problem is None or (isinstance(problem, Problem) and problem.num_groups * problem.num_classes > _LARGE):
        return
    product = problem.strength**2 if isinstance(problem, Problem) else problem.lambda_w * problem.lambda_h
    threshold = problem.threshold
    number = f"lambda_w lambda_h = {product:.4g}, threshold {threshold:.4g}"
    rule = "lambda_w lambda_h at or above the threshold of the problem"
    is_zero = not problem.collapses if isinstance(problem, UFMProblem) else product >= threshold
    if is_zero:
        yield Verdict("bad", "The optimum is zero: lambda is above the threshold, and nothing is learned", number, rule)
    elif isinstance(problem, Problem) and problem.groups_are_classes:
        yield from _on_minorities(problem)


def _on_minorities(problem: Problem) -> Iterator[Verdict]:
    try:
        vanished, shared = coinciding_groups(problem)
    except NoAnswer:
        return
    rule = "class means of the optimum within 1e-7 of each other, relative to the largest"
    if vanished:
        number = f"{len(vanished)} of {problem.num_classes} class means are zero at the optimum"
        yield Verdict("bad", f"Classes vanish at the optimum: {_numbers(vanished)}", number, rule)
    for classes in shared:
        number = f"{len(classes)} classes share one mean at the optimum"
        yield Verdict("bad", f"Minority classes merged: {_numbers(classes)}", number, rule)


# A measurement.


def _on_measurement(measurement: Mapping[str, Any]) -> Iterator[Verdict]:
    counts = _counts(measurement)
    absent, present = [i for i, n in enumerate(counts) if n == 0], [n for n in counts if n > 0]
    if absent:
        number = f"{len(absent)} of {len(counts)} classes: {_numbers(absent)}"
        yield Verdict("note", "Some classes have no samples; class means leave them out", number, "count is 0")
    if present and max(present) > min(present):
        number = f"{min(present):,} to {max(present):,} samples per class"
        words = "Classes are unbalanced, so that collapse to a simplex ETF is not what the theory predicts"
        yield Verdict("note", words, number, "the counts of the classes differ")
    values = measurement["measures"]
    trends = {f"nc/train/{name}": trend_of(np.zeros(1), np.array([value])) for name, value in values.items()}
    yield from _on_collapse(trends, "")
    unknown = [name for name, value in values.items() if not math.isfinite(value)]
    if unknown:
        yield Verdict("open", f"Not decided: {_and(unknown)}", "nan or infinite", "a value must be finite")
    words = "Not decided whether and how fast values fall: this is one state of the network"
    yield Verdict("open", words, "1 reading", f"a trend needs {LEAST_READINGS} readings")


def _counts(measurement: Mapping[str, Any]) -> list[int]:
    table = measurement.get("per_class")
    counts = table.get("count") if isinstance(table, Mapping) else None
    return [int(n) for n in counts] if isinstance(counts, list) and all(isinstance(n, int) for n in counts) else []


def _absent(sizes: Mapping[str, Any]) -> int:
    return sum(n == 0 for n in _counts(sizes))


def _is_roundoff(name: str, trend: Trend, dtype: str) -> bool:
    return trend.kind != "none" and abs(trend.last) <= roundoff_of(name, dtype)


def _said_dtype(dtype: str) -> str:
    if dtype in _ROUNDOFF:
        return f" ({dtype})"
    return " (no dtype recorded: that of float64)" if not dtype else f" ({dtype}: that of float64)"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value < 1e9 else f"{value:.2g}"


def _numbers(classes: list[int] | tuple[int, ...]) -> str:
    shown = ", ".join(map(str, classes[:10]))
    return f"{shown} and {len(classes) - 10} more" if len(classes) > 10 else shown


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
