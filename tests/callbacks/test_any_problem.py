"""The monitors of full-batch runs on problems with any loss, targets, counts and bias."""

import logging
from io import StringIO
from threading import Event

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nclightning import problems as of
from nclightning.callbacks import LastCheckpoint, NeuralCollapseMonitor, OptimalityMonitor, TensorBoardDashboard, gaps
from nclightning.callbacks.gaps import Gaps, said_if_slow
from nclightning.closing import _predicted
from nclightning.data import FullBatchLoader, IndexDataModule
from nclightning.figures import read_readings, summarize
from nclightning.figures.tables import rates_table
from nclightning.heads import Head
from nclightning.loggers import RunLogger
from nclightning.models import UFM, RegularizedClassifier
from nclightning.objective import Objective
from nclightning.problems import problem as problem_module
from nclightning.problems import spectrum as spectrum_module
from tests.helpers import fakes_a_gpu
from tests.problems.cases import CASES, one_against_rest
from tests.processes import on
from tests.trainers import quiet_trainer

GAP, DISTANCE, DECAY = "optimality/gap", "optimality/distance", "optimality/predicted_decay"
CERTIFIED = "optimality/certified_gap"

# Problems whose optimum is not known: with fewer features than it needs, or without a minimum.
UNKNOWN = {
    "ce": lambda: of.unbalanced_ce([9, 4, 1, 2], 2, 0.01, 0.02),
    "ce, free bias": lambda: of.unbalanced_ce([9, 4, 1, 2], 2, 0.01, 0.02, "free"),
    "ce, absent class": lambda: of.unbalanced_ce([9, 4, 0, 2], 1, 0.01, 0.02),
    "ce, no minimum": lambda: of.unbalanced_ce([5, 3, 0, 2], 4, 0.01, 0.01, "free"),
    "mse, penalized bias": lambda: of.mse_with_penalized_bias([6, 3, 1, 2], 2, 1e-3, 2e-3, 0.1),
    "mixup": lambda: of.mixup(4, 3, 2, 2, 1e-3, 1e-3),
    "multi-label": lambda: of.multi_label_bce([[1, 0, 0], [0, 1, 1], [1, 1, 0]], [3, 2, 2], 1, 1e-3, 1e-3),
    "hinge": lambda: one_against_rest([6, 3, 2, 1], 2, 1e-3, 2e-3),
    "hinge, free bias": lambda: one_against_rest([6, 3, 2, 1], 2, 1e-3, 2e-3, "free"),
}
OF_GROUPS = {
    "mixup": lambda: of.mixup(3, 2, 1, 4, 0.01, 0.01),
    "as many groups as classes": lambda: of.soft_labels([[0.9, 0.1], [0.5, 0.5]], [3, 2], 3, 0.01, 0.01),
    "multi-label": CASES["multi-label bce"],
    "one output": lambda: of.regression([[float(i)] for i in range(6)], 3, 0.05, 0.01),
}


def ufm(problem, make=UFM, **options):
    torch.manual_seed(0)
    return make(problem=problem, iterations_per_step=10, **options)


def batch_of(problem):
    """All samples, in an order that mixes the groups."""
    order = torch.randperm(problem.num_samples, generator=torch.Generator().manual_seed(1))
    return torch.arange(problem.num_samples), problem.labels()[order]


def fit(folder, model, *callbacks, max_steps=20, batch=None, **options):
    batch = batch_of(model.problem) if batch is None else batch
    saves = any(isinstance(each, LastCheckpoint) for each in callbacks)
    logger = RunLogger(str(folder))
    trainer = quiet_trainer(
        folder, max_steps=max_steps, callbacks=list(callbacks), logger=logger, enable_checkpointing=saves
    )
    trainer.fit(model, FullBatchLoader(batch, 2), [], **options)
    return read_readings(trainer.log_dir)


def both():
    return OptimalityMonitor(5), NeuralCollapseMonitor(5), TensorBoardDashboard()


def point_of(model, labels):
    bias = None if model.head.bias is None else model.head.bias.detach()
    return model.head.weight.detach(), model.features.detach(), labels, bias


