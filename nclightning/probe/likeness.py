"""Whether one tensor is made of another in a way that keeps the classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nclightning.heads import Head, fits, tolerance
from nclightning.probe.features import class_last

__all__ = ["Like", "Link", "follows", "in_another_order", "links", "logits_of", "makes", "pattern"]

# Real values may be single ones, which are equal or not; the others need two outputs, to be compared up to a shift.
Like = Literal["values", "equal", "shift", "factor"]

_MOST_COMPARED = 2048


def makes(layer: nn.Module, head: Head, features: Tensor, output: Tensor) -> bool:
    """Whether a head makes what a frozen layer made of features, or makes of them alone, should that be changed."""
    if fits(head, features, output):
        return True
    try:
        own = features.clone()  # The layer may write to it.
        again = layer.forward(own if class_last(layer, own) is own else own.movedim(-1, 1))
        return isinstance(again, Tensor) and fits(head, features, class_last(layer, again))
    except Exception:  # The layer takes more than features.
        return False


def logits_of(head: Head, rows: Tensor) -> Tensor:
    """Return what a head makes of features."""
    rows = nn.functional.normalize(rows, dim=-1) if head.normalizes else rows
    return nn.functional.linear(rows, head.weight.to(rows), None if head.bias is None else head.bias.to(rows))


class Link(NamedTuple):
    """How a part of a model's output follows from the logits of its head.

    Attributes:
        part: Where it is in the output.
        rows: Which rows of the logits it has: ``"same"``, their ``"mean"`` over positions, or ``"one"`` position each.
        position: Of that one, ``0`` or ``-1``; None if it is another for each sample.
        undo: What is taken back first: ``"softmax"``, ``"sigmoid"``, or nothing.
        second: Whether classes are in the second place, and not in the last.
        like: Whether it is ``"equal"`` to the logits, or up to a ``"shift"`` of each row, which cross-entropy does not
            see, or up to a shift and a ``"factor"``; ``"values"`` as ``"equal"``.
    """

    part: str
    rows: Literal["same", "mean", "one"]
    position: int | None
    undo: Literal["", "softmax", "sigmoid"]
    second: bool
    like: Like

    def misses(self, output: Tensor, logits: Tensor) -> Tensor:
        """Whether the output does not follow in this way. Stays on the device.

        Args:
            output: The part of the output.
            logits: ``(..., K)``.
        """
        made, rows = self._both(output, logits)
        no = torch.ones((), dtype=torch.bool, device=output.device)
        if self.rows != "same":
            made = made.flatten(1, -2) if made.ndim > 2 else made.unsqueeze(1)
            if len(made) != len(rows):
                return no
            if self.rows == "one" and self.position is None:
                return _nearest(rows, made, tolerance(output, logits))[1]
            made = made.mean(dim=1) if self.rows == "mean" else made[:, self.position]
        made = made.reshape(-1, made.shape[-1])
        if rows.shape != made.shape:
            return no
        holds, is_shift, is_equal = _compare(rows, made, tolerance(output, logits))
        return ~{"factor": holds, "shift": is_shift}.get(self.like, is_equal)

    def chosen(self, output: Tensor, logits: Tensor) -> Tensor:
        """Positions ``(B,)`` of the rows that an output has, where they vary. Stays on the device."""
        made, rows = self._both(output, logits)
        return _nearest(rows, made.flatten(1, -2), tolerance(output, logits))[0]

    def _both(self, output: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(torch.promote_types(output.dtype, logits.dtype), torch.float32)
        rows = _rows(output.detach().to(wide), logits.shape[-1], self.second)
        return logits.detach().to(wide), _undone(rows, self.undo)


def links(
    leaves: Mapping[str, Tensor], logits: Tensor, per_sample: bool = False, *, single: bool = False
) -> Iterator[Link]:
    """Yield the ways in which parts of an output follow from logits. Transfers to the host.

    A part follows if it equals the logits, or of each sample their mean over positions, or those of one position, up to
    a shift of each row, a positive factor, and a softmax, log_softmax, sigmoid or nothing.

    Args:
        leaves: Parts of the output, by where they are.
        logits: ``(..., K)``.
        per_sample: Whether a row per sample is asked for, where logits have positions.
        single: Whether logits may be single numbers, which a part equals or not.
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
        made, seen = logits.detach().to(wide), output.detach().to(wide)
        last = seen.ndim < 2 or seen.shape[-1] == classes or seen.shape[1] != classes
        for second in [False] * last + [True] * (seen.ndim > 1 and seen.shape[1] == classes):
            rows = _rows(seen, classes, second)
            undoes: tuple[Literal["", "softmax", "sigmoid"], ...] = ("",)
            if classes > 1 and bool(((rows > 0) & (rows < 1)).all()):
                undoes = ("", "softmax", "sigmoid")
            for undo in undoes:
                values = _undone(rows, undo)
                for kind, position, own in _choices(values, made, tolerance(output, logits), per_sample):
                    holds, is_shift, is_equal = _compare(values, own, tolerance(output, logits))
                    holds = holds if classes > 1 else is_equal
                    if bool(holds) and undo != "sigmoid":
                        like: Like = "equal" if not undo and bool(is_equal) else "shift" if bool(is_shift) else "factor"
                        yield Link(part, kind, position, undo, second, like)
                    elif bool(holds):
                        yield Link(part, kind, position, undo, second, "factor")


