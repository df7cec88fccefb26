"""NeuralCollapseMonitor on weights that ``fully_shard`` shares out among two processes."""

from datetime import timedelta

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from nclightning.functional import etf_deviation
from nclightning.metrics import Optimality
from nclightning.theory import UFMProblem
from tests.callbacks.attached import K, Net, loader, measure, read
from tests.processes import on
from tests.trainers import quiet_trainer

fsdp = pytest.importorskip("torch.distributed.fsdp")
pytestmark = pytest.mark.skipif(not hasattr(fsdp, "fully_shard"), reason="an older torch keeps it elsewhere")


class Sharded(Net):
    """Body, head and the rest in three groups, or all in one."""

    def __init__(self, nested=True, dtype=None, **options):
        super().__init__(**options)
        self.nested, self.dtype_of_forward = nested, dtype

    def configure_model(self):
        mesh, policy = self.device_mesh["data_parallel"], fsdp.MixedPrecisionPolicy(self.dtype_of_forward)
        for module in (self.body, self.last, self) if self.nested else (self,):
            fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)


def samples(count):
    """Of 49 and of 33 the first of two processes has a batch of 8 more than the second."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % K
    return torch.randn(count, 5, generator=generator) + torch.eye(K, 5)[labels], labels


def fit(folder, callbacks, count=49, tensor_parallel_size=1, still=False, **options):
    """Train on this process's share; return what was read and the whole weights, of which rank 0 has them."""
    torch.manual_seed(0)
    model = Sharded(frozen=still, **options)
    if still:  # Online readings are of changing weights and in training mode: here of weights that stand still.
        model.body[1] = model.body[3] = nn.Identity()
    trainer = quiet_trainer(
        folder,
        max_epochs=2,
        callbacks=callbacks,
        strategy=ModelParallelStrategy(
            data_parallel_size=2 // tensor_parallel_size,
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=False,
            timeout=timedelta(minutes=1),  # Of processes that wait for each other in vain.
        ),
        devices=2,
        num_sanity_val_steps=0,
    )
    data = samples(count)
    trainer.fit(model, loader(data, drop_last=not still), loader(data, shuffle=False, drop_last=False))
    return dict(trainer.callback_metrics), trainer.strategy.lightning_module_state_dict(), torch.get_rng_state()


def refused(folder, **options):
    with pytest.raises(ValueError, match=r"^\w") as caught:
        fit(folder, [NeuralCollapseMonitor()], **options)
    return str(caught.value)


class Reading:
    """Stands for a trainer."""

    def __init__(self, metrics):
        self.callback_metrics = metrics


@pytest.mark.parametrize("nested", [True, False], ids=["three groups", "one group"])
def test_a_sweep_reads_what_one_process_reads_and_leaves_no_trace(nested, tmp_path):
    measures = ("nc1", "nc2", "nc3", "accuracy", "ncc_mismatch")

    def job():
        monitor = NeuralCollapseMonitor(measures=measures, every_n_steps=2)
        part = monitor.at_epochs()
        publish, steps = part.publish_at_step, []

        def note(trainer, values):
            assert all(hasattr(parameter, "full_tensor") for parameter in trainer.lightning_module.parameters())
            steps.append(trainer.global_step)
            publish(trainer, values)

        part.publish_at_step = note
        results = fit(tmp_path, [], nested=nested), fit(tmp_path, [monitor], nested=nested)
        assert steps
        return results

    first, second = on(2, tmp_path, job)
    (_, bare, bare_random), (metrics, weights, random) = first
    assert bare.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in bare.items())
    assert torch.equal(bare_random, random)
    model = Net()
    model.load_state_dict(weights)
    assert read(Reading(metrics)) == pytest.approx(measure(model, samples(49)), rel=1e-6)
    assert {name: second[1][0][name] for name in metrics} == metrics
    with torch.no_grad():
        right = model(samples(49)[0]).argmax(dim=1) == samples(49)[1]
    assert float(metrics["nc/train/accuracy"]) == pytest.approx(float(right.double().mean()))


def test_ordinary_forwards(tmp_path):
    def job():
        return fit(tmp_path, [NeuralCollapseMonitor(source="online")], still=True)

    (metrics, weights, _), _ = on(2, tmp_path, job)
    model = Net()
    model.body[1] = model.body[3] = nn.Identity()
    model.load_state_dict(weights)
    expected = pytest.approx(measure(model, samples(49)), rel=1e-6)
    assert read(Reading(metrics)) == expected
    assert read(Reading(metrics), "val") == expected


def test_the_head_is_read_in_its_own_precision(tmp_path):
    def job():
        return fit(tmp_path, [NeuralCollapseMonitor()], still=True, nested=False, dtype=torch.bfloat16)

    (metrics, weights, _), _ = on(2, tmp_path, job)
    expected = pytest.approx(float(etf_deviation(weights["last.weight"].double())), rel=1e-6)
    assert read(Reading(metrics))["nc2"] == expected
    assert read(Reading(metrics), "val")["nc2"] == expected


def test_gap_and_distance(tmp_path):
    """Of balanced classes, which is what they are about; the second process has a batch less."""

    def job():
        return fit(tmp_path, [OptimalityMonitor(loss="ce", lambda_w=5e-2, lambda_h=1e-3)], count=33)

    (metrics, weights, _), _ = on(2, tmp_path, job)
    model = Net()
    model.load_state_dict(weights)
    data, metric = samples(33), Optimality(UFMProblem("ce", K, 11, 8, 5e-2, 1e-3), model.last)
    with torch.no_grad():
        metric.update(model.eval().body(data[0]), data[1])
    for name, value in metric.compute().items():
        assert float(metrics[f"optimality/{name}"]) == pytest.approx(float(value), rel=1e-6)


def test_refusals(tmp_path):
    def job():
        return refused(tmp_path, count=1, still=True), refused(tmp_path, tensor_parallel_size=2)

    for few, split in on(2, tmp_path, job):
        assert few.startswith("an evaluation pass with sharded weights needs a batch for each process")
        assert split.startswith("layers that are split over processes need the same batch on each")
