"""Full-batch data."""

import lightning as L
import pytest
import torch

from nclightning.data import FullBatchLoader, GaussianDataModule, IndexDataModule
from nclightning.models import UFM, TwoLayerMLP
from nclightning.problems import unbalanced_ce
from tests.trainers import quiet_trainer


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


def gaussian(**options):
    data = GaussianDataModule(**({"num_classes": 5, "samples_per_class": 40, "input_dim": 50} | options))
    data.setup("fit")
    return data


def test_gaussian_inputs_have_the_stated_moments_and_balanced_labels():
    x, labels = gaussian(variance=0.25).batch()
    assert x.dtype == torch.float64
    assert labels.bincount().tolist() == [40] * 5
    # 10,000 draws: the mean has a standard error of 0.005, the variance one of 0.0035.
    assert float(x.mean()) == pytest.approx(0, abs=0.02)
    assert float(x.var()) == pytest.approx(0.25, abs=0.014)


def test_gaussian_inputs_depend_on_their_seed_alone():
    before = torch.get_rng_state()
    x, again, other = (gaussian(seed=seed).batch()[0] for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, again)
    assert not torch.equal(x, other)
    torch.testing.assert_close(gaussian(variance=1.0, seed=3).batch()[0], 2 * x, rtol=1e-15, atol=0)


def mlp(**options):
    sizes = {"num_classes": 3, "samples_per_class": 4, "feature_dim": 5, "input_dim": 6, "hidden_dim": 7}
    return TwoLayerMLP(**sizes, loss="mse", lambda_=1e-3, **options)


def test_gaussian_inputs_take_the_models_dtype_from_the_same_draws():
    double, single = GaussianDataModule(), GaussianDataModule()
    double.adopt(mlp())
    single.adopt(mlp(dtype="float32"))
    assert torch.equal(double.batch()[0].float(), single.batch()[0])


def test_gaussian_arguments_are_checked():
    with pytest.raises(ValueError, match="variance must be finite and positive, got 0"):
        GaussianDataModule(variance=0)
    with pytest.raises(ValueError, match=r"GaussianDataModule\(input_dim=5\) differs from the model's 6"):
        GaussianDataModule(input_dim=5).adopt(mlp())


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=5)
    trainer.fit(mlp(), GaussianDataModule(seed=1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    for seed, steps in ((1, 8), (2, 9)):
        again = quiet_trainer(tmp_path, max_steps=steps)
        if seed == 2:
            with pytest.raises(ValueError, match=r"trained on data with .*'seed': 1.*, not .*'seed': 2"):
                again.fit(mlp(), GaussianDataModule(seed=seed), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
        else:
            again.fit(mlp(), GaussianDataModule(seed=seed), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
            assert again.global_step == 8


def test_sizes_that_a_problem_does_not_have_are_asked_for():
    model = UFM(problem=unbalanced_ce([3, 1], feature_dim=2, lambda_w=0.1, lambda_h=0.1))
    with pytest.raises(ValueError, match=r"GaussianDataModule\(input_dim=...\) is missing"):
        GaussianDataModule().adopt(model)
    data = GaussianDataModule(input_dim=6)
    data.adopt(model)
    x, labels = data.batch()
    assert (tuple(x.shape), labels.tolist()) == ((4, 6), [0, 0, 0, 1])
    assert (data.num_classes, data.samples_per_class, data.num_samples) == (2, None, 4)


@pytest.mark.parametrize("problem", ["segmentation", {"kind": "toy"}, {"init_args": {"counts": 3}}, 3])
def test_a_hyperparameter_of_that_name_may_mean_something_else(problem):
    class Own(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"problem": problem, "num_classes": 3, "samples_per_class": 2})

    data = IndexDataModule()
    data.adopt(Own())
    assert data.batch()[1].tolist() == [0, 0, 1, 1, 2, 2]
    assert (data.num_classes, data.samples_per_class) == (3, 2)
