"""Reading the weight and the bias of a head from any kind of layer, tensor or function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import linear, normalize

from nclightning.errors import UserError, UserTypeError
from nclightning.sharding import gathered

__all__ = [
    "Form",
    "Head",
    "HeadReader",
    "HeadSource",
    "device_of",
    "evaluating",
    "fits",
    "has_more_than_a_weight",
    "has_weight",
    "pair_of",
    "read_head",
    "tolerance",
    "weight_shape",
]

Form = Literal["weight", "transposed", "probed"]
_POINTWISE = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class Head:
    """Weight and bias of a head at one time.

    Attributes:
        weight: ``(K, d)``, detached and whole.
        bias: ``(K,)``, or None.
        normalizes: Whether it is a cosine head. Then the rows of ``weight`` have norm 1, and features must be divided
            by their norms, too.
        name: Its name in messages.
    """

    weight: Tensor
    bias: Tensor | None = None
    normalizes: bool = False
    name: str = "head"

    @property
    def out_features(self) -> int:
        """Number of classes K."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Number of features d."""
        return self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.weight.device

    def snapshot(self) -> Head:
        """Copy the tensors, which may be parameters that training changes."""
        bias = None if self.bias is None else self.bias.clone()
        return Head(self.weight.clone(), bias, self.normalizes, self.name)


def read_head(source: Any) -> Head:
    """Read the current weight and bias, in eval mode and without changing anything.

    In training mode the weight of a layer with ``spectral_norm`` cannot be read without changing training, since each
    access runs a power iteration. Layers with the older, hook-based ``weight_norm``, ``spectral_norm`` or pruning store
    the weight of their last forward; here it is computed from the parameters.

    Args:
        source: A module with a weight ``(K, d)``, such as ``nn.Linear``, or a convolution with kernels of size 1; a
            weight ``(K, d)``; a pair of weight and bias; a :class:`HeadReader`; or a :class:`Head`, which is returned
            unchanged.

    Returns:
        Weight and bias, detached. Sharded weights are gathered, for which all processes must call this.

    Raises:
        TypeError: If the source is none of these.
        ValueError: If the shapes do not fit.
    """
    if isinstance(source, Head):
        return source
    if isinstance(source, HeadReader):
        return source.read()
    if isinstance(source, nn.Module):
        with evaluating(source):
            return _checked(_weight_of(source), getattr(source, "bias", None))
    if isinstance(source, Tensor):
        return _checked(source, None)
    if isinstance(source, tuple | list) and len(source) == 2:
        return _checked(*source)
    if isinstance(weight := getattr(source, "weight", None), Tensor):
        return _checked(weight, getattr(source, "bias", None))
    raise UserTypeError(
        f"head must be a module with a weight (K, d), a weight, or a pair (weight, bias), got {type(source).__name__}."
    )


def weight_shape(source: Any) -> tuple[int, ...]:
    """Return the shape of the weight that :func:`read_head` reads, without gathering it from other processes."""
    if isinstance(source, Head | HeadReader):
        return source.out_features, source.in_features
    if isinstance(source, nn.Module):
        with evaluating(source):
            return tuple(_weight_of(source).shape)
    weight = source[0] if isinstance(source, tuple | list) and source else source
    return tuple(weight.shape) if isinstance(weight, Tensor) else tuple(read_head(source).weight.shape)


def device_of(source: Any) -> torch.device:
    """Return the device of the weight, without gathering it from other processes."""
    return source.device if isinstance(source, Head | HeadReader | Tensor) else _first_of(source).device


def _first_of(source: Any) -> Tensor:
    tensors = (*source.parameters(), *source.buffers()) if isinstance(source, nn.Module) else source
    return next((each for each in tensors if isinstance(each, Tensor)), torch.empty(0))


