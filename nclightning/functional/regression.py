"""Neural regression collapse (NRC1-NRC3): features and head of a regression, and the covariance of its targets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nclightning.errors import UserError, UserTypeError
from nclightning.functional.buffer import class_statistics
from nclightning.functional.linear import norm, power_of_two, singular_vectors, unit_rows
from nclightning.functional.rounding import rounding_along
from nclightning.functional.statistics import ClassStatistics

__all__ = [
    "GramDeviation",
    "UnitResiduals",
    "as_targets",
    "gram_deviation",
    "principal_residual",
    "row_space_residual",
    "sample_statistics",
    "target_rank",
    "unit_residuals",
]

# Root mean square of a rounding error relative to the largest one, rounded up.
_RMS_ROUNDING = 0.3
# Eigenvalues are treated as equal if they differ by at most this number of rounding errors.
_ROUNDINGS_OF_EQUAL = 4
_ROWS_PER_STEP = 2**13


class GramDeviation(NamedTuple):
    """Result of :func:`gram_deviation` (NRC3).

    Attributes:
        deviation: Squared distance of the head's Gram matrix from the nearest predicted matrix, both of norm 1.
        gamma: The gamma of that matrix; ``nan`` if each gamma of an interval gives this matrix.
    """

    deviation: Tensor
    gamma: Tensor


class UnitResiduals(NamedTuple):
    """Result of :func:`unit_residuals`: NRC1 and NRC2 of centred features divided by their norms.

    Attributes:
        principal: Mean squared distance from the span of the leading principal components (NRC1).
        row_space: Mean squared distance from the row space of the head (NRC2).
    """

    principal: Tensor
    row_space: Tensor


def sample_statistics(rows: Tensor) -> ClassStatistics:
    """Compute the statistics of samples without labels, treated as a single class.

    Args:
        rows: Features ``(N, d)`` or targets ``(N, K)``, of any floating dtype.

    Returns:
        Statistics with one class, in float64.

    Raises:
        ValueError: If the shape does not fit.
        TypeError: If rows are not floating.

    Example:
        >>> import torch
        >>> from nclightning.functional import sample_statistics
        >>> stats = sample_statistics(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        >>> stats.means, stats.counts
        (tensor([[2., 2.]], dtype=torch.float64), tensor([2.], dtype=torch.float64))
    """
    return class_statistics(rows, torch.zeros(len(rows), dtype=torch.int64, device=rows.device), 1)


def as_targets(targets: Tensor, num_targets: int) -> Tensor:
    """Reshape targets to one row per sample.

    Args:
        targets: ``(N, K)``, or ``(N,)`` for one target; floating, or integers that are real targets and not classes.
        num_targets: K.

    Returns:
        Floating ``(N, K)``.

    Raises:
        ValueError: If the shape does not fit.
        TypeError: If they are not real numbers.
    """
    if targets.is_complex() or targets.dtype == torch.bool:
        raise UserTypeError(f"targets must be real numbers, got {targets.dtype}: pass targets.float().")
    rows = targets.unsqueeze(-1) if targets.ndim == 1 and num_targets == 1 else targets
    if rows.ndim != 2 or rows.shape[1] != num_targets:
        repair = (
            "nclightning.metrics.NeuralCollapse if they are class numbers"
            if targets.ndim == 1 and not targets.is_floating_point()
            else "a head with an output for each column, or only the columns that the head predicts"
        )
        raise UserError(
            f"targets must have shape (N, {num_targets}), a column for each output of the head, got "
            f"{tuple(targets.shape)}: pass {repair}."
        )
    return rows if rows.is_floating_point() else rows.double()


def target_rank(targets: ClassStatistics) -> Tensor:
    """Count the directions along which targets spread by more than their rounding.

    The count is at most K, and less if columns are constant or depend on others. The scale of a column does not matter.

    Args:
        targets: Result of :func:`sample_statistics` for the targets.

    Returns:
        Scalar in the dtype of the statistics; ``nan`` for targets that are not finite.

    Raises:
        ValueError: If the statistics have several classes.

    Example:
        >>> import torch
        >>> from nclightning.functional import sample_statistics, target_rank
        >>> column = torch.tensor([[1.0], [2.0], [4.0]])
        >>> target_rank(sample_statistics(torch.cat([column, 3 * column], dim=1)))
        tensor(1., dtype=torch.float64)
    """
    root, count = _scatter_root(targets), targets.counts.sum().clamp(min=1)
    means, widths = targets.means.squeeze(0), targets.widths / count.sqrt()
    rounding = targets.epsilon * torch.hypot(means, widths)
    widths = torch.where(widths > rounding, widths, torch.inf)
    singular, right = singular_vectors(root / count.sqrt() / widths, full=True)
    edge = (_RMS_ROUNDING * (1 + (len(widths) / count).sqrt())).clamp(min=1)
    noise = edge * norm(right * (rounding / widths), dim=1)
    exact = torch.finfo(root.dtype).eps * len(widths) * singular.amax()
    counts = (singular > torch.maximum(noise, exact)).sum().to(root)
    return torch.where(targets.means.isfinite().all(), counts, torch.nan)


def principal_residual(features: ClassStatistics, num_directions: int | Tensor) -> Tensor:
    r"""Measure how far features are from the subspace of their leading principal components (NRC1).

    .. math:: \mathrm{NRC}_1 = \sum_{j>n} \sigma_j^2 \Big/ \sum_j \sigma_j^2

    with :math:`\sigma_1 \ge \sigma_2 \ge \dots` the singular values of the centred features. It is the share of their
    variance outside of their n leading principal components. It is computed from a square root of the scatter, so that
    even a share of 1e-24 has three correct digits.

    Andriopoulos et al. (2024). They first divide each centred feature by its norm, which gives all samples the same
    weight and needs a second pass over them: see :func:`unit_residuals`.

    Args:
        features: Result of :func:`sample_statistics` for the features ``(N, d)``.
        num_directions: n, the number of targets, or :func:`target_rank`.

    Returns:
        Scalar in [0, 1] in the dtype of the statistics, dimensionless. 0 at collapse, ``1 - n/d`` for many features
        without a preferred direction. ``nan`` where it is 0 for any features (n at least d, or at most n + 1 samples),
        with n = 0, for features that do not spread by more than their rounding, and for features that are not finite.

    Raises:
        ValueError: If the statistics have several classes.

    Example:
        >>> import torch
        >>> from nclightning.functional import principal_residual, sample_statistics
        >>> features = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> round(float(principal_residual(sample_statistics(features), num_directions=1)), 6)  # 2 / (18 + 2)
        0.1
    """
    singular, _ = singular_vectors(_scatter_root(features))
    outside = torch.arange(len(singular), device=singular.device) >= num_directions
    share = (norm(singular * outside, dim=0) / norm(singular, dim=0)).square()
    n = torch.as_tensor(num_directions, device=singular.device)
    defined = (n >= 1) & (n < len(singular)) & (n < features.counts.sum() - 1) & _spreads(features)
    return torch.where(defined, share, torch.nan)


def row_space_residual(features: ClassStatistics, weight: Tensor) -> Tensor:
    r"""Measure how far features are from the row space of the head (NRC2).

    .. math:: \mathrm{NRC}_2 = \frac{\sum_i \|(I - P_W)(h_i - \bar h)\|^2}{\sum_i \|h_i - \bar h\|^2}

    with :math:`P_W` the projection onto the span of the rows of W. It is the share of the variance of the features that
    the head ignores. Andriopoulos et al. (2024) first divide each centred feature by its norm, as for
    :func:`principal_residual`. A row of the head that depends on the others up to rounding adds nothing to the span.
    The norms of the rows do not matter.

    Args:
        features: Result of :func:`sample_statistics` for the features ``(N, d)``.
        weight: Head ``(K, d)``, in the dtype in which it was trained.

    Returns:
        Scalar in [0, 1] in the dtype of the statistics, dimensionless. 0 at collapse, ``1 - K/d`` for features and rows
        without a preferred direction. ``nan`` where it is 0 for any features (rows that span all directions), for a
        zero head, for features that do not spread by more than their rounding, and for features that are not finite.

    Raises:
        ValueError: If ``weight`` does not fit, or the statistics have several classes.

    Example:
        >>> import torch
        >>> from nclightning.functional import row_space_residual, sample_statistics
        >>> features = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> round(float(row_space_residual(sample_statistics(features), weight=torch.tensor([[5.0, 0.0]]))), 6)
        0.1
    """
    root, basis = _scatter_root(features), _row_space(weight, features)
    rows = root / power_of_two(root)
    rank = basis.square().sum().round()
    defined = (rank >= 1) & (rank < rows.shape[1]) & _spreads(features) & basis.isfinite().all()
    return torch.where(
        defined, (norm(_orthogonal_part(rows, basis), dim=1).square().sum() / rows.square().sum()), torch.nan
    )


def gram_deviation(targets: ClassStatistics, weight: Tensor, centred: bool = True) -> GramDeviation:
    r"""Measure how far the head's Gram matrix is from the form that the targets predict (NRC3).

    .. math:: \mathrm{NRC}_3 = \min_{\gamma \ge 0} \left\| \frac{W W^\top}{\|W W^\top\|_F}
        - \frac{[\Sigma^{1/2} - \gamma^{1/2} I]_+}{\|[\Sigma^{1/2} - \gamma^{1/2} I]_+\|_F} \right\|_F^2

    with :math:`\Sigma` the covariance of the targets and :math:`[\cdot]_+` the positive part. Andriopoulos et al.
    (2024) assume that :math:`\gamma` is below the least eigenvalue of :math:`\Sigma`, so that all eigenvalues stay
    positive. The formula above also describes the optima of the unconstrained feature model that have lost directions.
    So NRC3 is zero at every optimum, and there :math:`\gamma = N \lambda_W \lambda_H`
    (:func:`nclightning.problems.regression_gram`). The minimum over :math:`\gamma` is computed in closed form on each
    interval between two eigenvalues.

    Args:
        targets: Result of :func:`sample_statistics` for the targets ``(N, K)``.
        weight: Head ``(K, d)``.
        centred: False uses second moments around zero instead of the covariance, which is right for a head without a
            bias.

    Returns:
        Deviation in [0, 2], dimensionless, 0 at collapse; and gamma in the unit of squared targets. Both are scalars in
        the dtype of the statistics. Both are ``nan`` for K = 1, where any head has this form, for a zero head, and for
        targets that do not spread or are not finite. Gamma alone is ``nan`` if all remaining directions have the same
        variance.

    Raises:
        ValueError: If ``weight`` does not fit, or the statistics have several classes.

    Example:
        >>> import torch
        >>> from nclightning.functional import gram_deviation, sample_statistics
        >>> covariance_root, targets = torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> targets = torch.cat([targets, -targets]) * covariance_root
        >>> weight = torch.diag((covariance_root - 0.5).sqrt())
        >>> found = gram_deviation(sample_statistics(targets), weight)
        >>> bool(found.deviation < 1e-12), round(float(found.gamma), 6)
        (True, 0.25)
    """
    root, count = _scatter_root(targets), targets.counts.sum().clamp(min=1)
    if weight.ndim != 2 or len(weight) != root.shape[1]:
        raise UserError(
            f"weight must have shape ({root.shape[1]}, d), a row for each target, got {tuple(weight.shape)}."
        )
    if not centred:
        root = torch.cat([root, targets.means * count.sqrt()])
    sizes, directions = singular_vectors(root / count.sqrt(), full=True)
    unit = power_of_two(sizes)
    sizes, rows = sizes / unit, directions @ (weight.detach() / power_of_two(weight.detach())).to(root)
    gram = rows @ rows.T
    gram = gram / norm(gram.flatten(), dim=0)
    # The rounding errors of the targets are independent of each other.
    of_targets = rounding_along(targets, directions).amax() / count.sqrt() / unit
    rounding = _ROUNDINGS_OF_EQUAL * torch.maximum(of_targets, torch.finfo(root.dtype).eps * len(sizes) * sizes.amax())
    # Row j is for gamma with its root between the eigenvalues j and j + 1: only the first j directions remain.
    next_ = torch.cat([sizes.narrow(0, 1, len(sizes) - 1), sizes.new_zeros(1)])
    next_ = torch.where(next_ > rounding, next_, 0)
    left = torch.ones_like(gram, dtype=torch.bool).tril()
    number = torch.arange(1, len(sizes) + 1, device=sizes.device)
    mean = (sizes * left).sum(dim=1) / number
    deviations = torch.where(left, sizes - mean.unsqueeze(1), 0)
    overlap, spread = (deviations * gram.diagonal()).sum(dim=1), deviations.square().sum(dim=1)
    # The cosine between both matrices is largest where its derivative vanishes. If there is no such point, it decreases
    # with gamma and is largest at the lower end of the interval.
    best = mean - (gram.diagonal() * left).sum(dim=1) / number * spread / overlap
    gamma_is_unique = spread.sqrt() > rounding
    best = torch.where(gamma_is_unique & (overlap > 0), torch.minimum(torch.maximum(best, next_), sizes), next_)
    forms = (sizes - best.unsqueeze(1)).clamp(min=0) * left
    forms = forms / norm(forms, dim=1).unsqueeze(1)
    deviations = (forms - gram.diagonal()).square().sum(dim=1) + gram.tril(-1).square().sum() * 2
    deviations = torch.where(sizes - next_ > rounding, deviations, torch.inf)
    found = deviations.argmin(dim=0, keepdim=True)
    deviation, root_of_gamma, gamma_is_unique = (
        each.index_select(0, found).squeeze(0) for each in (deviations, best, gamma_is_unique)
    )
    defined = (sizes.amax() > rounding) & gram.isfinite().all() & (len(sizes) > 1)
    return GramDeviation(
        torch.where(defined, deviation, torch.nan),
        torch.where(defined & gamma_is_unique, (root_of_gamma * unit).square(), torch.nan),
    )


def unit_residuals(features: Tensor, num_directions: int, weight: Tensor) -> UnitResiduals:
    r"""Measure NRC1 and NRC2 as published: for centred features divided by their norms.

    .. math:: \mathrm{NRC}_1 = \frac1N \sum_i \|\tilde h_i - P_n \tilde h_i\|^2, \quad
        \mathrm{NRC}_2 = \frac1N \sum_i \|\tilde h_i - P_W \tilde h_i\|^2, \quad
        \tilde h_i = \frac{h_i - \bar h}{\|h_i - \bar h\|}

    with :math:`P_n` the projection onto the n leading principal components of the centred features, and :math:`P_W`
    the projection onto the row space of the head. Andriopoulos et al. (2024). All samples have the same weight. In
    :func:`principal_residual` and :func:`row_space_residual`, samples far from the mean weigh more. A sample equal to
    the mean has no direction and is left out.

    Args:
        features: All features ``(N, d)`` of any floating dtype, in one tensor: their mean is needed first.
        num_directions: n, the number of targets.
        weight: Head ``(K, d)``.

    Returns:
        Scalars in [0, 1], float64, dimensionless; ``nan`` where the other two functions are.

    Raises:
        ValueError: If a shape does not fit.
        TypeError: If features are not floating.

    Example:
        >>> import torch
        >>> from nclightning.functional import unit_residuals
        >>> features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> float(unit_residuals(features, 1, torch.tensor([[1.0, 0.0]])).principal)
        0.5
    """
    stats = sample_statistics(features).folded
    _, right = singular_vectors(_scatter_root(stats))
    leading, rows_of_head = right.narrow(0, 0, min(num_directions, len(right))), _row_space(weight, stats)
    sums, count = features.new_zeros(2, dtype=torch.float64), features.new_zeros((), dtype=torch.float64)
    for rows in torch.split(features.detach(), _ROWS_PER_STEP):
        deviations = (rows.double() - stats.totals.means) - stats.totals.tails
        size = norm(deviations, dim=1).unsqueeze(1)
        unit = torch.where(size > 0, deviations / size, 0)
        sums = sums + torch.stack([_orthogonal_part(unit, basis).square().sum() for basis in (leading, rows_of_head)])
        count = count + (size > 0).sum()
    shares = principal_residual(stats, num_directions), row_space_residual(stats, weight)
    principal, row_space = sums / count
    return UnitResiduals(
        torch.where(shares[0].isnan(), shares[0], principal), torch.where(shares[1].isnan(), shares[1], row_space)
    )


def _scatter_root(stats: ClassStatistics) -> Tensor:
    """Return the square root of the scatter of all samples; an error for several classes."""
    if len(stats.counts) != 1:
        raise UserError(f"statistics must have one class, got {len(stats.counts)}: make them with sample_statistics.")
    return stats.root


def _spreads(features: ClassStatistics) -> Tensor:
    """Return whether features differ from their mean by more than their rounding."""
    size = norm(features.means.squeeze(0), dim=0) * features.counts.sum().sqrt()
    return features.norms.sum() > features.epsilon * size


def _row_space(weight: Tensor, features: ClassStatistics) -> Tensor:
    """Compute orthonormal rows ``(r, d)`` with the same span as the rows of the head, padded with zero rows."""
    dim = features.means.shape[1]
    if weight.ndim != 2 or weight.shape[1] != dim:
        raise UserError(f"weight must have shape (K, {dim}) as features have {dim} columns, got {tuple(weight.shape)}.")
    # Dividing rows by their norms leaves their span unchanged. Without it, a short row could be lost in the rounding
    # error of a long one.
    rows = weight.detach().to(features.means)
    unit = torch.where((rows == 0).all(dim=1, keepdim=True), 0, unit_rows(rows))
    singular, right = singular_vectors(unit)
    least = max(torch.finfo(weight.dtype).eps, torch.finfo(rows.dtype).eps * max(rows.shape)) * singular.amax()
    return torch.where((singular > least).unsqueeze(1), right, singular.unsqueeze(1) * 0)


def _orthogonal_part(rows: Tensor, basis: Tensor) -> Tensor:
    """Compute the component of rows orthogonal to an orthonormal basis."""
    for _ in range(2):  # The second projection removes the rounding error of the first.
        rows = rows - (rows @ basis.T) @ basis
    return rows
