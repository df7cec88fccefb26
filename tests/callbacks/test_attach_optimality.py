"""OptimalityMonitor on modules that know nothing of it."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from nclightning.functional import class_statistics, distance_to_collapse
from nclightning.objective import Objective
from nclightning.problems import BinaryCrossEntropy, CrossEntropy, Problem, SquaredError, label_smoothing
from nclightning.theory import UFMProblem
from tests.callbacks.attached import K, Net, fit, hooks_of, loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]
N_PER_CLASS = 16


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N_PER_CLASS * K, 5, generator=generator), torch.arange(N_PER_CLASS * K) % K


def read(trainer):
    return {k.removeprefix("optimality/"): float(v) for k, v in trainer.callback_metrics.items()}


@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_with_the_penalties_given(loss, tmp_path, samples):
    monitor = OptimalityMonitor(loss=loss, lambda_w=1e-2, lambda_h=1e-3)
    model, trainer = fit(tmp_path, [monitor], loader(samples))
    model.eval()
    with torch.no_grad():
        features = model.body(samples[0])
    problem = UFMProblem(loss, K, N_PER_CLASS, 8, 1e-2, 1e-3)
    weight, bias = model.last.weight.detach().double(), model.last.bias.detach().double()
    objective = Objective(loss, 1e-2, 1e-3)(weight, features.double(), samples[1], bias)
    values = read(trainer)
    assert values.keys() == {"gap", "distance", "relative_distance", "certified_gap", "certified_bound"}
    # Features are float32 in batches of another size: their own rounding.
    assert values["certified_gap"] + values["certified_bound"] == pytest.approx(float(objective), rel=1e-6)
    assert values["gap"] == pytest.approx(float(objective) - problem.optimal_value, rel=1e-5)
    assert values["relative_distance"] == pytest.approx(values["distance"] / problem.optimum_norm, rel=1e-6)
    if loss == "mse":
        expected = float(problem.distance(weight, features, samples[1], bias))
        assert values["distance"] == pytest.approx(expected, rel=1e-5)
    assert hooks_of(model) == 0


def test_with_the_penalties_fitted_to_the_scales(tmp_path, samples):
    model, trainer = fit(tmp_path, [OptimalityMonitor(loss="ce")], loader(samples))
    model.eval()
    with torch.no_grad():
        stats = class_statistics(model.body(samples[0]), samples[1], K)
    fitted, values = distance_to_collapse(stats, model.last.weight), read(trainer)
    problem = UFMProblem("ce", K, N_PER_CLASS, 8, values["lambda_w"], values["lambda_h"])
    assert problem.weight_scale == pytest.approx(float(fitted.head_scale), rel=1e-5)
    assert problem.feature_scale == pytest.approx(float(fitted.feature_scale), rel=1e-5)


@pytest.mark.parametrize("penalties", [{}, {"lambda_w": 1e-2, "lambda_h": 1e-3}], ids=["fitted", "given"])
def test_one_pass_over_the_training_set(penalties, tmp_path, samples):
    seen = []  # Of the data: what a forward counts is put back after an evaluation pass.

    class Counting(TensorDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    monitor = OptimalityMonitor(loss="ce", **penalties)
    fit(tmp_path, [monitor], DataLoader(Counting(*samples), batch_size=8), max_epochs=2, num_sanity_val_steps=0)
    assert len(seen) == 2 * 2 * len(samples[0])  # In each epoch to train and to measure.


class Watched(Net):
    """Counts its training steps: a refusal must come before the first."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


class WithTargets(torch.utils.data.Dataset):
    """Shows its labels as torchvision's data sets do."""

    def __init__(self, samples, **options):
        self.inputs, self.targets = samples[0], samples[1].tolist()
        vars(self).update(options)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        transform = getattr(self, "target_transform", None) or int
        return self.inputs[index], transform(self.targets[index])


LOSSES = {
    "ce": ("ce", lambda bias: Problem(CrossEntropy(), None, COUNTS, 8, 1e-2, 1e-3, bias)),
    "mse": ("mse", lambda bias: Problem(SquaredError(), None, COUNTS, 8, 1e-2, 1e-3, bias)),
    "bce": ("bce", lambda bias: Problem(BinaryCrossEntropy(), None, COUNTS, 8, 1e-2, 1e-3, bias)),
    "weighted": (
        WEIGHTED := CrossEntropy(class_weights=[0.5, 1.0, 2.0]),
        lambda bias: Problem(WEIGHTED, None, COUNTS, 8, 1e-2, 1e-3, bias),
    ),
}


def unbalanced(samples):
    return samples[0], torch.where(torch.arange(len(samples[1])) % 6 == 5, 0, samples[1])


