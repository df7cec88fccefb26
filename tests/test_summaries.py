"""What TensorBoard's HPARAMS and IMAGES tabs show of a run."""

import csv
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from nclightning.cli import main
from nclightning.figures import Readings, summarize
from nclightning.figures.rates import LinearFit
from nclightning.figures.summary import RunSummary
from nclightning.models import UFM
from nclightning.optim import ArmijoGD
from nclightning.problems import label_smoothing
from nclightning.quantities import CONVERGING
from nclightning.summaries import hyperparameters, record_summary

NAMES = {tag: tag.rpartition("/")[2] for tag in CONVERGING}


def table(logdir):
    """The HPARAMS tab as TensorBoard's own server makes it: columns, metrics, and rows by run."""
    multiplexer = EventMultiplexer(tensor_size_guidance={"hparams": 0})
    multiplexer.AddRunsFromDirectory(str(logdir)).Reload()
    context = backend_context.Context(SimpleNamespace(data_provider=MultiplexerDataProvider(multiplexer, str(logdir))))
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=100, allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN]
    )
    response = list_session_groups.Handler(RequestContext(), context, "", request).run()
    content = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, content, [])
    rows = {}
    for group in response.session_groups:
        (session,) = group.sessions
        values = {name: getattr(v, v.WhichOneof("kind")) for name, v in group.hparams.items()}
        values |= {metric.name.tag: metric.value for metric in session.metric_values}
        rows[group.name] = values | {"status": session.status}
    return [info.name for info in experiment.hparam_infos], experiment.metric_infos, rows


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Figure(figsize=(3, 2)).savefig(path, dpi=100)
    return path


def lines(rates, last=100):
    """Readings on straight lines: quantity by quantity, so many iterations for a decade."""
    iterations = np.arange(0.0, last + 1)
    values = {tag: 10 ** (-iterations / rate) for tag, rate in zip(CONVERGING, rates, strict=True)}
    return Readings(iterations, values | {"optimality/error_bound_ratio": np.full(len(iterations), 2.5)})


def test_rates_and_last_values_reach_the_table(tmp_path, picture):
    rates = [12.0, 13.0, 24.0, 25.0, 7.0, 26.0, 27.0]
    record_summary(tmp_path / "a", summarize(lines(rates)), {"loss": "ce", "lambda_h": 5e-3, "seed": 0}, picture)
    columns, metrics, rows = table(tmp_path)
    row = rows["a"]
    assert columns == ["lambda_h", "loss", "seed"]
    assert [row[name] for name in ("lambda_h", "loss", "seed")] == [5e-3, "ce", 0]
    assert row["status"] == api_pb2.STATUS_SUCCESS
    assert row["summary/iterations"] == 100
    assert row["summary/kappa"] == 2.5
    for rate, name in zip(rates, NAMES.values(), strict=True):
        # TensorBoard keeps float32.
        assert row[f"summary/iterations_per_decade/{name}"] == pytest.approx(rate, rel=1e-6)
        assert row[f"summary/log10/{name}"] == pytest.approx(-100 / rate, rel=1e-6)
        assert row[f"summary/r_squared/{name}"] == pytest.approx(1.0, rel=1e-6)
    assert [metric.name.tag for metric in metrics if metric.name.tag not in row] == []
    assert len(metrics) == len({metric.display_name for metric in metrics}) == 23


def test_the_important_columns_come_first(tmp_path, picture):
    values = {"dtype": "float64", "feature_dim": 20, "loss": "ce", "lambda_w": 0.1, "lambda_h": 0.1}
    record_summary(tmp_path / "a", summarize(lines([9.0] * len(CONVERGING))), values, picture)
    assert table(tmp_path)[0] == ["lambda_h", "lambda_w", "loss", "dtype", "feature_dim"]


def test_only_finite_numbers_are_logged(tmp_path, picture):
    flat = LinearFit(0.0, 0.0, math.nan, 0, 10)
    summary = RunSummary(
        10, {"optimality/gap": 0.0, "nc/train/nc1": math.nan, "nc/train/nc2": 0.1}, {"optimality/gap": flat}, math.inf
    )
    record_summary(tmp_path, summary, {"loss": "ce"}, picture)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]} == {
        "summary/iterations": 10,
        "summary/log10/nc2": -1,
    }


def test_an_interrupted_run_is_not_called_a_success(tmp_path, picture):
    record_summary(tmp_path / "a", summarize(lines([9.0] * len(CONVERGING))), {"loss": "ce"}, picture, finished=False)
    assert table(tmp_path)[2]["a"]["status"] == api_pb2.STATUS_UNKNOWN


def test_equal_runs_keep_their_rows(tmp_path, picture):
    for name, rate in (("a", 9.0), ("b", 8.0)):
        record_summary(tmp_path / name, summarize(lines([rate] * len(CONVERGING))), {"loss": "ce"}, picture)
    rows = table(tmp_path)[2]
    assert [rows[name]["summary/iterations_per_decade/gap"] for name in "ab"] == pytest.approx([9.0, 8.0], rel=1e-6)


