"""Which samples of the training data are read: those that training itself can read."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler, SubsetRandomSampler, TensorDataset

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from tests.callbacks.attached import K, N, Net, Pair, fit, loader, measure, metrics, read
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
]
CHOSEN = list(range(0, 48, 3))


class Own(Sampler):
    def __init__(self, indices):
        self.indices = indices

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        return iter([self.indices[i] for i in torch.randperm(len(self.indices))])


class OwnBatches(Own):
    def __iter__(self):
        return iter(torch.tensor(self.indices).split(4))


HELD_OUT = {
    "batch sampler": {"batch_sampler": BatchSampler(SubsetRandomSampler(CHOSEN), 4, False)},
    "list": {"sampler": CHOSEN, "batch_size": 4},
    "own sampler": {"sampler": Own(CHOSEN), "batch_size": 4},
    "own batch sampler": {"batch_sampler": OwnBatches(CHOSEN)},
}


@pytest.mark.parametrize("monitor", ["collapse", "optimality"])
@pytest.mark.parametrize("options", HELD_OUT.values(), ids=HELD_OUT)
def test_samples_that_a_sampler_leaves_out_are_not_read(options, monitor, samples, tmp_path):
    y = torch.arange(N) % 7 % K if monitor == "collapse" else (torch.arange(N) // 3) % 2
    data = DataLoader(TensorDataset(samples[0], y), **options)
    own = samples[0][CHOSEN], y[CHOSEN]
    if monitor == "collapse":
        model, trainer = fit(tmp_path, [NeuralCollapseMonitor()], data)
        assert read(trainer) == pytest.approx(measure(model, own), rel=1e-5)
        return
    values = []
    for each in (data, loader(own, batch_size=4, shuffle=False, drop_last=False)):
        torch.manual_seed(0)
        model = Net(frozen=True)
        model.last, model.auxiliary = torch.nn.Linear(8, 2), torch.nn.Linear(8, 2)
        model.body[1] = model.body[3] = torch.nn.Identity()
        values.append(metrics(fit(tmp_path, [OptimalityMonitor(loss="ce")], each, model)[1], "optimality/"))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


LIMITS = {
    "batches of a fixed order": ({"shuffle": False}, {"limit_train_batches": 2}, range(16)),
    "a share of a fixed order": ({"shuffle": False, "drop_last": False}, {"limit_train_batches": 0.5}, range(24)),
    "batches of a shuffled order": ({}, {"limit_train_batches": 2}, range(N)),
    "all batches": ({"shuffle": False}, {"limit_train_batches": 100}, range(N)),
    "overfit on batches": ({}, {"overfit_batches": 2}, range(16)),
    "overfit on a share": ({"drop_last": False}, {"overfit_batches": 0.3}, range(16)),
}


@pytest.mark.parametrize(("options", "trainer", "chosen"), LIMITS.values(), ids=LIMITS)
def test_what_training_is_held_to_is_what_is_read(options, trainer, chosen, samples, tmp_path):
    measures = ("nc1", "nc2", "nc3", "accuracy")
    model, ended = fit(tmp_path, [NeuralCollapseMonitor(measures=measures)], loader(samples, **options), **trainer)
    own = tuple(part[list(chosen)] for part in samples)
    values = metrics(ended, "nc/train/")
    with torch.no_grad():
        right = (model.eval()(own[0]).argmax(1) == own[1]).double().mean()
    assert values.pop("accuracy") == pytest.approx(float(right))
    assert values == pytest.approx(measure(model, own), rel=1e-5)


class Endless(IterableDataset):
    """Rows in a fixed order, over and over."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        while True:
            yield from zip(*self.samples, strict=True)


