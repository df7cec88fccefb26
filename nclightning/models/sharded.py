"""Training of networks whose weights are sharded by ``fully_shard``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from nclightning.compat.lightning import change_checkpointing, splits_layers, writes_distributed_checkpoints
from nclightning.errors import UserError
from nclightning.files import check_checkpoint
from nclightning.models.backbones import FeatureTable
from nclightning.models.graph import AutogradObjective
from nclightning.optim import ClosureObjective
from nclightning.optim.evaluation import Evaluation, parameters_of
from nclightning.optim.hessian import Hessian
from nclightning.ranks import world_size
from nclightning.sharding import gathered, reshard

__all__ = ["ShardedObjective", "check_sharding", "check_strategy", "keep_optimizers_whole", "shard_weights"]


class ShardedObjective(AutogradObjective):
    """Line of an objective whose weights are gathered at each forward. Points and gradients are in shards.

    Args:
        objective: Evaluates this process's share of the objective, with its graph, by a forward of the module.
        params: Parameters, sharded.
        module: The module that gathers the weights.
    """

    def __init__(self, objective: Callable[[], Tensor], params: Sequence[Tensor], module: nn.Module) -> None:
        super().__init__(objective, params)
        self._module = module

    def hessian(self, start: Evaluation, unit: float) -> Hessian:
        """Make Hessian-vector products from differences of gradients: those of ``fully_shard`` have no graph."""
        return ClosureObjective.hessian(self, start, unit)

    def reject(self) -> None:
        """Restore the parameters, and release the gathered weights of the last trial."""
        super().reject()
        reshard(self._module)

    def _call(self) -> Tensor:
        reshard(self._module)  # A forward without a backward leaves gathered weights, which may be outdated.
        return super()._call()

    def _differentiate_share(self) -> float:
        share, self._share = self._share, None
        assert share is not None
        # fully_shard averages gradients over processes, and the sum is needed.
        share.backward(torch.full_like(share, world_size()))  # type: ignore[no-untyped-call]
        return torch.finfo(share.dtype).eps


def shard_weights(module: L.LightningModule, strategy: ModelParallelStrategy) -> None:
    """Shard the weights of a module, all in one group, which each evaluation of the objective gathers.

    Args:
        module: A module with a method ``evaluate_objective``. One that is sharded already is unchanged.
        strategy: A strategy whose processes are running.

    Raises:
        ValueError: If the strategy would split layers, or if features are free parameters.
    """
    _refuse_free_features(module)
    mesh = strategy.device_mesh
    _refuse_split_layers(mesh["tensor_parallel"].size() > 1, mesh.size())
    if _is_group(module):
        return
    from torch.distributed import fsdp  # noqa: PLC0415 - not part of all builds of torch

    if not hasattr(fsdp, "fully_shard"):
        raise UserError("sharded weights need torch 2.6 or later: update torch, or set trainer.strategy=ddp.")
    fsdp.fully_shard(module, mesh=mesh["data_parallel"])
    fsdp.register_fsdp_forward_method(module, "evaluate_objective")


def check_strategy(strategy: ModelParallelStrategy, module: nn.Module) -> None:
    """Raise an error unless a strategy fits the full-batch loop. Its processes need not be running.

    Args:
        strategy: The strategy of a trainer.
        module: The module to train.

    Raises:
        ValueError: If it does not fit.
    """
    _refuse_free_features(module)
    _refuse_split_layers(splits_layers(strategy), strategy.num_nodes * strategy.num_processes)
    if writes_distributed_checkpoints(strategy):
        raise UserError(
            "ModelParallelStrategy would write checkpoints that a single process cannot read: set its "
            "save_distributed_checkpoint=False."
        )


def check_sharding(module: L.LightningModule, optimizer: Any) -> None:
    """Raise an error unless weights are sharded in the way that the full-batch loop needs.

    Args:
        module: A configured module under ``ModelParallelStrategy``.
        optimizer: The optimizer of its parameters.

    Raises:
        ValueError: If they are not.
    """
    if not _is_group(module) or sum(_is_group(child) for child in module.modules()) > 1:
        raise UserError(
            f"the full-batch loop needs all weights of {type(module).__name__} in one group of fully_shard: leave "
            "configure_model as it is in RegularizedClassifier."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UserError(
            "LBFGS takes inner products over all parameters, but weights are sharded: use ArmijoLBFGS, ArmijoGD or an "
            "optimizer that treats each number by itself, or set trainer.strategy=ddp."
        )


def keep_optimizers_whole(strategy: ModelParallelStrategy) -> None:
    """Make a strategy save and load optimizer states in the form that they have on a single process.

    The strategy itself would drop what an optimizer adds to its state, and could not load a state without tensors. A
    checkpoint is checked before anything is loaded from it.

    Args:
        strategy: The strategy, of which two methods are replaced.
    """

    def optimizer_state(optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        plain = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state: dict[str, Any] = plain.state_dict()
        return _each_tensor(state, lambda _, value: gathered(value).cpu())

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(strategy.broadcast(checkpoint_path))
        if path.is_dir():
            raise UserError(f"ckpt_path={path} is a folder: resume from a checkpoint that is a single file.")
        check_checkpoint(path, f"ckpt_path={path}")
        stored = torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
        check = getattr(strategy.lightning_module, "check_checkpoint", None)
        if check is not None:
            check(stored)
        optimizers, strategy.optimizers = strategy.optimizers, []
        try:
            checkpoint = type(strategy).load_checkpoint(strategy, path, weights_only)
        finally:
            strategy.optimizers = optimizers
        for optimizer, state in zip(optimizers, checkpoint.get("optimizer_states", []), strict=False):
            params = parameters_of(optimizer)
            optimizer.load_state_dict(_each_tensor(state, lambda i, value: _shard_like(value, params[i])))  # noqa: B023
        return checkpoint

    change_checkpointing(strategy, optimizer_state, load_checkpoint)


def _each_tensor(state: Mapping[str, Any], change: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """Apply a function of the parameter's index and a tensor to all tensors in an optimizer's state."""
    changed = {
        index: {name: change(index, value) if isinstance(value, Tensor) else value for name, value in entries.items()}
        for index, entries in state["state"].items()
    }
    return {**state, "state": changed}


def _shard_like(tensor: Tensor, param: Tensor) -> Tensor:
    """Shard a tensor like a parameter of the same shape. A tensor of another shape is unchanged."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415

    if not isinstance(param, DTensor) or tensor.shape != param.shape:
        return tensor
    return distribute_tensor(tensor.to(param.device), param.device_mesh, param.placements)


def _refuse_free_features(module: nn.Module) -> None:
    """Raise an error if a module has a table of free features."""
    if any(isinstance(child, FeatureTable) for child in module.modules()):
        raise UserError(
            "ModelParallelStrategy does not fit free features, whose rows are shared by processes: set "
            "trainer.strategy=ddp."
        )


def _refuse_split_layers(split: bool, world: int) -> None:
    """Raise an error if a strategy splits layers."""
    if split:
        raise UserError(
            "ModelParallelStrategy would split layers, but the full-batch loop needs whole layers: set its "
            f"data_parallel_size={world}, tensor_parallel_size=1 and save_distributed_checkpoint=False."
        )


def _is_group(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has made a module the root of a group of shards."""
    return hasattr(module, "set_reshard_after_forward")
