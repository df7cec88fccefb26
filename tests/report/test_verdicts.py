import numpy as np
import pytest
import torch
import yaml

from nclightning import functional as F
from nclightning import quantities
from nclightning.problems import unbalanced_ce
from nclightning.report import read_records, verdicts_on
from nclightning.report.verdicts import least_nc2, roundoff_of
from tests.recorded import NC, geometric, record
from tests.report.cases import CURVES, STEPS

NC1, NC2, NC3 = NC
GAP, DISTANCE, GRADIENT = "optimality/gap", "optimality/distance", "optimality/grad_norm"
LOSS = quantities.LOSS.tag()
UFM = {"loss": "mse", "lambda_w": 1e-2, "lambda_h": 1e-3}


def said(folder, curves, **settings):
    """Words of the verdicts on a run with these curves."""
    record(folder, curves, **settings)
    (found,) = read_records([folder])
    return {verdict.words: verdict for verdict in verdicts_on(found)}


def flat(value, number=300):
    return np.arange(float(number)), np.full(number, value)


def test_collapse_needs_all_three_at_the_roundoff_of_the_dtype(tmp_path):
    ends = {NC1: flat(1e-25), NC2: flat(1e-13), NC3: flat(1e-13)}
    assert "Collapsed to round-off" in said(tmp_path / "a", ends, dtype="float64")
    above = said(tmp_path / "b", ends | {NC1: flat(1e-23)}, dtype="float64")
    assert "Not collapsed to round-off: NC1 is above it" in above
    single = {NC1: flat(1e-11), NC2: flat(1e-6), NC3: flat(1e-6)}
    assert "Collapsed to round-off" in said(tmp_path / "c", single, dtype="float32")
    words = said(tmp_path / "d", single)
    assert "Not collapsed to round-off: NC1, NC2 and NC3 are above it" in words  # No dtype, so nothing is forgiven.
    assert "no dtype recorded" in words["Not collapsed to round-off: NC1, NC2 and NC3 are above it"].rule


def test_with_nc1_alone_collapse_is_not_decided(tmp_path):
    words = said(tmp_path / "a", {NC1: flat(1e-25)})
    assert words["Not decided whether collapsed: NC2 and NC3 have no values"].kind == "open"
    assert not any(each.startswith("Collapsed") for each in words)


def test_a_last_value_between_swings_is_no_roundoff(tmp_path):
    steps = np.arange(300.0)
    swings = {tag: (steps, np.where(steps % 2, 1e-30, 1e-3)) for tag in (NC1, NC2, NC3)}
    assert swings[NC1][1][-1] == 1e-30
    words = said(tmp_path / "a", swings)
    assert "Not collapsed to round-off: NC1, NC2 and NC3 are above it" in words
    assert any(each.startswith("NC1: oscillates") for each in words)
    fluctuating = {tag: (steps, np.where(steps % 2, 1e-30, 1e-27)) for tag in (NC1, NC2, NC3)}
    assert "Collapsed to round-off" in said(tmp_path / "b", fluctuating)


