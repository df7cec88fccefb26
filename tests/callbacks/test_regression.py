"""RegressionCollapseMonitor on networks that know nothing of it, and on full-batch runs of regression problems."""

import lightning as L
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nclightning.callbacks import NeuralCollapseMonitor, RegressionCollapseMonitor
from nclightning.data import IndexDataModule
from nclightning.functional import etf_deviation, sample_statistics
from nclightning.metrics import RegressionCollapse
from nclightning.metrics.borrowed import Borrowed
from nclightning.models import UFM
from nclightning.problems import regression, unbalanced_ce
from tests.callbacks.attached import hooks_of
from tests.helpers import fake_twin
from tests.processes import on
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]
N, D, K = 50, 8, 2


class Net(L.LightningModule):
    """A regression network; its options say how its output follows from the head."""

    def __init__(self, num_targets=K, last=nn.ReLU, bias=True, output=lambda z: z):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, D), nn.BatchNorm1d(D), last(), nn.Dropout(0.2))
        self.last = nn.Linear(D, num_targets, bias=bias)
        self.output = output

    def forward(self, x):
        return self.output(self.last(self.body(x)))

    def training_step(self, batch, batch_idx):
        x, y = batch.values() if isinstance(batch, dict) else batch
        return (self(x) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Named(Dataset):
    """Samples as a mapping."""

    def __init__(self, *columns):
        self.columns = columns

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": self.columns[0][i], "targets": self.columns[1][i]}


@pytest.fixture
def inputs(generator):
    return torch.randn(N, 5, generator=generator)


def targets_of(inputs, num_targets=K):
    return inputs[:, :num_targets].tanh() * torch.arange(1.0, num_targets + 1) + 3


def loader(*tensors, kind=TensorDataset):
    return DataLoader(kind(*tensors), batch_size=8, shuffle=True, drop_last=True)


def fit(folder, data, model, *callbacks, **options):
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, **({"max_epochs": 2, "callbacks": list(callbacks)} | options))
    trainer.fit(model, data)
    return {k.removeprefix("nrc/train/"): float(v) for k, v in trainer.callback_metrics.items() if "nrc/" in k}


def expected(model, inputs, targets):
    model.eval()
    metric = RegressionCollapse(model.last)
    with torch.no_grad():
        metric.update(model.body(inputs).flatten(0, -2), targets.flatten(0, -2) if targets.ndim > 2 else targets)
    return {name: float(value) for name, value in metric.compute().items()}


def close(values):
    """Features are float32 in batches of another size: their own rounding."""
    return pytest.approx(values, rel=1e-4, nan_ok=True)


KINDS = {
    "two targets": (Net, K, lambda y: y),
    "behind a LayerNorm": (lambda: Net(last=lambda: nn.LayerNorm(D)), K, lambda y: y),
    "without a bias": (lambda: Net(bias=False), K, lambda y: y),
    "one column": (lambda: Net(1), 1, lambda y: y),
    "one target, squeezed": (lambda: Net(1, output=lambda z: z.squeeze(-1)), 1, lambda y: y.squeeze(-1)),
    "integers": (lambda: Net(1, output=lambda z: z[:, 0]), 1, lambda y: y.squeeze(-1).round().long()),
    "targets in double precision": (Net, K, lambda y: y.double()),
    "large targets": (Net, K, lambda y: 64 * y),
    "a mapping as output": (lambda: Net(output=lambda z: z.view(len(z), -1)), K, lambda y: y),
}


@pytest.mark.parametrize("name", KINDS)
def test_reads_the_whole_training_set_of_the_last_epoch(name, inputs, tmp_path):
    make, count, change = KINDS[name]
    torch.manual_seed(1)
    model, targets = make(), change(targets_of(inputs, count))
    values = fit(tmp_path, loader(inputs, targets), model, RegressionCollapseMonitor())
    assert values == close(expected(model, inputs, targets))
    assert hooks_of(model) == 0


