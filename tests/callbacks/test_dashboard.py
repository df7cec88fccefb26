"""The page's charts, the pictures and their iterates, and that nothing else changes."""

import re

import lightning as L
import matplotlib
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from packaging.version import Version
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch import nn

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor, TensorBoardDashboard, dashboard
from nclightning.callbacks.pictures import draw_angles
from nclightning.data import FullBatchLoader, IndexDataModule
from nclightning.functional import class_statistics
from nclightning.loggers import RunLogger
from nclightning.models import UFM, RegularizedClassifier
from nclightning.objective import Objective
from tests.callbacks.attached import Net, loader
from tests.trainers import quiet_trainer

ANGLES = "nc/train/angles"


def ufm(**options):
    torch.manual_seed(0)
    return UFM(4, 3, 6, "ce", **({"lambda_": 5e-3, "iterations_per_step": 10} | options))


def fit(folder, model=None, callbacks=None, max_steps=25, logger=None, **options):
    if callbacks is None:
        callbacks = [OptimalityMonitor(5), NeuralCollapseMonitor(5), TensorBoardDashboard()]
    logger = RunLogger(str(folder)) if logger is None else logger
    trainer = quiet_trainer(folder, max_steps=max_steps, callbacks=callbacks, logger=logger)
    trainer.fit(ufm() if model is None else model, datamodule=IndexDataModule(), **options)
    return trainer


def events_of(folder):
    return EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0}).Reload()


def charts_of(events):
    """Tags by chart by category, in order."""
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    return {c.title: {chart.title: list(chart.multiline.tag) for chart in c.chart} for c in layout.category}


def images_of(events):
    return [event.step for event in events.Images(ANGLES)] if ANGLES in events.Tags()["images"] else []


def tags_shown(events):
    """What TensorBoard finds for each chart: its patterns match from the start of a tag."""
    logged = events.Tags()["scalars"]
    return [
        [[tag for tag in logged if re.match(pattern, tag)] for pattern in patterns]
        for charts in charts_of(events).values()
        for patterns in charts.values()
    ]


def test_a_run_of_ours_has_its_charts(tmp_path):
    events = events_of(fit(tmp_path).log_dir)
    assert {title: len(charts) for title, charts in charts_of(events).items()} == {
        "Convergence": 4,
        "Neural collapse": 1,
        "Line search": 2,
    }
    assert tags_shown(events) == [
        [["log10/optimality/gap"], ["log10/optimality/distance"], ["log10/optimality/grad_norm"]],
        [["loss"]],
        [["optimality/error_bound_ratio"]],
        [["log10/optimality/gap"], ["log10/optimality/predicted_decay"]],
        [["log10/nc/train/nc1"], ["log10/nc/train/nc2"], ["log10/nc/train/nc3"]],
        [["line_search/step_size"]],
        [["line_search/evaluations"]],
    ]


def test_charts_show_no_tag_but_theirs(tmp_path):
    charts = charts_of(events_of(fit(tmp_path).log_dir))
    for pattern in (p for category in charts.values() for patterns in category.values() for p in patterns):
        tag = pattern[1:-1]
        assert re.match(pattern, tag)
        assert not re.match(pattern, f"{tag}2")
        assert not re.match(pattern, f"val/{tag}")


