"""Tests whether an output of a model follows from logits by an operation that keeps the classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nclightning.heads import Head, fits, tolerance
from nclightning.probe.features import class_last

__all__ = ["Agreement", "Link", "follows", "in_another_order", "links", "logits_of", "makes", "pattern"]

# How closely an output must agree with W h + b: be equal; be equal up to a shift of each row; or up to a shift and a
# factor. "values" is "equal" for regression, where a head may have a single output.
Agreement = Literal["values", "equal", "shift", "factor"]

_MAX_COMPARED = 2048


def makes(layer: nn.Module, head: Head, features: Tensor, output: Tensor) -> bool:
    """Return whether a head gives the output of a frozen layer, or what the layer gives when it is run on its own."""
    if fits(head, features, output):
        return True
    try:
        own = features.clone()  # The layer may overwrite it.
        again = layer.forward(own if class_last(layer, own) is own else own.movedim(-1, 1))
        return isinstance(again, Tensor) and fits(head, features, class_last(layer, again))
    except Exception:  # The layer takes more than features.
        return False


def logits_of(head: Head, rows: Tensor) -> Tensor:
    """Return the logits of features."""
    rows = nn.functional.normalize(rows, dim=-1) if head.normalizes else rows
    return nn.functional.linear(rows, head.weight.to(rows), None if head.bias is None else head.bias.to(rows))


class Link(NamedTuple):
    """How a part of a model's output follows from the logits of its head.

    Attributes:
        part: Name of the part of the output.
        rows: Which rows of the logits it has: the ``"same"``, their ``"mean"`` over positions, or those of ``"one"``
            position per sample.
        position: The one position, ``0`` or ``-1``; None if it differs from sample to sample.
        undo: The function that is inverted first: ``"softmax"``, ``"sigmoid"``, or none.
        second: Whether classes are the second dimension, and not the last.
        agreement: Whether it is ``"equal"`` to these rows, or equal up to a ``"shift"`` of each row, which does not
            change the cross-entropy, or up to a shift and a ``"factor"``; ``"values"`` is ``"equal"``.
    """

    part: str
    rows: Literal["same", "mean", "one"]
    position: int | None
    undo: Literal["", "softmax", "sigmoid"]
    second: bool
    agreement: Agreement

    def misses(self, output: Tensor, logits: Tensor) -> Tensor:
        """Return whether an output does not follow in this way. Stays on the device.

        Args:
            output: The part of the output.
            logits: ``(..., K)``.
        """
        logit_rows, rows = self._both(output, logits)
        no = torch.ones((), dtype=torch.bool, device=output.device)
        if self.rows != "same":
            logit_rows = logit_rows.flatten(1, -2) if logit_rows.ndim > 2 else logit_rows.unsqueeze(1)
            if len(logit_rows) != len(rows):
                return no
            if self.rows == "one" and self.position is None:
                return _nearest(rows, logit_rows, tolerance(output, logits))[1]
            logit_rows = logit_rows.mean(dim=1) if self.rows == "mean" else logit_rows[:, self.position]
        logit_rows = logit_rows.reshape(-1, logit_rows.shape[-1])
        if rows.shape != logit_rows.shape:
            return no
        with_factor, with_shift, equal = _compare(rows, logit_rows, tolerance(output, logits))
        return ~{"factor": with_factor, "shift": with_shift}.get(self.agreement, equal)

    def chosen(self, output: Tensor, logits: Tensor) -> Tensor:
        """Return the positions ``(B,)`` of the rows that an output has. Stays on the device."""
        logit_rows, rows = self._both(output, logits)
        return _nearest(rows, logit_rows.flatten(1, -2), tolerance(output, logits))[0]

    def _both(self, output: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, and the rows of an output with its function inverted, in a common dtype."""
        wide = torch.promote_types(torch.promote_types(output.dtype, logits.dtype), torch.float32)
        rows = _rows(output.detach().to(wide), logits.shape[-1], self.second)
        return logits.detach().to(wide), _inverted(rows, self.undo)


def links(
    leaves: Mapping[str, Tensor], logits: Tensor, per_sample: bool = False, *, single: bool = False
) -> Iterator[Link]:
    """Yield the ways in which parts of an output follow from logits. Transfers to the host.

    A part follows if it equals the logits, their mean over positions, or those of one position per sample; in each case
    up to a shift of each row and a positive factor, and perhaps after a softmax, log_softmax or sigmoid.

    Args:
        leaves: Parts of the output by name.
        logits: ``(..., K)``.
        per_sample: Whether the output must have one row per sample if logits have positions.
        single: Whether a single output is allowed. It must be equal to the logit.
    """
    classes, count = logits.shape[-1], logits.shape[:-1].numel()
    per_sample = per_sample and logits.ndim > 2
    if classes < (1 if single else 2):
        return
    for part, output in leaves.items():
        sizes = {len(logits)} if per_sample else {count, len(logits)}
        if output.ndim == 0 or output.numel() % classes or output.numel() // classes not in sizes:
            continue
        wide = torch.promote_types(torch.promote_types(output.dtype, logits.dtype), torch.float32)
        logit_rows, seen = logits.detach().to(wide), output.detach().to(wide)
        last = seen.ndim < 2 or seen.shape[-1] == classes or seen.shape[1] != classes
        for second in [False] * last + [True] * (seen.ndim > 1 and seen.shape[1] == classes):
            rows = _rows(seen, classes, second)
            functions: tuple[Literal["", "softmax", "sigmoid"], ...] = ("",)
            if classes > 1 and bool(((rows > 0) & (rows < 1)).all()):
                functions = ("", "softmax", "sigmoid")
            for undo in functions:
                values = _inverted(rows, undo)
                for kind, position, own in _candidate_rows(values, logit_rows, tolerance(output, logits), per_sample):
                    with_factor, with_shift, equal = _compare(values, own, tolerance(output, logits))
                    with_factor = with_factor if classes > 1 else equal
                    if bool(with_factor) and undo != "sigmoid":
                        agreement: Agreement = (
                            "equal" if not undo and bool(equal) else "shift" if bool(with_shift) else "factor"
                        )
                        yield Link(part, kind, position, undo, second, agreement)
                    elif bool(with_factor):
                        yield Link(part, kind, position, undo, second, "factor")


