r"""Coordinates of the points that are invariant under permutations of exchangeable classes.

Classes with the same count may be exchangeable; they are then of the same *kind*. The optimal logits are unique, so
that they are invariant under permutations within a kind. Let there be C kinds with :math:`m_c` classes of kind c, and
let Q be the ``(K, C)`` matrix whose columns are the normalised indicators of the kinds. Invariant scaled logits are

.. math:: \hat Z = Q T Q^\top + \sum_c a_c (I_c - J_c / m_c),

with a matrix T, the *core*, and for each kind with more than one class a number :math:`a_c`, the *difference* of its
classes. Squared norms and nuclear norms are sums over these parts:
:math:`\|\hat Z\|_* = \|T\|_* + \sum_c (m_c - 1) |a_c|`. A long-tailed data set of a thousand classes has about a
hundred kinds, so that the coordinates are few. Without exchangeable classes there is only the core.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nclightning.problems.groups import Factors, Groups
from nclightning.problems.preconditioning import LowRankTerm

if TYPE_CHECKING:
    from collections.abc import Callable

    from nclightning.problems.row_hessians import Flanks, Peaks, RowHessians

__all__ = ["Coordinates", "Parts"]


class Parts(NamedTuple):
    """A point, direction or gradient. The coordinates preserve the norm of scaled logits and bias.

    Attributes:
        core: T, ``(R, C)``.
        differences: a times the square root of ``m - 1``, for the kinds with more than one class.
        bias: ``(C,)``; empty without a bias.
    """

    core: Tensor
    differences: Tensor
    bias: Tensor

    def map(self, function: Callable[..., Tensor], *others: Parts) -> Parts:
        """Apply a function to each part."""
        return Parts(*(function(*each) for each in zip(self, *others, strict=True)))

    def plus(self, other: Parts, times: float = 1.0) -> Parts:
        """Add a multiple of another."""
        return self.map(lambda a, b: a + times * b, other)

    def dot(self, other: Parts) -> float:
        """Inner product."""
        return float(sum((a * b).sum() for a, b in zip(self, other, strict=True)))

    def norm(self) -> float:
        """Euclidean norm."""
        return math.sqrt(self.dot(self))


class Coordinates:
    """The map from coordinates to the logits of one class of each kind, and its transpose for gradients.

    With a free bias, the core is restricted to the orthogonal complement of d, the vector of the square roots of the
    counts: the bias has the same effect as a component along d, without a penalty. The core then has one row less. In
    the same way it has one column less for a loss that is invariant to a shift of all logits of a sample.
    """

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        kinds = _kinds(groups)
        like = groups.targets
        M, K = like.shape
        self.kinds = kinds
        if kinds is None:
            self.first = torch.arange(M, device=like.device)
            self.row_sizes, self.column_sizes = like.new_ones(M), like.new_ones(K)
            self.many = like.new_zeros(0, dtype=torch.int64)
        else:
            self.row_sizes = self.column_sizes = torch.bincount(kinds).to(like)
            C = len(self.row_sizes)
            order = torch.arange(K - 1, -1, -1, device=like.device)
            self.first = order.new_zeros(C).scatter_(0, kinds[order], order)
            self.many = torch.nonzero(self.row_sizes > 1).flatten()
        self.weights = (self.row_sizes[self.many] - 1).sqrt()
        self.targets, self.counts = like[self.first], groups.counts[self.first]
        self.total = groups.num_samples
        self.has_bias = groups.lambda_b is not None
        # Reflections that remove from the core the row that the bias replaces and the column that the loss ignores.
        self.row_axis = _mirror((self.row_sizes * self.counts).sqrt()) if groups.lambda_b == 0 else None
        self.column_axis = _mirror(self.column_sizes.sqrt()) if groups.loss.shift_invariant else None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the core."""
        return len(self.first) - (self.row_axis is not None), len(self.column_sizes) - (self.column_axis is not None)

    def zero(self, bias: Tensor | None) -> Parts:
        """Coordinates of the point with logits zero and a given bias ``(K,)``."""
        like, size = self.targets, len(self.column_sizes)
        folded = like.new_zeros(0) if bias is None else self._sums(bias.unsqueeze(0))[0] / self.column_sizes.sqrt()
        assert bias is None or len(folded) == size
        return Parts(like.new_zeros(self.shape), like.new_zeros(len(self.many)), folded)

    def logits(self, parts: Parts) -> Tensor:
        """Map coordinates to the logits ``(R, K)`` of the first class of each kind. The map is linear."""
        rows = self.lifted_columns(self.lifted(parts.core).T).T / (self.row_sizes * self.counts).sqrt().unsqueeze(1)
        roots = self.column_sizes.sqrt()
        rows = rows / roots
        if self.has_bias:
            rows = rows + parts.bias / roots
        if self.kinds is None:
            return rows
        differences = torch.zeros_like(self.counts)
        differences[self.many] = parts.differences / self.weights
        differences = differences / self.counts.sqrt()
        rows = (rows - torch.diag(differences / self.row_sizes))[:, self.kinds]
        rows[torch.arange(len(rows), device=rows.device), self.first] += differences
        return rows

    def gradient(self, residuals: Tensor) -> Parts:
        """Compute the gradient of the mean loss from its gradients in the logits ``(R, K)``."""
        sums = self._sums(residuals)
        share = self.row_sizes * self.counts / self.total
        roots = self.column_sizes.sqrt()
        core = sums * (share / (self.row_sizes * self.counts).sqrt()).unsqueeze(1) / roots
        differences = self.weights
        if len(differences):
            own = residuals[self.many, self.first[self.many]] - sums[self.many, self.many] / self.row_sizes[self.many]
            differences = own * (share / self.counts.sqrt())[self.many] / self.weights
        bias = share @ sums / roots if self.has_bias else sums.new_zeros(0)
        core = _lowered(_lowered(core, self.row_axis).T, self.column_axis).T
        return Parts(core, differences, bias)

    def curvatures(self, hessians: RowHessians | Flanks, left: Tensor, right: Tensor) -> Tensor:
        """Second derivatives of the mean loss along the core's ``u v^T``, for the columns of two matrices.

        Args:
            hessians: Hessians of the loss of each row.
            left: Vectors u, ``(R, p)``, in coordinates of the core.
            right: Vectors v, ``(C, q)``, in coordinates of the core.

        Returns:
            ``(p, q)``.
        """
        axes = self.lifted_columns(right) / self.column_sizes.sqrt().unsqueeze(1)
        product = hessians.along(axes if self.kinds is None else axes[self.kinds])
        return self.lifted(left).square().T @ product / self.total

    def curvatures_of_differences(self, hessians: RowHessians | Flanks) -> Tensor:
        """Compute the second derivatives of the mean loss along each entry of ``differences``."""
        like = self.column_sizes
        if not len(self.weights):
            return self.weights
        rows = self.logits(Parts(like.new_zeros(self.shape), torch.ones_like(self.weights), torch.zeros_like(like)))
        return (hessians.square(rows) * self.row_sizes * self.counts / self.total)[self.many]

    def hessian_of_bias(self, hessians: RowHessians | Flanks) -> Tensor:
        """Compute the Hessian of the mean loss in the bias, ``(C, C)``; empty without a bias."""
        if not self.has_bias:
            return self.targets.new_zeros(0, 0)
        whole = hessians.summed(self.row_sizes * self.counts / self.total)
        roots = self.column_sizes.sqrt()
        return self._sums(self._sums(whole).T) / roots / roots.unsqueeze(1)

    def low_rank(self, peaks: Peaks, left: Tensor, right: Tensor) -> LowRankTerm:
        """Return the peaks of all rows as one low-rank term: one vector per row; their outer products are summed.

        Args:
            peaks: Peaks of the rows' Hessians.
            left: Orthonormal columns ``(R, p)``, in coordinates of the core.
            right: Orthonormal columns ``(C, q)``, in coordinates of the core.
        """
        sums, roots = self._sums(peaks.axes), self.column_sizes.sqrt()
        share = self.row_sizes * self.counts / self.total
        heights = (share * peaks.heights[:, 0]).sqrt()
        lefts = (heights / (self.row_sizes * self.counts).sqrt()).unsqueeze(1) * self.lifted(left)
        own = peaks.axes[self.many, self.first[self.many]] - sums[self.many, self.many] / self.row_sizes[self.many]
        differences = heights.new_zeros(len(heights), len(self.many))
        differences[self.many, torch.arange(len(self.many), device=self.many.device)] = (
            heights[self.many] * own / self.counts[self.many].sqrt() / self.weights
        )
        bias = heights.unsqueeze(1) * sums / roots if self.has_bias else sums[:, :0]
        return LowRankTerm(lefts, sums / roots @ self.lifted_columns(right), differences, bias)

    def factors(self, left: Tensor, singular: Tensor, right: Tensor, rest: Parts) -> Factors:
        """Compute the singular value decomposition of the scaled logits from that of the core."""
        left, right = self.lifted(left), self.lifted_columns(right)
        parts = [(self._unfolded(left, self.row_sizes), singular, self._unfolded(right, self.column_sizes))]
        for kind, differences in zip(self.many.tolist(), (rest.differences / self.weights).tolist(), strict=True):
            if differences:
                assert self.kinds is not None
                members = torch.nonzero(self.kinds == kind).flatten()
                frame = left.new_zeros(len(self.kinds), len(members) - 1)
                frame[members] = _lifted(
                    torch.eye(len(members) - 1, dtype=left.dtype, device=left.device),
                    _mirror(left.new_ones(len(members))),
                )
                parts.append(
                    (frame, left.new_full((len(members) - 1,), abs(differences)), frame if differences > 0 else -frame)
                )
        u, s, v = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
        order = s.argsort(descending=True, stable=True)
        bias = None if not self.has_bias else self._unfolded(rest.bias.unsqueeze(1), self.column_sizes)[:, 0]
        if bias is not None and self.groups.shift_is_free:
            bias = bias - bias.mean()
        return Factors(u[:, order], s[order], v[:, order], bias)

    def lifted(self, core: Tensor) -> Tensor:
        """Add the row that a free bias removes from the core."""
        return _lifted(core, self.row_axis)

    def lifted_columns(self, columns: Tensor) -> Tensor:
        """Add the column that a shift-invariant loss removes; ``columns`` is transposed."""
        return _lifted(columns, self.column_axis)

    def _sums(self, rows: Tensor) -> Tensor:
        """Sum the columns of each kind."""
        if self.kinds is None:
            return rows
        return rows.new_zeros(len(rows), len(self.column_sizes)).index_add_(1, self.kinds, rows)

    def _unfolded(self, columns: Tensor, sizes: Tensor) -> Tensor:
        """Expand columns that have one row per kind to one row per class."""
        columns = columns / sizes.sqrt().unsqueeze(1)
        return columns if self.kinds is None else columns[self.kinds]


