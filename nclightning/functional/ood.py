"""NC5: the cosine between the mean feature of an out-of-distribution set and the class means."""

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
    r"""Measure the cosine between the mean feature of an out-of-distribution set and the class means (NC5).

    .. math:: \operatorname*{mean}_k \left| \cos\angle(\mu_k, \mu^{\mathrm{OOD}}) \right|

    Ammar et al. (2024), NECO. Neither mean is centred.

    Args:
        stats: Statistics of the in-distribution features. Light statistics suffice.
        ood_mean: Mean feature of the out-of-distribution set ``(d,)``.
        reduction: ``"mean"`` is over the classes present, ``"max"`` is the worst class, and ``"none"`` gives the value
            of each class, ``(K,)``, ``nan`` for an absent class.

    Returns:
        Value in [0, 1] in the dtype of the statistics, dimensionless. 0 if all are orthogonal; ``nan`` for a zero mean
        or without samples.

    Raises:
        ValueError: If ``ood_mean`` does not fit, or ``reduction`` is unknown.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, ood_orthogonality
        >>> stats = class_statistics(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.arange(2), num_classes=2)
        >>> ood_orthogonality(stats, ood_mean=torch.tensor([0.0, -2.0]), reduction="none")
        tensor([0., 1.], dtype=torch.float64)
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