class NoDataset:
    """An endless iterable of batches."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(DataLoader(Endless(self.samples), batch_size=10))


class EndlessSampler(Sampler):
    def __iter__(self):
        while True:
            yield from range(N)


STREAMS = {
    "data set": lambda samples: DataLoader(Endless(samples), batch_size=10),
    "no data set": NoDataset,
    "sampler": lambda samples: DataLoader(TensorDataset(*samples), sampler=EndlessSampler(), batch_size=10),
}


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
@pytest.mark.parametrize(
    ("options", "rows"),
    [({"limit_train_batches": 3, "max_epochs": 2}, 30), ({"max_steps": 4, "max_epochs": -1}, 40)],
    ids=["limit", "steps"],
)
def test_an_endless_stream_is_read_as_far_as_training_reads_it(make, options, rows, samples, tmp_path):
    model, trainer = fit(tmp_path, [NeuralCollapseMonitor()], make(samples), **options)
    assert read(trainer) == pytest.approx(measure(model, tuple(part[:rows] for part in samples)), rel=1e-5)


def test_an_endless_stream_is_read_in_the_middle_of_an_epoch(samples, tmp_path):
    seen = []

    def note(trainer, values):
        rows = 10 * trainer.global_step
        expected = measure(trainer.lightning_module, tuple(part[:rows] for part in samples))
        trainer.lightning_module.train()
        seen.append((float(values["nc/train/nc1"]), expected["nc1"]))

    data, watch = DataLoader(Endless(samples), batch_size=10), NeuralCollapseMonitor(every_n_steps=2)
    watch.at_epochs().publish_at_step = note
    fit(tmp_path, [watch], data, max_steps=4, max_epochs=-1)
    assert len(seen) == 2
    for value, expected in seen:
        assert value == pytest.approx(expected, rel=1e-5)


def test_a_further_endless_set_is_read_as_far_as_validation_would(samples, tmp_path):
    sets = {"more": DataLoader(Endless(samples), batch_size=10)}
    model, trainer = fit(tmp_path, [NeuralCollapseMonitor(datasets=sets)], loader(samples), limit_val_batches=2)
    assert read(trainer, "more") == pytest.approx(measure(model, tuple(part[:20] for part in samples)), rel=1e-5)


class OneShot(IterableDataset):
    """Its own iterator, which holds what cannot be copied."""

    def __init__(self, samples):
        self.rows = (row for row in zip(*samples, strict=True))

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.rows)


class NotPlain(DataLoader):
    def __iter__(self):
        return super().__iter__()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda samples: DataLoader(OneShot(samples), batch_size=5),
            "would advance its OneShot, which cannot be copied",
        ),
        (lambda samples: NotPlain(TensorDataset(*samples)), "NotPlain is a DataLoader with an __iter__ of its own"),
    ],
)
@pytest.mark.parametrize("monitor", [NeuralCollapseMonitor, lambda: OptimalityMonitor(loss="ce")], ids=["nc", "gap"])
def test_what_cannot_be_swept_is_refused_before_the_first_batch(monitor, make, message, samples, tmp_path):
    class NoStep(Net):
        def training_step(self, batch, batch_idx):
            raise AssertionError

    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [monitor()], make(samples), NoStep())


def test_several_training_loaders_are_refused_before_the_first_batch(samples, tmp_path):
    class NoStep(Pair):
        def training_step(self, batch, batch_idx):
            raise AssertionError

    with pytest.raises(ValueError, match="OptimalityMonitor reads one training set, and there are 2"):
        fit(tmp_path, [OptimalityMonitor(loss="ce")], {"a": loader(samples), "b": loader(samples)}, NoStep())


@pytest.mark.filterwarnings("ignore")  # Of forking and few workers.
@pytest.mark.parametrize(
    ("options", "trainer"),
    [
        (HELD_OUT["list"], {}),
        (HELD_OUT["own sampler"], {}),
        (HELD_OUT["own batch sampler"], {"use_distributed_sampler": False}),
        (HELD_OUT["list"], {"limit_train_batches": 100}),
    ],
)
def test_two_processes_read_the_subset_together(options, trainer, samples, tmp_path):
    """Lightning wraps samplers, or each process has the whole; either way each sample counts once."""
    torch.manual_seed(0)
    model = Net()
    ddp = {"strategy": "ddp_fork_find_unused_parameters_true", "devices": 2}
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[NeuralCollapseMonitor()], **ddp, **trainer)
    trainer.fit(model, DataLoader(TensorDataset(*samples), **options))
    own = tuple(part[CHOSEN] for part in samples)
    assert read(trainer) == pytest.approx(measure(model, own), rel=1e-5)
