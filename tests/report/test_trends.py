import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nclightning.report import trend_of
from tests.report.cases import CURVES, STEPS


@pytest.mark.parametrize("name", CURVES)
def test_each_kind_of_end_is_told(name):
    kind, values = CURVES[name]
    assert trend_of(STEPS, values).kind == kind


@given(
    per_decade=st.floats(1, 300),
    start=st.floats(-8, 3),
    scale=st.integers(1, 50),
    number=st.integers(5, 400),
)
def test_a_straight_line_is_continued_to_where_it_arrives(per_decade, start, scale, number):
    """However slowly it falls, it is not called flat."""
    iterations = scale * np.arange(float(number))
    values = 10.0 ** (start - iterations / per_decade)
    trend = trend_of(iterations, np.where(values > 1e-300, values, np.nan))
    left = iterations[values > 1e-300]
    if len(left) < 5:
        assert trend.kind == "few"
        return
    assert trend.kind == "falling"
    target = 1e-12
    expected = max(0.0, per_decade * (start + 12) - left[-1])
    assert trend.iterations_to(target) == pytest.approx(expected, rel=1e-6, abs=1e-3)


@given(power=st.floats(0.5, 3))
def test_a_power_law_is_not_called_linear(power):
    """1/t and its powers are nearly straight on their last third; only the slope before tells."""
    assert trend_of(STEPS, (1 + STEPS) ** -power).kind == "slowing"


@given(values=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=40), factor=st.floats(1e-5, 1e5))
def test_any_numbers_have_a_trend_which_the_unit_does_not_change(values, factor):
    values = np.array(values, dtype=float)
    values[np.abs(values) < 1e-200] = 0.0  # Those that a factor could take out of the range of doubles.
    values[np.abs(values) > 1e200] = np.inf
    iterations = np.arange(float(len(values)))
    assert trend_of(iterations, values).kind == trend_of(iterations, np.exp2(np.round(np.log2(factor))) * values).kind


def test_without_a_falling_line_no_target_is_reached():
    assert trend_of(STEPS, np.full(300, 0.5)).iterations_to(1e-12) == np.inf
    assert trend_of(STEPS, CURVES["grows"][1]).iterations_to(1e-12) == np.inf
