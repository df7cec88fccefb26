"""Han, Papyan and Donoho's decomposition of the mean squared error."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import norm, product, triangular_factor
from nclightning.functional.rounding import rounding_along, spread_of_rounding
from nclightning.functional.statistics import ClassStatistics

__all__ = ["MSEDecomposition", "mse_decomposition"]


class MSEDecomposition(NamedTuple):
    r"""Three parts of the loss; their sum is ``total``.

    Attributes:
        nc1: Loss of the least-squares head due to within-class variability,
            :math:`\frac12 \operatorname{tr} W_{LS} (\Sigma_W + \lambda I) W_{LS}^\top`.
        nc2_nc3: Loss of the least-squares head on the class means,
            :math:`\frac12 \sum_k \frac{n_k}N \|W_{LS} \mu_k - e_k\|^2`.
        perpendicular: Additional loss of the given head over the least-squares head,
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
    r"""Split the mean squared error on one-hot labels into parts due to NC1, to NC2 and NC3, and to the head.

    .. math:: \mathcal L = \mathcal L_{\mathrm{NC1}} + \mathcal L_{\mathrm{NC2/3}} + \mathcal L^\perp

    Han, Papyan and Donoho (2022), Sec. 2. For given features, :math:`W_{LS} = A\,(G + \lambda I)^{-1}` minimises the
    loss. Here G is the second moment of the features and A the mixed moment of labels and features. A bias is treated
    as one more feature that is always 1, and is penalised like the rest. Classes are weighted by their counts. If
    :math:`G + \lambda I` is singular, all least-squares heads have the same parts.

    No part is computed as a difference. Let M be the class means and T the one-hot labels, both with the rows of class
    k multiplied by :math:`\sqrt{n_k/N}`; let S be a square root of the within-class covariance plus
    :math:`\lambda I`; and let :math:`Z = M S^{-1}`. Then the residual of the least-squares head on the class means is
    :math:`(I + Z Z^\top)^{-1} T`, and its output within classes is :math:`Z^\top (I + Z Z^\top)^{-1} T`. Directions
    along which the means spread but the samples of a class do not, such as a bias without penalty, are fitted exactly
    first. Directions along which neither exceeds rounding of the features are left out. Without a bias, a common offset
    of the features remains in the formulas: the relative error is about eps times the offset over the spread.

    Args:
        stats: Statistics of the features, with scatter.
        weight: Head ``(K, d)``.
        bias: Bias of the head ``(K,)``; None for a head without one.
        weight_decay: :math:`\lambda`, not negative.

    Returns:
        The three parts: non-negative scalars in the dtype of the statistics and the unit of the loss. ``nan`` without
        samples or with features that are not finite, ``inf`` on overflow. The absolute error of the square root of
        ``perpendicular`` is about 1e-16, the rounding of the residual of ``weight``.

    Raises:
        ValueError: If the head does not fit the statistics, they have no scatter, or ``weight_decay`` is negative.

    Example:
        >>> import torch
        >>> from nclightning.functional import class_statistics, mse_decomposition
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> stats = class_statistics(features, torch.tensor([0, 0, 1, 1]), num_classes=2)
        >>> parts = mse_decomposition(stats, weight=torch.eye(2))
        >>> [round(float(part), 6) for part in (*parts, parts.total)]
        [0.04, 0.01, 0.45, 0.5]
    """
    if weight.shape != stats.means.shape or (bias is not None and bias.shape != stats.counts.shape):
        raise UserError(
            f"weight must have shape {tuple(stats.means.shape)} and bias ({len(stats.means)},), "
            f"got {tuple(weight.shape)} and {None if bias is None else tuple(bias.shape)}."
        )
    if not weight_decay >= 0:
        raise UserError(f"weight_decay must not be negative, got {weight_decay}.")
    parts = _Fit(stats, bias is not None, weight_decay).parts(weight, bias)
    return MSEDecomposition(*parts)