def test_batches_that_are_mappings(inputs, tmp_path):
    model, targets = Net(), targets_of(inputs)
    values = fit(tmp_path, loader(inputs, targets, kind=Named), model, RegressionCollapseMonitor())
    assert values == close(expected(model, inputs, targets))


def test_positions_have_targets_of_their_own(generator, tmp_path):
    inputs = torch.randn(N, 4, 5, generator=generator)
    torch.manual_seed(1)
    model = Net()
    model.body = nn.Sequential(nn.Linear(5, D), nn.Tanh())
    values = fit(tmp_path, loader(inputs, inputs[..., :K]), model, RegressionCollapseMonitor())
    assert values == close(expected(model, inputs, inputs[..., :K]))


def test_targets_in_the_scale_of_the_head(inputs, tmp_path):
    """A forward that undoes a normalisation of the targets: the head as the loss sees it is a function of the model."""
    std, mean, targets = torch.tensor([2.0, 5.0]), torch.tensor([1.0, -1.0]), targets_of(inputs)

    def head(model):
        return std.unsqueeze(1) * model.last.weight, std * model.last.bias + mean

    torch.manual_seed(1)
    model = Net(output=lambda z: z * std + mean)
    with pytest.raises(ValueError, match="no layer of Net was seen to be the head"):
        fit(tmp_path, loader(inputs, targets), model, RegressionCollapseMonitor())
    values = fit(tmp_path, loader(inputs, targets), model, RegressionCollapseMonitor(head=head))
    known = expected(model, inputs, targets)
    metric = RegressionCollapse(head(model))
    metric.update(model.body(inputs).detach(), targets)
    assert values == close({name: float(value) for name, value in metric.compute().items()})
    assert values["nrc2"] == pytest.approx(known["nrc2"], rel=1e-4)


def test_leaves_no_trace_and_keeps_the_cadence(inputs, tmp_path):
    runs = []
    for callbacks in ([], [RegressionCollapseMonitor(every_n_epochs=2)]):
        torch.manual_seed(1)
        model = Net()
        values = fit(tmp_path, loader(inputs, targets_of(inputs)), model, *callbacks, max_epochs=3)
        runs.append((model.state_dict(), torch.get_rng_state()))
    assert values.keys() == {"nrc1", "nrc2", "nrc3", "gamma", "rank"}
    assert all(torch.equal(runs[0][0][name], tensor) for name, tensor in runs[1][0].items())
    assert torch.equal(runs[0][1], runs[1][1])


