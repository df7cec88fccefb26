"""Monitors of one trainer that share evaluation passes, and what must keep them from it."""

from datetime import timedelta

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback, Timer, TQDMProgressBar
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, SubsetRandomSampler, TensorDataset

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from tests.callbacks.attached import K, Net, fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:no reading of neural collapse"),
]
N = 48
LAST = 2.0


class Counting(TensorDataset):
    """Counts what is read: what a forward counts is put back after an evaluation pass."""

    num_read = 0
    scale = 1.0

    def __getitem__(self, index):
        self.num_read += 1
        x, y = super().__getitem__(index)
        return self.scale * x, y


class Scaled(Net):
    """Has a number that is neither weight nor buffer."""

    scale = 1.0

    def forward(self, x):
        return super().forward(self.scale * x)


def collapse(**options):
    return NeuralCollapseMonitor(measures=("nc1",), stages=("train",), **options)


def duality(**options):
    return NeuralCollapseMonitor(measures=("nc3",), stages=("train",), **options)


class Narrow(Scaled):
    """Has a layer with fewer features on the batch of the last sample."""

    def __init__(self):
        super().__init__()
        self.aside = nn.Identity()

    def forward(self, x):
        self.aside(x[:, : 4 - int((x[:, 0] == LAST).any())])
        return super().forward(x)


def run(folder, callbacks, epochs=2, bar=False, strategy=None, kind=Scaled, **options):
    generator = torch.Generator().manual_seed(0)
    data = Counting(torch.randn(N, 5, generator=generator), torch.arange(N) % K)
    data.tensors[0][-1, 0] = LAST
    loader = DataLoader(data, **({"batch_size": 8, "shuffle": True} | options))
    torch.manual_seed(0)
    processes = {} if strategy is None else {"strategy": strategy, "devices": 2}
    chosen = {"max_epochs": epochs, "enable_progress_bar": bar} | processes
    model, trainer = fit(folder, list(callbacks), loader, kind(), **chosen)
    values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith(("nc/", "optimality/"))}
    return values, data.num_read // N - epochs, model


MONITORS = {
    "collapse": collapse,
    "decisions": lambda: NeuralCollapseMonitor(measures=("nc2", "accuracy"), layers=("body.0",), stages=("train",)),
    "optimality": lambda: OptimalityMonitor(loss="ce"),
}


def test_one_pass_for_all(tmp_path):
    alone = [run(tmp_path, [make()]) for make in MONITORS.values()]
    together, num_passes, model = run(tmp_path, [make() for make in MONITORS.values()])
    assert together == alone[0][0] | alone[1][0] | alone[2][0]
    assert [count for _, count, _ in alone] == [2, 4, 2]
    assert num_passes == 4
    for _, _, other in alone:
        assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize(
    "between",
    [EarlyStopping("nc/train/nc1", strict=False), TQDMProgressBar(), Timer()],
    ids=lambda each: type(each).__name__,
)
def test_callbacks_that_change_nothing_may_come_between(between, tmp_path):
    bar = isinstance(between, TQDMProgressBar)
    assert run(tmp_path, [collapse(), between, OptimalityMonitor(loss="ce")], bar=bar)[1] == 2


def between_weights(trainer, model):
    model.last.weight.data = 2 * model.last.weight.data + torch.eye(K, 8)


def between_numbers(trainer, model):
    model.scale = 3.0


def between_modules(trainer, model):
    model.body[2] = nn.Tanh()


def between_hooks(trainer, model):
    model.body.register_forward_hook(lambda module, args, output: output**2)


def between_data(trainer, model):
    trainer.train_dataloader.dataset.scale = 3.0


def between_labels(trainer, model):
    data = trainer.train_dataloader.dataset
    data.tensors = data.tensors[0], data.tensors[1].flip(0)


def between_samples(trainer, model):
    trainer.train_dataloader.sampler.indices = [1, *range(0, N, 2)]


CHANGES = [value for name, value in list(globals().items()) if name.startswith("between_")]


