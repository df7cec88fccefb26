"""Monitors of one trainer that look at the same data at the same weights share one evaluation pass."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from tests.callbacks.attached import K, Net, fit, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]
EPOCHS, N = 2, 16 * K


@pytest.fixture
def samples():
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(0)), torch.arange(N) % K


class Counting(TensorDataset):
    """Counts the samples that are read of it; what a forward counts is put back after an evaluation pass."""

    def __init__(self, *tensors):
        super().__init__(*tensors)
        self.count = 0

    def __getitem__(self, index):
        self.count += 1
        return super().__getitem__(index)


def run(folder, samples, *monitors, **options):
    """Return the values of a fit of two epochs, and how many evaluation passes it made."""
    torch.manual_seed(0)
    data = Counting(*samples)
    loaders = DataLoader(data, batch_size=8)
    _, trainer = fit(folder, list(monitors), loaders, Net(), max_epochs=EPOCHS, num_sanity_val_steps=0, **options)
    values = {tag: float(value) for tag, value in trainer.callback_metrics.items() if tag.startswith(("nc/", "opt"))}
    return values, data.count / N - EPOCHS


def collapse(**options):
    return NeuralCollapseMonitor(**{"stages": ("train",), **options})


def optimality(**options):
    return OptimalityMonitor(**{"loss": "ce", **options})


# Monitors, and their evaluation passes in two epochs.
PAIRS = {
    "both": (lambda: (collapse(), optimality()), 2),
    "the other way round": (lambda: (optimality(), collapse()), 2),
    "the head named": (lambda: (collapse(head="last"), optimality(head="last")), 2),
    "named by one": (lambda: (collapse(head="last"), optimality()), 2),
    "further layers": (lambda: (collapse(layers=("body.0",)), optimality()), 4),  # They have decisions.
    "decisions": (lambda: (collapse(measures=("nc1", "accuracy")), optimality()), 4),
    "two of one kind": (lambda: (collapse(measures=("nc1",)), collapse(measures=("nc2",)), optimality()), 2),
    "every second epoch": (lambda: (collapse(), optimality(every_n_epochs=2)), 2),
    "the other every second epoch": (lambda: (collapse(every_n_epochs=2), optimality()), 2),
    "heads as functions": (lambda: (collapse(head=read_last), optimality(head=read_last)), 2),
    "other batches": (lambda: (collapse(batch_fn=tuple), optimality()), 4),
    "other forwards": (lambda: (collapse(forward_fn=lambda m, x: m(x)), optimality()), 4),
    "other ignored labels": (lambda: (collapse(ignore_index=7), optimality()), 4),
    "at steps, too": (lambda: (optimality(), collapse(every_n_steps=3)), 2 + 2 * 16 * K // 8 // 3),
}


def read_last(model):
    return model.last.weight, model.last.bias


@pytest.mark.parametrize(("monitors", "expected"), PAIRS.values(), ids=PAIRS)
def test_values_are_those_of_each_alone(monitors, expected, tmp_path, samples):
    values, passes = run(tmp_path / "both", samples, *monitors())
    alone = [run(tmp_path / str(i), samples, monitor) for i, monitor in enumerate(monitors())]
    assert values == {tag: value for own, _ in alone for tag, value in own.items()}
    assert passes == expected


def test_what_one_monitor_cannot_read_leaves_the_other_its_values(tmp_path, samples):
    inputs, labels = samples
    late = torch.cat([labels[:-1], labels.new_tensor([-100])])  # Seen when gap and distance are read.
    values = {}

    class Keep(L.Callback):
        def on_exception(self, trainer, pl_module, exception):
            values.update(trainer.callback_metrics)

    with pytest.raises(ValueError, match=r"1 labels were outside 0\.\.2"):
        run(tmp_path, (inputs, late), collapse(batch_fn=split), optimality(batch_fn=split), Keep())
    assert "nc/train/nc1" in values


def test_ignored_labels_are_for_one_monitor_alone(tmp_path, samples):
    """What neural collapse leaves out has no gap, whoever gathers the class means."""
    inputs, labels = samples
    late = torch.cat([labels[:-1], labels.new_tensor([-100])])
    with pytest.raises(ValueError, match=r"1 labels were outside 0\.\.2"):
        run(tmp_path / "both", (inputs, late), collapse(batch_fn=split), optimality(batch_fn=split))
    with pytest.raises(ValueError, match=r"1 labels were outside 0\.\.2"):
        run(tmp_path / "alone", (inputs, late), optimality(batch_fn=split))


def split(batch):
    return batch[0], batch[1]


def test_an_error_in_the_pass_of_another_is_its_own(tmp_path, samples):
    """The pass is made again for one alone when it fails for several."""
    other = collapse(measures=("nc2",), on_error="warn")
    gatherer = other.at_epochs().gatherer

    def broken():
        made = gatherer()
        made.add = lambda *_: 1 / 0
        return made

    other.at_epochs().gatherer = broken
    values, _ = run(tmp_path, samples, collapse(measures=("nc1",)), other)
    assert "nc/train/nc1" in values
    assert "nc/train/nc2" in values  # By a pass of its own.


def test_what_a_failed_fit_has_gathered_is_forgotten(tmp_path, samples):
    """Else another model at the same step, on the same loader, would get its values."""
    monitors, data = [collapse(), optimality()], loader(samples, shuffle=False)
    publish = monitors[0].at_epochs().publish
    monitors[0].at_epochs().publish = lambda *_: 1 / 0  # Behind the pass that both share.
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "failed", monitors, data, max_epochs=1, num_sanity_val_steps=0)
    monitors[0].at_epochs().publish = publish
    torch.manual_seed(1)
    _, trainer = fit(tmp_path / "again", monitors, data, Net(), max_epochs=1, num_sanity_val_steps=0)
    torch.manual_seed(1)
    _, fresh = fit(tmp_path / "fresh", [optimality()], data, Net(), max_epochs=1, num_sanity_val_steps=0)
    assert trainer.callback_metrics["optimality/gap"] == fresh.callback_metrics["optimality/gap"]


def test_a_second_fit_shares_with_those_that_are_left(tmp_path, samples):
    first, second = collapse(), optimality()
    data = Counting(*samples)
    _, trainer = fit(tmp_path, [first, second], DataLoader(data, batch_size=8), max_epochs=1, num_sanity_val_steps=0)
    assert data.count == 2 * N
    trainer.callbacks.remove(second)
    data.count = 0
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, DataLoader(data, batch_size=8))
    assert data.count == 2 * N


def test_unshared_loaders_are_passed_each(tmp_path, samples):
    """Further sets are of one monitor alone."""
    other = loader(samples, shuffle=False)
    values, passes = run(tmp_path, samples, collapse(datasets={"more": other}), optimality())
    assert {"nc/more/nc1", "nc/train/nc1", "optimality/gap"} <= values.keys()
    assert passes == 2