REFUSED = {
    "classes": (lambda: Net(3), lambda y: y[:, 0].long(), {}, r"targets must have shape \(N, 3\).*NeuralCollapse if"),
    "other columns": (Net, lambda y: y[:, [0, 1, 1]], {}, r"targets must have shape \(N, 2\).*got \(8, 3\)"),
    "a squashed output": (lambda: Net(output=torch.tanh), lambda y: y, {}, "no layer of Net was seen to be the head"),
    "a named head with one": (
        lambda: Net(output=torch.tanh),
        lambda y: y,
        {"head": "last"},
        r"output of Net is not W h \+ b of the head 'last', and regression collapse .*: a bound such as tanh",
    ),
    "no tensor": (
        Net,
        lambda y: y,
        {"batch_fn": lambda b: (b[0], b[1].tolist())},
        r"targets must be a tensor, got a list.*pass batch_fn",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_paired_is_refused_before_the_first_step(name, inputs, tmp_path):
    make, change, options, message = REFUSED[name]
    model = make()
    model.training_step = lambda *_: pytest.fail("a step was made")
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, loader(inputs, change(targets_of(inputs))), model, RegressionCollapseMonitor(**options))


def test_several_loaders_and_a_second_monitor_are_refused(inputs, tmp_path):
    data = loader(inputs, targets_of(inputs))
    with pytest.raises(ValueError, match="RegressionCollapseMonitor reads one training set, and there are 2"):
        fit(tmp_path, [data, data], Net(), RegressionCollapseMonitor())
    with pytest.raises(ValueError, match="both log 'nrc/train/gamma'"):
        fit(tmp_path, data, Net(), RegressionCollapseMonitor(), RegressionCollapseMonitor(head="last"))
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1, got 0"):
        RegressionCollapseMonitor(every_n_epochs=0)


def test_the_same_on_two_processes(inputs, tmp_path):
    targets = targets_of(inputs)

    def job():
        torch.manual_seed(1)
        model = Net()
        model.body[1] = model.body[3] = nn.Identity()  # Each process has statistics and random numbers of its own.
        options = {"accelerator": "cpu", "strategy": "ddp", "devices": 2}
        return fit(tmp_path, loader(inputs, targets), model, RegressionCollapseMonitor(), **options), expected(
            model, inputs, targets
        )

    for values, known in on(2, tmp_path, job):
        assert values == close(known)


# Full-batch runs.


def run(folder, problem, iterations=3000, **options):
    torch.manual_seed(0)
    model = UFM(problem=problem, iterations_per_step=iterations)
    monitor = RegressionCollapseMonitor(every_n_iterations=iterations // 4)
    values = fit(
        folder,
        IndexDataModule(),
        model,
        monitor,
        max_epochs=-1,
        max_steps=iterations,
        num_sanity_val_steps=0,
        **options,
    )
    return model, values


@pytest.mark.parametrize("bias", ["free", "none"])
def test_a_run_collapses_to_the_gamma_that_is_predicted(bias, generator, tmp_path):
    targets = torch.randn(20, 3, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.5])
    problem = regression(targets, 6, lambda_w=0.02, lambda_h=0.1, bias=bias)
    _, values = run(tmp_path, problem)
    # What the line search reaches: squares of the distance from the optimum, which is near round-off.
    assert max(values[f"nrc{i}"] for i in (1, 2, 3)) < 1e-20
    assert values["gamma"] == pytest.approx(20 * 0.02 * 0.1, rel=1e-6)
    assert values["rank"] == 3


def test_of_classes_nrc3_is_the_square_of_nc2(tmp_path):
    """The form that one-hot targets of balanced classes prescribe is the simplex ETF."""
    model, values = run(tmp_path, unbalanced_ce([5, 5, 5], 4, 0.01, 0.01, "free"), iterations=4)
    assert values["nrc3"] == pytest.approx(float(etf_deviation(model.head.weight.detach())) ** 2, rel=1e-9)


def test_readings_make_no_host_sync(generator):
    problem = regression(torch.randn(12, K, generator=generator), 4, 0.01, 0.01)
    model, monitor = UFM(problem=problem), RegressionCollapseMonitor()
    monitor.prepare(model, (torch.arange(12), torch.arange(12)))
    part = monitor.at_iterates()
    with FakeTensorMode():
        index, labels = fake_twin(model, "cuda", 12)
        model._all_rows = index, index._version  # As after the first reading, which looks at them.
        part._metric._head = Borrowed(model.head)
        part._targets = sample_statistics(torch.empty(12, K, device="cuda"))
        values = monitor.read(model, (index, labels))
        assert {value.device.type for value in values.values()} == {"cuda"}


def test_modules_without_an_objective_are_refused():
    with pytest.raises(ValueError, match="takes the targets of a full-batch run from its objective, and Net has none"):
        RegressionCollapseMonitor().prepare(Net(), (torch.arange(3), torch.arange(3)))


def test_beside_the_monitor_of_classes(inputs, tmp_path):
    """One reads class numbers, the other targets: what they say of the same batches does not mix."""
    labels = torch.arange(N) % K
    both = DataLoader(TensorDataset(inputs, torch.eye(K)[labels]), batch_size=10)
    of_classes = NeuralCollapseMonitor(batch_fn=lambda b: (b[0], b[1].argmax(dim=1)))
    model = Net()
    values = fit(tmp_path, both, model, of_classes, RegressionCollapseMonitor())
    assert values == close(expected(model, inputs, torch.eye(K)[labels]))
