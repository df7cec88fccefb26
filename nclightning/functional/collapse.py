"""Measures of neural collapse as functions of the class statistics and the head."""

from __future__ import annotations

import torch
from torch import Tensor

from nclightning.functional.statistics import ClassStatistics

__all__ = ["etf_deviation", "self_duality", "within_class_variability"]


def within_class_variability(stats: ClassStatistics) -> Tensor:
    r"""Measure how far features are from their class means, relative to the spread of the means (NC1).

    .. math:: \mathrm{NC}_1 = \tfrac1K \operatorname{tr}(\Sigma_W \Sigma_B^{\dagger}),\quad
        \Sigma_W = \tfrac1N \sum_i (h_i - \mu_{y_i})(h_i - \mu_{y_i})^\top,\quad
        \Sigma_B = \tfrac1K \sum_k (\mu_k - \mu_G)(\mu_k - \mu_G)^\top

    with :math:`\mu_G` the unweighted mean of the class means. Read in the coordinates of the singular value
    decomposition of the centred means, whose rank is taken to be exactly ``min(K - 1, d)``: no pseudo-inverse of a
    d x d matrix, no cutoff that drops or adds a direction near collapse. Classes without samples are left out and K
    counts those present. Paper: Appendix; Papyan, Han and Donoho (2020), with their 1/K.

    Args:
        stats: Statistics of the features.

    Returns:
        Non-negative scalar in the dtype of the statistics, dimensionless. 0 at exact collapse; ``inf`` where the
        class means coincide along a direction of that rank in which the features spread; ``nan`` where they
        coincide and nothing spreads, or with fewer than two classes present.
    """
    num_present = stats.present.sum()
    _, singular, right = torch.linalg.svd(stats.centred_means, full_matrices=False)
    spread = ((right @ stats.scatter) * right).sum(dim=1).clamp(min=0)
    kept = torch.arange(len(singular), device=singular.device) < num_present - 1
    value = torch.where(kept, spread / singular.square(), 0).sum() / stats.counts.sum()
    # Sigma_B carries 1/K and the definition another: they cancel against the K of the pseudo-inverse.
    return torch.where(num_present >= 2, value, torch.nan)


def etf_deviation(weight: Tensor) -> Tensor:
    r"""Measure how far the head is from a simplex equiangular tight frame (NC2).

    .. math:: \mathrm{NC}_2 = \left\| \frac{W^\top W}{\|W^\top W\|_F}
        - \frac{1}{\sqrt{K-1}} \left(I_K - \tfrac1K 1_K 1_K^\top\right) \right\|_F

    Paper: Appendix, with erratum E1 (the 1/K).

    Args:
        weight: Head ``(K, d)``, K at least 2.

    Returns:
        Scalar in [0, 2] in the dtype of ``weight``, dimensionless; 0 for an ETF of any size and orientation, up to
        the round-off of that dtype; ``nan`` for a zero head.

    Raises:
        ValueError: If ``weight`` is not ``(K, d)`` with K at least 2.
    """
    if weight.ndim != 2 or len(weight) < 2:
        raise ValueError(f"weight must be (K, d) with K >= 2, got {tuple(weight.shape)}.")
    everyone = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    return _deviation_from_etf(weight @ weight.T, everyone)


def self_duality(stats: ClassStatistics, weight: Tensor) -> Tensor:
    r"""Measure how far the head is from the dual of the class means (NC3, coherence form).

    .. math:: \mathrm{NC}_3 = \left\| \frac{W^\top \bar H}{\|W^\top \bar H\|_F}
        - \frac{1}{\sqrt{K-1}} \left(I_K - \tfrac1K 1_K 1_K^\top\right) \right\|_F

    with :math:`\bar H` the centred class means. Classes without samples are left out. Paper: Appendix, with
    erratum E1. It vanishes for self-dual ETFs, and also for every pair with :math:`W^\top \bar H \propto P`.

    Args:
        stats: Statistics of the features.
        weight: Head ``(K, d)``.

    Returns:
        Scalar in [0, 2] in the dtype of the statistics, dimensionless; ``nan`` for a zero head or coinciding means.

    Raises:
        ValueError: If ``weight`` does not fit the statistics.
    """
    if weight.shape != stats.means.shape:
        raise ValueError(
            f"weight must have shape {tuple(stats.means.shape)} like the class means, got {tuple(weight.shape)}."
        )
    present = stats.present
    return _deviation_from_etf(weight.to(stats.means) @ stats.centred_means.T * present.unsqueeze(1), present)


def _deviation_from_etf(gram: Tensor, present: Tensor) -> Tensor:
    """Frobenius distance of a normalised Gram matrix to that of the ETF over the classes present."""
    mask = present.to(gram)
    count = mask.sum()
    target = (torch.diag(mask) - torch.outer(mask, mask) / count) / (count - 1).sqrt()
    deviation: Tensor = torch.linalg.matrix_norm(gram / torch.linalg.matrix_norm(gram) - target)
    return deviation
