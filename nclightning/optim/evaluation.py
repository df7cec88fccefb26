"""Value and gradient of an objective at one point, and inner products over parameters and processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nclightning.compat.torch import version_of
from nclightning.optim.unchanged import Iterate
from nclightning.ranks import rank, sum_over_ranks, world_size
from nclightning.sharding import own_shard

__all__ = ["Evaluation", "StoredEvaluation", "add_up", "average_over_ranks", "parameters_of", "products_of"]

_Version = tuple[int, ...] | None
_State = tuple[bool, _Version, _Version]  # Whether a parameter is trainable; the versions of it and of its gradient.


@dataclass(frozen=True)
class Evaluation:
    """Value and gradient at one point.

    Attributes:
        value: The objective.
        epsilon: Machine epsilon of the dtype in which the value was computed.
        gradients: One gradient per parameter; None if the objective does not depend on the parameter.
        square: Squared norm of the gradient over all parameters.
    """

    value: float
    epsilon: float
    gradients: list[Tensor | None]
    square: float

    @property
    def finite(self) -> bool:
        """Whether value and gradient are finite."""
        return math.isfinite(self.value) and math.isfinite(self.square)


class StoredEvaluation:
    """An evaluation that can be reused until the parameters or their gradients change.

    Args:
        evaluation: Value and gradient at the current parameters.
        params: The parameters, whose ``grad`` is set to the gradients of the evaluation.
        iterate: Record of the current parameters. With None, changes are seen by torch's version counters alone, which
            miss writes through ``.data``.
    """

    def __init__(self, evaluation: Evaluation, params: Sequence[Tensor], iterate: Iterate | None) -> None:
        self.evaluation = evaluation
        self.compare_with(iterate)
        self._states = self._states_of(params)

    def compare_with(self, iterate: Iterate | None) -> None:
        """Detect changes by this record of the parameters from now on, or with None by version counters alone."""
        self._iterate = iterate
        self._norms = None if iterate is None else _norms(self.evaluation.gradients)

    def _states_of(self, params: Sequence[Tensor]) -> list[_State]:
        gradients = self.evaluation.gradients
        return [(p.requires_grad, _version(p), _version(g)) for p, g in zip(params, gradients, strict=True)]

    def is_valid(self, params: Sequence[Tensor]) -> bool:
        """Return whether nothing has changed on this process. Gradients that were set to None count as unchanged."""
        states, gradients = self._states_of(params), self.evaluation.gradients
        if any(p.grad is not None and p.grad is not g for p, g in zip(params, gradients, strict=True)):
            return False
        if self._iterate is None:
            return states == self._states
        return (
            all(_is_as_it_was(now, then) for now, then in zip(states, self._states, strict=True))
            and self._iterate.matches(params)
            and self._gradients_are_unchanged(params)
        )

    def _gradients_are_unchanged(self, params: Sequence[Tensor]) -> bool:
        """Return whether the gradients have their norms. Other code may clear or clip them through ``.data``."""
        return all(p.grad is None for p in params) or self._norms == _norms(self.evaluation.gradients)


def _norms(gradients: Sequence[Tensor | None]) -> list[float]:
    """Return the norms of this process's gradients or shards, at a tenth of the cost of float64 inner products."""
    shards = [own_shard(g) for g in gradients if g is not None]
    norms = [torch.linalg.vector_norm(g, dtype=_wide(g)).double() for g in shards]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _is_as_it_was(now: _State, then: _State) -> bool:
    """Compare everything except the version of a trainable parameter, which may have been changed and restored."""
    trainable, _, gradient = now
    return (trainable, gradient) == (then[0], then[2]) and (trainable or now == then)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """List the parameters of an optimizer, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _version(tensor: Tensor | None) -> _Version:
    """Return version counters and address of a tensor. A sharded tensor and its shard have separate counters."""
    if tensor is None:
        return None
    if type(tensor) in (Tensor, nn.Parameter):
        return version_of(tensor), tensor.data_ptr()
    shard = own_shard(tensor)
    return version_of(tensor), version_of(shard), shard.data_ptr()


def products_of(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return this process's part of an inner product of two vectors, parameter by parameter, in float64.

    Returns:
        Scalars on the devices of the parameters; None, for zero, where an entry is missing.
    """
    return [
        None if a is None or b is None else torch.dot(own_shard(a).double().flatten(), own_shard(b).double().flatten())
        for a, b in zip(left, right, strict=True)
    ]


def add_up(products: Sequence[Tensor | None], shared: Sequence[bool]) -> Tensor:
    """Sum inner products over parameters and processes.

    Args:
        products: This process's products, one tensor per parameter, all of one shape; None is zero.
        shared: For each parameter, whether it is split between processes. Products of other parameters are the same
            on all processes and count once.

    Returns:
        The sum, of the same shape, on the device of the first product; bitwise the same on each process.
    """
    pairs = [(product, part) for product, part in zip(products, shared, strict=True) if product is not None]
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    device = pairs[0][0].device  # Parameters may be on several devices.
    parts = torch.stack([product.to(device) for product, _ in pairs], dim=-1)
    if not any(part for _, part in pairs):
        return parts.sum(-1)
    if rank() > 0:
        parts = torch.where(torch.tensor([part for _, part in pairs], device=device), parts, 0)
    return sum_over_ranks(parts.sum(-1))


def average_over_ranks(value: Tensor) -> Tensor:
    """Return the mean over all processes in float64, bitwise the same on each; on a single process the value itself."""
    if world_size() == 1:
        return value
    return sum_over_ranks(value.to(torch.float64, copy=True)) / world_size()