COUNTS = [N_PER_CLASS + N_PER_CLASS // 2, N_PER_CLASS, N_PER_CLASS // 2]


@pytest.mark.parametrize("bias", ["none", "free", 0.1])
@pytest.mark.parametrize("kind", LOSSES)
def test_any_loss_and_counts(kind, bias, tmp_path, samples):
    """Against the problem of these counts on the features that the trained network has."""
    loss, make = LOSSES[kind]
    model, data = Net(), unbalanced(samples)
    if bias == "none":
        model.last = nn.Linear(8, K, bias=False)
    options = {"lambda_b": bias} if isinstance(bias, float) else {}
    monitor = OptimalityMonitor(loss=loss, lambda_w=1e-2, lambda_h=1e-3, head="last", **options)
    model, trainer = fit(tmp_path, [monitor], loader(data), model)
    model.eval()
    order = data[1].argsort(stable=True)
    with torch.no_grad():
        features = model.body(data[0])[order].double()
    problem, offset = make(bias), model.last.bias
    point = model.last.weight.double(), features, problem.labels(), None if offset is None else offset.double()
    values = read(trainer)
    assert values.keys() == {"gap", "distance", "relative_distance", "certified_gap", "certified_bound"}
    # Features are float32 in batches of another size: their own rounding.
    assert values["gap"] == pytest.approx(float(problem.gap(*point)), rel=1e-5)
    assert values["distance"] == pytest.approx(float(problem.distance(*point)), rel=1e-5)
    assert values["certified_bound"] == pytest.approx(problem.certified_lower_bound(*point), rel=1e-5, abs=1e-7)
    assert values["certified_gap"] >= values["gap"]


def test_smoothed_labels(tmp_path, samples):
    problem = label_smoothing(COUNTS, 0.1, 8, 1e-2, 1e-3, "free")
    monitor = OptimalityMonitor(loss="ce", lambda_w=1e-2, lambda_h=1e-3, targets=problem.targets.tolist())
    _, trainer = fit(tmp_path, [monitor], loader(unbalanced(samples)))
    values = read(trainer)
    objective = values["certified_gap"] + values["certified_bound"]
    assert objective == pytest.approx(values["gap"] + problem.optimal_value, rel=1e-9)


@pytest.mark.parametrize("kind", ["absent", "few features"])
def test_without_a_known_optimum_the_certified_gap_is_left(kind, tmp_path, samples):
    """It is said once, whatever the number of epochs."""
    model, data = Net(), samples
    if kind == "absent":
        data, reason = (samples[0], samples[1].clamp(max=1)), "class 2 has no samples"
    else:
        model.body, reason = nn.Sequential(model.body, nn.Linear(8, 1)), "feature_dim=1 is below the rank 2"
        model.last, model.auxiliary = nn.Linear(1, K), nn.Linear(1, K)
    monitor = OptimalityMonitor(loss="ce", lambda_w=1e-3, lambda_h=1e-5, head="last")
    with pytest.warns(UserWarning, match=f"optimality/certified_gap holds: .*{reason}") as said:
        _, trainer = fit(tmp_path, [monitor], loader(data), model, max_epochs=3)
    assert sum("certified_gap" in str(each.message) for each in said) == 1
    values = read(trainer)
    assert math.isnan(values["gap"])
    assert values["certified_gap"] > 0


def test_exact_values_are_left_out_without_a_word(tmp_path, samples):
    _, trainer = fit(tmp_path, [OptimalityMonitor(loss="ce", exact=False)], loader(samples))
    values = read(trainer)
    assert all(math.isnan(values[name]) for name in ("gap", "distance", "relative_distance"))
    assert values["certified_gap"] > 0


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_soft_and_several_labels_are_refused(loss, tmp_path, samples):
    monitor = OptimalityMonitor(loss=loss, batch_fn=lambda batch: (batch[0], torch.eye(K)[batch[1]]))
    message = (
        r"labels must be integers, .*soft labels have no class.*Optimality\('bce', head\)\.update\(features, targets\)"
    )
    with pytest.raises(TypeError, match=message):
        fit(tmp_path, [monitor], loader(samples))


@pytest.mark.parametrize("head", [None, "last"])
def test_one_output_is_refused(head, tmp_path, samples):
    class Binary(Watched):
        def __init__(self):
            super().__init__()
            self.last, self.auxiliary = nn.Linear(8, 1), nn.Identity()

        def step(self, batch):
            return nn.functional.binary_cross_entropy_with_logits(self(batch[0]).squeeze(1), batch[1].float())

    model = Binary()
    message = (
        r"one output and labels 0 and 1 use nclightning\.metrics\.Optimality\('bce', head\)\.update\(features, labels\)"
    )
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [OptimalityMonitor(loss="bce", head=head)], loader([samples[0], samples[1] % 2]), model)
    assert model.steps == 0


TABLES = {
    "rows": (
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
        "^targets must have a row for each of the 3 .*'last', got 2 rows: .*Opt",
    ),
    "columns": ([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], r"^targets must have a column for each of the 3 .*\(3, 2\)"),
}


@pytest.mark.parametrize("case", TABLES)
def test_targets_of_other_labels_are_refused_on_the_first_batch(case, tmp_path, samples):
    targets, message = TABLES[case]
    model = Watched()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [OptimalityMonitor(loss="ce", targets=targets)], loader(samples), model)
    assert model.steps == 0


