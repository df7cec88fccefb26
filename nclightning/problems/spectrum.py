r"""Eigenvalues of the Hessian of F at the optimal set, the same at each of its points.

The Hessian splits into three parts:

1. deviations of samples within their groups;
2. deviations of head and mean features orthogonal to the range of the features, which only the multipliers couple;
3. deviations of head and mean features within this range, together with the bias: one dense matrix of size
   ``(K + M) r + K``, which does not depend on the number of samples and features.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nclightning.problems.balanced_spectrum import is_symmetric, symmetric_values
from nclightning.problems.no_answer import NoAnswer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nclightning.problems.optimal_set import OptimalSet

__all__ = ["Eigenvalue", "spectrum"]

# Largest size of the dense matrix, whose eigenvalues take seconds.
_LARGEST_MATRIX = 4000


class Eigenvalue(NamedTuple):
    """An eigenvalue of the Hessian at the optimal set.

    Attributes:
        value: The eigenvalue, in the unit of F; exactly 0.0 along the optimal set.
        multiplicity: Its multiplicity within the sector, at least 1.
        sector: The kind of deviations that it belongs to.
    """

    value: float
    multiplicity: int
    sector: str


def spectrum(optimal: OptimalSet) -> tuple[Eigenvalue, ...]:
    """List the eigenvalues, ordered by value and then by sector.

    Args:
        optimal: The optimal set.

    Returns:
        Entries whose multiplicities sum to the number of variables.

    Raises:
        NoAnswer: If the dense matrix is too large.
    """
    optimum, groups = optimal.optimum, optimal.optimum.groups
    outputs = 0 if groups.lambda_b is None else groups.targets.shape[1]
    width = min(optimum.rank, optimal.feature_dim)
    size = sum(groups.targets.shape) * width + outputs
    if size > _LARGEST_MATRIX and not is_symmetric(optimal):
        raise NoAnswer(
            "spectrum",
            f"its dense part has {size} rows, more than {_LARGEST_MATRIX}: use a smaller problem of the same kind.",
        )
    entries = [*_within(optimal, width), *_orthogonal(optimal, width), *_in_range(optimal, width)]
    return tuple(sorted(entry for entry in entries if entry.multiplicity > 0))


def _frames(optimal: OptimalSet, width: int) -> tuple[Tensor, Tensor]:
    """Return head and scaled features of a member of the optimal set, in coordinates of the range."""
    weight, features = optimal.weight_factor, optimal.scaled_features
    return weight[:, :width], features[:, :width]


def _within(optimal: OptimalSet, width: int) -> Iterator[Eigenvalue]:
    """Yield the eigenvalues of deviations of samples within their groups."""
    groups, lambda_h = optimal.optimum.groups, optimal.lambda_h
    weight, features = _frames(optimal, width)
    extra = groups.counts.round().long() - 1
    total = int(extra.sum())
    yield Eigenvalue(lambda_h, total * (optimal.feature_dim - width), "within groups, orthogonal")
    if total and width:
        logits, targets = groups.logits(features @ weight.T, optimal.optimum.factors.bias), groups.targets
        if is_symmetric(optimal):  # All groups have the same eigenvalues.
            logits, targets, extra = logits[:1], targets[:1], extra.sum().unsqueeze(0)
        hessian = groups.loss.hessian(logits, targets)
        values = torch.linalg.eigvalsh(weight.T @ hessian @ weight) / groups.num_samples + lambda_h
        for row, count in zip(values.tolist(), extra.tolist(), strict=True):
            for value in row:
                yield Eigenvalue(value, count, "within groups, in range")


def _orthogonal(optimal: OptimalSet, width: int) -> Iterator[Eigenvalue]:
    """Yield the eigenvalues of each direction outside of the range, where the multipliers couple head and means."""
    copies, optimum = optimal.feature_dim - width, optimal.optimum
    if not copies:
        return
    lw, lh = optimal.lambda_w, optimal.lambda_h
    strength = optimum.groups.strength
    yield Eigenvalue(0.0, copies * width, "orthogonal")
    yield Eigenvalue(lw + lh, copies * width, "orthogonal")
    fractions = optimum.inactive.fractions.tolist()
    for fraction in fractions:
        large = (lw + lh + math.hypot(lw - lh, 2 * fraction * strength)) / 2
        # Computed from the determinant, so that only 1 - f can cancel.
        small = strength * (strength / large) * (1 - fraction) * (1 + fraction)
        yield Eigenvalue(small, copies, "orthogonal, vanishing")
        yield Eigenvalue(large, copies, "orthogonal, vanishing")
    coupled = width + len(fractions)
    M, K = optimum.groups.targets.shape
    yield Eigenvalue(lw, copies * (K - coupled), "head, orthogonal")
    yield Eigenvalue(lh, copies * (M - coupled), "means, orthogonal")


def _in_range(optimal: OptimalSet, width: int) -> Iterator[Eigenvalue]:
    """Yield the eigenvalues of deviations in the range of the features, together with the bias."""
    zeros = optimal.dimension - (optimal.feature_dim - width) * width
    zeros += optimal.optimum.groups.shift_is_free
    sector = "in range" if width else "bias"
    if is_symmetric(optimal):
        pairs = symmetric_values(optimal)
    else:
        pairs = [(value, 1) for value in torch.linalg.eigvalsh(_range_matrix(optimal, width)).tolist()]
    yield Eigenvalue(0.0, zeros, sector)
    for value, multiplicity in sorted(pairs, key=lambda pair: abs(pair[0])):
        # The smallest values are the zeros, up to rounding; they are listed exactly above.
        left = max(0, multiplicity - zeros)
        zeros -= multiplicity - left
        yield Eigenvalue(value, left, sector)


def _range_matrix(optimal: OptimalSet, width: int) -> Tensor:
    """Compute the Hessian in head ``(K, r)``, scaled mean features ``(M, r)`` and bias, flattened in this order."""
    groups, bias = optimal.optimum.groups, optimal.optimum.factors.bias
    weight, features = _frames(optimal, width)
    (M, K), roots = groups.targets.shape, groups.counts.sqrt()
    logits = groups.logits(features @ weight.T, bias)
    multipliers = groups.multipliers(logits)
    outputs = 0 if bias is None else K
    eye_k, eye_m = (torch.eye(size, dtype=weight.dtype, device=weight.device) for size in (K, M))
    # Derivative of the scaled logits (M, K) in each variable.
    parts = [
        torch.einsum("mr,kl->mklr", features, eye_k).reshape(M, K, K * width),
        torch.einsum("mp,kr->mkpr", eye_m, weight).reshape(M, K, M * width),
        torch.einsum("m,kl->mkl", roots, eye_k)[:, :, :outputs],
    ]
    change = torch.cat(parts, dim=2)
    product = torch.einsum("mkl,mlx->mkx", groups.loss.hessian(logits, groups.targets), change)
    matrix = torch.einsum("mkx,mky->xy", change, product) / groups.num_samples
    heads, means = K * width, M * width
    diagonal = matrix.diagonal()
    diagonal[:heads] += optimal.lambda_w
    diagonal[heads : heads + means] += optimal.lambda_h
    if groups.lambda_b:
        diagonal[heads + means :] += groups.lambda_b
    eye_r = torch.eye(width, dtype=weight.dtype, device=weight.device)
    cross = torch.einsum("mk,rs->krms", multipliers, eye_r).reshape(heads, means)
    matrix[:heads, heads : heads + means] += cross
    matrix[heads : heads + means, :heads] += cross.T
    return (matrix + matrix.T) / 2