@pytest.mark.parametrize("case", CASES)
def test_gap_and_distance_of_any_problem(case, tmp_path):
    problem = CASES[case]()
    model, (index, labels) = ufm(problem), batch_of(problem)
    readings = fit(tmp_path, model, *both())
    point, values = point_of(model, labels), readings.values
    trained = float(model.evaluate_objective((index, labels)).detach())
    assert values["loss"][-1] == pytest.approx(trained, rel=1e-12)  # Sums in another order.
    # The difference of F and F* loses what of F is above it.
    assert values[GAP][-1] == pytest.approx(trained - problem.optimal_value, abs=1e-12 * trained)
    assert values[DISTANCE][-1] == pytest.approx(float(problem.distance(*point)), rel=1e-9)
    assert values[DECAY][0] == 1.0
    assert values[DECAY][-1] == pytest.approx(np.prod((1 - taken(model, tmp_path) * problem.mu) ** 2), rel=1e-12)
    assert CERTIFIED not in values
    rows = [line for line in table_of(model, readings).splitlines() if "theory" in line]
    assert f" {problem.rates.error_bound_constant:.6g} " in rows[-1]


def table_of(model, readings):
    """What a run ends with."""
    console = Console(file=StringIO(), width=120)
    console.print(rates_table(summarize(readings), problem=_predicted(model)))
    return console.file.getvalue()


def taken(model, folder):
    """Steps of the same run, each read."""
    return fit(folder / "again", ufm(model.problem), OptimalityMonitor(1, theory=False)).values[
        "line_search/step_size"
    ][1:]


@pytest.mark.parametrize("case", UNKNOWN)
def test_without_an_optimum_the_gap_to_a_bound_is_logged_and_that_said_once(case, tmp_path, caplog):
    problem = UNKNOWN[case]()
    model, batch = ufm(problem), batch_of(problem)
    monitor = OptimalityMonitor(5)
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        readings = fit(tmp_path, model, monitor, TensorBoardDashboard())
        passed = quiet_trainer(tmp_path, callbacks=[monitor]).validate(model, FullBatchLoader(batch, 1), verbose=False)
    values = readings.values
    said = [record.message for record in caplog.records if "certified_gap" in record.message]
    assert len(said) == 1
    assert said[0].startswith("Gap and distance are not known: ")
    assert not {GAP, DISTANCE, DECAY, "optimality/error_bound_ratio"} & values.keys()
    bound = problem.certified_lower_bound(*point_of(model, batch[1]))
    assert values[CERTIFIED][-1] == pytest.approx(values["loss"][-1] - bound, rel=1e-12)
    assert passed[0][CERTIFIED] == pytest.approx(values[CERTIFIED][-1], rel=1e-12)
    assert f"log10/{CERTIFIED}" in values
    if case != "ce, no minimum":
        assert (values[CERTIFIED] >= values["loss"] - problem.convex_optimum.value).all()
    assert "theory" not in table_of(model, readings)


def test_the_bound_of_cross_entropy_is_the_entropy_of_mixed_predictions(tmp_path):
    problem = UNKNOWN["ce"]()
    model, (_, labels) = ufm(problem), batch_of(problem)
    values = fit(tmp_path, model, OptimalityMonitor(5)).values
    weight, features, *_ = point_of(model, labels)
    targets = problem.targets[labels]
    # Group by group, the mean prediction of its samples; the features of a group have not met yet.
    p = (features @ weight.T).softmax(dim=1)
    p = torch.stack([p[labels == label].mean(dim=0) for label in labels])
    norm = float(torch.linalg.matrix_norm((p - targets) / len(labels), 2))
    q = targets + min(1.0, problem.strength / norm) * (p - targets)
    entropy = float(-(q * q.clamp(min=1e-300).log()).sum(dim=1).mean())
    assert values[CERTIFIED][-1] == pytest.approx(values["loss"][-1] - entropy, rel=1e-12)


@pytest.mark.parametrize("options", [{"stop_distance": 1e-12}, {"stop_at_floor": True}])
def test_stopping_without_a_distance_is_refused_before_anything_is_written(options, tmp_path):
    with pytest.raises(ValueError, match=r"below the rank.*--optimality.stop_distance null --optimality.stop_at_floor"):
        fit(tmp_path, ufm(UNKNOWN["ce"]()), OptimalityMonitor(5, **options))
    assert not list(tmp_path.rglob("readings.csv"))