@dataclass(frozen=True, eq=False)
class HeadReader:
    """A head, and the way in which its weight and bias are read each time.

    Attributes:
        source: The layer; or a function without arguments that returns weight and bias.
        name: Its name in messages.
        form: ``"weight"`` reads ``source.weight`` as ``(K, d)``, ``"transposed"`` as ``(d, K)``. ``"probed"`` applies
            the layer to the unit vectors, for layers whose forward computes the weight, such as LoRA.
        normalizes: Whether it is a cosine head.
        out_features: K.
        in_features: d.
    """

    source: nn.Module | Callable[[], Any]
    name: str
    form: Form
    normalizes: bool
    out_features: int
    in_features: int

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return _first_of(self.source).device if isinstance(self.source, nn.Module) else self.read().device

    @property
    def layer(self) -> nn.Module | None:
        """The layer; None if the source is a function."""
        return self.source if isinstance(self.source, nn.Module) else None

    @torch.no_grad()
    def read(self) -> Head:
        """Read the current weight and bias; see :func:`read_head`.

        Raises:
            ValueError: If their shapes have changed.
        """
        if not isinstance(self.source, nn.Module):
            weight, bias = pair_of(self.source())
        else:
            with evaluating(self.source):
                if self.form == "probed":
                    weight, bias = _probe(self.source, self.in_features)
                else:
                    weight, bias = _weight_of(self.source), getattr(self.source, "bias", None)
                    weight = weight.t() if self.form == "transposed" else weight
        head = _checked(weight, None if self.normalizes else bias, self.name)
        if head.weight.shape != (self.out_features, self.in_features):
            raise UserError(
                f"the head {self.name!r} had a weight of shape {(self.out_features, self.in_features)} when it was "
                f"found, and now has one of shape {tuple(head.weight.shape)}: start a new fit after such a change."
            )
        return Head(normalize(head.weight), None, True, self.name) if self.normalizes else head


HeadSource = nn.Module | Tensor | tuple[Tensor, Tensor | None] | Head | HeadReader


def fits(head: Head, features: Tensor, output: Tensor, away_from: Tensor | None = None) -> bool:
    """Whether a head maps features to an output, for a cosine head up to a positive factor.

    Args:
        head: The head.
        features: Input of the layer, ``(..., d)``.
        output: Output of the layer, ``(..., K)``.
        away_from: Labels whose entries are not compared, for heads with a margin at the label.

    Returns:
        Whether the output is that of the head, up to round-off of the lower precision of features and output. This
        needs transfers to the host.
    """
    rows = features.detach().reshape(-1, features.shape[-1]).to(torch.promote_types(features.dtype, torch.float32))
    seen = output.detach().reshape(-1, output.shape[-1]).to(rows.dtype)
    if rows.shape[1] != head.in_features or seen.shape[1] != head.out_features or len(rows) != len(seen):
        return False
    rows = normalize(rows) if head.normalizes else rows
    made = linear(rows, head.weight.to(rows), None if head.bias is None else head.bias.to(rows))
    if away_from is None and not head.normalizes and torch.equal(made, seen):  # The rest is ten times slower.
        return True
    finite = made.isfinite().all(dim=1) & seen.isfinite().all(dim=1)  # Other rows cannot be compared.
    made, seen = (torch.where(finite.unsqueeze(1), each, 0) for each in (made, seen))
    if away_from is not None:
        others = torch.ones_like(made, dtype=torch.bool).scatter_(1, away_from.reshape(-1, 1).to(made.device), False)
        made, seen = made[others], seen[others]
    if head.normalizes:
        factor = (made * seen).sum() / made.square().sum().clamp_min(torch.finfo(made.dtype).tiny)
        if not float(factor) > 0:
            return False
        made = made * factor
    size = torch.maximum(torch.linalg.vector_norm(seen), torch.linalg.vector_norm(made))
    return bool(torch.linalg.vector_norm(made - seen) <= tolerance(features, output, head.weight) * size)


def tolerance(*tensors: Tensor) -> float:
    """Relative difference up to which values are taken for equal: well above round-off, far below real differences."""
    eps = max(torch.finfo(tensor.dtype).eps for tensor in tensors)
    on_host = all(tensor.device.type == "cpu" for tensor in tensors)
    # On other devices float32 products may have ten bits only (TF32).
    return max(eps**0.5 / 4 if on_host or eps > 1e-4 else 1e-2, 1e-6)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set a module and its children to eval mode, and restore the mode of each one."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        # Not by eval(): some layers change when their mode does, such as LoRA layers that merge their weights.
        for child, training in modes:
            if training:
                child.training = False
        yield
    finally:
        for child, training in modes:
            if child.training != training:
                child.training = training


