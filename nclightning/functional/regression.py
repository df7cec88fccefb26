"""Neural regression collapse, NRC1-NRC3: features and head of a regression against the covariance of its targets."""

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

# Root mean square of a rounding, relative to the largest one; generous.
_STANDARD_ROUNDING = 0.3
# Eigenvalues are equal up to so many roundings.
_EQUAL = 4
_ROWS_AT_A_TIME = 2**13


class GramDeviation(NamedTuple):
    """NRC3.

    Attributes:
        deviation: Squared distance of the head's Gram matrix from the nearest predicted form, both of norm 1.
        gamma: The gamma of that form; ``nan`` where the form is the same for a whole interval of them.
    """

    deviation: Tensor
    gamma: Tensor


class UnitResiduals(NamedTuple):
    """NRC1 and NRC2 of centred features of norm 1.

    Attributes:
        principal: Mean squared distance from the leading principal components.
        row_space: The same from the row space of the head.
    """

    principal: Tensor
    row_space: Tensor


def sample_statistics(rows: Tensor) -> ClassStatistics:
    """Compute the statistics of samples without classes: those of one class.

    Args:
        rows: Features ``(N, d)`` or targets ``(N, K)``, of any floating dtype.

    Returns:
        Float64.

    Raises:
        ValueError: If the shape does not fit.
        TypeError: If rows are not floating.
    """
    return class_statistics(rows, torch.zeros(len(rows), dtype=torch.int64, device=rows.device), 1)


