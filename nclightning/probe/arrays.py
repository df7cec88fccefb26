"""Validation and conversion of features, labels and a head that the user passes as arrays."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nclightning.errors import UserError, UserTypeError
from nclightning.heads import Head
from nclightning.sharding import gathered

__all__ = ["Arrays", "arrays"]

_ROWS_AT_A_TIME = 2**16


class Arrays(NamedTuple):
    """Features with their labels, and the head on top of them.

    Attributes:
        features: ``(N, d)`` of any floating dtype.
        labels: ``(N,)`` int64 on the same device, each within ``0..K-1`` or equal to ``ignore_index``.
        num_classes: Number of classes K.
        head: The head, or None.
    """

    features: Tensor
    labels: Tensor
    num_classes: int
    head: Head | None


def arrays(features: Any, labels: Any, weight: Any, bias: Any, ignore_index: int | None) -> Arrays:
    """Check arrays, and convert them to tensors on one device.

    Args:
        features: ``(N, d)``, or ``(B, T, d)`` with labels ``(B, T)``: a tensor, or anything that numpy converts to an
            array.
        labels: ``(N,)`` integers of any type.
        weight: ``(K, d)``, or None.
        bias: ``(K,)``, or None.
        ignore_index: Label of samples to leave out.

    Returns:
        Tensors on the device of the features, or on the host if that device has no float64.

    Raises:
        TypeError: If an array has a dtype that does not fit.
        ValueError: If shapes or labels do not fit, or a number is not finite.
    """
    rows, classes = tensor_of(features, "features"), tensor_of(labels, "labels")
    _check_kinds(rows, classes)
    rows, classes = _paired(rows, classes)
    device = torch.device("cpu") if rows.device.type == "mps" else rows.device
    rows, classes = rows.to(device), classes.to(device, torch.int64)
    head = None if weight is None else _head(weight, bias, rows.shape[1], device)
    if weight is None and bias is not None:
        raise UserError("bias was given without weight: pass weight=, too.")
    counted = torch.ones_like(classes, dtype=torch.bool) if ignore_index is None else classes != ignore_index
    num_classes = _count_classes(classes[counted], head, ignore_index)
    _check_finite(rows, counted)
    return Arrays(rows, classes, num_classes, head)


def tensor_of(value: Any, name: str) -> Tensor:
    """Convert an array or lists to a tensor, without a copy if possible.

    Args:
        value: Any value.
        name: Name of the argument, for messages.

    Returns:
        A dense tensor, detached.

    Raises:
        TypeError: If the value is no array of numbers.
    """
    if isinstance(value, list | tuple) and any(isinstance(each, Tensor) for each in value):
        value = _stacked(value, name)
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UserTypeError(
                f"{name} must be a dense tensor with values, got one of layout {value.layout}, dtype {value.dtype} on "
                f"{value.device}: pass {name}.to_dense(), or {name}.dequantize()."
            )
        return gathered(value)
    if isinstance(value, nn.Module | Mapping | str | bytes) or value is None or hasattr(value, "todense"):
        attribute = {"weight": "layer.weight", "bias": "layer.bias"}.get(name, "an array, such as one of a mapping")
        raise UserTypeError(
            f"{name} must be a tensor, an array or lists of numbers, got a {_kind(value)}: pass {attribute}."
        )
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise UserTypeError(
            f"{name} must be one array, got a {_kind(value)} that numpy cannot convert: pass torch.cat({name}) or "
            f"numpy.concatenate({name}) of a list of batches."
        ) from error
    if isinstance(value, np.ma.MaskedArray):
        raise UserTypeError(f"{name} must not be masked: pass its rows without a mask, {name}.data[~mask].")
    return _from_numpy(array, name)


def _kind(value: Any) -> str:
    return "sparse matrix" if hasattr(value, "todense") else type(value).__name__


def _stacked(value: list[Any] | tuple[Any, ...], name: str) -> Tensor:
    """Stack a list of tensors of equal shapes."""
    shapes = {tuple(each.shape) if isinstance(each, Tensor) else None for each in value}
    shape = next(iter(shapes))
    if len(shapes) > 1 or shape is None or len(shape) > (0 if name == "labels" else 1):
        raise UserError(f"{name} must be one array, got a list of tensors: pass torch.cat({name}).")
    return torch.stack(list(value))


def _from_numpy(array: Any, name: str) -> Tensor:
    """Convert a numpy array to a tensor, and its dtype to one that torch supports."""
    if array.dtype.kind in "OSUV":
        repair = (
            "numpy.unique(labels, return_inverse=True)[1], which numbers the classes"
            if name == "labels"
            else f"{name}.astype(numpy.float32)"
        )
        raise UserTypeError(f"{name} must be numbers, got {_described(array)}: pass {repair}.")
    if array.dtype.kind in "ui" and array.dtype != np.uint8:
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise UserError(f"{name} must fit into 64 bits, got {array.max()}.")
        array = array.astype(np.int64)
    elif array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if any(stride < 0 for stride in array.strides):
        array = np.ascontiguousarray(array)
    with warnings.catch_warnings():  # Torch warns of read-only arrays, such as memory maps. Nothing is written here.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"


def _check_kinds(features: Tensor, labels: Tensor) -> None:
    """Raise unless features are floating and labels are integers, and neither is empty."""
    if not features.numel() or not labels.numel():
        raise UserError(
            f"features and labels must not be empty, got shapes {tuple(features.shape)} and {tuple(labels.shape)}: "
            "pass samples of two classes at least."
        )
    if not features.is_floating_point():
        raise UserTypeError(f"features must be floating, got {_described(features)}: pass them as float32 or float64.")
    if (
        labels.ndim > 1
        and labels.shape[:-1] == features.shape[:-1]
        and labels.shape[-1] > 1
        and labels.ndim == features.ndim
    ):
        raise UserError(
            f"labels must be class numbers, one for each row of features {_described(features)}, got "
            f"{_described(labels)}: pass labels.argmax(-1) if they are one-hot."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserTypeError(
            f"labels must be integers, got {_described(labels)}: pass labels.long() of a tensor, labels.astype(int) of "
            "an array. For real targets there is nclightning.metrics.RegressionCollapse."
        )


def _paired(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Reshape features to one row per label."""
    shape = tuple(features.shape)
    if labels.ndim == features.ndim and labels.shape[-1] == 1:
        labels = labels.squeeze(-1)
    if features.ndim >= 2 and labels.shape == features.shape[:-1]:
        return features.reshape(-1, shape[-1]), labels.reshape(-1)
    if features.ndim == 2 and labels.ndim == 1 and len(labels) == shape[1]:
        repair = "pass features.T, so that rows are samples"
    elif features.ndim > 2 and labels.ndim == 1 and len(labels) == shape[0]:
        where = "positions, features.mean(1)" if features.ndim == 3 else "space, features.flatten(2).mean(2)"
        repair = f"average over {where}, or pass features.flatten(1), or labels of shape {shape[:-1]}"
    elif features.ndim == 1:
        repair = "pass features of shape (N, d), such as features.reshape(-1, 1) of a single feature"
    else:
        repair = f"pass labels of shape {shape[:-1]}"
    raise UserError(
        f"there must be one label for each row of features, got features of shape {shape} and labels of shape "
        f"{tuple(labels.shape)}: {repair}."
    )