@pytest.mark.parametrize("beside", [[], [NeuralCollapseMonitor]], ids=["alone", "beside"])
def test_a_label_to_ignore_after_the_first_batch(beside, tmp_path, samples):
    labels = samples[1].clone()
    labels[-1] = -100
    data = DataLoader(TensorDataset(samples[0], labels), batch_size=8)
    monitors = [OptimalityMonitor(loss="ce"), *(make(ignore_index=-100) for make in beside)]
    with pytest.raises(
        ValueError, match=r"^1 labels were outside 0\.\.2: map labels .* in batch_fn, or leave"
    ) as raised:
        fit(tmp_path, monitors, data)
    assert "ignore_index" not in str(raised.value)


@pytest.mark.parametrize("kind", ["targets that a transform mends", "a sampler that balances", "names"])
def test_data_that_only_look_unbalanced_are_read(kind, tmp_path, samples):
    inputs, labels = samples
    halves = {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2}
    if kind == "targets that a transform mends":
        fine = labels + 3 * (labels == 0) * (torch.arange(len(labels)) < 9)
        data = DataLoader(WithTargets((inputs, fine), target_transform=halves.__getitem__), batch_size=8)
    elif kind == "names":
        data = WithTargets(samples, target_transform={"a": 0, "b": 1, "c": 2}.__getitem__)
        data.targets = ["abc"[i] for i in labels.tolist()]
        data = DataLoader(data, batch_size=8)
    else:
        rows = torch.cat([torch.arange(len(labels)), torch.tensor([0, 3, 6])])  # Label 0 three times more.
        sampler = SubsetRandomSampler(range(len(labels)))
        data = DataLoader(TensorDataset(inputs[rows], labels[rows]), batch_size=8, sampler=sampler)
    _, trainer = fit(tmp_path, [OptimalityMonitor(loss="ce", lambda_w=1e-2, lambda_h=1e-3)], data, Watched())
    assert read(trainer)["gap"] > 0


def test_without_a_loss_other_modules_are_refused(tmp_path, samples):
    with pytest.raises(ValueError, match=r"OptimalityMonitor\(loss=...\) gap and distance"):
        fit(tmp_path, [OptimalityMonitor()], loader(samples))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "^loss must be 'mse', 'ce', 'bce' or a Loss such as .*, or None .*, got 'hinge'\\.$"),
        ({"loss": "ce", "lambda_b": -1.0}, "^lambda_b must be 0 or positive and finite, got -1.0"),
        ({"lambda_w": 1.0}, "^lambda_w was given without lambda_h: give both, or neither to have both fitted\\.$"),
        ({"loss": "ce", "lambda_h": 1.0}, "^lambda_h was given without lambda_w: give both"),
        ({"every_n_epochs": 0}, "^every_n_epochs must be at least 1, got 0\\.$"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        OptimalityMonitor(**options)


class Scaled(nn.Linear):
    def forward(self, x):
        return 16 * super().forward(x)


HEADS = {
    "a forward of its own": ("ce", lambda: Scaled(8, K), "head must be linear, got a Scaled"),
}


@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize("penalties", [{}, {"lambda_w": 1e-2, "lambda_h": 1e-3}], ids=["fitted", "given"])
def test_heads_without_a_known_optimum_are_refused_on_the_first_batch(case, penalties, tmp_path, samples):
    loss, make, message = HEADS[case]
    model = Watched()
    model.last = make()
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [OptimalityMonitor(loss=loss, head="last", **penalties)], loader(samples), model)
    assert model.steps == 0


def test_several_loaders_are_refused_on_the_first_batch(tmp_path, samples):
    class Pair(Watched):
        def step(self, batch):
            return super().step(batch["a"])

    model = Pair()
    with pytest.raises(ValueError, match="there are 2 training loaders"):
        fit(tmp_path, [OptimalityMonitor(loss="ce")], {"a": loader(samples), "b": loader(samples)}, model)
    assert model.steps == 0


def test_the_first_batch_is_looked_at_without_a_trace(tmp_path, samples):
    def train(callbacks):
        model, _ = fit(tmp_path, callbacks, loader(samples), max_epochs=1)
        return {**model.state_dict(), "random": torch.get_rng_state()}

    plain, watched = train([]), train([OptimalityMonitor(loss="ce")])
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_scales_that_no_penalties_make_optimal_read_nan(tmp_path, samples):
    """Logits of MSE beyond their targets: in a run that goes on, not the end of it."""
    model = Net()
    model.rate = 0.0
    with torch.no_grad():
        model.last.weight.mul_(1e3)
    _, trainer = fit(tmp_path, [OptimalityMonitor(loss="mse")], loader(samples), model)
    values = read(trainer)
    assert values.keys() == {
        *("gap", "distance", "relative_distance", "certified_gap", "certified_bound", "lambda_w", "lambda_h")
    }
    assert all(math.isnan(value) for value in values.values())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["lambda_w", "lambda_h"])
def test_penalties_without_an_optimum(name, value):
    with pytest.raises(ValueError, match=f"{name} must be None or positive and finite, got {value}"):
        OptimalityMonitor(loss="ce", **({"lambda_w": 1.0, "lambda_h": 1.0} | {name: value}))