@pytest.mark.parametrize("change", CHANGES)
def test_each_sees_what_there_is_at_its_turn(change, tmp_path):
    def values(*monitors):
        options = {"shuffle": False, "sampler": SubsetRandomSampler(range(N))}
        return run(tmp_path, monitors, epochs=1, **options)[0]

    class Own(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            change(trainer, pl_module)

    first, expected = values(collapse()), values(Own(), duality())
    assert values(duality()) != expected
    for callback in (Own(), LambdaCallback(on_train_epoch_end=change)):
        assert values(collapse(), callback, duality()) == first | expected


def test_a_monitor_with_a_hook_of_the_users(tmp_path):
    class After(NeuralCollapseMonitor):
        def on_train_epoch_end(self, trainer, pl_module):
            super().on_train_epoch_end(trainer, pl_module)
            between_numbers(trainer, pl_module)

    class Before(NeuralCollapseMonitor):
        def on_train_epoch_end(self, trainer, pl_module):
            between_numbers(trainer, pl_module)
            super().on_train_epoch_end(trainer, pl_module)

    after, before = (kind(measures=("nc1",), stages=("train",)) for kind in (After, Before))
    changed = run(tmp_path, [LambdaCallback(on_train_epoch_end=between_numbers), duality()], epochs=1)[0]
    assert run(tmp_path, [after, duality()], epochs=1)[0].items() >= changed.items()
    plain = run(tmp_path, [duality()], epochs=1)[0]
    assert run(tmp_path, [duality(), before], epochs=1)[0].items() >= plain.items()


@pytest.mark.parametrize("order", [1, -1])
def test_an_error_of_one_leaves_the_other_its_values(order, tmp_path):
    calls = []

    def fails_later(batch):
        calls.append(len(batch[1]))
        if len(calls) > 2:
            raise ValueError("only the first batch")
        return batch

    monitors = [duality(), collapse(batch_fn=fails_later, on_error="warn")][::order]
    values = run(tmp_path, monitors, epochs=3)[0]
    assert len(calls) > 3
    assert values == run(tmp_path, [duality()], epochs=3)[0]


def aside(**options):
    return collapse(layers=("aside",), on_error="warn", **options)


@pytest.mark.parametrize("order", [1, -1])
def test_an_error_at_the_end_of_a_pass_leaves_the_other_its_values(order, tmp_path):
    alone = run(tmp_path, [OptimalityMonitor(loss="ce")], kind=Narrow)[0]
    with pytest.warns(
        UserWarning, match="'aside' have 3 numbers in one batch and 4 in another.*leave it out of layers"
    ):
        assert run(tmp_path, [OptimalityMonitor(loss="ce"), aside()][::order], kind=Narrow)[0] == alone


class FailsOnOne:
    """A ``batch_fn`` that fails on the second of two processes, but for the first batches."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        if self.calls > 3 and torch.distributed.get_rank() == 1:
            raise ValueError("only the first batches")
        return batch


class KeepValues(L.Callback):
    """Keeps what the first process has read: values of the parent process come after all of them."""

    def __init__(self, file):
        self.file = file

    def on_train_end(self, trainer, pl_module):
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.is_global_zero:
            torch.save(values, self.file)


def on_two(folder, *monitors, **options):
    """Values of two processes; those that wait for each other in vain end with an error."""
    strategy = DDPStrategy(
        start_method="fork", find_unused_parameters=True, timeout=timedelta(seconds=30), process_group_backend="gloo"
    )
    run(folder, [*monitors, KeepValues(folder / "values.pt")], strategy=strategy, **options)
    return torch.load(folder / "values.pt")


@pytest.mark.parametrize("order", [1, -1])
def test_an_error_on_one_process_before_the_pass_of_another_monitor(order, tmp_path):
    """They see different batches: each has a pass of its own, which no process may begin alone."""
    alone = on_two(tmp_path, duality())
    monitors = [collapse(batch_fn=FailsOnOne(), on_error="warn"), duality()][::order]
    assert on_two(tmp_path, *monitors) == alone


@pytest.mark.parametrize("source", ["sweep", "online"])
def test_an_error_on_one_process_at_the_end(source, tmp_path):
    values = on_two(tmp_path, aside(source=source), OptimalityMonitor(loss="ce"), kind=Narrow)
    assert values == on_two(tmp_path, OptimalityMonitor(loss="ce"), kind=Narrow)


def test_a_stream_is_read_once(tmp_path):
    class Stream(IterableDataset):
        num_read = 0

        def __iter__(self):
            generator = torch.Generator().manual_seed(0)
            for index in range(N):
                self.num_read += 1
                yield torch.randn(5, generator=generator), index % K

    def values(*monitors):
        data = Stream()
        _, trainer = fit(tmp_path, list(monitors), DataLoader(data, batch_size=8), max_epochs=2)
        return {k: float(v) for k, v in trainer.callback_metrics.items()}, data.num_read // N

    first, second = values(collapse()), values(OptimalityMonitor(loss="ce"))
    together = values(collapse(), OptimalityMonitor(loss="ce"))
    assert together == (first[0] | second[0], first[1])
