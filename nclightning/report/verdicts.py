"""Verdicts in words on a run or a measurement, each decided by a rule that is shown beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nclightning.figures.runs import Run
from nclightning.figures.tables import error_bound_constant_of
from nclightning.problems import NoAnswer, Problem
from nclightning.problems.coincidence import coinciding_groups
from nclightning.quantities import (
    CERTIFIED_GAP,
    CONVERGING,
    DISTANCE,
    ERROR_BOUND_RATIO,
    GAP,
    GRAD_NORM,
    LOSS,
    NC,
    NC2,
    NC3,
    parse_tag,
)
from nclightning.report.quantities import OF_COLLAPSE, falls_to_zero, label_of
from nclightning.report.recorded import Record
from nclightning.report.trends import LEAST_READINGS, Trend, trend_of
from nclightning.theory import UFMProblem

__all__ = ["Verdict", "least_nc2", "roundoff_of", "sizes_of", "verdicts_on"]

TARGET = 1e-12  # To which a falling curve is continued.
# Deviations of first order at which nothing is left but round-off. In float64 the shipped configurations stop at a
# distance of 1e-12; float32 has 1.2e-7, and sums of a hundred terms lose two digits. NC1 and the gap are quadratic in
# deviations, so that their limit is the square.
_ROUNDOFF = {"float64": 1e-12, "float32": 1e-5}
_SECOND_ORDER = ("gap", "certified_gap", "nc1", "nc1_ratio", "nc1_cdnv")
_OF_FRAMES = (NC2.name, NC3.name)  # Distances from a simplex ETF.
_NEAR_LEAST = 1.01
_SAME_RATE = 1.2  # A straight stretch still holds some of the start, where the prediction is not meant.
_LEAST_TO_CONTINUE = 0.5  # Decades, as for a rate in the tables.
_FAR = 1e3  # By which an objective has grown in a run that is called diverged.
_LEAST_START = 1e-6  # A run that starts closer to the optimum, or at a saddle, may grow 1000-fold by nothing else.
_MISSED = 2  # Times the longest pause between readings, after which a curve counts as ended.
_LARGE = 400**2  # Groups times classes from which on an optimum may take minutes.
_BELOW_FLOOR = 1e-3  # Rounding of a float32 table may put a value below its least one.
# Round-off spoils the ratio below the first, and the bound is local. Without a dtype nothing is held against a run.
_BOUND_FROM, _BOUND_TO = {"float64": 1e-10}, 1e-3
_BOUND_FROM_ELSE = 1e-5
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
        num_classes: K.
        feature_dim: d, at least 1.

    Returns:
        0 where a simplex ETF fits.
    """
    if num_classes <= feature_dim + 1:
        return 0.0
    return math.sqrt(2 - 2 * math.sqrt(feature_dim / (num_classes - 1)))


