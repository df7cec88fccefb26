"""``nclightning.Probe`` where several processes train, by plain ``DistributedDataParallel`` and by Fabric."""

import warnings
from datetime import timedelta

import lightning as L
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Sampler, TensorDataset

from nclightning import Probe, measure, ranks
from nclightning.callbacks import NeuralCollapseMonitor
from nclightning.compat.torch import default_store
from tests.probe.loops import EXACT, Wrapped, X, Y, loader, made, sgd, states, step
from tests.trainers import forget_accelerator, quiet_trainer

accelerate = pytest.importorskip("accelerate")

ODD = 25  # A distributed sampler shows one sample twice.
SET = TensorDataset(X[:ODD].double(), Y[:ODD])
MEASURES = ("nc1", "nc2", "nc3", "accuracy", "ncc_mismatch")


class Half(Sampler):
    """A sampler of somebody else that leaves samples to other processes."""

    def __iter__(self):
        return iter(range(dist.get_rank(), ODD, 2))

    def __len__(self):
        return len(range(dist.get_rank(), ODD, 2))


def of_all(rows, labels):
    """Put together what both processes have, without the duplicate at the end of the second."""
    parts = [None, None]
    dist.all_gather_object(parts, (rows, labels))
    count = ODD // 2 + 1
    return tuple(torch.cat([parts[0][i], parts[1][i][: ODD - count]]) for i in range(2))


def epoch_of(probe, run, body, head, batches):
    """Run an epoch online; return it and what features of its forwards show."""
    rows, labels = [], []
    handle = head.register_forward_pre_hook(lambda layer, args: rows.append(args[0].detach().double().clone()))
    with probe.online() as epoch:
        for x, y in epoch.batches(batches):
            rows[len(labels) :] = []  # The first batch is looked at before.
            run(x, y)
            labels.append(y)
    handle.remove()
    rows, labels = of_all(torch.cat(rows[: len(labels)]), torch.cat(labels))
    return epoch, measure(features=rows, labels=labels, weight=head.weight.double(), bias=head.bias.double())


def refused(call):
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def plainly(rank, file, results):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(minutes=1))
    model = made()
    parallel, single = DistributedDataParallel(model), made()
    probe = Probe(parallel, measures=MEASURES)
    data = DataLoader(SET, batch_size=8, sampler=DistributedSampler(SET))
    before = states(model)
    found = [probe.read(data), probe.read(DataLoader(SET, batch_size=8, shuffle=True))]
    results["untouched", rank] = states(model) == before
    if rank == 0:
        found.append(probe.read(data, alone=True))
        sets = {"train": data, "val": loader(slice(12))}
        found += [probe.read(sets, alone=True)["val"]]
        results["half"] = refused(lambda: probe.read(DataLoader(SET, sampler=Half()), alone=True))
    results["found", rank] = found
    optimizer = sgd(model)
    online = Probe(parallel)
    epoch, expected = epoch_of(online, lambda x, y: step(parallel, optimizer, x, y), model.body, model.out, data)
    results["online", rank] = dict(epoch.measurement), dict(expected), epoch.measurement.num_samples

    # Only one process comes to read, and the other one trains on: no number of ours gets into a gradient.
    ranks._PATIENCE, store = timedelta(seconds=0.1), default_store()
    before = store.timeout
    store.set_timeout(timedelta(seconds=0.5))
    if rank == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results["missing"] = refused(lambda: probe.read(data))
        results["said"] = str(caught[0].message)
    store.set_timeout(before)
    gradients = []
    for each in (parallel, single):  # The first takes over the running statistics of the first process.
        single.load_state_dict(model.state_dict())
        each.eval().zero_grad()
        each(X.double()).square().sum().backward()
        gradients.append([p.grad.clone() for p in each.parameters()])
    results["gradients", rank] = gradients
    results["again", rank] = (
        dict(probe.read(data)),
        dict(measure(single, DataLoader(SET, batch_size=8), measures=MEASURES)),
    )
    dist.destroy_process_group()


def test_processes_of_a_plain_loop(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(plainly, (tmp_path / "file", results), nprocs=2, start_method="fork")
        results = dict(results)
    model = made()
    right = measure(model, DataLoader(SET, batch_size=8), measures=MEASURES)
    for rank in range(2):
        assert results["untouched", rank]
        for found in results["found", rank][:3]:
            assert dict(found) == pytest.approx(dict(right), **EXACT)
            assert found.num_samples == ODD
        measured, expected, count = results["online", rank]
        assert (measured, count) == (pytest.approx(expected, **EXACT), ODD)
        parallel, single = results["gradients", rank]
        assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(parallel, single, strict=True))
        found, expected = results["again", rank]
        assert found == pytest.approx(expected, **EXACT)
    sets = {"train": DataLoader(SET, batch_size=8), "val": loader(slice(12))}
    val = Probe(model, measures=MEASURES).read(sets)["val"]
    assert dict(results["found", 0][3]) == pytest.approx(dict(val), **EXACT)
    assert "the sampler Half leaves to other processes is not known" in results["half"]
    assert "process 0 of 2 reached measure, and processes [1] did not" in results["missing"]
    assert "read(data, alone=True) is for one" in results["said"]


# Fabric.


