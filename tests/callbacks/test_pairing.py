"""Features of a step belong to the labels of its batch, whatever else the step runs; or the step is refused."""

import copy
import io
import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from tests.forms import oracle
from tests.trainers import quiet_trainer

K, D, N, B = 4, 6, 48, 8


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = draw(N, 5), torch.arange(N) % K


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.out = nn.Sequential(nn.Linear(5, D), nn.Tanh()), nn.Linear(D, K)

    def forward(self, x):
        return self.out(self.body(x))


class Stands(L.LightningModule):
    """A model whose weights stand still, so that the forwards of a whole epoch have one right answer."""

    def __init__(self, step, net=None):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.anchor, self.old = net or Net(), nn.Parameter(torch.zeros(())), None
        for parameter in self.net.parameters():
            parameter.requires_grad_(False)
        self._step, self.steps = step, 0

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        self.steps = max(self.steps, batch_idx + 1)
        return self._step(self, batch) + 0 * self.anchor

    def configure_optimizers(self):
        return torch.optim.SGD([self.anchor], lr=0.1)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def replay(model, batch):
    value = loss(model, batch)
    if model.old is not None:
        value = value + loss(model, model.old)
    model.old = batch
    return value


def teacher(model, batch):
    own = copy.deepcopy(model.net)
    value = loss(model, batch)
    own.body[0].weight.data.mul_(3)
    own(batch[0])
    return value


def saved(model, batch):
    file = io.BytesIO()
    torch.save(model.net, file)
    file.seek(0)
    torch.load(file, weights_only=False)(batch[0])
    return loss(model, batch)


def perturbed(model, batch):
    value = loss(model, batch)
    own = model.net.body[0].weight.data
    before = own.clone()
    own.mul_(2)
    model(batch[0])
    own.copy_(before)
    return value


RIGHT = {
    "plain": loss,
    "by its network": lambda m, b: F.cross_entropy(m.net(b[0]), b[1]),
    "by its layers": lambda m, b: F.cross_entropy(m.net.out(m.net.body(b[0])), b[1]),
    "in another memory format": lambda m, b: F.cross_entropy(m(b[0].clone()), b[1]),
    "unlabelled after": lambda m, b: loss(m, b) + 0.1 * m(3 * b[0] + 1).softmax(1).square().sum(),
    "unlabelled before": lambda m, b: 0.1 * m(3 * b[0] + 1).softmax(1).square().sum() + loss(m, b),
    "more unlabelled after": lambda m, b: loss(m, b) + 0.1 * m(b[0].repeat(2, 1)).sum(),
    "replay": replay,
    "copied teacher": teacher,
    "saved": saved,
    "twice with other weights": perturbed,
}


def fit(model, folder, monitor, loaders=None, **options):
    torch.manual_seed(0)
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=[monitor], **options)
    loaders = DataLoader(TensorDataset(X, Y), batch_size=B) if loaders is None else loaders
    try:
        trainer.fit(model, loaders)
    finally:
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    return {k.removeprefix("nc/"): float(v) for k, v in trainer.callback_metrics.items()}


def right(model, stage="train", x=X):
    with torch.no_grad():
        return {f"{stage}/{k}": v for k, v in oracle(model.net.body(x), model.net.out.weight, Y).items()}


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in eval mode at the start")


@pytest.mark.parametrize("step", RIGHT)
def test_online_features_are_those_of_the_batch(step, tmp_path):
    model = Stands(RIGHT[step])
    read = fit(model, tmp_path, NeuralCollapseMonitor(source="online", stages=("train",)))
    assert read == pytest.approx(right(model), rel=1e-4)


def permuted(model, batch):
    order = torch.arange(B).flip(0)
    return F.cross_entropy(model(batch[0][order]), batch[1][order])


def chunks(model, batch):
    return sum(loss(model, pair) for pair in zip(batch[0].chunk(2), batch[1].chunk(2), strict=True))


WRONG = {
    "permuted": permuted,
    "mixed": lambda m, b: F.cross_entropy(m(0.5 * b[0] + 0.5 * b[0].flip(0)), b[1]),
    "chunks": chunks,
    "together with others": lambda m, b: F.cross_entropy(m(torch.cat([b[0], b[0] + 1]))[:B], b[1]),
    "several of which none is it": lambda m, b: F.cross_entropy(m(b[0] + 1) + m(b[0] - 1), b[1]),
}


