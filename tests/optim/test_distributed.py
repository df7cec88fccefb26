"""Two processes with different data take the same steps as one with all of it."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nclightning.optim import ArmijoGD

STEPS = 30


def losses(x):
    """Two local objectives whose mean is the global one; alone, each would ask for another step."""
    a = torch.tensor([1.0, 8.0, 0.3], dtype=x.dtype)
    return (a * (x - 1).square()).sum(), ((a.flip(0) + 2) * (x + 0.5).square()).sum() + (x**4).sum()


def run(rank, world, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
    optimizer = ArmijoGD([x])

    def closure():
        optimizer.zero_grad()
        value = losses(x)[rank]
        value.backward()
        dist.all_reduce(x.grad)  # What DistributedDataParallel does in backward.
        x.grad /= world
        return value

    path = []
    for _ in range(STEPS):
        optimizer.step(closure)
        path.append((x.detach().clone(), optimizer.outcome.step_size))
    results[rank] = path
    dist.destroy_process_group()


def test_ranks_take_the_steps_of_one_process(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(run, (2, tmp_path / "store", results), nprocs=2)
        first, second = results[0], results[1]
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
    optimizer = ArmijoGD([x])

    def closure():
        optimizer.zero_grad()
        value = sum(losses(x)) / 2
        value.backward()
        return value

    for (a, step_a), (b, step_b) in zip(first, second, strict=True):
        optimizer.step(closure)
        assert torch.equal(a, b)
        assert step_a == step_b == optimizer.outcome.step_size
        # Another order of summation: some roundings, carried along.
        torch.testing.assert_close(a, x.detach(), rtol=1e-12, atol=1e-12)
