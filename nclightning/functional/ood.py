"""NC5: features of an out-of-distribution set against the class means."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import unit_rows
from nclightning.functional.statistics import ClassStatistics

__all__ = ["ood_orthogonality"]


def ood_orthogonality(
    stats: ClassStatistics, ood_mean: Tensor, reduction: Literal["mean", "max", "none"] = "mean"
) -> Tensor:
    r"""Measure how far the mean feature of an out-of-distribution set is from orthogonal to the class means (NC5).

    .. math:: \operatorname*{mean}_k \left| \cos\angle(\mu_k, \mu^{\mathrm{OOD}}) \right|

    Ammar et al. (2024), NECO: both means as they are, not centred.

    Args:
        stats: Statistics of the in-distribution features; the light form suffices.
        ood_mean: Mean feature of the other set ``(d,)``.
        reduction: ``"mean"`` over the classes present, ``"max"`` for the worst class, or ``"none"`` for each ``(K,)``,
            ``nan`` where absent.

    Returns:
        In [0, 1] in the dtype of the statistics; 0 at orthogonality, ``nan`` for a zero mean or without samples.

    Raises:
        ValueError: If ``ood_mean`` does not fit, or there is no such reduction.
    """
    if ood_mean.shape != stats.means.shape[1:]:
        raise UserError(f"ood_mean must have shape {tuple(stats.means.shape[1:])}, got {tuple(ood_mean.shape)}.")
    if reduction not in ("mean", "max", "none"):
        raise UserError(f"reduction must be 'mean', 'max' or 'none', got {reduction!r}.")
    cosine = (unit_rows(stats.means) @ unit_rows(ood_mean.detach().to(stats.means).unsqueeze(0)).T).squeeze(1).abs()
    if reduction == "none":
        return torch.where(stats.present, cosine, torch.nan)
    masked = torch.where(stats.present, cosine, 0)
    value = masked.amax() if reduction == "max" else masked.sum() / stats.present.sum()
    return torch.where(stats.present.any(), value, torch.nan)
