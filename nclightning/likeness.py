"""Whether one tensor is made of another in a way that keeps the classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from nclightning.features import class_last
from nclightning.heads import Head, fits, tolerance

__all__ = ["follows", "follows_from", "makes", "pattern"]


def makes(layer: nn.Module, head: Head, features: Tensor, output: Tensor) -> bool:
    """Whether a head makes what a frozen layer made of features, or makes of them alone, should that be changed."""
    if fits(head, features, output):
        return True
    try:
        again = layer.forward(features if class_last(layer, features) is features else features.movedim(-1, 1))
        return isinstance(again, Tensor) and fits(head, features, class_last(layer, again))
    except Exception:  # The layer takes more than features.
        return False


def follows_from(leaves: Mapping[str, Tensor], rows: Tensor, head: Head) -> bool:
    """Whether a part of the output follows from what a head makes of features."""
    rows = nn.functional.normalize(rows, dim=-1) if head.normalizes else rows
    made = nn.functional.linear(rows, head.weight.to(rows), None if head.bias is None else head.bias.to(rows))
    return any(follows(leaf, made) for leaf in leaves.values())


def follows(output: Tensor, logits: Tensor, *, mean: bool = False, either: bool = False) -> bool:
    """Whether an output is made of logits by something that keeps the classes.

    Args:
        output: Of the model.
        logits: ``(..., K)``.
        mean: Ask for their mean over positions instead.
        either: Ask for one of the two.

    Returns:
        Whether it equals them up to a shift of each row, a positive factor, and a softmax, log_softmax, sigmoid or
        nothing. Transfers to the host.
    """
    if either:
        return follows(output, logits) or follows(output, logits, mean=True)
    if mean:
        if logits.ndim < 3:
            return False
        logits = logits.flatten(1, -2).mean(dim=1)
    classes = logits.shape[-1]
    if output.numel() != logits.numel() or classes < 2:
        return False
    bound = tolerance(output, logits)
    wide = torch.promote_types(torch.promote_types(output.dtype, logits.dtype), torch.float32)
    made, seen = _centred(logits.detach().to(wide).reshape(-1, classes)), output.detach().to(wide)
    shapes = (
        [seen.reshape(-1, classes)] if seen.ndim < 2 or seen.shape[-1] == classes or seen.shape[1] != classes else []
    )
    if seen.ndim > 1 and seen.shape[1] == classes:
        shapes.append(seen.movedim(1, -1).reshape(-1, classes))
    return any(_proportional(undone, made, bound) for rows in shapes for undone in (rows, *_undone(rows)))


def _proportional(rows: Tensor, made: Tensor, bound: float) -> bool:
    """Whether finite rows are a positive multiple of others, up to a shift of each row."""
    finite = rows.isfinite().all(dim=1) & made.isfinite().all(dim=1)
    values, own = _centred(rows[finite]), made[finite]
    if values.numel() == 0:
        return False
    sizes = float(torch.linalg.vector_norm(values)), float(torch.linalg.vector_norm(own))
    if 0 in sizes:  # As of a head that starts at zero.
        return sizes[0] == sizes[1]
    factor = float((values * own).sum()) / sizes[1] ** 2
    if values.numel() - len(values) < 3 and not abs(factor - 1) <= bound:  # A free factor would fit by chance.
        return False
    return factor > 0 and float(torch.linalg.vector_norm(values - factor * own)) <= bound * sizes[0]


def _undone(rows: Tensor) -> Iterator[Tensor]:
    """Take back a softmax, and a sigmoid."""
    if bool(((rows > 0) & (rows < 1)).all()):
        yield rows.log()
        yield torch.logit(rows)


def _centred(rows: Tensor) -> Tensor:
    return rows - rows.mean(dim=-1, keepdim=True)


def pattern(output: Tensor) -> Tensor:
    """Values that no two classes and rows share, moderate so that a softmax of them keeps digits."""
    count = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
    return torch.cos(count * count + count).reshape(output.shape).to(output.dtype)