def test_a_run_stops_at_the_distance_of_any_problem(tmp_path):
    problem = CASES["label smoothing, unbalanced"]()
    values = fit(tmp_path, ufm(problem), OptimalityMonitor(1, stop_distance=1e-3), max_steps=2000).values
    assert values[DISTANCE][-1] <= 1e-3 < values[DISTANCE][-2]


def test_float32_runs_are_read_in_float64(tmp_path):
    model = ufm(UNKNOWN["ce"](), dtype="float32")
    values = fit(tmp_path, model, OptimalityMonitor(5)).values
    point = [
        each if each is None or not each.is_floating_point() else each.double()
        for each in point_of(model, batch_of(model.problem)[1])
    ]
    exact = float(model.problem.value(*point)) - model.problem.certified_lower_bound(*point)
    assert values[CERTIFIED][-1] == pytest.approx(exact, rel=1e-12)


def test_a_spectrum_that_is_too_large_leaves_the_decay_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(spectrum_module, "_LARGEST_MATRIX", 3)
    model = ufm(CASES["unbalanced ce"]())
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        readings = fit(tmp_path, model, *both())
    assert GAP in readings.values
    assert DECAY not in readings.values
    assert sum("No decay of the gap is predicted" in record.message for record in caplog.records) == 1
    assert "theory" not in table_of(model, readings)


def test_a_resumed_run_goes_on(tmp_path):
    problem = CASES["unbalanced ce, penalized bias"]()
    whole = fit(tmp_path / "whole", ufm(problem), OptimalityMonitor(1), max_steps=40).values
    fit(tmp_path / "parts", ufm(problem), OptimalityMonitor(1), LastCheckpoint(20), max_steps=20)
    checkpoint = tmp_path / "parts" / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    rest = fit(tmp_path / "rest", ufm(problem), OptimalityMonitor(1), max_steps=40, ckpt_path=checkpoint).values
    for tag in (GAP, DISTANCE, DECAY):
        np.testing.assert_array_equal(rest[tag], whole[tag][20:])


def test_at_the_threshold_nothing_decays(tmp_path):
    problem = of.balanced_ce(4, 4, 6, 0.125, 0.125)
    assert problem.mu == 0
    assert set(fit(tmp_path, ufm(problem), OptimalityMonitor(1)).values[DECAY]) == {1.0}


class Anew(UFM):
    """A module whose problem is another object each time."""

    @property
    def problem(self):
        return super().problem.replace()


def test_an_optimum_is_found_once(tmp_path, monkeypatch):
    solved = []

    def find_optimum(groups, tolerance, find=problem_module.find_optimum):
        solved.append(groups)
        return find(groups, tolerance)

    monkeypatch.setattr(problem_module, "find_optimum", find_optimum)
    for make, callbacks in (
        (CASES["unbalanced ce"], [OptimalityMonitor(5, stop_at_floor=True)]),
        (UNKNOWN["ce"], both()),
    ):
        solved.clear()
        model = ufm(make(), Anew)
        fit(tmp_path, model, *callbacks)
        _predicted(model)
        assert len(solved) == 1


def test_an_optimum_that_is_not_certified_is_not_looked_for_again(monkeypatch):
    problem, tries = of.unbalanced_ce([9, 4, 1], 4, 0.01, 0.02).replace(tolerance=1e-300), []
    monkeypatch.setattr(
        problem_module,
        "find_optimum",
        lambda *_: tries.append(1) or (_ for _ in ()).throw(of.NoAnswer("optimum", "no.")),
    )
    for _ in range(2):
        assert Gaps(problem).missing.reason == "no."
    assert len(tries) == 1


def test_labels_are_those_of_the_problem(tmp_path):
    problem = CASES["unbalanced ce"]()
    other = torch.arange(problem.num_samples), problem.labels().flip(0) * 0
    with pytest.raises(ValueError, match=r"each of the groups 0\.\.2"):
        fit(tmp_path, ufm(problem), OptimalityMonitor(5), batch=other)


class Misread(UFM):
    """A module that says another problem than it trains."""

    @property
    def problem(self):
        return super().problem.replace(lambda_h=0.03)


def test_an_objective_that_is_another_is_refused(tmp_path):
    model = ufm(UNKNOWN["ce"](), Misread)
    with pytest.raises(ValueError, match="the objective that is trained is"):
        fit(tmp_path, model, OptimalityMonitor(5))