def test_only_what_is_logged_gets_a_chart(tmp_path):
    model = ufm(optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    events = events_of(fit(tmp_path, model, [OptimalityMonitor(5), TensorBoardDashboard()]).log_dir)
    assert list(charts_of(events)) == ["Convergence"]
    assert all(len(tags) == 1 for chart in tags_shown(events) for tags in chart)
    bare = events_of(fit(tmp_path, callbacks=[TensorBoardDashboard(pictures=False)]).log_dir)
    assert bare.Tags()["tensors"] == []


@pytest.mark.parametrize(("max_steps", "steps"), [(25, [0, 1, 2, 4, 8, 16, 25]), (16, [0, 1, 2, 4, 8, 16])])
def test_pictures_at_powers_of_two_and_the_last_iterate(max_steps, steps, tmp_path):
    assert images_of(events_of(fit(tmp_path, max_steps=max_steps).log_dir)) == steps


def test_pictures_can_be_switched_off(tmp_path):
    events = events_of(fit(tmp_path, callbacks=[NeuralCollapseMonitor(), TensorBoardDashboard(pictures=False)]).log_dir)
    assert images_of(events) == []
    assert list(charts_of(events)) == ["Neural collapse"]


def test_pictures_are_of_their_iterate(tmp_path, monkeypatch):
    drawn = {}

    def keep(loggers, tag, stats, weight, step):
        drawn[step] = stats.means.clone(), weight.detach().clone()

    monkeypatch.setattr(dashboard, "draw_angles", keep)
    fit(tmp_path, callbacks=[TensorBoardDashboard()], max_steps=11)
    for iteration in (0, 4, 8, 11):
        model = ufm()
        if iteration:
            quiet_trainer(tmp_path, max_steps=iteration).fit(model, datamodule=IndexDataModule())
        means = model.features.detach().reshape(4, 3, 6).mean(dim=1)
        # Summation orders differ: a few roundings.
        torch.testing.assert_close(drawn[iteration][0], means, rtol=1e-13, atol=1e-14)
        assert torch.equal(drawn[iteration][1], model.head.weight)


def test_a_part_of_the_data_is_not_drawn(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer = quiet_trainer(tmp_path, max_steps=5, callbacks=[TensorBoardDashboard()], logger=logger)
    trainer.fit(ufm(), FullBatchLoader((torch.arange(8), torch.arange(8) // 2), 1), [])
    logger.experiment.add_scalar("something", 1.0)
    logger.experiment.flush()
    assert images_of(events_of(logger.log_dir)) == []


def test_drawing_leaves_no_trace(tmp_path):
    """In a model in which a forward leaves traces: running statistics, and draws from the generator."""

    def run(name, callbacks):
        torch.manual_seed(0)
        states = []

        class Watch(L.Callback):
            def on_train_start(self, trainer, pl_module):
                pl_module.backbone[2].eval()  # A part in a mode of its own.

            def on_iteration_end(self, trainer, pl_module, batch, iteration):
                modes = [module.training for module in pl_module.modules()]
                gradients = [p.grad.tolist() for p in pl_module.parameters()]
                states.append((torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), modes, gradients))

        model = RegularizedClassifier(
            nn.Sequential(nn.Embedding(12, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Dropout(0.1)),
            nn.Linear(6, 4),
            Objective("ce", 1e-3, 1e-3),
            12,
            lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
            iterations_per_step=10,
        )
        logger = RunLogger(str(tmp_path / name))
        trainer = quiet_trainer(tmp_path, max_steps=25, callbacks=[*callbacks, Watch()], logger=logger)
        trainer.fit(model, FullBatchLoader((torch.arange(12), torch.arange(12) // 3), 1), [])
        return model, trainer, states

    bare, bare_trainer, bare_states = run("bare", [])
    drawn, drawn_trainer, drawn_states = run("drawn", [TensorBoardDashboard()])
    assert images_of(events_of(drawn_trainer.log_dir)) == [0, 1, 2, 4, 8, 16, 25]
    assert int(bare.backbone[1].num_batches_tracked) == 25
    for one, other in zip(bare.state_dict().values(), drawn.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    momenta = [
        [state["momentum_buffer"] for state in trainer.optimizers[0].state.values()]
        for trainer in (bare_trainer, drawn_trainer)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))
    assert bare_states == drawn_states
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in drawn.modules())


def test_loggers_of_others_are_left_alone(tmp_path):
    def files(name, callbacks):
        folder = tmp_path / name
        fit(folder, callbacks=[NeuralCollapseMonitor(5), *callbacks], logger=CSVLogger(folder))
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    assert files("with", [TensorBoardDashboard()]) == files("without", [])


def test_on_an_ordinary_module(tmp_path, samples):
    samples = samples[0][:48], torch.arange(48) % 3
    logger = TensorBoardLogger(tmp_path)
    monitors = [NeuralCollapseMonitor(), OptimalityMonitor(loss="ce")]
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=[*monitors, TensorBoardDashboard()], logger=logger)
    trainer.fit(Net(), loader(samples), loader(samples, shuffle=False))
    events = events_of(logger.log_dir)
    assert tags_shown(events) == [
        [["optimality/gap"]],
        [["optimality/relative_distance"]],
        [["nc/train/nc1"], ["nc/train/nc2"], ["nc/train/nc3"]],
        [["nc/val/nc1"], ["nc/val/nc2"], ["nc/val/nc3"]],
    ]
    assert images_of(events) == []


def test_a_resumed_run_goes_on(tmp_path):
    first = fit(tmp_path)
    first.save_checkpoint(tmp_path / "last.ckpt")
    logger = RunLogger(str(tmp_path))
    logger.continue_run(first.log_dir, 25)
    fit(tmp_path, max_steps=40, logger=logger, ckpt_path=tmp_path / "last.ckpt")
    events = events_of(first.log_dir)
    assert images_of(events) == [0, 1, 2, 4, 8, 16, 25, 32, 40]
    before, after = events.Tensors("custom_scalars__config__")
    assert before.tensor_proto == after.tensor_proto


class Canvas:
    """Keeps the last picture."""

    def __init__(self):
        self.experiment = self

    def add_image(self, tag, image, step, dataformats):
        self.image = image


def picture(features, weight, step=3):
    canvas = Canvas()
    labels = torch.arange(len(features)) % len(weight)
    draw_angles([canvas], "a", class_statistics(features, labels, len(weight)), weight, step)
    return canvas.image


def panels(image):
    """The four squares: class means, head, head against means, and the ETF."""
    return [image[y - 65 : y + 65, x - 65 : x + 65] for y in (151, 375) for x in (120, 321)]


@pytest.mark.skipif(Version(matplotlib.__version__) < Version("3.11"), reason="panels stand a pixel aside")
def test_a_collapsed_picture_has_four_equal_panels():
    etf = torch.eye(4, dtype=torch.float64) - 0.25
    means, head, cross, goal = panels(picture(etf.repeat(3, 1), 2 * etf))
    assert len(np.unique(goal.reshape(-1, 3), axis=0)) == 2
    assert all(np.array_equal(each, goal) for each in (means, head, cross))
    means, head, cross, goal = panels(picture(etf.repeat(3, 1), etf[[1, 0, 2, 3]]))
    assert np.array_equal(means, goal)
    assert np.array_equal(head, goal)
    assert not np.array_equal(cross, goal)


def test_a_picture_shows_nothing_of_the_one_before(generator):
    one, other = torch.randn(2, 12, 4, dtype=torch.float64, generator=generator)
    first = picture(one, one[:4], 3)
    assert not np.array_equal(picture(other, other[:4], 1024), first)
    assert np.array_equal(picture(one, one[:4], 3), first)