SENTENCES = {
    "straight": "NC2: still falling; at this rate another 301 iterations to 1e-12",
    "one over t": "NC2: falling ever more slowly; more than ",
    "a floor": "NC2: stalled at 7.5e-12",
    "slow and straight": "NC2: falling, not decided for how long",
    "one over t to a floor": "NC2: stalled at 0.503",
    "constant": "NC2: stalled at 0.5",
    "swings": "NC2: oscillates between 0.1 and 10",
    "grows": "NC2: rising",
    "a cliff at the end": "NC2: not decided, no simple trend",
    "zero at the end": "At round-off: NC2",
    "negative at the end": "At round-off: NC2",
    "nan only": "NC2: not decided, every reading is nan or infinite",
    "one reading": "NC2: not decided, too few readings",
    "nan in the middle": "NC2: still falling; at this rate another 301 iterations to 1e-12",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_sentence_on_a_curve(tmp_path, name):
    values = CURVES[name][1]
    scale = 10 if name == "a floor" else 1  # Else its 7.5e-13 would be round-off.
    curves = {NC2: (STEPS, scale * values), "line_search/step_size": flat(1.0)}
    words = said(tmp_path / "a", curves)
    assert any(each.startswith(SENTENCES[name]) for each in words), list(words)


def test_a_fall_of_a_fraction_of_a_decade_is_not_continued(tmp_path):
    short, long = (10.0 ** (-STEPS / per_decade) for per_decade in (210, 190))  # Over 100 iterations.
    assert "NC1: falling, not decided for how long" in said(tmp_path / "a", {NC1: (STEPS, short)})
    assert any(each.startswith("NC1: still falling;") for each in said(tmp_path / "b", {NC1: (STEPS, long)}))


def test_a_run_of_one_row_decides_no_trend(tmp_path):
    words = said(tmp_path / "a", {GAP: flat(0.5, 1), NC1: flat(0.5, 1)})
    assert "gap: not decided, too few readings" in words
    assert words["NC1: not decided, too few readings"].number == "0.5 at 0; 1 reading"


DIVERGED = {
    "infinite": {GAP: (STEPS, np.where(STEPS < 250, 1.0, np.inf)), NC1: flat(1.0)},
    "nan to the end": {
        GAP: (STEPS, np.where(STEPS < 250, 1.0, np.nan)),
        NC1: (STEPS, np.where(STEPS < 250, 1, np.nan)),
    },
    "grown": {GAP: (STEPS, 10.0 ** (STEPS / 50))},
    "loss grown": {LOSS: (STEPS, 10.0 ** (STEPS / 50)), GAP: flat(1.0)},
}


@pytest.mark.parametrize("name", DIVERGED)
def test_divergence_is_told(tmp_path, name):
    assert said(tmp_path / "a", DIVERGED[name])["Diverged"].kind == "bad"


@pytest.mark.parametrize(
    "curves",
    [
        {GAP: (STEPS, np.where((STEPS > 100) & (STEPS < 200), np.nan, 1.0))},
        {GAP: geometric(10, 8)},
        {"optimality/error_bound_ratio": (STEPS, np.where(STEPS == 3, np.inf, 1.0)), GAP: flat(1.0)},
        {GAP: flat(1.0), "log10/optimality/gap": (STEPS, np.full(300, -np.inf))},
        {GAP: (STEPS, np.where(STEPS < 1, 1e-22, 1e-16))},  # Started at the optimum.
        {LOSS: (STEPS, 1 - 1e-12 * 10.0 ** (STEPS / 30)), GRADIENT: (STEPS, 1e-6 * 10.0 ** (STEPS / 60))},  # A saddle.
        {NC1: (STEPS, np.where(STEPS < 1, np.inf, 1.0)), GAP: flat(1.0)},  # All features were the same.
        {GRADIENT: (STEPS, np.where(STEPS == 3, np.inf, 1.0))},  # A step that mixed precision left out.
    ],
)
def test_what_is_no_divergence_is_not_called_one(tmp_path, curves):
    assert "Diverged" not in said(tmp_path / "a", curves)


@pytest.mark.parametrize(("K", "d"), [(10, 4), (5, 1), (100, 64)])
def test_the_least_nc2_is_that_of_the_best_head(K, d):
    """The projection of a simplex ETF to d of its K - 1 dimensions has it, and no other head is below."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.eye(K, dtype=torch.float64) - 1 / K)[0][:, :d]
    assert float(F.etf_deviation(frame)) == pytest.approx(least_nc2(K, d), rel=1e-9)
    others = [torch.randn(K, d, dtype=torch.float64, generator=generator) for _ in range(20)]
    assert min(float(F.etf_deviation(each)) for each in others) > least_nc2(K, d)
    assert least_nc2(K, K - 1) == least_nc2(K, 10 * K) == 0


def test_with_few_features_nc2_cannot_vanish(tmp_path):
    least = least_nc2(10, 4)
    words = said(tmp_path / "a", {NC2: flat(least * 1.001), NC3: flat(2 * least)}, feature_dim=4)
    verdict = words["NC2 and NC3 cannot vanish: K > d + 1"]
    assert f"{least:.4g}" in verdict.number
    assert "NC2: within 1 % of the least value that these sizes allow" in words
    assert f"NC3: stalled at {2 * least:.3g}" in words
    enough = said(tmp_path / "b", {NC2: flat(0.5)}, feature_dim=9)
    assert not any("cannot vanish" in each for each in enough)
    impossible = said(tmp_path / "c", {NC2: flat(least / 2)}, feature_dim=4)
    assert "Not decided: a value is below the least that these sizes allow" in impossible


def test_with_few_features_nothing_is_continued_to_zero(tmp_path):
    words = said(tmp_path / "a", {NC2: (STEPS, 10 * 10.0 ** (-STEPS / 290))}, feature_dim=4)
    assert "NC2: falling, to a value that these sizes keep above zero" in words
    below = said(tmp_path / "b", {NC2: flat(0.5)}, feature_dim=4)
    assert "NC2: within 1 % of the least value that these sizes allow" not in below


def test_a_collapse_that_was_followed_by_nan_is_not_the_end_of_the_run(tmp_path):
    ends = {NC1: 1e-25, NC2: 1e-13, NC3: 1e-13}
    curves = {tag: (STEPS, np.where(STEPS < 200, value, np.nan)) for tag, value in ends.items()}
    words = said(tmp_path / "a", {GAP: flat(1.0)} | curves, dtype="float64")
    assert "NC1: not decided, no value after 199" in words
    assert not any(each.startswith("Collapsed") for each in words)
    sparse = {tag: (STEPS, np.where(STEPS % 160 == 0, value, np.nan)) for tag, value in ends.items()}
    assert "Collapsed to round-off" in said(tmp_path / "b", {GAP: flat(1.0)} | sparse, dtype="float64")


def test_of_other_sets_and_other_problems_it_is_not_said_that_nc_should_vanish(tmp_path):
    words = said(tmp_path / "a", {"nc/val/nc1": flat(0.3)})
    assert words["NC1 (val): flat at 0.3, not decided whether it should vanish"].kind == "open"
    problem = unbalanced_ce([100, 100, 90, 90], feature_dim=3, lambda_w=0.01, lambda_h=0.01)
    record(tmp_path / "b", {NC2: flat(0.3)})
    (tmp_path / "b" / "hparams.yaml").write_text(yaml.safe_dump({"problem": problem.describe()}))
    (found,) = read_records([tmp_path / "b"])
    words = [verdict.words for verdict in verdicts_on(found)]
    assert "NC2: flat at 0.3, not decided whether it should vanish" in words


@pytest.mark.parametrize(("dtype", "judged"), [("float64", True), ("float32", False)])
def test_roundoff_of_float32_does_not_break_the_error_bound(tmp_path, dtype, judged):
    """At distances of 1e-7 of the norm the ratio of two float32 numbers is noise."""
    (found,) = read_records([write(tmp_path / "probe", {GAP: flat(1.0)})])
    kappa, norm = found.run.problem.error_bound_constant, found.run.problem.optimum_norm
    iterations, distance = geometric(20, 7, start=norm)
    ratio = np.where(distance < 1e-6 * norm, 100 * kappa, 0.9 * kappa)
    curves = {DISTANCE: (iterations, distance), "optimality/error_bound_ratio": (iterations, ratio)}
    words = said(tmp_path / "a", curves, **UFM, dtype=dtype)
    assert ("The error bound of the theory does not hold near the optimal set" in words) == judged


def test_a_flat_certified_gap_may_be_that_of_the_optimum(tmp_path):
    words = said(tmp_path / "a", {quantities.CERTIFIED_GAP.tag(): flat(0.448)})
    assert "certified gap: flat at 0.448, not decided whether it should vanish" in words


def test_an_optimum_at_zero_is_told_from_the_penalties(tmp_path):
    """K^2 n lambda_w lambda_h = 1 is the threshold: 1000 times the product here."""
    above = said(tmp_path / "a", {GAP: flat(1e-3)}, **UFM | {"lambda_w": 1.0, "lambda_h": 1.01e-3})
    below = said(tmp_path / "b", {GAP: flat(1e-3)}, **UFM | {"lambda_w": 1.0, "lambda_h": 0.99e-3})
    sentence = "The optimum is zero: lambda is above the threshold, and nothing is learned"
    assert sentence in above
    assert sentence not in below


@pytest.mark.parametrize(("counts", "merged"), [([100, 100, 2, 2], True), ([100, 100, 90, 90], False)])
def test_minority_classes_merge_where_the_optimum_has_them_in_one_place(tmp_path, counts, merged):
    problem = unbalanced_ce(counts, feature_dim=3, lambda_w=0.01, lambda_h=0.01)
    folder = tmp_path / "a"
    record(folder, {GAP: flat(1e-3)})
    (folder / "hparams.yaml").write_text(yaml.safe_dump({"problem": problem.describe()}))
    (found,) = read_records([folder])
    assert ("Minority classes merged: 2, 3" in [verdict.words for verdict in verdicts_on(found)]) == merged


def test_at_the_optimum_what_does_not_vanish_is_no_fault_of_the_run(tmp_path):
    words = said(tmp_path / "a", {DISTANCE: flat(1e-13), NC2: flat(0.6)}, dtype="float64")
    assert words["NC2: 0.6 at the optimum, where it does not vanish"].kind == "note"


def test_the_error_bound_is_judged_near_the_optimum_only(tmp_path):
    """At a large distance the ratio may be anything; kappa of this problem is 1/mu."""
    iterations, distance = geometric(20, 12, start=10.0)
    (found,) = read_records([write(tmp_path / "probe", {GAP: flat(1.0)})])
    kappa, norm = found.run.problem.error_bound_constant, found.run.problem.optimum_norm
    for name, factor, sentence in (
        ("held", 0.99, "The error bound holds near the optimal set"),
        ("broken", 1.05, "The error bound of the theory does not hold near the optimal set"),
    ):
        ratio = np.where(distance > 1e-3 * norm, 100 * kappa, factor * kappa)
        curves = {DISTANCE: (iterations, distance), "optimality/error_bound_ratio": (iterations, ratio)}
        assert sentence in said(tmp_path / name, curves, **UFM)
    far = {DISTANCE: flat(10 * norm), "optimality/error_bound_ratio": flat(kappa)}
    assert "Not decided whether the error bound holds: no reading lies near the optimal set" in said(
        tmp_path / "far", far, **UFM
    )


def write(folder, curves):
    record(folder, curves, **UFM)
    return folder


@pytest.mark.parametrize(("factor", "same"), [(1.0, True), (1.15, True), (1.3, False), (0.5, False)])
def test_measured_and_predicted_rate_are_compared(tmp_path, factor, same):
    curves = {GAP: geometric(100, 10), "optimality/predicted_decay": geometric(100, 10)}
    iterations, values = curves["optimality/predicted_decay"]
    words = said(tmp_path / "a", curves | {"optimality/predicted_decay": (iterations, values ** (1 / factor))}, **UFM)
    assert ("The gap falls at the rate that the theory predicts" in words) == same


def test_each_verdict_has_a_number_and_a_rule(tmp_path):
    curves = {tag: (STEPS, values) for tag, (_, values) in zip(NC, CURVES.values(), strict=False)}
    for verdict in said(tmp_path / "a", curves | {GAP: flat(1e-3)}, **UFM).values():
        assert verdict.number
        assert verdict.rule


def test_roundoff_is_quadratic_for_what_is_quadratic():
    assert roundoff_of("nc1", "float32") == roundoff_of("nc2", "float32") ** 2
    assert roundoff_of("gap", "bfloat16") == roundoff_of("gap", "float64")
