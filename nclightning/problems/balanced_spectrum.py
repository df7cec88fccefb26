r"""The part of the spectrum within the range of the features, for any number of balanced classes.

The Hessian commutes with permutations of the classes, so that it splits by the irreducible representations of the
permutation group. A deviation of the head or of the mean features is a matrix ``(K, r)``, or ``(K, K)`` in coordinates
of the classes.

- Five matrices are invariant under the permutations that fix the first class. They give the eigenvalues in the trivial
  and in the standard representation.
- The remaining matrices are either symmetric with zero row sums and zero diagonal, or skew with zero row sums. One
  matrix of each kind gives its eigenvalue.

So the products of the Hessian with about fifteen vectors give all eigenvalues.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nclightning.problems.simplex import has_exchangeable_classes

if TYPE_CHECKING:
    from nclightning.problems.optimal_set import OptimalSet

__all__ = ["is_symmetric", "symmetric_values"]


def is_symmetric(optimal: OptimalSet) -> bool:
    """Whether the classes are exchangeable, and the optimal features span all differences of classes."""
    groups, rank, d = optimal.optimum.groups, optimal.optimum.rank, optimal.feature_dim
    K = groups.targets.shape[1]
    return K >= 4 and d >= rank >= K - 1 and has_exchangeable_classes(groups)


class _Deviation(NamedTuple):
    """A deviation of head and scaled mean features, in coordinates of the range, and of the bias."""

    head: Tensor
    means: Tensor
    bias: Tensor

    def dot(self, other: _Deviation) -> float:
        return float(sum((a * b).sum() for a, b in zip(self, other, strict=True)))


class _Hessian:
    """The Hessian at an optimum, for deviations within the range."""

    def __init__(self, optimal: OptimalSet) -> None:
        self.optimal, self.groups = optimal, optimal.optimum.groups
        self.weight, self.features = optimal.weight_factor, optimal.scaled_features
        self.logits = optimal.optimum.logits
        self.multipliers = self.groups.multipliers(self.logits)

    def __call__(self, move: _Deviation) -> _Deviation:
        groups, roots = self.groups, self.groups.counts.sqrt().unsqueeze(1)
        change = (move.means @ self.weight.T + self.features @ move.head.T) / roots
        product = groups.loss.curvature(self.logits, groups.targets, change + move.bias)
        scaled = groups.scaled(product)
        head = scaled.T @ self.features + self.multipliers.T @ move.means + self.optimal.lambda_w * move.head
        means = scaled @ self.weight + self.multipliers @ move.head + self.optimal.lambda_h * move.means
        return _Deviation(head, means, groups.shares @ product + (groups.lambda_b or 0.0) * move.bias)


def symmetric_values(optimal: OptimalSet) -> list[tuple[float, int]]:
    """Return the eigenvalues with multiplicities of deviations of head, mean features and bias within the range."""
    hessian = _Hessian(optimal)
    K = optimal.optimum.groups.targets.shape[1]
    one = torch.zeros(K, dtype=torch.float64, device=optimal.optimum.groups.targets.device)
    one[0] = 1
    ones = torch.ones_like(one)
    rest = ones - one
    pairs = [(a, b) for a in (one, rest) for b in (one, rest)]
    matrices = [*(torch.outer(a, b) for a, b in pairs), torch.diag(rest)]
    invariant = [torch.eye(K).to(one), torch.outer(ones, ones)]
    found = []
    trivial = _values(hessian, _copies(optimal, invariant, [ones]), [])
    both = _values(hessian, _copies(optimal, matrices, [one, rest]), _copies(optimal, invariant, [ones]))
    found += [(value, 1) for value in trivial] + [(value, K - 1) for value in both]
    axes = torch.eye(K).to(one)[:, :4].T
    square = torch.outer(axes[0] - axes[1], axes[2] - axes[3])
    found += [(value, K * (K - 3) // 2) for value in _values(hessian, _copies(optimal, [square + square.T], []), [])]
    cycle = torch.outer(axes[0], axes[1]) + torch.outer(axes[1], axes[2]) + torch.outer(axes[2], axes[0])
    found += [
        (value, (K - 1) * (K - 2) // 2) for value in _values(hessian, _copies(optimal, [cycle - cycle.T], []), [])
    ]
    return found


def _copies(optimal: OptimalSet, matrices: list[Tensor], biases: list[Tensor]) -> list[_Deviation]:
    """Return each matrix as a deviation of the head and as one of the mean features, each vector as one of the bias."""
    frame = optimal.optimum.factors.right
    found = []
    for matrix in matrices:
        part = matrix @ frame
        zero, none = torch.zeros_like(part), torch.zeros_like(part[:, 0])
        found += [_Deviation(part, zero, none), _Deviation(zero, part, none)]
    if optimal.optimum.groups.lambda_b is not None:
        zero = torch.zeros_like(frame)
        found += [_Deviation(zero, zero, bias) for bias in biases]
    return found


def _values(hessian: _Hessian, moves: list[_Deviation], without: list[_Deviation]) -> list[float]:
    """Return the eigenvalues on the span of ``moves`` orthogonal to the span of ``without``; both are invariant."""
    left_out = _orthonormal(without, [])
    basis = _orthonormal(moves, left_out)
    images = [hessian(move) for move in basis]
    matrix = torch.tensor([[a.dot(b) for b in images] for a in basis], dtype=torch.float64)
    values: list[float] = torch.linalg.eigvalsh((matrix + matrix.T) / 2).tolist() if len(basis) else []
    return values


def _orthonormal(moves: list[_Deviation], others: list[_Deviation]) -> list[_Deviation]:
    """Orthonormalise by Gram-Schmidt, applied twice; moves that depend on earlier ones up to rounding are dropped."""
    basis: list[_Deviation] = []
    for move in moves:
        size, now = max(1.0, move.dot(move) ** 0.5), move
        for _ in range(2):
            for other in (*others, *basis):
                overlap = now.dot(other)
                now = _Deviation(*(a - overlap * b for a, b in zip(now, other, strict=True)))
        norm = now.dot(now) ** 0.5
        if norm > 1e-8 * size:
            basis.append(_Deviation(*(part / norm for part in now)))
    return basis