def as_targets(targets: Tensor, num_targets: int) -> Tensor:
    """Bring targets to a row for each sample.

    Args:
        targets: ``(N, K)``, or ``(N,)`` for one target; floating, or integers that are numbers and not classes.
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
            else "a head with an output for each column, or those columns that the head predicts"
        )
        raise UserError(
            f"targets must have shape (N, {num_targets}), a column for each output of the head, got "
            f"{tuple(targets.shape)}: pass {repair}."
        )
    return rows if rows.is_floating_point() else rows.double()


def target_rank(targets: ClassStatistics) -> Tensor:
    """Count the directions along which targets spread by more than their rounding.

    At most K, and less with constant columns, or columns that depend on others. It is the same at every scale of the
    columns, each of which is judged by its own.

    Args:
        targets: Of :func:`sample_statistics`.

    Returns:
        Scalar in the dtype of the statistics; ``nan`` for targets that are not finite.

    Raises:
        ValueError: If the statistics have several classes.
    """
    root, count = _root(targets), targets.counts.sum().clamp(min=1)
    means, widths = targets.means.squeeze(0), targets.widths / count.sqrt()
    rounding = targets.epsilon * torch.hypot(means, widths)
    widths = torch.where(widths > rounding, widths, torch.inf)
    singular, right = singular_vectors(root / count.sqrt() / widths, full=True)
    edge = (_STANDARD_ROUNDING * (1 + (len(widths) / count).sqrt())).clamp(min=1)
    noise = edge * norm(right * (rounding / widths), dim=1)
    exact = torch.finfo(root.dtype).eps * len(widths) * singular.amax()
    counts = (singular > torch.maximum(noise, exact)).sum().to(root)
    return torch.where(targets.means.isfinite().all(), counts, torch.nan)


def principal_residual(features: ClassStatistics, num_directions: int | Tensor) -> Tensor:
    r"""Measure how far features are from the subspace of their leading principal components (NRC1).

    .. math:: \mathrm{NRC}_1 = \sum_{j>n} \sigma_j^2 \Big/ \sum_j \sigma_j^2

    with :math:`\sigma_1 \ge \sigma_2 \ge \dots` the singular values of the centred features: the share of their
    variance outside of their n leading principal components. Read off the square root of the scatter, so that a share
    of 1e-24 is right to three digits. Andriopoulos et al. (2024), who first divide each centred feature by its norm:
    that is :func:`unit_residuals`, which weighs all samples alike and cannot be had without a second look at them.

    Args:
        features: Of :func:`sample_statistics`, ``(N, d)``.
        num_directions: n, the number of targets, or :func:`target_rank`.

    Returns:
        Scalar in [0, 1] in the dtype of the statistics; 0 at collapse, ``1 - n/d`` for many features without a
        preferred direction. ``nan`` where it could be nothing but 0, for n of d directions or at most n + 1 samples;
        with n = 0; and for features that do not spread beyond their rounding, or are not finite.

    Raises:
        ValueError: If the statistics have several classes.
    """
    singular, _ = singular_vectors(_root(features))
    outside = torch.arange(len(singular), device=singular.device) >= num_directions
    share = (norm(singular * outside, dim=0) / norm(singular, dim=0)).square()
    n = torch.as_tensor(num_directions, device=singular.device)
    defined = (n >= 1) & (n < len(singular)) & (n < features.counts.sum() - 1) & _spreads(features)
    return torch.where(defined, share, torch.nan)


def row_space_residual(features: ClassStatistics, weight: Tensor) -> Tensor:
    r"""Measure how far features are from the row space of the head (NRC2).

    .. math:: \mathrm{NRC}_2 = \frac{\sum_i \|(I - P_W)(h_i - \bar h)\|^2}{\sum_i \|h_i - \bar h\|^2}

    with :math:`P_W` the projection onto the span of the rows of W: the share of the variance of the features that the
    head does not see. Andriopoulos et al. (2024), with the difference that :func:`principal_residual` names. A row
    that rounding of the weight explains by the others adds nothing to the span; a small one counts like a large one.

    Args:
        features: Of :func:`sample_statistics`, ``(N, d)``.
        weight: Head ``(K, d)``, in the dtype in which it was rounded.

    Returns:
        Scalar in [0, 1] in the dtype of the statistics; 0 at collapse, ``1 - K/d`` for features and rows without a
        preferred direction. ``nan`` where it could be nothing but 0, for rows that span all directions; for a zero
        head; and for features that do not spread beyond their rounding, or are not finite.

    Raises:
        ValueError: If ``weight`` does not fit, or the statistics have several classes.
    """
    root, basis = _root(features), _row_space(weight, features)
    rows = root / power_of_two(root)
    rank = basis.square().sum().round()
    defined = (rank >= 1) & (rank < rows.shape[1]) & _spreads(features) & basis.isfinite().all()
    return torch.where(defined, (norm(_off(rows, basis), dim=1).square().sum() / rows.square().sum()), torch.nan)


def gram_deviation(targets: ClassStatistics, weight: Tensor, centred: bool = True) -> GramDeviation:
    r"""Measure how far the head's Gram matrix is from the form that the targets prescribe (NRC3).

    .. math:: \mathrm{NRC}_3 = \min_{\gamma \ge 0} \left\| \frac{W W^\top}{\|W W^\top\|_F}
        - \frac{[\Sigma^{1/2} - \gamma^{1/2} I]_+}{\|[\Sigma^{1/2} - \gamma^{1/2} I]_+\|_F} \right\|_F^2

    with :math:`\Sigma` the covariance of the targets and :math:`[\cdot]_+` the positive part. Andriopoulos et al.
    (2024), who take :math:`\gamma` below the least eigenvalue of :math:`\Sigma`, where all is positive. Beyond it the
    optimum of the unconstrained feature model has lost directions, and is this: so NRC3 vanishes at every optimum, and
    there :math:`\gamma = N \lambda_W \lambda_H` (:func:`nclightning.problems.regression_gram`). The minimum is found in
    closed form on each interval between two eigenvalues.

    Args:
        targets: Of :func:`sample_statistics`, ``(N, K)``.
        weight: Head ``(K, d)``.
        centred: False takes second moments around zero for the covariance, as is right for a head without a bias.

    Returns:
        Deviation in [0, 2], 0 at collapse, and gamma in the unit of squared targets; scalars in the dtype of the
        statistics. Both ``nan`` for K = 1, where there is nothing to compare, for a zero head, and for targets that do
        not spread or are not finite. Gamma alone is ``nan`` where only directions of equal variance are left.

    Raises:
        ValueError: If ``weight`` does not fit, or the statistics have several classes.

    Example:
        >>> covariance_root, targets = torch.tensor([3.0, 1.0]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
        >>> targets = torch.cat([targets, -targets]) * covariance_root
        >>> weight = torch.diag((covariance_root - 0.5).sqrt())
        >>> found = gram_deviation(sample_statistics(targets), weight)
        >>> bool(found.deviation < 1e-12), round(float(found.gamma), 6)
        (True, 0.25)
    """
    root, count = _root(targets), targets.counts.sum().clamp(min=1)
    if weight.ndim != 2 or len(weight) != root.shape[1]:
        raise UserError(f"weight must have shape ({root.shape[1]}, d) for as many targets, got {tuple(weight.shape)}.")
    if not centred:
        root = torch.cat([root, targets.means * count.sqrt()])
    sizes, directions = singular_vectors(root / count.sqrt(), full=True)
    unit = power_of_two(sizes)
    sizes, rows = sizes / unit, directions @ (weight.detach() / power_of_two(weight.detach())).to(root)
    gram = rows @ rows.T
    gram = gram / norm(gram.flatten(), dim=0)
    # Roundings of targets are independent of each other.
    of_targets = rounding_along(targets, directions).amax() / count.sqrt() / unit
    rounding = _EQUAL * torch.maximum(of_targets, torch.finfo(root.dtype).eps * len(sizes) * sizes.amax())
    # Row j is for those gamma whose root is between the eigenvalues j and j + 1: the first j directions are left.
    next_ = torch.cat([sizes.narrow(0, 1, len(sizes) - 1), sizes.new_zeros(1)])
    next_ = torch.where(next_ > rounding, next_, 0)
    left = torch.ones_like(gram, dtype=torch.bool).tril()
    number = torch.arange(1, len(sizes) + 1, device=sizes.device)
    mean = (sizes * left).sum(dim=1) / number
    away = torch.where(left, sizes - mean.unsqueeze(1), 0)
    alike, spread = (away * gram.diagonal()).sum(dim=1), away.square().sum(dim=1)
    # The cosine of both matrices is largest where its derivative vanishes; without such a point it falls with gamma.
    best = mean - (gram.diagonal() * left).sum(dim=1) / number * spread / alike
    told = spread.sqrt() > rounding
    best = torch.where(told & (alike > 0), torch.minimum(torch.maximum(best, next_), sizes), next_)
    forms = (sizes - best.unsqueeze(1)).clamp(min=0) * left
    forms = forms / norm(forms, dim=1).unsqueeze(1)
    deviations = (forms - gram.diagonal()).square().sum(dim=1) + gram.tril(-1).square().sum() * 2
    deviations = torch.where(sizes - next_ > rounding, deviations, torch.inf)
    found = deviations.argmin(dim=0, keepdim=True)
    deviation, root_of_gamma, told = (each.index_select(0, found).squeeze(0) for each in (deviations, best, told))
    defined = (sizes.amax() > rounding) & gram.isfinite().all() & (len(sizes) > 1)
    return GramDeviation(
        torch.where(defined, deviation, torch.nan),
        torch.where(defined & told, (root_of_gamma * unit).square(), torch.nan),
    )


def unit_residuals(features: Tensor, num_directions: int, weight: Tensor) -> UnitResiduals:
    r"""Measure NRC1 and NRC2 of centred features that are divided by their norms, as they are published.

    .. math:: \mathrm{NRC}_1 = \frac1N \sum_i \|\tilde h_i - P_n \tilde h_i\|^2, \quad
        \mathrm{NRC}_2 = \frac1N \sum_i \|\tilde h_i - P_W \tilde h_i\|^2, \quad
        \tilde h_i = \frac{h_i - \bar h}{\|h_i - \bar h\|}

    with :math:`P_n` the projection onto the n leading principal components of the centred features, and :math:`P_W`
    that onto the row space of the head. Andriopoulos et al. (2024). All samples count alike, where
    :func:`principal_residual` and :func:`row_space_residual` let those far from the mean count more. A sample in the
    mean has no direction, and is left out.

    Args:
        features: ``(N, d)`` of any floating dtype, all at once: their mean is needed first.
        num_directions: n, the number of targets.
        weight: Head ``(K, d)``.

    Returns:
        Scalars in [0, 1], float64; ``nan`` where the other two functions are.

    Raises:
        ValueError: If a shape does not fit.
        TypeError: If features are not floating.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
        >>> float(unit_residuals(features, 1, torch.tensor([[1.0, 0.0]])).principal)
        0.5
    """
    stats = sample_statistics(features).folded
    _, right = singular_vectors(_root(stats))
    leading, rows_of_head = right.narrow(0, 0, min(num_directions, len(right))), _row_space(weight, stats)
    sums, count = features.new_zeros(2, dtype=torch.float64), features.new_zeros((), dtype=torch.float64)
    for rows in torch.split(features.detach(), _ROWS_AT_A_TIME):
        away = (rows.double() - stats.totals.means) - stats.totals.tails
        size = norm(away, dim=1).unsqueeze(1)
        unit = torch.where(size > 0, away / size, 0)
        sums = sums + torch.stack([_off(unit, basis).square().sum() for basis in (leading, rows_of_head)])
        count = count + (size > 0).sum()
    shares = principal_residual(stats, num_directions), row_space_residual(stats, weight)
    principal, row_space = sums / count
    return UnitResiduals(
        torch.where(shares[0].isnan(), shares[0], principal), torch.where(shares[1].isnan(), shares[1], row_space)
    )


def _root(stats: ClassStatistics) -> Tensor:
    """Square root of the scatter of all samples."""
    if len(stats.counts) != 1:
        raise UserError(f"statistics must be of one class, got {len(stats.counts)}: make them with sample_statistics.")
    return stats.root


def _spreads(features: ClassStatistics) -> Tensor:
    """Whether features differ by more than their rounding."""
    size = norm(features.means.squeeze(0), dim=0) * features.counts.sum().sqrt()
    return features.norms.sum() > features.epsilon * size


def _row_space(weight: Tensor, features: ClassStatistics) -> Tensor:
    """Orthonormal rows ``(r, d)`` that span those of the head; zero ones for rows that depend on others."""
    dim = features.means.shape[1]
    if weight.ndim != 2 or weight.shape[1] != dim:
        raise UserError(f"weight must have shape (K, {dim}) as features have {dim} columns, got {tuple(weight.shape)}.")
    # The span does not depend on the norms of the rows; divided by them none is below the rounding of another.
    rows = weight.detach().to(features.means)
    unit = torch.where((rows == 0).all(dim=1, keepdim=True), 0, unit_rows(rows))
    singular, right = singular_vectors(unit)
    least = max(torch.finfo(weight.dtype).eps, torch.finfo(rows.dtype).eps * max(rows.shape)) * singular.amax()
    return torch.where((singular > least).unsqueeze(1), right, singular.unsqueeze(1) * 0)


def _off(rows: Tensor, basis: Tensor) -> Tensor:
    """Part of rows orthogonal to an orthonormal basis; twice, as the first time leaves a rounding of the rows."""
    for _ in range(2):
        rows = rows - (rows @ basis.T) @ basis
    return rows
