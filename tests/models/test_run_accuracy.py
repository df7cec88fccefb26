"""NC1 along a whole run, whose spread orthogonal to the class means dominates from the middle on."""

from functools import partial

import lightning as L
import pytest
import torch

from nclightning.data import IndexDataModule
from nclightning.functional import class_statistics, within_class_variability
from nclightning.models import UFM
from nclightning.optim import ArmijoGD
from tests.functional import multiprecision
from tests.trainers import quiet_trainer


class Snapshots(L.Callback):
    """Keeps features of some iterates."""

    def __init__(self, every):
        self.every, self.features = every, {}

    def on_iteration_end(self, trainer, pl_module, batch, iteration):
        if iteration % self.every == 0:
            self.features[iteration] = pl_module.features.detach().clone(), batch[1]


def test_nc1_of_ufm_mse_from_the_start_to_1e_28(tmp_path):
    L.seed_everything(0, verbose=False)
    model = UFM(10, 10, 20, "mse", lambda_w=5e-3, lambda_h=5e-4, optimizer=partial(ArmijoGD, patience=1))
    snapshots = Snapshots(every=300)
    quiet_trainer(tmp_path, max_steps=3300, callbacks=[snapshots]).fit(model, datamodule=IndexDataModule(10, 10))
    ones, right = (torch.ones(10, 20), torch.ones(10)), {}
    for iteration, (features, labels) in snapshots.features.items():
        right[iteration] = multiprecision.evaluate("nc1", features, labels, *ones)
        for stats in (class_statistics(features, labels, 10), class_statistics(features, labels, 10).folded):
            value = float(within_class_variability(stats))
            if right[iteration] > 1e-28:
                assert value == pytest.approx(right[iteration], rel=1e-6), iteration
    assert max(right.values()) > 1e-2
    assert min(right.values()) < 1e-27
