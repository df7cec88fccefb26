"""Which sets NeuralCollapseMonitor sweeps."""

import pytest
import torch

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from nclightning.data import IndexDataModule
from nclightning.functional import class_statistics, ood_orthogonality, within_class_variability
from nclightning.models import UFM
from tests.callbacks.test_attach import K, N, Net, fit, loader, samples
from tests.callbacks.test_monitor_options import features_of, metrics, pytestmark
from tests.trainers import quiet_trainer

__all__ = ["pytestmark", "samples"]


class Pair(Net):
    """Takes batches of two loaders."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)


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
