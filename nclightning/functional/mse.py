"""Han, Papyan and Donoho's decomposition of the mean squared error."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nclightning.functional.statistics import ClassStatistics

__all__ = ["MSEDecomposition", "mse_decomposition"]


class MSEDecomposition(NamedTuple):
    r"""Parts of the loss; they add up to ``total``.

    Attributes:
        nc1: Loss of the least-squares head by within-class variability,
            :math:`\frac12 \operatorname{tr} W_{LS} (\Sigma_W + \lambda I) W_{LS}^\top`.
        nc2_nc3: Loss of the least-squares head by its class means,
            :math:`\frac12 \sum_k \frac{n_k}N \|W_{LS} \mu_k - e_k\|^2`.
        perpendicular: Loss by the head's distance from the least-squares head,
            :math:`\frac12 \operatorname{tr} (W - W_{LS}) (\Sigma_T + \mu\mu^\top + \lambda I) (W - W_{LS})^\top`.
    """

    nc1: Tensor
    nc2_nc3: Tensor
    perpendicular: Tensor

    @property
    def total(self) -> Tensor:
        r"""The loss :math:`\frac1{2N} \sum_i \|W h_i + b - e_{y_i}\|^2 + \frac\lambda2 (\|W\|^2 + \|b\|^2)`."""
        return self.nc1 + self.nc2_nc3 + self.perpendicular


def mse_decomposition(
    stats: ClassStatistics, weight: Tensor, bias: Tensor | None = None, weight_decay: float = 0.0
) -> MSEDecomposition:
    r"""Split the mean squared error of a head on one-hot labels into what NC1, NC2-NC3 and a suboptimal head cost.

    Han, Papyan and Donoho (2022), Sec. 2: :math:`W_{LS} = A\,(G + \lambda I)^{-1}` minimises the loss for the features
    at hand, with G the second moment of the features and A that between labels and features. A bias is a further
    feature that is always 1, penalised like the rest. Classes weigh by their samples. Where G + lambda I is singular
    the least-squares head of smallest norm is taken.

    Args:
        stats: Statistics of the features, with scatter.
        weight: Head ``(K, d)``.
        bias: Its bias ``(K,)``; None for a head without.
        weight_decay: :math:`\lambda`, not negative.

    Returns:
        The three parts, non-negative, in the dtype of the statistics; ``nan`` without samples or with features that
        are not finite.

    Raises:
        ValueError: If the head does not fit the statistics, they have no scatter, or ``weight_decay`` is negative.
    """
    if weight.shape != stats.means.shape or (bias is not None and bias.shape != stats.counts.shape):
        raise ValueError(
            f"weight must have shape {tuple(stats.means.shape)} and bias its first, "
            f"got {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}."
        )
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}.")
    share = (stats.counts / stats.counts.sum()).unsqueeze(1)
    head, means, within = weight.detach().to(stats.means), stats.means, stats.scatter / stats.counts.sum()
    if bias is not None:
        head = torch.cat([head, bias.detach().to(head).unsqueeze(1)], dim=1)
        means = torch.cat([means, torch.ones_like(share)], dim=1)
        within = torch.nn.functional.pad(within, (0, 1, 0, 1))
    ridge = weight_decay * torch.eye(means.shape[1], dtype=means.dtype, device=means.device)
    moment = within + (share * means).T @ means + ridge
    finite = moment.isfinite().all()
    inverse = torch.linalg.pinv(torch.where(finite, moment, 0), hermitian=True)
    best = (share * means) @ inverse
    away = head - best
    labels = torch.eye(len(means), dtype=means.dtype, device=means.device)
    parts = (
        ((best @ (within + ridge)) * best).sum(),
        (share * (best @ means.T).T.sub(labels).square()).sum(),
        ((away @ moment) * away).sum(),
    )
    return MSEDecomposition(*(torch.where(finite, part / 2, torch.nan) for part in parts))
