"""Which sets NeuralCollapseMonitor sweeps."""

import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor, OptimizerLaws
from nclightning.data import IndexDataModule
from nclightning.functional import class_statistics, ood_orthogonality, within_class_variability
from nclightning.models import UFM
from tests.callbacks.attached import K, N, Net, Pair, features_of, fit, loader, metrics
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]


def test_several_training_loaders(tmp_path, samples):
    """Each is read by itself, decisions by the class means of all."""
    parts = {"a": tuple(s[:20] for s in samples), "b": tuple(s[20:] for s in samples)}
    loaders = {name: loader(part) for name, part in parts.items()}
    monitor = NeuralCollapseMonitor(measures=("nc1", "ncc_accuracy"))
    model, trainer = fit(tmp_path, [monitor], loaders, Pair())
    read = metrics(trainer)
    means = class_statistics(features_of(model, samples[0]), samples[1], K).means
    for name, (x, y) in parts.items():
        features = features_of(model, x)
        nc1 = within_class_variability(class_statistics(features, y, K))
        nearest = torch.cdist(features.double(), means).argmin(1)
        assert read[f"train/{name}/nc1"] == pytest.approx(float(nc1), rel=1e-4)
        assert read[f"train/{name}/ncc_accuracy"] == pytest.approx(float((nearest == y).double().mean()))


@pytest.mark.parametrize(
    "options", [{"stages": ("val",)}, {"source": "online"}, {"source": "online", "stages": ("val",)}], ids=str
)
def test_further_data_sets_are_swept_whatever_is_read_of_training(options, tmp_path, samples):
    half, other = tuple(s[:20] for s in samples), samples[0] + 3
    sets = {"half": loader(half), "far": loader((other, torch.zeros(N)))}
    model, trainer = fit(tmp_path, [NeuralCollapseMonitor(datasets=sets, ood=("far",), **options)], loader(samples))
    read = metrics(trainer)
    training = {f"train/nc{i}" for i in (1, 2, 3)} if "stages" not in options else set()
    assert read.keys() == {"half/nc1", "half/nc2", "half/nc3", "far/nc5"} | training
    stats = class_statistics(features_of(model, samples[0]), samples[1], K)
    expected = float(ood_orthogonality(stats, features_of(model, other).double().mean(0)))
    assert read["far/nc5"] == pytest.approx(expected, rel=1e-5)


def test_several_training_loaders_have_no_common_gap(tmp_path, samples):
    with pytest.raises(ValueError, match="OptimalityMonitor reads one training set, and there are 2"):
        fit(tmp_path, [OptimalityMonitor(loss="ce")], {"a": loader(samples), "b": loader(samples)}, Pair())


def test_data_sets_beside_full_batch_iterations(tmp_path):
    model, monitor = UFM(2, 3, 4, "ce", lambda_=1e-2), NeuralCollapseMonitor(datasets={"more": []})
    with pytest.raises(ValueError, match="datasets are swept on other modules than UFM"):
        quiet_trainer(tmp_path, max_steps=10, callbacks=[monitor]).fit(model, IndexDataModule())


def test_a_cadence_in_steps_of_full_batch_iterations_is_said_to_have_no_effect(tmp_path):
    for monitor in (NeuralCollapseMonitor(every_n_steps=2), OptimizerLaws(every_n_steps=2)):
        trainer = quiet_trainer(tmp_path, max_steps=10, callbacks=[monitor])
        with pytest.warns(UserWarning, match="every_n_steps=2 has no effect on UFM, .*: set every_n_iterations"):
            trainer.fit(UFM(2, 3, 4, "ce", lambda_=1e-2), IndexDataModule())


def test_a_test_of_other_weights_sweeps_the_training_set_again(tmp_path, samples):
    monitor = NeuralCollapseMonitor(measures=("nc1", "ncc_accuracy"), ood=("1",))
    with pytest.warns(UserWarning, match="this fit reads, of which none has a name: it has no nc5 of them"):
        model, trainer = fit(tmp_path, [monitor], loader(samples), WithTest())
    with torch.no_grad():
        model.body[0].weight.mul_(-1)  # As the best checkpoint would.
    trainer.test(model, [loader(samples, shuffle=False, drop_last=False)] * 2, verbose=False)
    features = features_of(model, samples[0])
    means = class_statistics(features, samples[1], K).means
    nearest = torch.cdist(features.double(), means).argmin(1)
    assert metrics(trainer)["test/0/ncc_accuracy"] == pytest.approx(float((nearest == samples[1]).double().mean()))
    assert metrics(trainer).keys() >= {"test/1/nc5"}


