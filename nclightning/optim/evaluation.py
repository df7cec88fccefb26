"""Value and gradient of an objective at one point, in numbers that decisions can be made on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nclightning.compat.torch import version_of
from nclightning.optim.iterate import Iterate
from nclightning.ranks import rank, sum_over_ranks, world_size
from nclightning.sharding import own_shard

__all__ = ["Carried", "Evaluation", "add_up", "average_over_ranks", "parameters_of", "products_of"]

_Version = tuple[int, ...] | None
_State = tuple[bool, _Version, _Version]  # Whether a parameter is trainable, its version and its gradient's.


@dataclass(frozen=True)
class Evaluation:
    """Value and gradient at one point.

    Attributes:
        value: The objective.
        epsilon: Machine epsilon of the dtype in which it was computed.
        gradients: One per parameter; None where the objective does not depend on it.
        square: Squared norm of the gradient.
    """

    value: float
    epsilon: float
    gradients: list[Tensor | None]
    square: float

    @property
    def finite(self) -> bool:
        """Whether value and gradient are."""
        return math.isfinite(self.value) and math.isfinite(self.square)


class Carried:
    """An evaluation for as long as the parameters and their gradients are those that it was made at.

    Args:
        evaluation: At the parameters as they are.
        params: Whose gradients are those of the evaluation.
        iterate: The parameters as they are. None leaves it to torch's version counters, which writes through ``.data``
            escape.
    """

    def __init__(self, evaluation: Evaluation, params: Sequence[Tensor], iterate: Iterate | None) -> None:
        self.evaluation = evaluation
        self.compare_with(iterate)
        self._states = self._states_of(params)

    def compare_with(self, iterate: Iterate | None) -> None:
        """Tell the parameters by their values from now on, or by version counters alone."""
        self._iterate = iterate
        self._norms = None if iterate is None else _norms(self.evaluation.gradients)

    def _states_of(self, params: Sequence[Tensor]) -> list[_State]:
        gradients = self.evaluation.gradients
        return [(p.requires_grad, _version(p), _version(g)) for p, g in zip(params, gradients, strict=True)]

    def holds(self, params: Sequence[Tensor]) -> bool:
        """Say whether it still is the evaluation there, as far as this process knows; gradients may be None."""
        states, gradients = self._states_of(params), self.evaluation.gradients
        if any(p.grad is not None and p.grad is not g for p, g in zip(params, gradients, strict=True)):
            return False
        if self._iterate is None:
            return states == self._states
        return (
            all(_is_as_it_was(now, then) for now, then in zip(states, self._states, strict=True))
            and self._iterate.matches(params)
            and self._holds_gradients(params)
        )

    def _holds_gradients(self, params: Sequence[Tensor]) -> bool:
        """Say whether gradients that others can reach have their norms: some clear or clip them through ``.data``."""
        return all(p.grad is None for p in params) or self._norms == _norms(self.evaluation.gradients)


def _norms(gradients: Sequence[Tensor | None]) -> list[float]:
    """Return the norms of what this process has of gradients, which cost a tenth of inner products in float64."""
    shards = [own_shard(g) for g in gradients if g is not None]
    norms = [torch.linalg.vector_norm(g, dtype=_wide(g)).double() for g in shards]
    return torch.stack([norm.to(norms[0].device) for norm in norms]).tolist() if norms else []


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def _is_as_it_was(now: _State, then: _State) -> bool:
    """Compare all but the versions of a trainable parameter, which may have been written and put back."""
    trainable, _, gradient = now
    return (trainable, gradient) == (then[0], then[2]) and (trainable or now == then)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """List what an optimizer moves, group by group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _version(tensor: Tensor | None) -> _Version:
    """Count the writes to a tensor, of which a sharded one and its shard count apart, and tell its memory."""
    if tensor is None:
        return None
    if type(tensor) in (Tensor, nn.Parameter):
        return version_of(tensor), tensor.data_ptr()
    shard = own_shard(tensor)
    return version_of(tensor), version_of(shard), shard.data_ptr()


def products_of(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Inner products of what this process has of two vectors, parameter by parameter, in float64.

    Returns:
        Scalars on the devices of the parameters; None where an entry is missing, which is zero.
    """
    return [
        None if a is None or b is None else torch.dot(own_shard(a).double().flatten(), own_shard(b).double().flatten())
        for a, b in zip(left, right, strict=True)
    ]


def add_up(products: Sequence[Tensor | None], shared: Sequence[bool]) -> Tensor:
    """Add up what this process has of inner products, over parameters and processes.

    Args:
        products: One tensor for each parameter, all of one shape; None is zero.
        shared: Of which parameters each process has a part only. What all processes have counts once.

    Returns:
        Of the same shape, on the device of the first; the same bits on each process.
    """
    pairs = [(product, part) for product, part in zip(products, shared, strict=True) if product is not None]
    if not pairs:
        return torch.zeros((), dtype=torch.float64)
    device = pairs[0][0].device  # Layers may be on several.
    parts = torch.stack([product.to(device) for product, _ in pairs], dim=-1)
    if not any(part for _, part in pairs):
        return parts.sum(-1)
    if rank() > 0:
        parts = torch.where(torch.tensor([part for _, part in pairs], device=device), parts, 0)
    return sum_over_ranks(parts.sum(-1))


def average_over_ranks(value: Tensor) -> Tensor:
    """Mean over all processes in float64, the same bits on each; the value itself on a single one."""
    if world_size() == 1:
        return value
    return sum_over_ranks(value.to(torch.float64, copy=True)) / world_size()
