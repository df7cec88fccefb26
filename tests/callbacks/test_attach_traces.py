"""Readings of odd modules, optimizers and loaders: right numbers, and no trace."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from nclightning.callbacks import NeuralCollapseMonitor
from tests.callbacks.attached import K, N, Net, fit, loader, measure
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class Recorder(L.Callback):
    """Keeps nc1 after each epoch."""

    def __init__(self):
        self.read = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.read.append(float(trainer.callback_metrics["nc/train/nc1"]))


@pytest.mark.parametrize(
    "make", [lambda p: torch.optim.AdamW(p, lr=0.05, fused=True), lambda p: torch.optim.SGD(p, lr=0.5, fused=True)]
)
def test_fused_optimizers_are_read_anew_each_epoch(samples, tmp_path, make):
    model = Net()
    model.configure_optimizers = lambda: make(model.parameters())
    recorder = Recorder()
    fit(tmp_path, [NeuralCollapseMonitor(), recorder], loader(samples), model)
    assert recorder.read[-1] == pytest.approx(measure(model, samples)["nc1"], rel=1e-5)
    assert len(set(recorder.read)) == 3


def test_a_second_model_is_not_read_as_the_first(samples, tmp_path):
    monitor = NeuralCollapseMonitor(measures=("nc1", "ncc_accuracy"))
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, trainer = fit(tmp_path, [monitor], loader(samples), Net(), max_epochs=1)
        assert float(trainer.callback_metrics["nc/train/nc1"]) == pytest.approx(
            measure(model, samples)["nc1"], rel=1e-5
        )


def test_a_head_found_in_one_model_is_not_looked_for_in_the_next(samples, tmp_path):
    class Swapped(Net):
        """The names of head and auxiliary layer exchanged."""

        def forward(self, x):
            h = self.body(x)
            self.last(h)
            return self.auxiliary(h)

    monitor = NeuralCollapseMonitor()
    fit(tmp_path, [monitor], loader(samples), max_epochs=1)
    torch.manual_seed(3)
    model = Swapped()
    quiet_trainer(tmp_path, callbacks=[monitor], inference_mode=False).validate(
        model, loader(samples, shuffle=False), verbose=False
    )
    assert monitor._reader.head_of(model).layer is model.auxiliary


@pytest.mark.parametrize("inference_mode", [True, False])
def test_a_validation_on_its_own_is_read(samples, tmp_path, inference_mode):
    model = Net()
    trainer = quiet_trainer(tmp_path, callbacks=[NeuralCollapseMonitor()], inference_mode=inference_mode)
    trainer.validate(model, loader(samples, drop_last=False, shuffle=False), verbose=False)
    assert float(trainer.callback_metrics["nc/val/nc1"]) == pytest.approx(measure(model, samples)["nc1"], rel=1e-5)


class Traces(Net):
    """Counts forwards in a buffer, and has a layer that merges weights when its mode changes, as LoRA does."""

    class Merging(nn.Linear):
        """Adds to its weight in eval mode."""

        def train(self, mode=True):
            super().train(mode)
            with torch.no_grad():
                self.weight.add_(0.0 if mode else 1.0)
            return self

    def __init__(self):
        super().__init__()
        self.register_buffer("forwards", torch.zeros(()))
        self.merging = self.Merging(5, 5)

    def forward(self, x):
        self.forwards += 1
        return super().forward(self.merging(x))


@pytest.mark.parametrize("source", ["sweep", "online"])
def test_buffers_and_layers_that_act_on_their_mode_keep_no_trace(samples, tmp_path, source):
    states = []
    for callbacks in ([], [NeuralCollapseMonitor(source=source)]):
        torch.manual_seed(0)
        model, _ = fit(tmp_path, callbacks, loader(samples), Traces())
        states.append(model.state_dict())
    assert float(states[0]["forwards"]) == 3 * (N // 8)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


class Reusing:
    """Fills the same memory with each batch."""

    def __init__(self, samples):
        self.samples = samples
        self.x, self.y = torch.empty(10, 5), torch.empty(10, dtype=torch.int64)

    def __len__(self):
        return N // 10

    def __iter__(self):
        for rows, labels in zip(self.samples[0].split(10), self.samples[1].split(10), strict=True):
            self.x.copy_(rows)
            self.y.copy_(labels)
            yield self.x, self.y


def test_loaders_that_reuse_their_memory_are_read_right(samples, tmp_path):
    model, trainer = fit(tmp_path, [NeuralCollapseMonitor()], Reusing(samples), Net(frozen=True), max_epochs=1)
    assert float(trainer.callback_metrics["nc/train/nc1"]) == pytest.approx(measure(model, samples)["nc1"], rel=1e-5)


def test_a_subset_sampler_is_followed(samples, tmp_path):
    chosen = list(range(0, 48, 3))
    data = DataLoader(TensorDataset(*samples), batch_size=4, sampler=SubsetRandomSampler(chosen))
    model, trainer = fit(tmp_path, [NeuralCollapseMonitor()], data, max_epochs=1)
    own = tuple(part[chosen] for part in samples)
    assert float(trainer.callback_metrics["nc/train/nc1"]) == pytest.approx(measure(model, own)["nc1"], rel=1e-5)


class Stream(IterableDataset):
    """Rows one by one."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        yield from zip(*self.samples, strict=True)