@pytest.mark.parametrize("step", WRONG)
def test_online_steps_on_something_else_are_refused_at_once(step, tmp_path):
    model = Stands(WRONG[step])
    with pytest.raises(ValueError, match=r"'online' and Probe.online pair features with labels by.*Use source='sweep'"):
        fit(model, tmp_path, NeuralCollapseMonitor(source="online", stages=("train",)))
    assert model.steps == 1


def test_an_online_step_that_differs_later_is_refused_before_anything_is_logged(tmp_path):
    def later(model, batch):
        return (permuted if model.steps > 2 else loss)(model, batch)

    with pytest.raises(ValueError, match=r"'online' and Probe\.online pair"):
        fit(Stands(later), tmp_path, NeuralCollapseMonitor(source="online"))


def test_an_online_step_that_differs_before_a_validation_inside_the_epoch_is_refused(tmp_path):
    class Validates(Stands):
        def validation_step(self, batch, batch_idx):
            self(batch[0])

        def val_dataloader(self):
            return DataLoader(TensorDataset(X, Y), batch_size=B)

    model = Validates(lambda m, b: (permuted if m.steps == 2 else loss)(m, b))
    with pytest.raises(ValueError, match=r"'online' and Probe\.online pair"):
        fit(model, tmp_path, NeuralCollapseMonitor(source="online"), val_check_interval=3)


def test_batch_fn_makes_the_inputs_of_the_step(tmp_path):
    model = Stands(lambda m, b: F.cross_entropy(m(b[0] / 3), b[1]))
    monitor = NeuralCollapseMonitor(source="online", stages=("train",), batch_fn=lambda b: (b[0] / 3, b[1]))
    assert fit(model, tmp_path, monitor) == pytest.approx(right(model, x=X / 3), rel=1e-4)


def test_closures_of_an_optimizer_run_the_step_again(tmp_path):
    class Searches(Stands):
        def configure_optimizers(self):
            return torch.optim.LBFGS([self.anchor], max_iter=3)

    model = Searches(loss)
    read = fit(model, tmp_path, NeuralCollapseMonitor(source="online", stages=("train",)))
    assert read == pytest.approx(right(model), rel=1e-4)


class Validates(Stands):
    def __init__(self, step):
        super().__init__(loss)
        self._validate = step

    def validation_step(self, batch, batch_idx):
        self._validate(self, batch)


@pytest.mark.parametrize(
    "step",
    [
        lambda m, b: m(b[0]) + m(-b[0]),
        lambda m, b: m(-b[0]) + m(b[0]),
        lambda m, b: [m(x) for x in (b[0] + 1, b[0], b[0] + 2)],
    ],
    ids=["after", "before", "between"],
)
def test_validation_reads_the_run_on_the_batch(step, tmp_path):
    model, trainer = Validates(step), quiet_trainer(tmp_path, callbacks=[NeuralCollapseMonitor()])
    values = trainer.validate(model, DataLoader(TensorDataset(X, Y), batch_size=B), verbose=False)[0]
    read = {k.removeprefix("nc/"): v for k, v in values.items()}
    assert read == pytest.approx(right(model, "val"), rel=1e-4)


def test_validation_on_prepared_inputs_is_read_as_it_runs(tmp_path):
    model = Validates(lambda m, b: m(b[0] / 3))
    trainer = quiet_trainer(tmp_path, callbacks=[NeuralCollapseMonitor()])
    values = trainer.validate(model, DataLoader(TensorDataset(X, Y), batch_size=B), verbose=False)[0]
    read = {k.removeprefix("nc/"): v for k, v in values.items()}
    assert read == pytest.approx(right(model, "val", X / 3), rel=1e-4)


