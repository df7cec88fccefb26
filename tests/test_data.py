"""The index data of the UFM."""

import lightning as L
import pytest
import torch

from nclightning.data import FullBatchLoader, IndexDataModule
from nclightning.models import UFM


def test_batch_is_balanced_and_in_the_order_of_the_theory():
    data = IndexDataModule(3, 2)
    data.setup("fit")
    index, labels = data.batch()
    assert index.tolist() == [0, 1, 2, 3, 4, 5]
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    model = UFM(3, 2, 4, "mse", lambda_=0.1)
    assert torch.equal(labels, model.problem.labels())


def test_loader_repeats_the_same_tensors():
    batch = (torch.arange(3), torch.arange(3))
    loader = FullBatchLoader(batch, 4)
    assert len(loader) == 4
    assert all(got is batch for got in loader)
    assert len(list(loader)) == 4


def test_iterating_leaves_the_random_state():
    before = torch.get_rng_state()
    list(FullBatchLoader((torch.arange(3), torch.arange(3)), 4))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_classes": 4}, r"IndexDataModule\(num_classes=4\) differs from the model's 3"),
        ({"samples_per_class": 5}, r"IndexDataModule\(samples_per_class=5\) differs from the model's 2"),
    ],
)
def test_sizes_that_differ_from_the_model_are_refused(sizes, message):
    trainer = L.Trainer(
        max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False
    )
    with pytest.raises(ValueError, match=message):
        trainer.fit(UFM(3, 2, 4, "mse", lambda_=0.1), datamodule=IndexDataModule(**sizes))


def test_missing_sizes_are_named():
    with pytest.raises(ValueError, match=r"IndexDataModule\(num_classes=...\) is missing"):
        IndexDataModule().setup("fit")


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        IndexDataModule(1, 3).setup("fit")
    with pytest.raises(ValueError, match="steps_per_epoch must be at least 1"):
        IndexDataModule(steps_per_epoch=0)
