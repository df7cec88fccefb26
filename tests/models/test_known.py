"""Only a module whose minimum is known has a problem; every other one is refused, with the repair."""

from contextlib import nullcontext
from inspect import isfunction

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from nclightning.callbacks import OptimalityMonitor
from nclightning.cli import main
from nclightning.data import FullBatchLoader, IndexDataModule
from nclightning.models import UFM, RegularizedClassifier, TwoLayerMLP
from nclightning.models.backbones import FeatureTable
from nclightning.objective import Objective
from nclightning.problems import CrossEntropy, Problem, balanced_ce, mse_with_penalized_bias, mse_without_bias
from nclightning.theory import UFMProblem
from tests.trainers import quiet_trainer

K, N, D = 3, 6, 4
SMOOTHED = 0.85 * torch.eye(K, dtype=torch.float64) + 0.05


def ufm(loss="mse", make=UFM, **options):
    torch.manual_seed(0)
    return make(K, N // K, D, loss, lambda_=1e-2, iterations_per_step=10, **options)


def network(loss="mse", head=None, backbone=None, objective=None, num_samples=N):
    torch.manual_seed(0)
    head, backbone = head or linear(loss == "mse"), backbone or nn.Linear(5, D, dtype=torch.float64)
    return RegularizedClassifier(
        backbone, head, objective or Objective(loss, 1e-2, 1e-2), num_samples, iterations_per_step=10
    )


def changed(make, **parts):
    def build():
        model = make()
        for path, part in parts.items():
            owner, _, name = path.replace("__", ".").rpartition(".")
            setattr(model.get_submodule(owner), name, part(model) if isfunction(part) else part)
        return model

    return build


def frozen(make, name):
    def build():
        model = make()
        model.get_parameter(name).requires_grad_(False)
        return model

    return build


def normed(norm, name="head"):
    def build():
        model = ufm()
        norm(model.get_submodule(name))
        return model

    return build


class Smoothed(Objective):
    """Label smoothing, as an objective of one's own."""

    def _mean_loss(self, logits, labels):
        return 0.9 * super()._mean_loss(logits, labels) - 0.1 * torch.log_softmax(logits, dim=1).mean()


class Weighted(UFM):
    """Class weights, as an evaluation of one's own."""

    def evaluate_objective(self, batch):
        return 2 * super().evaluate_objective(batch)


class Positive(UFM):
    def forward(self, x):
        return self.head(self.backbone(x).relu())


class Normalised(TwoLayerMLP):
    def features_of(self, x):
        return nn.functional.normalize(super().features_of(x))


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.normalize(x), nn.functional.normalize(self.weight))


class Shifted(FeatureTable):
    def forward(self, index):
        return super().forward(index) + 1


def table():
    return FeatureTable(N, D, torch.float64)


def linear(bias):
    return nn.Linear(D, K, bias=bias, dtype=torch.float64)


def layer_norm(model):
    return nn.Sequential(model.backbone, nn.LayerNorm(D, elementwise_affine=False))