@pytest.mark.parametrize("case", OF_GROUPS)
def test_collapse_of_groups(case, tmp_path):
    """Labels are no rows of the head: what pairs them is left out."""
    problem = OF_GROUPS[case]()
    model, (index, labels) = ufm(problem), batch_of(problem)
    monitor = NeuralCollapseMonitor(5)
    values = fit(tmp_path, model, monitor, TensorBoardDashboard()).values
    names = {name.removeprefix("nc/train/") for name in values if name.startswith("nc/")}
    assert names == {"nc1_ratio", "nc1_cdnv", *(("nc2",) if problem.num_classes > 1 else ())}
    features = model.features.detach()
    groups = [features[labels == m] for m in range(problem.num_groups)]
    means = torch.stack([group.mean(dim=0) for group in groups])
    within = sum(float((group - mean).square().sum()) for group, mean in zip(groups, means, strict=True)) / len(labels)
    between = float((means - means.mean(dim=0)).square().sum()) / len(means)
    assert values["nc/train/nc1_ratio"][-1] == pytest.approx(within / between, rel=1e-9)
    assert "log10/nc/train/nc1_ratio" in values
    for stage, run in (("val", "validate"), ("test", "test")):
        trainer = quiet_trainer(tmp_path, callbacks=[monitor])
        passed = getattr(trainer, run)(model, FullBatchLoader((index, labels), 1), verbose=False)[0]
        assert passed[f"nc/{stage}/nc1_ratio"] == pytest.approx(within / between, rel=1e-9)
        assert f"nc/{stage}/nc3" not in passed


def test_all_measures_of_groups_are_those_that_exist(tmp_path):
    model = ufm(OF_GROUPS["mixup"]())
    values = fit(tmp_path, model, NeuralCollapseMonitor(5, measures=("all",))).values
    assert {"nc/train/nc0", "nc/train/nc2_centred", "nc/train/nc1_cdnv_worst"} <= values.keys()
    assert not {"nc/train/nc1", "nc/train/nc2_means", "nc/train/nc3", "nc/train/mse_nc1"} & values.keys()
    with pytest.raises(ValueError, match=r"measures \['nc3'\] need labels that are classes"):
        fit(tmp_path / "3", model, NeuralCollapseMonitor(5, measures=("nc2", "nc3")))


def test_labels_beyond_the_groups_are_refused(tmp_path):
    problem = OF_GROUPS["mixup"]()
    index, labels = batch_of(problem)
    with pytest.raises(ValueError, match=r"labels must be within 0\.\.5, the groups of the problem of UFM, got 1\.\.6"):
        fit(tmp_path, ufm(problem), NeuralCollapseMonitor(5), batch=(index, labels + 1))


def test_classes_of_a_smoothed_problem_are_rows_of_the_head(tmp_path):
    values = fit(tmp_path, ufm(CASES["label smoothing"]()), NeuralCollapseMonitor(5)).values
    assert {"nc/train/nc1", "nc/train/nc2", "nc/train/nc3"} <= values.keys()


def test_what_labels_say_is_known_without_the_problem(tmp_path):
    """Nobody knows the minimum without a penalty; groups are groups all the same."""
    problem = OF_GROUPS["as many groups as classes"]()
    torch.manual_seed(0)
    objective = Objective(problem.loss, 0.0, 0.0, targets=problem.targets)
    model = RegularizedClassifier(nn.Linear(2, 3).double(), nn.Linear(3, 2).double(), objective, problem.num_samples)
    inputs = torch.randn(problem.num_samples, 2, dtype=torch.float64)
    values = fit(tmp_path, model, NeuralCollapseMonitor(5), batch=(inputs, problem.labels())).values
    assert "nc/train/nc1_ratio" in values
    assert "nc/train/nc3" not in values


class Network(RegularizedClassifier):
    """A network on smoothed labels, whose optimum is a lower bound."""

    problem = of.label_smoothing([5, 2, 3], 0.1, 4, 1e-2, 1e-3)

    def __init__(self):
        torch.manual_seed(0)
        objective = Objective(self.problem.loss, 1e-2, 1e-3, targets=self.problem.targets)
        super().__init__(nn.Linear(6, 4).double(), nn.Linear(4, 3, bias=False).double(), objective, 10)


