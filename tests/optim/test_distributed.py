"""Two processes with different data take the same steps as one with all of it."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

from nclightning.optim import ArmijoGD, ArmijoLBFGS
from tests.processes import on

STEPS = 30
KINDS_OF_SEARCH = [ArmijoGD, ArmijoLBFGS]
fully_shard = getattr(fsdp, "fully_shard", None)


def losses(x):
    """Two local objectives whose mean is the global one; alone, each would ask for another step."""
    a = torch.tensor([1.0, 8.0, 0.3], dtype=x.dtype)
    return (a * (x - 1).square()).sum(), ((a.flip(0) + 2) * (x + 0.5).square()).sum() + (x**4).sum()


def take_steps(make):
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
    optimizer = make([x])

    def closure():
        optimizer.zero_grad()
        value = losses(x)[dist.get_rank()]
        value.backward()
        dist.all_reduce(x.grad)  # What DistributedDataParallel does in backward.
        x.grad /= dist.get_world_size()
        return value

    path = []
    for _ in range(STEPS):
        optimizer.step(closure)
        path.append((x.detach().clone(), optimizer.outcome.step_size))
    return path


@pytest.mark.parametrize("make", KINDS_OF_SEARCH)
def test_ranks_take_the_steps_of_one_process(make, tmp_path):
    first, second = on(2, tmp_path, lambda: take_steps(make), group=True)
    x = torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
    optimizer = make([x])

    def closure():
        optimizer.zero_grad()
        value = sum(losses(x)) / 2
        value.backward()
        return value

    for (a, step_a), (b, step_b) in zip(first, second, strict=True):
        optimizer.step(closure)
        assert torch.equal(a, b)
        assert step_a == step_b
        # Interpolated steps are numbers that are rounded, too; at the end they are of noise.
        if optimizer.outcome.grad_norm > 1e-8:
            assert step_a == pytest.approx(optimizer.outcome.step_size, rel=1e-6)
        # Another order of summation: some roundings, carried along.
        torch.testing.assert_close(a, x.detach(), rtol=1e-12, atol=1e-12)


class Valley(torch.nn.Module):
    """Two processes get a row each; the second row is where it is to be, and the offset is with both."""

    def __init__(self, offset):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.tensor([[3.0, -2.0, 1.0], [0.5, 0.5, 0.5]], dtype=torch.float64))
        self.offset = torch.nn.Parameter(torch.full((2,), offset, dtype=torch.float64))

    def forward(self):
        curvature = torch.tensor([[1.0, 8.0, 0.3], [1.0, 1.0, 1.0]], dtype=torch.float64)
        return (curvature * (self.rows - 0.5).square()).sum() + 3 * self.offset.square().sum()


def walk(module, make=ArmijoGD):
    optimizer = make(module.parameters(), initial_step=4.0)  # Too long: the first step takes several trials.

    def closure():
        module.reshard() if hasattr(module, "reshard") else None
        optimizer.zero_grad()
        value = module()
        value.backward()
        return value

    path = []
    for _ in range(STEPS):
        optimizer.step(closure)
        path.append((optimizer.outcome, optimizer.total_evaluations))
    return path


@pytest.mark.skipif(fully_shard is None, reason="an older torch keeps it elsewhere")
@pytest.mark.parametrize("make", KINDS_OF_SEARCH)
@pytest.mark.parametrize("offset", [2.0, 0.0], ids=["both move", "the second has nothing to move"])
def test_sharded_parameters_take_the_steps_of_whole_ones(offset, make, tmp_path):
    def walk_together():
        module = Valley(offset)
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), ignored_params={module.offset})
        path = walk(module, make)
        module.reshard()
        return path, module.rows.full_tensor().detach(), module.offset.detach()

    (first, rows, moved), (second, *_) = on(2, tmp_path, walk_together, group=True)
    module = Valley(offset)
    whole = walk(module, make)
    assert whole[0][0].evaluations > 2
    assert first == second
    torch.testing.assert_close(rows, module.rows.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved, module.offset.detach(), rtol=1e-12, atol=1e-12)
    for (outcome, evaluations), (expected, expected_evaluations) in zip(first, whole, strict=True):
        assert evaluations == expected_evaluations
        assert outcome.status is expected.status
        assert outcome.step_size == expected.step_size
        assert outcome.grad_norm == pytest.approx(expected.grad_norm, rel=1e-10, abs=1e-12)


def resume_within(make):
    """Walk in one go, and with a state that is saved and loaded on the way."""
    paths = []
    for stop in (None, 6):
        module = Valley(2.0)
        fully_shard(module, mesh=init_device_mesh("cpu", (2,)), ignored_params={module.offset})
        optimizer, path = make(module.parameters()), []

        def closure(module=module):
            module.reshard()
            module.zero_grad()
            value = module() + module.rows.pow(4).sum()
            value.backward()
            return value

        for step in range(12):
            if step == stop:
                state = optimizer.state_dict()
                assert all(
                    value.shape == p.shape
                    for p, entries in zip(module.parameters(), state["state"].values(), strict=True)
                    for value in entries.values()
                )
                optimizer = make(module.parameters())
                optimizer.zero_grad()
                optimizer.load_state_dict(copy.deepcopy(state))
            optimizer.step(closure)
            path.append(optimizer.outcome)
        paths.append(path)
    return paths


@pytest.mark.skipif(fully_shard is None, reason="an older torch keeps it elsewhere")
def test_a_state_of_sharded_parameters_is_resumed_bit_for_bit(tmp_path):
    (one, other), second = on(2, tmp_path, lambda: resume_within(ArmijoLBFGS), group=True)
    assert one == other
    assert second == [one, other]


KINDS = {"as it was": 1, "gradient zeroed on one": 2, "moved on both": 2}  # Evaluations of the second step.


def take_two_steps(kind):
    """Disturb what is between two steps; return what each process has of it."""
    rank, x = dist.get_rank(), torch.nn.Parameter(torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64))
    if kind == "unequal" and rank == 1:
        x.data[1] = -x.data[1]
    optimizer = ArmijoGD([x], initial_step=0.1)

    def closure():
        optimizer.zero_grad()
        value = losses(x)[dist.get_rank()]
        value.backward()
        dist.all_reduce(x.grad)
        x.grad /= 2
        return value

    optimizer.step(closure)
    if kind == "gradient zeroed on one" and rank == 1:
        x.grad.zero_()
    if kind == "moved on both":
        x.data.mul_(1.5)
    optimizer.step(closure)
    return optimizer.outcome.evaluations, x.tolist()


def disturb():
    seen = {kind: take_two_steps(kind) for kind in KINDS}
    with pytest.raises(ValueError, match="not the same on all processes"):
        take_two_steps("unequal")
    return seen


def test_processes_agree_on_whether_to_evaluate_anew_and_refuse_other_parameters_together(tmp_path):
    first, second = on(2, tmp_path, disturb, group=True)
    assert first == second
    assert {kind: evaluations for kind, (evaluations, _) in first.items()} == KINDS