def _kinds(groups: Groups) -> Tensor | None:
    """Return the kind of each class ``(K,)``; None if all kinds are different."""
    targets = groups.targets
    if not groups.loss.exchangeable or targets.shape[0] != targets.shape[1]:
        return None
    marks = torch.stack([groups.counts, targets.diagonal()], dim=1)
    unique, kinds = torch.unique(marks, dim=0, return_inverse=True)
    if len(unique) == len(marks):
        return None
    # Exchanging two classes for two others of the same kinds must not change an entry of the targets.
    size = len(unique)
    pair = kinds.unsqueeze(1) * size + kinds
    off = ~torch.eye(len(kinds), dtype=torch.bool, device=targets.device)
    least, most = (
        targets.new_zeros(size * size).scatter_reduce(0, pair[off], targets[off], how, include_self=False)
        for how in ("amin", "amax")
    )
    return kinds if torch.equal(least, most) else None


def _mirror(axis: Tensor) -> Tensor:
    """Return the normal of the reflection that maps an axis with positive entries to the first coordinate axis."""
    axis = axis / axis.norm()
    axis[0] += 1
    mirror: Tensor = axis / axis.norm()
    return mirror


def _lifted(rows: Tensor, mirror: Tensor | None) -> Tensor:
    """Map coordinates in a basis of the orthogonal complement of the axis to rows."""
    if mirror is None:
        return rows
    rows = torch.cat([rows.new_zeros(1, rows.shape[1]), rows])
    return rows - 2 * torch.outer(mirror, mirror @ rows)


def _lowered(rows: Tensor, mirror: Tensor | None) -> Tensor:
    """Apply the transpose of :func:`_lifted`."""
    return rows if mirror is None else (rows - 2 * torch.outer(mirror, mirror @ rows))[1:]