COUNTS, PENALTIES = [N // K] * K, {"lambda_w": N // K * 1e-2, "lambda_h": 1e-2}
# Modules with a head or an objective of another kind than the paper's, and the problem that they train.
OTHERS = {
    "UFM without the bias of MSE": (changed(ufm, head=linear(False)), mse_without_bias(COUNTS, D, **PENALTIES)),
    "UFM whose bias was taken off": (changed(ufm, head__bias=None), mse_without_bias(COUNTS, D, **PENALTIES)),
    "CE with a bias": (
        changed(lambda: ufm("ce"), head=linear(True)),
        balanced_ce(K, N // K, D, **PENALTIES).replace(bias="free"),
    ),
    "penalty on the bias": (
        changed(ufm, objective=Objective("mse", **PENALTIES, lambda_b=0.1)),
        mse_with_penalized_bias(COUNTS, D, **PENALTIES, lambda_b=0.1),
    ),
    "network without the bias of MSE": (
        lambda: network(head=nn.Linear(D, K, bias=False)),
        mse_without_bias(COUNTS, D, 1e-2, 1e-2),
    ),
    "network with logit adjustment": (
        lambda: network("ce", objective=Objective(CrossEntropy(offset=[0.0, 1.0, 2.0]), 1e-2, 1e-2)),
        Problem(CrossEntropy(offset=[0.0, 1.0, 2.0]), None, COUNTS, D, 1e-2, 1e-2),
    ),
    "network on label smoothing": (
        lambda: network("ce", objective=Objective(CrossEntropy(), 1e-2, 1e-2, targets=SMOOTHED)),
        Problem(CrossEntropy(), SMOOTHED, COUNTS, D, 1e-2, 1e-2),
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_losses_targets_and_biases_have_problems_of_their_own(case):
    make, expected = OTHERS[case]
    assert make().problem.describe() == expected.describe()


def test_a_free_bias_does_not_change_the_minimum_of_a_network():
    """The paper's names stay for it: only the optimal set of free features is another."""
    model = network("ce", head=nn.Linear(D, K, dtype=torch.float64))
    assert model.problem == UFMProblem("ce", K, N // K, D, 1e-2, 1e-2)
    free = balanced_ce(K, N // K, D, 1e-2, 1e-2).replace(bias="free")
    assert model.problem.optimal_value == pytest.approx(free.optimal_value, rel=1e-14)


REFUSED = {
    "label smoothing": (
        changed(lambda: ufm("ce"), objective=Smoothed("ce", 1e-2, 1e-2)),
        "objective is a Smoothed, whose minimum is not known",
    ),
    "own objective of a network": (lambda: network(objective=Smoothed("ce", 1e-2, 1e-2)), "objective is a Smoothed"),
    "class weights": (lambda: ufm(make=Weighted), "evaluate_objective of Weighted is not that of nclightning.models"),
    "evaluation set on the instance": (
        changed(ufm, evaluate_objective=lambda model: model.evaluate_objective),
        "evaluate_objective of UFM is not that",
    ),
    "own forward": (lambda: ufm(make=Positive), "forward of Positive is not that"),
    "own features": (
        lambda: Normalised(K, N // K, D, "mse", lambda_=1e-2, input_dim=5, hidden_dim=7),
        "features_of of Normalised is not that",
    ),
    "ReLU features": (
        changed(ufm, backbone=lambda model: nn.Sequential(model.backbone, nn.ReLU())),
        "backbone is a Sequential that changes the features",
    ),
    "ReLU features by hand": (
        lambda: network(backbone=nn.Sequential(table(), nn.ReLU())),
        "backbone is a Sequential that changes the features",
    ),
    "LayerNorm features": (changed(ufm, backbone=layer_norm), "backbone is a Sequential"),
    "shifted features": (changed(ufm, backbone=Shifted(N, D, torch.float64)), "backbone is a Shifted"),
    "UFM without a table": (changed(ufm, backbone=nn.Embedding(N, D)), "backbone is a Embedding"),
    "forward set on the table": (changed(ufm, backbone__forward=lambda _: abs), "backbone is a FeatureTable"),
    "cosine head": (changed(ufm, head=Cosine(D, K)), "head is a Cosine with its own forward"),
    "head of two layers": (
        changed(ufm, head=lambda _: nn.Sequential(nn.Linear(D, D), nn.Linear(D, K))),
        "head is a Sequential",
    ),
    "weight norm": (normed(parametrizations.weight_norm), "head computes its weight or bias from other parameters"),
    "spectral norm": (normed(parametrizations.spectral_norm), "head computes its weight or bias"),
    "weight norm of the features": (
        normed(lambda table: parametrizations.weight_norm(table, "features"), "backbone"),
        "backbone is a ParametrizedFeatureTable",
    ),
    "fixed head": (frozen(ufm, "head.weight"), r"head.weight is not trained \(requires_grad=False\)"),
    "fixed bias": (frozen(ufm, "head.bias"), "head.bias is not trained"),
    "fixed head of a network": (frozen(network, "head.weight"), "head.weight is not trained"),
    "fixed features": (frozen(ufm, "backbone.features"), "backbone.features is not trained"),
    "samples that K does not divide": (
        lambda: network(num_samples=7),
        "num_samples must be a multiple of the number of classes, got 7 samples of 3 classes",
    ),
    "another number of samples": (changed(ufm, num_samples=9), "backbone has features of 6 samples"),
    "another dimension": (changed(ufm, head=nn.Linear(5, K)), "in 4 dimensions, and the model .*head.in_features=5"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_known_is_refused_before_anything_is_written(case, tmp_path):
    make, message = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=message):
        model.problem  # noqa: B018
    trainer = quiet_trainer(tmp_path, max_steps=5, callbacks=[OptimalityMonitor(1)])
    loader = FullBatchLoader((torch.arange(N), torch.arange(N) % K), 1)
    with pytest.raises(ValueError, match=f"{message}.*OptimalityMonitor\\(theory=False\\)"):
        trainer.fit(model, loader, [])
    assert list(tmp_path.rglob("*")) == []


def test_the_command_line_refuses_before_it_makes_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="evaluate_objective of Weighted is not that of nclightning"):
        main(["fit", "--config", "ufm_mse", "--model", f"{__name__}.Weighted"])
    assert list(tmp_path.iterdir()) == []


def test_weight_norm_of_the_old_kind_is_refused():
    model = ufm()
    with pytest.warns(FutureWarning, match="deprecated"):
        weight_norm(model.head)
    with pytest.raises(ValueError, match="head computes its weight or bias"):
        model.problem  # noqa: B018


def test_a_bias_free_run_never_reads_a_gap(tmp_path):
    """Converged, it would read a gap of 5e-3 and a distance above 1, of a minimum that it does not have."""
    model = changed(ufm, head=linear(False))()
    monitor = OptimalityMonitor(1, theory=False)
    trainer = quiet_trainer(tmp_path, max_steps=2000, callbacks=[monitor])
    trainer.fit(model, datamodule=IndexDataModule())
    assert float(trainer.callback_metrics["optimality/grad_norm"]) <= 1e-8
    assert not {"optimality/gap", "optimality/distance"} & set(trainer.callback_metrics)
    stats = model.features.detach().view(K, N // K, D)
    problem = ufm().problem
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\) for loss='mse', got None"):
        problem.distance_from_moments(model.head.weight, stats.mean(dim=1), torch.zeros(()))


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("kind", ["UFM", "table by hand", "subclass"])
def test_what_is_known_has_the_right_problem(loss, kind):
    class Mine(UFM):
        def on_train_start(self):
            pass

    by_hand = {"head": linear(loss == "mse"), "backbone": table()}
    model = {
        "UFM": lambda: ufm(loss),
        "table by hand": lambda: network(loss, **by_hand, objective=Objective(loss, 2e-2, 1e-2)),
        "subclass": lambda: ufm(loss, Mine),
    }[kind]()
    assert model.problem == UFMProblem(loss, K, N // K, D, 2e-2, 1e-2)
    assert model.features_are_free


def test_a_network_is_measured_against_the_lower_bound():
    for loss in ("mse", "ce"):
        model = network(loss, head=nn.Linear(D, K))  # Under CE, a bias is free and its optimum constant.
        assert model.problem == UFMProblem(loss, K, N // K, D, 1e-2, 1e-2)
        assert not model.features_are_free


def test_who_knows_the_minimum_of_a_subclass_may_state_it(tmp_path):
    class Halved(UFM):
        """The same minimisers at half the value of each penalty and loss."""

        def evaluate_objective(self, batch):
            return super().evaluate_objective(batch)

        @property
        def problem(self):
            return UFMProblem("mse", K, N // K, D, 2e-2, 1e-2)

    trainer = quiet_trainer(tmp_path, max_steps=20, callbacks=[OptimalityMonitor(5)])
    trainer.fit(ufm(make=Halved), datamodule=IndexDataModule())
    values = {k: float(v) for k, v in trainer.callback_metrics.items()}
    optimum = UFMProblem("mse", K, N // K, D, 2e-2, 1e-2).optimal_value
    assert values["optimality/gap"] == pytest.approx(values["loss"] - optimum, rel=1e-10)


def shrink(_, args):
    return (0.5 * args[0],)


def doubled(_, args, output):
    return 2 * output


HOOKS = {
    "before the head": lambda m: m.head.register_forward_pre_hook(shrink),
    "after the head": lambda m: m.head.register_forward_hook(doubled),
    "after the table": lambda m: m.backbone.register_forward_hook(doubled),
    "that only looks": lambda m: m.head.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("loss", ["mse", "ce"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_that_changes_what_is_trained_is_refused_at_the_first_iterate(hook, loss, tmp_path):
    model, seen = ufm(loss), []

    monitor = OptimalityMonitor(1)
    part = monitor.at_iterates()
    read = part.read

    def noted(pl_module, batch):
        values = read(pl_module, batch)
        seen.append(values)
        return values

    part.read = noted
    HOOKS[hook](model)
    looks = hook == "that only looks"
    context = (
        nullcontext()
        if looks
        else pytest.raises(
            ValueError, match=r"(objective that is trained is|what enters the head is not) .*theory=False"
        )
    )
    with context:
        quiet_trainer(tmp_path, max_steps=5, callbacks=[monitor]).fit(model, datamodule=IndexDataModule())
    assert bool(seen) == looks


def test_dropout_is_refused_at_the_first_iterate(tmp_path):
    model = network(backbone=nn.Sequential(nn.Linear(5, D, dtype=torch.float64), nn.Dropout(0.5)))
    loader = FullBatchLoader((torch.randn(N, 5, dtype=torch.float64), torch.arange(N) % K), 1)
    with pytest.raises(ValueError, match=r"objective that is trained is .*\(dropout, a hook"):
        quiet_trainer(tmp_path, max_steps=5, callbacks=[OptimalityMonitor(1)]).fit(model, loader, [])


def adam_of_head(params):
    return torch.optim.Adam(list(params)[:1], lr=1e-3)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=1e-2), "weight_decay=0.01, a penalty beside"),
        (lambda params: torch.optim.AdamW(params, lr=1e-3), "weight_decay=0.01"),
        (lambda params: torch.optim.SGD(list(params)[1:], lr=0.1), "does not move backbone.features, and"),
        (adam_of_head, "does not move head.weight, head.bias, and"),
    ],
)
def test_an_optimizer_with_a_problem_of_its_own_is_refused(optimizer, message, tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=5, callbacks=[OptimalityMonitor(1)])
    with pytest.raises(ValueError, match=message):
        trainer.fit(ufm(optimizer=optimizer), datamodule=IndexDataModule())


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_of_unbalanced_labels_is_refused(stage, tmp_path):
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    trainer = quiet_trainer(tmp_path, callbacks=[OptimalityMonitor()])
    with pytest.raises(ValueError, match="exactly 2 times"):
        getattr(trainer, stage)(ufm(), FullBatchLoader((torch.arange(N), labels), 1), verbose=False)


def test_a_table_of_relu_features_has_no_predicted_decay(tmp_path):
    """As many numbers as the unconstrained feature model, but other curvature: a property that states it is bound."""

    class Stated(RegularizedClassifier):
        @property
        def problem(self):
            return UFMProblem("ce", K, N // K, D, 1e-2, 1e-2)

    model = Stated(
        nn.Sequential(table(), nn.ReLU()), linear(False), Objective("ce", 1e-2, 1e-2), N, iterations_per_step=10
    )
    nn.init.normal_(model.backbone[0].features)
    trainer = quiet_trainer(tmp_path, max_steps=5, callbacks=[OptimalityMonitor(1)])
    trainer.fit(model, FullBatchLoader((torch.arange(N), torch.arange(N) % K), 1), [])
    assert "optimality/gap" in trainer.callback_metrics
    assert "optimality/predicted_decay" not in trainer.callback_metrics