def test_the_picture_is_the_file(tmp_path, picture):
    record_summary(tmp_path, summarize(lines([9.0] * len(CONVERGING))), {}, picture)
    (image,) = EventAccumulator(str(tmp_path)).Reload().Images("convergence")
    assert (image.step, image.width, image.height) == (100, 300, 200)
    assert image.encoded_image_string == picture.read_bytes()


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        (ArmijoGD, "ArmijoGD()"),
        (lambda params: ArmijoGD(params, patience=1, c1=0.2), "ArmijoGD(patience=1, c1=0.2)"),
        (lambda params: torch.optim.SGD(params, lr=0.3, momentum=0.9), "SGD(lr=0.3, momentum=0.9)"),
    ],
)
def test_hyperparameters_of_a_model(optimizer, text):
    model = UFM(4, 3, 6, "ce", lambda_=1e-3, init_scale=0.1)
    model.hparams.update({"_class_path": "nclightning.models.UFM", "endless": math.inf, "sizes": [1, 2]})
    values = hyperparameters(model, optimizer(list(model.parameters())), 7)
    expected = {
        "num_classes": 4,
        "samples_per_class": 3,
        "feature_dim": 6,
        "loss": "ce",
        "lambda_w": 3e-3,
        "lambda_h": 1e-3,
        "init_scale": 0.1,
        "dtype": "float64",
        "optimizer": text,
        "seed": 7,
    }
    assert values == expected


def test_hyperparameters_of_a_problem_are_words():
    problem = label_smoothing([9, 3], 0.1, 4, 1e-2, 1e-3)
    model = UFM(problem=problem)
    values = hyperparameters(model, ArmijoGD(model.parameters()), None)
    line = "CE loss, label smoothing 0.1, K = 2, n = 3 to 9, N = 12, d = 4, lambda_w = 0.01, lambda_h = 0.001, no bias"
    expected = {"num_classes": 2, "feature_dim": 4, "loss": "CE loss, label smoothing 0.1", "problem": line}
    assert expected.items() <= values.items()
    assert (values["lambda_w"], values["lambda_h"]) == (1e-2, 1e-3)
    assert "samples_per_class" not in values


@pytest.mark.parametrize("problem", ["classification", 3, {"class_path": "os.getcwd"}, ["a"]], ids=str)
def test_what_others_call_a_problem_is_left_alone(problem):
    model = torch.nn.Linear(2, 2)
    model.hparams = {"problem": problem, "loss": "hinge"}
    values = hyperparameters(model, torch.optim.SGD(model.parameters(), lr=0.1), None)
    assert values["loss"] == "hinge"
    assert values.get("problem") == (problem if isinstance(problem, str | int) else None)


@pytest.mark.parametrize("seed", [None, False])
def test_a_run_without_seed_has_none(seed):
    model = UFM(4, 3, 6, "ce", lambda_=1e-3)
    assert "seed" not in hyperparameters(model, ArmijoGD(model.parameters()), seed)


def test_the_summary_is_read_after_the_files_of_a_continued_run(tmp_path, picture):
    for ahead in (0, 3600):  # A clock that was set back since, too.
        (tmp_path / f"events.out.tfevents.{int(time.time()) + ahead}.zzz.9.0").touch()
    record_summary(tmp_path, summarize(lines([9.0] * len(CONVERGING))), {}, picture)
    names = sorted(path.name for path in tmp_path.glob("events*"))
    assert len(names) == 3
    assert "zzz" not in names[-1]


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _somewhere_else(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    @staticmethod
    def fit(*args, steps):
        main(
            [
                "fit",
                "--config",
                "ufm_ce",
                "--trainer.max_steps",
                str(steps),
                "--trainer.enable_progress_bar",
                "false",
                *args,
            ]
        )

    @staticmethod
    def last(version):
        with Path(f"lightning_logs/version_{version}/readings.csv").open() as file:
            return list(csv.DictReader(file))[-1]

    def test_a_sweep_is_compared(self):
        for penalty in ("5e-3", "1e-3"):
            self.fit("--lambda", penalty, "--seed_everything", "3", steps=40)
        rows = table("lightning_logs")[2]
        for version, penalty in enumerate((5e-3, 1e-3)):
            row, last = rows[f"version_{version}"], self.last(version)
            assert (row["lambda_h"], row["lambda_w"]) == (penalty, pytest.approx(10 * penalty))
            assert (row["loss"], row["optimizer"], row["seed"]) == ("ce", "ArmijoGD()", 3)
            assert row["summary/iterations"] == 40
            for tag, name in NAMES.items():
                if tag == "optimality/certified_gap":  # The gap is known.
                    assert tag not in last
                    continue
                assert row[f"summary/log10/{name}"] == pytest.approx(math.log10(float(last[tag])), rel=1e-6)

    def test_a_resumed_run_shows_its_new_values_and_keeps_its_readings(self):
        self.fit(steps=60)
        self.fit(steps=30)
        before = table("lightning_logs")[2]["version_1"]
        self.fit("--ckpt_path", "lightning_logs/version_1/checkpoints/last.ckpt", steps=60)
        rows = table("lightning_logs")[2]
        assert before["summary/iterations"] == 30
        assert rows["version_1"] == rows["version_0"]
        whole, resumed = (EventAccumulator(f"lightning_logs/version_{i}").Reload() for i in range(2))
        assert set(whole.Tags()["scalars"]) == set(resumed.Tags()["scalars"])
        for tag in whole.Tags()["scalars"]:
            curves = [[(e.step, e.value) for e in events.Scalars(tag)] for events in (whole, resumed)]
            assert curves[0] == curves[1]
        assert [e.step for e in resumed.Scalars("loss")] == list(range(0, 61, 2))
        (image,) = resumed.Images("convergence")
        assert image.step == 60
        assert image.encoded_image_string == Path("lightning_logs/version_1/convergence.png").read_bytes()