def sizes_of(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Number of classes and of features; zeros where they are not recorded.

    Args:
        settings: Of a run, or a measurement.
    """
    K, d = settings.get("num_classes"), settings.get("feature_dim")
    known = type(K) is int and type(d) is int and K >= 2 and d >= 1
    return (K, d) if known else (0, 0)  # type: ignore[return-value]


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


@dataclass(frozen=True)
class _Context:
    """What the verdict on a curve depends on beside the curve.

    Attributes:
        dtype: Of the run; empty if it is not recorded.
        unit: Of the abscissa, in the plural.
        at_optimum: Whether gap or distance is at round-off, so that what does not vanish is no fault of the run.
        least: Least NC2 and NC3 of these sizes.
        is_general: Whether the optimum of the problem may be another than a simplex ETF.
    """

    dtype: str
    unit: str
    at_optimum: bool = False
    least: float = 0.0
    is_general: bool = False


def _on_run(record: Record) -> Iterator[Verdict]:
    assert record.run is not None
    readings, dtype = record.run.readings, str(record.settings.get("dtype", ""))
    trends = {tag: trend_of(readings.iterations, values) for tag, values in readings.values.items()}
    ended = {tag: trends.pop(tag) for tag in [*trends] if _has_ended(readings.iterations, readings.values[tag])}
    of_training = f"{NC}/train/"
    last = {tag.removeprefix(of_training): each.last for tag, each in trends.items() if tag.startswith(of_training)}
    reached = [tag for tag in dict.fromkeys((*CONVERGING, *filter(falls_to_zero, trends))) if tag in trends]
    floored = [tag for tag in reached if _is_roundoff(tag, trends[tag], dtype)]
    K, d = sizes_of(record.settings)
    context = _Context(
        dtype,
        "iterations" if record.has_iterations else "steps",
        at_optimum=GAP.tag() in floored or DISTANCE.tag() in floored,
        least=least_nc2(K, d) if K else 0.0,
        is_general=isinstance(record.run.problem, Problem),
    )
    yield from _on_sizes(record.settings, last)
    of_collapse = [f"{of_training}{name}" for name in OF_COLLAPSE]
    yield from _on_collapse(trends, dtype)
    # A run that has collapsed was said to have, with these values.
    repeated = of_collapse if {*of_collapse} <= {*floored} else []
    if others := [tag for tag in floored if tag not in repeated]:
        yield _on_floored(others, trends, dtype)
    for tag in reached:
        if tag not in floored:
            yield _on_trend(label_of(tag), tag, trends[tag], context)
    for tag, trend in ended.items():
        if tag in CONVERGING or falls_to_zero(tag):
            number = f"{trend.last:.3g} at {trend.at:,}, of {int(readings.iterations[-1]):,} {context.unit}"
            rule = "no value follows for more than twice the longest pause between two values"
            yield Verdict("open", f"{label_of(tag)}: not decided, no value after {trend.at:,}", number, rule)
    yield from _on_rate(record)


def _has_ended(iterations: NDArray[np.float64], values: NDArray[np.float64]) -> bool:
    """Whether a curve stops long before the run does: its last value is not where the run ended."""
    read = iterations[np.isfinite(values)]
    return len(read) > 1 and bool(iterations[-1] - read[-1] > _MISSED * np.diff(read).max())


def _on_collapse(trends: Mapping[str, Trend], dtype: str) -> Iterator[Verdict]:
    """Say whether the training set has collapsed, which needs all three measures."""
    found = {name: trends[tag] for name in OF_COLLAPSE if (tag := f"{NC}/train/{name}") in trends}
    found = {name: trend for name, trend in found.items() if trend.kind != "none"}
    if not found:
        return
    missing = [name.upper() for name in OF_COLLAPSE if name not in found]
    values = ", ".join(f"{name.upper()} = {trend.last:.2g}" for name, trend in found.items())
    limits = ", ".join(f"{name.upper()} at most {roundoff_of(name, dtype):.2g}" for name in OF_COLLAPSE)
    rule = f"in the last reading {limits}, and not swinging above it{_said_dtype(dtype)}"
    far = [name.upper() for name, trend in found.items() if not _is_roundoff(name, trend, dtype)]
    if missing:
        have = "has no value" if len(missing) == 1 else "have no values"
        yield Verdict("open", f"Not decided whether collapsed: {_and(missing)} {have}", values, rule)
    elif not far:
        yield Verdict("good", "Collapsed to round-off", values, rule)
    else:
        verb = "is" if len(far) == 1 else "are"
        yield Verdict("note", f"Not collapsed to round-off: {_and(far)} {verb} above it", values, rule)


def _on_floored(tags: Sequence[str], trends: Mapping[str, Trend], dtype: str) -> Verdict:
    """Say of all that is at round-off that it is, in one sentence."""
    remarks = {tag: " (exactly 0)" if trends[tag].last == 0 else "" for tag in tags}
    remarks |= {tag: " (negative by rounding)" for tag in tags if trends[tag].last < 0}
    values = ", ".join(f"{label_of(tag)} = {trends[tag].last:.3g}{remarks[tag]}" for tag in tags)
    first, second = roundoff_of(DISTANCE.name, dtype), roundoff_of(GAP.name, dtype)
    rule = f"last value at most {first:.2g} in size, of gap and NC1, which are quadratic, {second:.2g}"
    return Verdict("good", f"At round-off: {_and([label_of(tag) for tag in tags])}", values, rule + _said_dtype(dtype))


def _on_trend(label: str, tag: str, trend: Trend, context: _Context) -> Verdict:
    """Say what a curve does that is not at round-off."""
    name, value = parse_tag(tag).name, f"{trend.last:.3g} at {trend.at:,}"
    if trend.kind == "none":
        rule = "a trend needs finite values; nan also stands for classes without samples"
        return Verdict("open", f"{label}: not decided, every reading is nan or infinite", "no finite value", rule)
    if trend.kind == "negative":
        rule = f"a value below -{roundoff_of(name, context.dtype):.2g} is no rounding, and cannot be"
        return Verdict("open", f"{label}: not decided, the last value is negative", value, rule)
    if trend.kind == "few":
        rule = f"a trend needs {LEAST_READINGS} positive readings"
        readings = "1 reading" if trend.number == 1 else f"{trend.number} readings"
        return Verdict("open", f"{label}: not decided, too few readings", f"{value}; {readings}", rule)
    not_to_zero = _on_positive_end(label, tag, trend, context)
    return _on_end(label, trend, value, context.unit) if not_to_zero is None else not_to_zero


def _on_positive_end(label: str, tag: str, trend: Trend, context: _Context) -> Verdict | None:
    """Say what a curve does that need not fall to zero; None for one that must."""
    name, value = parse_tag(tag).name, f"{trend.last:.3g} at {trend.at:,}"
    least = context.least if name in _OF_FRAMES else 0.0
    if trend.kind in ("falling", "slowing") and least:
        rule = "the last third falls along a line with R^2 at least 0.99, and K > d + 1"
        number = f"{value}, least {least:.6g}"
        return Verdict("note", f"{label}: falling, to a value that these sizes keep above zero", number, rule)
    if trend.kind == "flat" and least * (1 - _BELOW_FLOOR) <= trend.last <= _NEAR_LEAST * least:
        rule = "flat, and at most 1.01 times the least value that K > d + 1 allows"
        number = f"{trend.last:.6g}, least {context.least:.6g}"
        return Verdict("good", f"{label}: within 1 % of the least value that these sizes allow", number, rule)
    if trend.kind == "flat" and tag == CERTIFIED_GAP.tag():
        rule = "flat; with fewer features than the rank of the optimum, part of it stays at the optimum"
        return Verdict("open", f"{label}: flat at {trend.last:.3g}, not decided whether it should vanish", value, rule)
    if trend.kind == "flat" and context.at_optimum and falls_to_zero(tag):
        rule = "flat, while gap or distance is at round-off"
        return Verdict("note", f"{label}: {trend.last:.3g} at the optimum, where it does not vanish", value, rule)
    if trend.kind == "flat" and falls_to_zero(tag) and (context.is_general or not tag.startswith(f"{NC}/train/")):
        rule = "flat; at the optimum of a general problem, and on other sets than the training set, it may be positive"
        return Verdict("open", f"{label}: flat at {trend.last:.3g}, not decided whether it should vanish", value, rule)
    return None


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
    assert trend.line is not None
    if trend.kind == "falling" and trend.line.decades < _LEAST_TO_CONTINUE:
        rule = "R^2 at least 0.99 on the last third; a line that falls by less than half a decade is not continued"
        fallen = f"it fell by {trend.line.decades:.2g} decades over the last third"
        return Verdict("note", f"{label}: falling, not decided for how long", f"{number}; {fallen}", rule)
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
        near = 1 / _SAME_RATE <= quotient <= _SAME_RATE
        words = f"The gap falls at {'the rate' if near else 'another rate than the one'} that the theory predicts"
        number = f"{gap.iterations_per_decade:.4g} iterations/decade measured, "
        number += f"{predicted.iterations_per_decade:.4g} predicted for the steps taken"
        yield Verdict("good" if near else "note", words, number, "the two within a factor of 1.2")
    yield from _on_error_bound(record.run, str(record.settings.get("dtype", "")))


def _on_error_bound(run: Run, dtype: str) -> Iterator[Verdict]:
    """Compare distance over gradient norm with 1/mu near the optimal set, where the bound is claimed."""
    ratio, distance = (run.readings.values.get(each.tag()) for each in (ERROR_BOUND_RATIO, DISTANCE))
    if run.problem is None or ratio is None or distance is None:
        return
    constant = error_bound_constant_of(run.problem)
    if constant is None or not math.isfinite(constant):
        return
    share = _BOUND_FROM.get(dtype, _BOUND_FROM_ELSE)
    near, far = share * run.problem.optimum_norm, _BOUND_TO * run.problem.optimum_norm
    inside = ratio[(distance >= near) & (distance <= far) & np.isfinite(ratio)]
    rule = f"distance / gradient norm at distances of {share:g} to 1e-3 of the norm of the optimum, at most 1.01 / mu"
    if not len(inside):
        words = "Not decided whether the error bound holds: no reading lies near the optimal set"
        yield Verdict("open", words, f"1/mu = {constant:.6g}", rule)
        return
    holds = float(inside.max()) <= _BOUND * constant
    number = f"at most {inside.max():.6g} in {len(inside)} readings, 1/mu = {constant:.6g}"
    words = "The error bound holds near the optimal set"
    if not holds:
        words = "The error bound of the theory does not hold near the optimal set"
    yield Verdict("good" if holds else "bad", words, number, rule)


def _on_divergence(record: Record) -> Iterator[Verdict]:
    assert record.run is not None
    readings = record.run.readings
    rule = "the last value is infinite; or all values are nan to the end; or the loss grew 1000-fold, to 0.001 or more"
    rule += " (gap where no loss is recorded, gradient norm where neither is)"
    for tag, values in readings.values.items():
        # The ratio and logarithms are infinite where a gradient or a value is 0, measures where class means meet.
        may_be = parse_tag(tag).is_log10 or tag == ERROR_BOUND_RATIO.tag() or parse_tag(tag).group == NC
        known = np.flatnonzero(~np.isnan(values))
        if not may_be and len(known) and np.isinf(values[known[-1]]):
            at = readings.iterations[np.isinf(values)][0]
            yield Verdict("bad", "Diverged", f"{tag} is infinite at {at:,.0f}", rule)
            return
    if not readings.values:
        return
    unknown: NDArray[np.bool_] = np.isnan(np.array(list(readings.values.values()))).all(axis=0)
    if unknown[-1] and not unknown.all():
        at = readings.iterations[np.flatnonzero(~unknown)[-1]]
        yield Verdict("bad", "Diverged", f"all values are nan after {at:,.0f}", rule)
        return
    for tag in (LOSS.tag(), GAP.tag(), GRAD_NORM.tag()):
        values = readings.values.get(tag, np.array([]))
        values = values[np.isfinite(values)]
        if len(values) < LEAST_READINGS:
            continue
        if values[0] > 0 and values[-1] >= _FAR * max(values[0], _LEAST_START):
            number = f"{tag} grew from {values[0]:.3g} to {values[-1]:.3g}"
            yield Verdict("bad", "Diverged", number, rule)
        return  # A gradient grows on the way from a saddle, while the loss falls.


# What the sizes and the problem decide before anything is measured.


def _on_sizes(sizes: Mapping[str, Any], measured: Mapping[str, float]) -> Iterator[Verdict]:
    K, d = sizes_of(sizes)
    if not K:
        return
    present = K - _absent(sizes)
    least = {NC2.name: least_nc2(K, d), NC3.name: least_nc2(present, d)}  # NC3 leaves absent classes out.
    found = {name: measured[name] for name in _OF_FRAMES if math.isfinite(measured.get(name, math.nan)) and least[name]}
    if found:
        values = ", ".join(f"{name.upper()} = {value:.4g}, at least {least[name]:.4g}" for name, value in found.items())
        rule = "a simplex ETF of K classes needs K - 1 dimensions; the least value is sqrt(2 - 2 sqrt(d / (K - 1)))"
        if any(value < least[name] * (1 - _BELOW_FLOOR) for name, value in found.items()):
            words = "Not decided: a value is below the least that these sizes allow"
            yield Verdict("open", words, f"K = {K}, d = {d}: {values}", rule)
        else:
            words = f"{_and([name.upper() for name in found])} cannot vanish: K > d + 1"
            yield Verdict("note", words, f"K = {K}, d = {d}: {values}", rule)
    rank = measured.get("nc1_rank", math.nan)
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
    trends = {f"{NC}/train/{name}": trend_of(np.zeros(1), np.array([value])) for name, value in values.items()}
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


def _is_roundoff(tag: str, trend: Trend, dtype: str) -> bool:
    limit = roundoff_of(parse_tag(tag).name, dtype)
    if trend.kind == "oscillating" and trend.high > limit:  # Its last value is that of one moment.
        return False
    return trend.kind != "none" and abs(trend.last) <= limit


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