def _head(weight: Any, bias: Any, feature_dim: int, device: torch.device) -> Head:
    """Check weight and bias, and return them as a head."""
    rows = tensor_of(weight, "weight").to(device)
    if not rows.is_floating_point():
        raise UserTypeError(f"weight must be floating, got {_described(rows)}: pass it as float32 or float64.")
    if rows.ndim > 2 and rows.shape[2:].numel() == 1:  # A convolution with kernels of size 1.
        rows = rows.flatten(1)
    if rows.ndim != 2 or rows.shape[1] != feature_dim:
        turned = rows.ndim == 2 and rows.shape[0] == feature_dim
        raise UserError(
            f"weight must have shape (K, {feature_dim}), a row for each class, as features have {feature_dim} columns; "
            f"got {tuple(rows.shape)}: pass "
            + ("weight.T." if turned else "the weight of the layer that these features enter, or its features.")
        )
    values = None if bias is None else tensor_of(bias, "bias").to(device)
    if values is not None and (values.shape != rows.shape[:1] or not values.is_floating_point()):
        raise UserError(
            f"bias must be floating of shape ({len(rows)},) as weight has {len(rows)} rows, got {_described(values)}."
        )
    for name, each in (("weight", rows), ("bias", values)):
        if each is not None and not bool(each.isfinite().all()):
            raise UserError(f"{name} has numbers that are not finite: pass the {name} from before training diverged.")
    return Head(rows, values, name="weight")


def _count_classes(labels: Tensor, head: Head | None, ignore_index: int | None) -> int:
    """Return the number of classes K. Raise if labels are not within ``0..K-1``."""
    if not labels.numel():
        raise UserError(
            f"all labels are {ignore_index}, which ignore_index leaves out: pass ignore_index=None to count them."
        )
    least, most = torch.stack(labels.aminmax()).tolist()
    num_classes = most + 1 if head is None else head.out_features
    if least < 0:
        raise UserError(
            f"labels must be within 0..K-1, got {least}..{most}: pass ignore_index={least} if that marks samples to "
            "leave out."
        )
    if head is not None and most >= num_classes:
        repair = (
            "pass labels - 1" if (least, most) == (1, num_classes) else "pass the weight of the head of these labels"
        )
        raise UserError(
            f"labels must be within 0..{num_classes - 1}, since weight has {num_classes} rows, got {least}..{most}: "
            f"{repair}."
        )
    if num_classes < 2:
        raise UserError(
            "neural collapse compares classes, and there is only one: pass samples of two classes at least"
            + ("." if head is None else ", and a weight with a row for each.")
        )
    if head is None:
        _check_numbers(labels, least, most)
    return num_classes


def _check_numbers(labels: Tensor, least: int, most: int) -> None:
    """Raise if labels seem not to number the classes. Needed if there is no head, which has K rows."""
    if most >= max(len(labels), 1000):
        raise UserError(
            f"labels must number the classes from 0 on, and {len(labels)} labels go up to {most}: pass "
            "torch.unique(labels, return_inverse=True)[1], or weight= with a row for each class."
        )
    if least == 1 and bool((labels.bincount()[1:] > 0).all()):
        raise UserError(
            f"labels must number the classes from 0 on, got 1..{most}: pass labels - 1, or weight= "
            "with a row for class 0, too."
        )


def _check_finite(features: Tensor, counted: Tensor) -> None:
    """Raise if a row of features that counts is not finite."""
    bad = sum(
        ((~rows.isfinite().all(dim=1)) & own).sum()
        for rows, own in zip(torch.split(features, _ROWS_AT_A_TIME), torch.split(counted, _ROWS_AT_A_TIME), strict=True)
    )
    if count := int(bad):
        raise UserError(
            f"features have numbers that are not finite in {count} of {int(counted.sum())} rows: pass features[ok] and "
            "labels[ok] with ok = features.isfinite().all(1), or features from before training diverged."
        )