@pytest.mark.parametrize(
    "step",
    [lambda m, b: [m(crop) for crop in (b[0][:4], b[0][4:])], lambda m, b: m(b[0][b[1] > 0])],
    ids=["crops", "some rows"],
)
def test_validation_on_other_samples_is_refused_with_a_repair_that_works(step, tmp_path):
    model, loader = Validates(step), DataLoader(TensorDataset(X, Y), batch_size=B)
    with pytest.raises(ValueError, match=r"cannot be paired with labels.*datasets=\{'name': loader\}"):
        quiet_trainer(tmp_path, callbacks=[NeuralCollapseMonitor()]).validate(model, loader, verbose=False)
    model = Stands(loss)
    read = fit(model, tmp_path, NeuralCollapseMonitor(stages=("train",), datasets={"name": loader}))
    read = {tag: value for tag, value in read.items() if tag.startswith("name")}
    assert read == pytest.approx(right(model, "name"), rel=1e-4)


# Steps that do something else than the forward.


def said(model, folder, monitor, *loaders, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(model, folder, monitor, *loaders, **options)
    return [str(w.message) for w in caught if "first training step" in str(w.message)]


@pytest.mark.parametrize("make", [NeuralCollapseMonitor, lambda: OptimalityMonitor(loss="ce")], ids=["nc", "gap"])
def test_a_step_on_other_inputs_is_said_once(make, tmp_path):
    (message,) = said(Stands(lambda m, b: F.cross_entropy(m(2 * b[0] - 1), b[1])), tmp_path, make())
    assert "on other inputs than those of the batch" in message
    assert said(Stands(loss), tmp_path, make()) == []
    assert said(Stands(chunks), tmp_path, make()) == []


def test_a_step_that_leaves_out_the_head_is_said(tmp_path):
    model = Stands(lambda m, b: F.cross_entropy(m.other(m.net.body(b[0])), b[1]))
    model.other = nn.Linear(D, K)
    (message,) = said(model, tmp_path, NeuralCollapseMonitor())
    assert "the head 'net.out', whose output is that" in message


def test_an_evaluation_pass_says_that_it_validates(tmp_path):
    """As Lightning documents for hooks that augment batches."""

    class Augments(Stands):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return (batch[0] + 5 if self.trainer.training else batch[0]), batch[1]

    model = Augments(loss)
    assert fit(model, tmp_path, NeuralCollapseMonitor()) == pytest.approx(right(model), rel=1e-4)
    assert model.trainer.state.stage is None or not model.trainer.validating


# Loaders.


def halves():
    return {"labelled": DataLoader(TensorDataset(X, Y), batch_size=B), "rest": DataLoader(X + 1, batch_size=B)}


def of_both(model, batch):
    return loss(model, batch["labelled"]) + 0 * model(batch["rest"]).sum()


def test_an_unlabelled_training_loader_is_refused_at_once_with_a_repair_that_works(tmp_path):
    model = Stands(of_both)
    with pytest.raises(ValueError, match=r"another training loader.* give samples without labels the label -100"):
        fit(model, tmp_path, NeuralCollapseMonitor(), halves())
    with pytest.raises(ValueError, match=r"batch_fn failed on a list .* TypeError.*batches of one loader"):
        fit(model, tmp_path, NeuralCollapseMonitor(batch_fn=lambda b: b["labelled"]), halves())
    assert model.steps == 0

    def split(batch):
        return batch if isinstance(batch, list) else (batch, torch.full((len(batch),), -100))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the labels have 0 classes")
        read = fit(model, tmp_path, NeuralCollapseMonitor(batch_fn=split), halves())
    expected = right(model, "train/labelled")
    assert {tag: read[tag] for tag in expected} == pytest.approx(expected, rel=1e-4)


def test_online_labels_of_several_loaders_are_refused_at_once(tmp_path):
    model = Stands(of_both)
    with pytest.raises(ValueError, match=r"keys \['labelled', 'rest'\] has no labels.*batch_fn"):
        fit(model, tmp_path, NeuralCollapseMonitor(source="online"), halves())
    assert model.steps == 0


class Fixed(Net):
    def forward(self, x):
        return super().forward(x.view(B, 5))


class Squeezes(Net):
    def forward(self, x):
        return super().forward(x.squeeze())


@pytest.mark.parametrize(("net", "count"), [(Fixed(), 42), (Squeezes(), 41)], ids=["view", "squeeze"])
def test_samples_left_over_that_the_model_does_not_take_are_refused_at_once(net, count, tmp_path):
    def loader():
        return DataLoader(TensorDataset(X[:count], Y[:count]), batch_size=B, drop_last=True)

    model = Stands(loss, net)
    with pytest.raises(ValueError, match=f"the {count % B} samples that drop_last=True leaves out.*source='online'"):
        fit(model, tmp_path, NeuralCollapseMonitor(), loader())
    assert model.steps == 0
    assert "train/nc1" in fit(model, tmp_path, NeuralCollapseMonitor(source="online"), loader())


def test_samples_left_over_that_collate_fn_does_not_take_are_refused(tmp_path):
    def collate(samples):
        assert len(samples) == B, "whole batches only"
        return torch.stack([x for x, _ in samples]), torch.stack([y for _, y in samples])

    loader = DataLoader(TensorDataset(X[:42], Y[:42]), batch_size=B, drop_last=True, collate_fn=collate)
    with pytest.raises(ValueError, match=r"drop_last=True leaves out of training.*whole batches only"):
        fit(Stands(loss), tmp_path, NeuralCollapseMonitor(), loader)


@pytest.mark.parametrize(
    ("data", "message"), [(X, "expected batches"), (TensorDataset(X, Y + 2), "labels must be within")]
)
def test_validation_loaders_are_checked_before_training(data, message, tmp_path):
    model = Validates(lambda m, b: m(b[0] if isinstance(b, list) else b))
    loaders = DataLoader(TensorDataset(X, Y), batch_size=B), DataLoader(data, batch_size=B)
    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, max_epochs=1, callbacks=[NeuralCollapseMonitor()]).fit(model, *loaders)
    assert model.steps == 0