def _choices(
    rows: Tensor, made: Tensor, bound: float, per_sample: bool
) -> Iterator[tuple[Literal["same", "mean", "one"], int | None, Tensor]]:
    """Yield rows of logits of which an output may be, as many as it has."""
    flat = made.reshape(-1, made.shape[-1])
    if len(flat) == len(rows) and not per_sample:
        yield "same", None, flat
    elif len(made) == len(rows):
        places = made.flatten(1, -2)
        yield "mean", None, places.mean(dim=1)
        chosen, misses = _nearest(rows, places, bound)
        if not bool(misses):
            first, final = bool((chosen == 0).all()), bool((chosen == places.shape[1] - 1).all())
            own = places[torch.arange(len(places), device=chosen.device), chosen]
            yield "one", 0 if first else -1 if final else None, own


def follows(output: Tensor, logits: Tensor, *, either: bool = False, single: bool = False) -> bool:
    """Whether an output is made of logits by something that keeps the classes.

    Args:
        output: Of the model.
        logits: ``(..., K)``.
        either: Let also count what is made of their mean over positions, or of one position.
        single: As for :func:`links`.

    Returns:
        As :func:`links`. Transfers to the host.
    """
    return any(either or link.rows == "same" for link in links({"": output}, logits, single=single))


def in_another_order(output: Tensor, logits: Tensor) -> bool:
    """Whether an output has the rows of logits, up to a shift of each or after a softmax, in another order.

    Args:
        output: Of the model.
        logits: ``(..., K)``. Of very many rows nothing is said: each is compared with each.

    Returns:
        False also if each row is in its place. Transfers to the host.
    """
    if output.shape != logits.shape or logits.ndim < 2 or logits[..., 0].numel() > _MOST_COMPARED:
        return False
    rows, made = (each.detach().reshape(-1, each.shape[-1]).double() for each in (output, logits))
    if bool(((rows > 0) & (rows < 1)).all()):
        rows = _undone(rows, "softmax")
    rows, made = _centred(rows), _centred(made)
    apart = torch.cdist(rows, made, compute_mode="donot_use_mm_for_euclid_dist")
    same = apart <= tolerance(output, logits) * torch.linalg.vector_norm(made) / len(made) ** 0.5
    return not bool(same.diagonal().all()) and bool(same.any(dim=1).all() & same.any(dim=0).all())


def _rows(output: Tensor, classes: int, second: bool) -> Tensor:
    """Bring the classes of an output to the last place, and make one row of each position."""
    output = output.movedim(1, -1) if second and output.ndim > 1 else output
    return output.reshape(-1, classes) if output.numel() % classes == 0 else output.reshape(-1, 1)


def _compare(rows: Tensor, made: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Whether finite rows are a positive multiple of others up to a shift of each row, only shifted, and the same."""
    finite = (rows.isfinite().all(dim=1) & made.isfinite().all(dim=1)).unsqueeze(1)  # The others show nothing.
    rows, made = torch.where(finite, rows, 0), torch.where(finite, made, 0)
    values, own = _centred(rows), _centred(made)
    size, other = torch.linalg.vector_norm(values), torch.linalg.vector_norm(own)
    factor = (values * own).sum() / other.square()
    holds = (factor > 0) & (torch.linalg.vector_norm(values - factor * own) <= bound * size)
    one = (factor - 1).abs() <= bound
    if values.numel() - len(values) < 3:  # A free factor would fit by chance.
        holds = holds & one
    # Zero is what a head that starts at zero makes.
    none = (size == 0) | (other == 0)
    holds = torch.where(none, (size == other) & finite.any(), holds)
    equal = torch.linalg.vector_norm(rows - made) <= bound * torch.linalg.vector_norm(made)
    return holds, holds & (one | none), holds & equal


def _nearest(rows: Tensor, places: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """The position ``(B,)`` of which each row is, and whether that cannot be told of some row.

    Positions with the same logits may have other features.
    """
    values, own = _centred(rows), _centred(places)
    off = torch.linalg.vector_norm(values.unsqueeze(1) - own, dim=-1)
    off = torch.where(off.isfinite(), off, torch.inf)
    size = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    near = off <= bound * torch.maximum(size, size.mean())
    shown = values.isfinite().all(dim=1)
    return off.argmin(dim=1), (shown & (near.sum(dim=1) != 1)).any() | ~shown.any()


def _undone(rows: Tensor, undo: str) -> Tensor:
    return rows.log() if undo == "softmax" else torch.logit(rows) if undo == "sigmoid" else rows


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=-1, keepdim=True)


def pattern(output: Tensor) -> Tensor:
    """Values that no two classes and rows share, moderate so that a softmax of them keeps digits."""
    count = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
    return torch.cos(count * count + count).reshape(output.shape).to(output.dtype)