def in_fabric(fabric, precision):
    warnings.simplefilter("ignore")
    model = made().to(torch.float32)
    parallel, optimizer = fabric.setup(model, sgd(model))
    data = fabric.setup_dataloaders(DataLoader(TensorDataset(X[:ODD], Y[:ODD]), batch_size=8, shuffle=True))
    probe = Probe(parallel)
    before = states(model)
    found = probe.read(data)
    assert states(model) == before

    def run(x, y):
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(parallel(x).float(), y))
        optimizer.step()

    epoch, expected = epoch_of(probe, run, model.body, model.out, data)
    assert probe.read(data)["nc1"] != found["nc1"]
    return dict(found), dict(epoch.measurement), dict(expected), epoch.measurement.num_samples


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_processes_of_fabric(precision):
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="ddp_fork", precision=precision)
    found, measured, expected, count = fabric.launch(in_fabric, precision)
    assert (measured, count) == (pytest.approx(expected, **EXACT), ODD)
    single = L.Fabric(accelerator="cpu", devices=1, precision=precision).setup(made().to(torch.float32))
    right = Probe(single).read(DataLoader(TensorDataset(X[:ODD], Y[:ODD]), batch_size=8))
    # Float32 and bfloat16 forwards in batches of other samples.
    assert found == pytest.approx(dict(right), rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-true", "64-true"])
def test_fabric_reads_what_the_monitor_reads(precision, tmp_path):
    """On the same weights and data, in each precision."""
    fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    module, names = Wrapped(made().to(dtype)), ("nc1", "nc2", "nc3", "accuracy")
    data = DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True)
    trainer = quiet_trainer(
        tmp_path,
        max_epochs=1,
        precision=precision,
        callbacks=[NeuralCollapseMonitor(measures=names, stages=("train",))],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    logged = {tag.removeprefix("nc/train/"): float(value) for tag, value in trainer.callback_metrics.items()}
    model, batches = fabric.setup(made().to(dtype)), fabric.setup_dataloaders(data)
    model.load_state_dict(module.net.state_dict())
    probe, before = Probe(model, measures=names), states(model)
    assert dict(probe.read(batches)) == pytest.approx(logged, **EXACT)
    assert states(model) == before
    online, rows = Probe(model), []
    with online.online() as epoch:  # The model itself runs, without Fabric's conversion of inputs.
        for x, _ in epoch.batches(batches):
            model.module(x.to(model.module.out.weight.dtype))
    assert epoch.measurement.num_samples == len(X)
    handle = model.module.out.register_forward_pre_hook(lambda layer, args: rows.append(args[0].detach().double()))
    labels = []
    with online.online() as epoch:
        for x, y in epoch.batches(batches):
            rows[len(labels) :] = []
            model(x)
            labels.append(y)
    handle.remove()
    head = model.module.out
    right = measure(
        features=torch.cat(rows[: len(labels)]).to(head.weight.dtype), labels=torch.cat(labels), weight=head.weight
    )
    assert dict(epoch.measurement) == pytest.approx(dict(right), **EXACT)


# accelerate.


def accelerated(precision, results):
    warnings.simplefilter("ignore")
    forget_accelerator()  # A fork has that of its parent.
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = made().to(torch.float32)
    rows, labels, indices = [], [], []
    samples = TensorDataset(X[:ODD], Y[:ODD], torch.arange(ODD))
    parallel, optimizer, data = accelerator.prepare(model, sgd(model), DataLoader(samples, batch_size=4, shuffle=True))
    probe = Probe(parallel, batch_fn=lambda batch: batch[:2])
    before = states(model)
    found = probe.read(data)
    results["untouched", accelerator.process_index] = states(model) == before
    if accelerator.is_main_process:
        results["alone"] = dict(probe.read(data, alone=True))
    handle = model.out.register_forward_pre_hook(lambda layer, args: rows.append(args[0].detach().double().clone()))
    with probe.online() as epoch:
        for x, y, index in epoch.batches(data):
            rows[len(labels) :] = []
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(parallel(x), y))
            optimizer.step()
            labels.append(y)
            indices.append(index)
    handle.remove()
    results[accelerator.process_index] = dict(found), dict(epoch.measurement), epoch.measurement.num_samples
    own = [torch.cat(each) for each in (rows[: len(labels)], labels, indices)]
    results["rows", accelerator.process_index] = (
        own,
        model.out.weight.detach().double(),
        model.out.bias.detach().double(),
    )
    accelerator.end_training()


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_processes_of_accelerate(precision):
    with mp.Manager() as manager:
        results = manager.dict()
        accelerate.debug_launcher(accelerated, (precision, results), num_processes=2)
        results = dict(results)
    parts, weight, bias = [results["rows", i][0] for i in range(2)], *results["rows", 0][1:]
    # In the order of the epoch, in which what is repeated comes last.
    turns = [zip(*(torch.split(each, 4) for each in part), strict=True) for part in parts]
    batches = [batch for turn in zip(*turns, strict=True) for batch in turn]
    rows, labels, indices = (torch.cat(each)[:ODD] for each in zip(*batches, strict=True))
    assert sorted(indices.tolist()) == list(range(ODD))
    expected = measure(features=rows, labels=labels, weight=weight, bias=bias)
    model = made().to(torch.float32)
    loader = DataLoader(TensorDataset(X[:ODD], Y[:ODD]), batch_size=4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        right = measure(model, loader)
    for rank in range(2):
        found, measured, count = results[rank]
        assert results["untouched", rank]
        assert found == pytest.approx(dict(right), rel=1e-5)
        assert (measured, count) == (pytest.approx(dict(expected), **EXACT), ODD)
    assert results["alone"] == pytest.approx(dict(right), **EXACT)