def _candidate_rows(
    rows: Tensor, logit_rows: Tensor, bound: float, per_sample: bool
) -> Iterator[tuple[Literal["same", "mean", "one"], int | None, Tensor]]:
    """Yield the choices of rows of the logits that an output with so many rows may have."""
    flat = logit_rows.reshape(-1, logit_rows.shape[-1])
    if len(flat) == len(rows) and not per_sample:
        yield "same", None, flat
    elif len(logit_rows) == len(rows):
        places = logit_rows.flatten(1, -2)
        yield "mean", None, places.mean(dim=1)
        chosen, misses = _nearest(rows, places, bound)
        if not bool(misses):
            first, final = bool((chosen == 0).all()), bool((chosen == places.shape[1] - 1).all())
            own = places[torch.arange(len(places), device=chosen.device), chosen]
            yield "one", 0 if first else -1 if final else None, own


def follows(output: Tensor, logits: Tensor, *, either: bool = False, single: bool = False) -> bool:
    """Return whether an output follows from logits by an operation that keeps the classes. Transfers to the host.

    Args:
        output: Output of the model.
        logits: ``(..., K)``.
        either: Whether a mean over positions, or one position per sample, counts as well.
        single: As for :func:`links`.
    """
    return any(either or link.rows == "same" for link in links({"": output}, logits, single=single))


def in_another_order(output: Tensor, logits: Tensor) -> bool:
    """Return whether an output has the rows of the logits in another order, up to a shift of each or a softmax.

    Args:
        output: Output of the model.
        logits: ``(..., K)``.

    Returns:
        False if the order is the same, and for very many rows, because all pairs are compared. Transfers to the host.
    """
    if output.shape != logits.shape or logits.ndim < 2 or logits[..., 0].numel() > _MAX_COMPARED:
        return False
    rows, logit_rows = (each.detach().reshape(-1, each.shape[-1]).double() for each in (output, logits))
    if bool(((rows > 0) & (rows < 1)).all()):
        rows = _inverted(rows, "softmax")
    rows, logit_rows = _centred(rows), _centred(logit_rows)
    distances = torch.cdist(rows, logit_rows, compute_mode="donot_use_mm_for_euclid_dist")
    same = distances <= tolerance(output, logits) * torch.linalg.vector_norm(logit_rows) / len(logit_rows) ** 0.5
    return not bool(same.diagonal().all()) and bool(same.any(dim=1).all() & same.any(dim=0).all())


def _rows(output: Tensor, classes: int, second: bool) -> Tensor:
    """Reshape an output to one row per position, with the classes in the last dimension."""
    output = output.movedim(1, -1) if second and output.ndim > 1 else output
    return output.reshape(-1, classes) if output.numel() % classes == 0 else output.reshape(-1, 1)


def _compare(rows: Tensor, logit_rows: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compare rows with others: equal up to a shift of each and a positive factor, up to a shift, and exactly.

    Rows that are not finite are left out.
    """
    finite = (rows.isfinite().all(dim=1) & logit_rows.isfinite().all(dim=1)).unsqueeze(1)
    rows, logit_rows = torch.where(finite, rows, 0), torch.where(finite, logit_rows, 0)
    values, own = _centred(rows), _centred(logit_rows)
    size, other = torch.linalg.vector_norm(values), torch.linalg.vector_norm(own)
    factor = (values * own).sum() / other.square()
    with_factor = (factor > 0) & (torch.linalg.vector_norm(values - factor * own) <= bound * size)
    one = (factor - 1).abs() <= bound
    if values.numel() - len(values) < 3:  # A free factor would fit by chance.
        with_factor = with_factor & one
    # A head that is initialised at zero gives zero logits.
    none = (size == 0) | (other == 0)
    with_factor = torch.where(none, (size == other) & finite.any(), with_factor)
    equal = torch.linalg.vector_norm(rows - logit_rows) <= bound * torch.linalg.vector_norm(logit_rows)
    return with_factor, with_factor & (one | none), with_factor & equal


def _nearest(rows: Tensor, places: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Return the position ``(B,)`` that each row comes from, and whether it is ambiguous for some row.

    Ambiguity matters because positions with the same logits may have different features.
    """
    values, own = _centred(rows), _centred(places)
    off = torch.linalg.vector_norm(values.unsqueeze(1) - own, dim=-1)
    off = torch.where(off.isfinite(), off, torch.inf)
    size = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    near = off <= bound * torch.maximum(size, size.mean())
    shown = values.isfinite().all(dim=1)
    return off.argmin(dim=1), (shown & (near.sum(dim=1) != 1)).any() | ~shown.any()


def _inverted(rows: Tensor, undo: str) -> Tensor:
    return rows.log() if undo == "softmax" else torch.logit(rows) if undo == "sigmoid" else rows


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=-1, keepdim=True)


def pattern(output: Tensor) -> Tensor:
    """Return values that differ for all rows and classes. They are in [-1, 1], where softmax is accurate."""
    count = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
    return torch.cos(count * count + count).reshape(output.shape).to(output.dtype)