def has_weight(module: nn.Module) -> bool:
    """Whether a module has a weight, or its transpose, that :func:`read_head` can read."""
    with evaluating(module):
        try:
            return not isinstance(module, nn.Embedding) and _weight_of(module).ndim == 2
        except UserError:
            return False


def has_more_than_a_weight(module: nn.Module) -> bool:
    """Whether a module has parameters besides those that determine ``weight`` and ``bias``."""
    legacy = {"weight_g", "weight_v", "weight_orig"}
    names = {name for name, _ in module.named_parameters() if not name.startswith("parametrizations.")}
    return bool(names - legacy - {"weight", "bias"})


def _weight_of(module: nn.Module) -> Tensor:
    """Compute the weight of a layer in eval mode, as a matrix."""
    weight: Any = getattr(module, "weight", None)
    plain = isinstance(weight, nn.Parameter)
    parameters = {} if plain else dict(module.named_parameters(recurse=False))
    buffers = {} if plain else dict(module.named_buffers(recurse=False))
    if {"weight_g", "weight_v"} <= parameters.keys():
        size, direction = parameters["weight_g"], parameters["weight_v"]
        others = [i for i in range(direction.ndim) if size.ndim == 0 or size.shape[i] == 1 != direction.shape[i]]
        norm = torch.linalg.vector_norm(direction, dim=others, keepdim=True) if others else direction.abs()
        weight = direction * (size / norm)
    elif "weight_orig" in parameters and "weight_mask" in buffers:
        weight = parameters["weight_orig"] * buffers["weight_mask"]
    elif "weight_orig" in parameters and {"weight_u", "weight_v"} <= buffers.keys():
        weight = parameters["weight_orig"]
        weight = weight / torch.dot(buffers["weight_u"], weight.flatten(1) @ buffers["weight_v"])
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise UserTypeError(f"{type(module).__name__} has no weight, so that it is not a head.")
    if isinstance(module, _POINTWISE):
        if module.groups != 1 or any(size != 1 for size in module.kernel_size):
            raise UserError(
                f"{type(module).__name__} with kernel_size={module.kernel_size} and groups={module.groups} is no head: "
                "only convolutions with kernels of size 1 and one group are linear layers of each position."
            )
        weight = weight.flatten(1)
    return torch.as_tensor(weight)


def _probe(module: nn.Module, dim: int) -> tuple[Tensor, Tensor]:
    """Compute weight and bias of an affine layer from zero and the unit vectors, in float64 if it supports that."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    own = next((t for t in tensors.values() if t.is_floating_point()), torch.empty(()))
    for dtype in (torch.float64, own.dtype):
        state = {f"layer.{name}": t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        unit = torch.eye(dim, dtype=dtype, device=own.device)
        try:
            bias = functional_call(_Bare(module), state, (unit[:1] * 0,))[0]
            parts = torch.split(unit, _ROWS_AT_A_TIME)
            rows = [functional_call(_Bare(module), state, (part,)) - bias for part in parts]
        except RuntimeError:
            if dtype is own.dtype:
                raise
            continue
        if bias.dtype == dtype:  # Otherwise the layer has converted to its own precision, which is used instead.
            break
    return torch.cat(rows).t(), bias


class _Bare(nn.Module):
    """Runs a layer without its hooks, which are meant for forwards of the model only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        output = self.layer.forward(x)
        if isinstance(output, Tensor):
            return output
        raise UserTypeError(f"{type(self.layer).__name__} returns a {type(output).__name__}: a head returns a tensor.")


def pair_of(value: Any) -> tuple[Any, Any]:
    """Convert the result of a user's ``head`` function to a weight and a bias."""
    if isinstance(value, nn.Module):
        head = read_head(value)
        return head.weight, head.bias
    if isinstance(value, Tensor):
        return value, None
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], value[1]
    raise UserTypeError(
        f"head=... must return (weight, bias), with None for no bias; it returned {type(value).__name__}."
    )


def _checked(weight: Any, bias: Any, name: str = "head") -> Head:
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise UserError(f"the head {name!r} must have a weight of shape (K, d), got {shape}.")
    weight = gathered(weight)
    if bias is not None:
        if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
            shape = tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__
            raise UserError(f"the head {name!r} must have a bias of shape ({len(weight)},) or None, got {shape}.")
        bias = gathered(bias)
    return Head(weight, bias, name=name)