class _Fit:
    """The least-squares head, represented by its residuals in coordinates in which nothing cancels."""

    def __init__(self, stats: ClassStatistics, has_bias: bool, weight_decay: float) -> None:
        total = stats.counts.sum()
        self.shares = (stats.counts / total.clamp(min=1)).sqrt().unsqueeze(1)
        # A bias without penalty can absorb the mean feature, so that it may be subtracted from all features.
        self.free_bias = has_bias and not weight_decay
        self.offset = stats.global_mean("sample") if self.free_bias else stats.means.new_zeros(stats.means.shape[1])
        means = stats.centre_means("sample") if self.free_bias else stats.means
        within = stats.root / total.sqrt()
        self.finite = within.isfinite().all() & means.isfinite().all()  # False without samples, too.
        self.means = self.shares * torch.where(self.finite, means, 0)
        self.within = torch.where(self.finite, within, 0)
        self.penalised_bias = has_bias and bool(weight_decay)
        if self.penalised_bias:
            self.means = torch.cat([self.means, self.shares], dim=1)
            self.within = torch.nn.functional.pad(self.within, (0, 1))
        if weight_decay:
            ridge = torch.eye(self.means.shape[1], dtype=means.dtype, device=means.device) * math.sqrt(weight_decay)
            self.within = triangular_factor([self.within, ridge])
        self._stats = None if weight_decay else stats

    def parts(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the within-class part, the part on class means, and the part due to another head than this one."""
        head = weight.detach().to(self.means)
        bias = None if bias is None else bias.detach().to(head)
        labels = self.shares * torch.eye(len(head), dtype=head.dtype, device=head.device)
        if self.penalised_bias:
            assert bias is not None
            head, bias = torch.cat([head, bias.unsqueeze(1)], dim=1), None
        residual, spread = self._least_squares(labels)
        # One product for class means, spread and offset, so that they share one scale factor.
        made, own, factor = product(torch.cat([self.means, self.within, self.offset.unsqueeze(0)]), head)
        means, within, offset = torch.split(own * made, [len(self.means), len(self.within), 1])
        fitted = means - factor * labels
        if bias is not None:
            fitted = fitted + self.shares * (offset + factor * bias)
        excess = norm(torch.cat([fitted + factor * residual, within - factor * spread]).flatten(), dim=0) / factor
        squares = spread.square().sum(), residual.square().sum(), excess.square()
        first, second, third = (torch.where(self.finite, square / 2, torch.nan) for square in squares)
        return first, second, third

    def _least_squares(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the residual of the least-squares head on class means ``(K, K)`` and its output within classes."""
        # Find the directions along which means and samples together spread by more than rounding of the features.
        _, sizes, right = torch.linalg.svd(torch.cat([self.within, self.means]), full_matrices=False)
        least = _rounding(sizes)
        if self._stats is not None:
            largest = torch.linalg.vector_norm(self.within @ right.T, dim=0).amax()
            least = torch.maximum(least, spread_of_rounding(self._stats, rounding_along(self._stats, right), largest))
        counts = sizes > least
        means = self.means @ right.T * counts
        within = self.within @ right.T * counts
        left, spreads, axes = torch.linalg.svd(within, full_matrices=False)
        means = means @ axes.T
        spread_out = spreads > _rounding(spreads)
        # Directions without spread within classes are fitted exactly. The residual is orthogonal to them.
        free = [torch.where(spread_out, 0, means), (self.shares == 0).to(means) * torch.eye(len(means)).to(means)]
        if self.free_bias:
            free.append(self.shares)
        basis, lengths, _ = torch.linalg.svd(torch.cat(free, dim=1), full_matrices=True)
        lengths = torch.nn.functional.pad(lengths, (0, len(basis) - len(lengths)))
        basis = basis * (lengths <= _rounding(lengths))
        ratios = torch.where(spread_out, basis.T @ means / torch.where(spread_out, spreads, 1), 0)
        u, z, v = torch.linalg.svd(ratios, full_matrices=True)
        z = torch.nn.functional.pad(z, (0, max(len(u), len(v)) - len(z)))
        targets = u.T @ (basis.T @ labels)
        shrunk = targets / (1 + z.narrow(0, 0, len(u)).square()).unsqueeze(1)
        rank = min(len(u), len(v))
        inner = (z.narrow(0, 0, rank).unsqueeze(1) * shrunk.narrow(0, 0, rank)).T @ v.narrow(0, 0, rank)
        return basis @ (u @ shrunk), left @ inner.T


def _rounding(sizes: Tensor) -> Tensor:
    """Return the size up to which singular values are only rounding of the largest one."""
    return torch.finfo(sizes.dtype).eps * len(sizes) * sizes.amax()