@pytest.mark.slow
def test_a_sweep_in_the_middle_does_not_end_the_epoch_of_a_stream(samples, tmp_path):
    seen = []

    class Counting(Net):
        """Notes its batches."""

        def training_step(self, batch, batch_idx):
            seen.append(batch_idx)
            return super().training_step(batch, batch_idx)

    data = DataLoader(Stream(samples), batch_size=10, num_workers=1, persistent_workers=True)
    fit(tmp_path, [NeuralCollapseMonitor(every_n_steps=2)], data, Counting(), max_epochs=2)
    assert seen == [0, 1, 2, 3, 4] * 2


def test_a_loader_of_whole_batches_is_swept(samples, tmp_path):
    class Batches(torch.utils.data.Dataset):
        """Each item is a batch."""

        def __len__(self):
            return 5

        def __getitem__(self, i):
            return samples[0][10 * i : 10 * i + 10], samples[1][10 * i : 10 * i + 10]

    model, trainer = fit(tmp_path, [NeuralCollapseMonitor()], DataLoader(Batches(), batch_size=None), max_epochs=1)
    assert float(trainer.callback_metrics["nc/train/nc1"]) == pytest.approx(measure(model, samples)["nc1"], rel=1e-5)
    assert model.last.out_features == K


def test_a_head_that_is_called_by_keyword_is_read(samples, tmp_path):
    class Keyword(Net):
        """Names its argument."""

        def forward(self, x):
            return self.last(input=self.body(x))

    model, trainer = fit(tmp_path, [NeuralCollapseMonitor(source="online")], loader(samples), Keyword(), max_epochs=1)
    fit(tmp_path, [NeuralCollapseMonitor()], loader(samples), model, max_epochs=1)
    assert trainer.callback_metrics["nc/train/nc1"] > 0


def test_a_layer_without_a_tensor_warns_where_asked_and_training_goes_on(samples, tmp_path):
    class Silent(nn.Module):
        """Returns nothing."""

        def forward(self, h):
            return None

    class Mute(Net):
        """Calls it."""

        def __init__(self):
            super().__init__()
            self.silent = Silent()

        def forward(self, x):
            h = self.body(x)
            self.silent(h)
            return self.last(h)

    for source in ("sweep", "online"):
        monitor = NeuralCollapseMonitor(layers=["silent"], source=source, on_error="warn")
        with pytest.warns(UserWarning, match="layer 'silent' returns no tensor"):
            _, trainer = fit(tmp_path, [monitor], loader(samples), Mute(), max_epochs=1)
        assert trainer.global_step == N // 8


def test_a_second_fit_begins_without_the_readings_of_the_first(samples, tmp_path):
    class First(L.Callback):
        """Looks before the first batch."""

        def on_train_start(self, trainer, pl_module):
            self.seen = [name for name in trainer.callback_metrics if name.startswith("nc/")]

    monitor, look = NeuralCollapseMonitor(), First()
    for _ in range(2):
        fit(tmp_path, [monitor, look], loader(samples), max_epochs=1)
        assert look.seen == []


@pytest.mark.parametrize("source", ["sweep", "online"])
def test_a_loader_that_iterates_in_its_own_way_is_read_online_only(samples, tmp_path, source):
    class Doubled(DataLoader):
        """Changes what it yields."""

        def __iter__(self):
            for x, y in super().__iter__():
                yield 2 * x, y

    def read(data):
        torch.manual_seed(0)
        trainer = fit(tmp_path, [NeuralCollapseMonitor(source=source)], data, Net(), max_epochs=1)[1]
        return float(trainer.callback_metrics["nc/train/nc1"])

    data = Doubled(TensorDataset(*samples), batch_size=10)
    if source == "sweep":
        with pytest.raises(ValueError, match="Doubled is a DataLoader with an __iter__ of its own"):
            read(data)
    else:
        assert read(data) == read(DataLoader(TensorDataset(2 * samples[0], samples[1]), batch_size=10))