def test_a_network_is_above_the_optimum_of_free_features(tmp_path):
    inputs = torch.randn(10, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    values = fit(tmp_path, Network(), *both(), batch=(inputs, Network.problem.labels())).values
    assert (values[GAP] > 0).all()
    assert DECAY not in values


MANY = {"known": CASES["mixup"], "absent group": CASES["absent class"], "certified": UNKNOWN["ce, free bias"]}


@pytest.mark.parametrize("case", MANY)
def test_samples_may_be_shared_out(case, tmp_path):
    problem = MANY[case]()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(problem.num_classes, problem.feature_dim, dtype=torch.float64, generator=generator)
    features = torch.randn(problem.num_samples, problem.feature_dim, dtype=torch.float64, generator=generator)
    head = Head(weight, torch.ones(len(weight), dtype=torch.float64) if problem.has_bias else None)
    labels = batch_of(problem)[1]
    whole = Gaps(problem).read(head, features, labels)

    def job():
        rows = slice(0, 3) if torch.distributed.get_rank() == 0 else slice(3, None)
        gaps = Gaps(problem)
        gaps.check(labels[rows])
        with pytest.raises(ValueError, match="each of the groups"):
            gaps.check(labels[rows] * 0)
        return gaps.read(head, features[rows], labels[rows])

    for value, readings in on(2, tmp_path, job, group=True):
        assert float(value) == pytest.approx(float(whole.value), rel=1e-12)
        assert readings.keys() == whole.readings.keys()
        for tag, each in readings.items():
            assert float(each) == pytest.approx(float(whole.readings[tag]), rel=1e-12)


@pytest.mark.parametrize("case", ["known", "certified"])
def test_a_run_on_two_processes_reads_what_one_does(case, tmp_path):
    read = []
    for devices in (1, 2):
        folder, callbacks = tmp_path / str(devices), [OptimalityMonitor(5), NeuralCollapseMonitor(5)]
        strategy = "ddp_fork" if devices > 1 else "auto"
        options = {"devices": devices, "strategy": strategy, "logger": RunLogger(str(folder))}
        trainer = quiet_trainer(folder, max_steps=20, callbacks=callbacks, **options)
        trainer.fit(ufm(MANY[case]()), IndexDataModule())
        read.append(read_readings(folder / "lightning_logs" / "version_0").values)
    assert read[0].keys() == read[1].keys()
    for tag, values in read[0].items():
        # Sums in another order, carried along by twenty steps.
        np.testing.assert_allclose(read[1][tag], values, rtol=1e-9, err_msg=tag)


@pytest.mark.skipif(not fakes_a_gpu(), reason="this torch looks for a real GPU")
@pytest.mark.parametrize("case", ["ce", "mse, penalized bias", "multi-label"])
def test_a_bound_is_read_where_the_features_are(case):
    """Fake tensors raise on a transfer to the host, and on a mix of devices."""
    problem = UNKNOWN[case]()
    reader, sizes = Gaps(problem), (problem.num_classes, problem.feature_dim)
    reader.read(
        Head(torch.ones(sizes), torch.ones(sizes[0])), torch.ones(problem.num_samples, sizes[1]), problem.labels()
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        head = Head(torch.empty(sizes, device="cuda"), torch.empty(sizes[0], device="cuda"))
        features = torch.empty(problem.num_samples, sizes[1], device="cuda")
        value, readings = reader.read(head, features, torch.zeros(len(features), dtype=torch.int64, device="cuda"))
        assert {each.device.type for each in (value, *readings.values())} == {"cuda"}


def test_what_takes_long_is_said(monkeypatch):
    said = Event()
    monkeypatch.setattr(gaps, "_PATIENCE", 0.0)
    monkeypatch.setattr(gaps, "rank_zero_info", lambda sentence: said.set())
    with said_if_slow("Finding the optimum."):
        assert said.wait(60)


def test_what_does_not_take_long_is_not_said(monkeypatch):
    said = []
    monkeypatch.setattr(gaps, "_PATIENCE", 3600.0)
    monkeypatch.setattr(gaps, "rank_zero_info", said.append)
    with said_if_slow("Finding the optimum."):
        pass
    assert said == []