# Scripted parts.


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_parts(tmp_path):
    net = Net()
    net.body = torch.jit.script(net.body)
    model = Stands(loss, net)
    assert fit(model, tmp_path, NeuralCollapseMonitor()) == pytest.approx(right(model), rel=1e-4)
    with pytest.raises(ValueError, match="scripted or traced, where no head can be seen: 'net'"):
        fit(Stands(loss, torch.jit.script(Net())), tmp_path, NeuralCollapseMonitor())
    with pytest.raises(ValueError, match="scripted or traced, where no head can be seen: 'net'"):
        fit(Stands(loss, torch.jit.trace(Net(), X[:B])), tmp_path, NeuralCollapseMonitor())


# The optimum is that of a loss of W h + b.


class Scaled(Net):
    def forward(self, x):
        return super().forward(x) / 0.1


class BiasApart(Net):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(draw(K))

    def forward(self, x):
        return super().forward(x) + self.bias


@pytest.mark.parametrize("head", [None, "net.out"])
@pytest.mark.parametrize("net", [Scaled, BiasApart])
def test_gap_and_distance_need_logits_as_the_loss_sees_them(net, head, tmp_path):
    model = Stands(loss, net())
    with pytest.raises(ValueError, match=r"is not W h \+ b of the head|no layer of"):
        fit(model, tmp_path, OptimalityMonitor(loss="ce", head=head))
    assert model.steps == 0


def test_gap_and_distance_of_a_function_with_the_temperature(tmp_path):
    own = fit(Stands(loss), tmp_path, OptimalityMonitor(loss="ce", lambda_w=1e-3, lambda_h=1e-4))
    head = lambda m: (m.net.out.weight / 0.1, m.net.out.bias / 0.1)  # noqa: E731
    scaled = fit(
        Stands(loss, Scaled()), tmp_path, OptimalityMonitor(loss="ce", lambda_w=1e-3, lambda_h=1e-4, head=head)
    )
    assert scaled["optimality/gap"] > own["optimality/gap"]


def test_labels_to_leave_out_name_no_argument_that_there_is_not(tmp_path):
    loader = DataLoader(TensorDataset(X, torch.where(torch.arange(N) < 2, -100, Y)), batch_size=B)
    with pytest.raises(ValueError, match=r"got -100\.\.3.*a loader without the samples") as caught:
        fit(Stands(loss), tmp_path, OptimalityMonitor(loss="ce"), loader)
    assert "ignore_index" not in str(caught.value)