class WithTest(Net):
    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.step(batch)


@pytest.mark.parametrize("ignore_index", [None, 0])
def test_labels_of_out_of_distribution_sets_are_not_looked_at(ignore_index, tmp_path, samples):
    sets = {"far": loader((samples[0] + 3, torch.full((N,), 77)))}
    monitor = NeuralCollapseMonitor(datasets=sets, ood=["far"], ignore_index=ignore_index)
    model, trainer = fit(tmp_path, [monitor], loader(samples))
    kept = samples[1] != 0 if ignore_index == 0 else torch.ones(N, dtype=torch.bool)
    stats = class_statistics(features_of(model, samples[0][kept]), samples[1][kept], K)
    expected = float(ood_orthogonality(stats, features_of(model, samples[0] + 3).double().mean(0)))
    assert metrics(trainer)["far/nc5"] == pytest.approx(expected, rel=1e-5)


def test_out_of_distribution_sets_that_do_not_exist_are_said(tmp_path, samples):
    said = r"ood=\['svnh'\] are neither datasets nor loaders that this {} reads, {}: it has no nc5 of them\. Pass data"
    with pytest.warns(UserWarning, match=said.format("fit", "which are 'svhn'")):
        fit(tmp_path, [NeuralCollapseMonitor(datasets={"svhn": loader(samples)}, ood=["svnh"])], loader(samples))
    none, data = "of which none has a name", (loader(samples), loader(samples, drop_last=False, shuffle=False))
    with pytest.warns(UserWarning, match=said.format("fit", none)):  # That of validation is not read.
        fit(tmp_path, [NeuralCollapseMonitor(ood=["svnh"], stages=("train",))], data)
    with pytest.warns(UserWarning, match=said.format("fit", none)):
        model, trainer = fit(tmp_path, [NeuralCollapseMonitor(ood=["svnh"])], data, WithTest())
    for name, call in (("validation", trainer.validate), ("test", trainer.test)):
        with pytest.warns(UserWarning, match=said.format(name, none)):
            call(model, data[1], verbose=False)
    model = UFM(2, 3, 4, "ce", lambda_=1e-2)
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[NeuralCollapseMonitor(ood=["svnh"])])
    with pytest.warns(UserWarning, match=said.format("fit", none)):
        trainer.fit(model, IndexDataModule())
    with pytest.raises(ValueError, match=r"ood must be a sequence of names: write \('svhn',\)"):
        NeuralCollapseMonitor(ood="svhn")


def test_a_monitor_is_pickled_after_a_fit(tmp_path, samples):
    monitor = NeuralCollapseMonitor(measures=("nc1", "ncc_accuracy"))
    _, first = fit(tmp_path, [monitor], loader(samples))
    again = pickle.loads(pickle.dumps(monitor))
    _, second = fit(tmp_path, [again], loader(samples))
    assert metrics(first) == metrics(second)


def test_a_loader_that_runs_out_is_said(tmp_path, samples):
    class Once:
        def __init__(self, batches):
            self.batches = iter(batches)

        def __iter__(self):
            return self.batches

    with pytest.raises(
        ValueError, match=r"data are empty for process 0 of 1: .* a loader that starts again in each pass"
    ):
        fit(tmp_path, [NeuralCollapseMonitor(datasets={"once": Once(list(loader(samples)))})], loader(samples))


class CountsEpochs(Net):
    def on_train_epoch_end(self):
        self.log("epochs", self.current_epoch + 1.0)


class Rank1(RuntimeError):
    """What one process of two has."""


def failing_on_rank_1(batch):
    if dist.get_rank() == 1:
        raise Rank1("here")
    return batch


@pytest.mark.filterwarnings("ignore")  # Of forking and few workers, and of what is to happen.
@pytest.mark.parametrize("options", [{}, {"source": "online"}, {"stages": ("val",)}], ids=str)
def test_two_processes_give_up_together(options, tmp_path, samples):
    """Where one of them fails the other does not wait for it, and both train on."""
    monitor = NeuralCollapseMonitor(batch_fn=failing_on_rank_1, on_error="warn", head="last", **options)
    trainer = quiet_trainer(
        tmp_path,
        max_epochs=2,
        callbacks=[monitor],
        strategy=DDPStrategy(start_method="fork", find_unused_parameters=True, timeout=timedelta(minutes=1)),
        devices=2,
        num_sanity_val_steps=0,
    )
    trainer.fit(CountsEpochs(), loader(samples), loader(samples, shuffle=False))
    assert trainer.callback_metrics.keys() == {"epochs"}
    assert int(trainer.callback_metrics["epochs"]) == 2
