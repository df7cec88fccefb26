r"""The loss of samples above that of their class means, from one pass and without cancellation.

With :math:`z_i = W h_i + b` and the loss :math:`L(z, y) = \phi(z) - z_y` up to a constant, phi convex (cross-entropy:
the logarithm of the sum of exponentials; MSE: :math:`\frac12\|z\|^2`), let
:math:`D(z, a) = \phi(z) - \phi(a) - \langle\nabla\phi(a), z - a\rangle \ge 0` be its Bregman divergence. Sums over the
samples of a class with mean :math:`\bar z` obey

.. math::
    \sum_i L(z_i, y) - n L(\bar z, y) = \sum_i D(z_i, \bar z), \qquad
    \sum_i D(z_i, a) = \sum_i D(z_i, \bar z) + n D(\bar z, a)

for every a (Banerjee et al., Clustering with Bregman divergences, 2005, Prop. 1). The second one moves a sum around one
mean to another, as centred moments are moved: all terms are non-negative, so that nothing cancels. Divergences are
formed from differences of features, so that equal features give exact zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["ExcessLoss", "HeadLoss"]

# Below this exp(t) - 1 - t is taken from its Taylor series with these coefficients, whose rest is 1e-17 of it. Above it
# the difference loses at most five bits.
_SERIES_BELOW = 0.125
_COEFFICIENTS = (1 / 2, 1 / 6, 1 / 24, 1 / 120, 1 / 720, 1 / 5040, 1 / 40320, 1 / 362880, 1 / 3628800, 1 / 39916800)
# Above the first a probability times exp(t) is taken from its logarithm: the probability may be too small for a number.
# Above the second it is too large for one, and so would be the sum of as many as there are classes.
_LARGE_EXPONENT, _LARGEST_EXPONENT = 30.0, 680.0
# So many numbers are taken at once, of more rows than classes: what is done once for each class takes no longer. Of
# these, so many at a time: what is formed of them stays in the cache of a CPU.
_ELEMENTS_AT_ONCE, _ELEMENTS_AT_A_TIME, _LEAST_ROWS = 2**18, 2**17, 256


@dataclass(frozen=True)
class HeadLoss:
    """A loss of the logits of a linear head.

    Attributes:
        loss: ``"mse"`` or ``"ce"``.
        weight: ``(K, d)``, float64.
        bias: ``(K,)``, float64, or None.
    """

    loss: Literal["mse", "ce"]
    weight: Tensor
    bias: Tensor | None

    def table(self, points: Tensor) -> Tensor:
        """What the divergence from the logits of some features needs of them.

        Args:
            points: Features ``(B, d)``.

        Returns:
            A row for each: logarithms of the probabilities ``(B, K)``; for MSE nothing, ``(B, 0)``.
        """
        if self.loss == "mse":
            return points.new_zeros(len(points), 0)
        return torch.log_softmax(linear(points, self.weight, self.bias), dim=1)

    def divergence(self, shifts: Tensor, rows: Tensor) -> Tensor:
        """Bregman divergence of the logits of features that are shifted, from those without the shift.

        Args:
            shifts: ``(B, d)``.
            rows: Rows of :meth:`table` of the features without the shift.

        Returns:
            Non-negative ``(B,)``.
        """
        change = shifts @ self.weight.T
        return change.square_().sum(dim=1) / 2 if self.loss == "mse" else _cumulant(rows, change)


def _cumulant(log_probability: Tensor, change: Tensor) -> Tensor:
    r"""Logarithm of the mean of :math:`e^t` without its linear term, under probabilities in the last dimension."""
    probability = log_probability.exp()
    t = change - (probability * change).sum(dim=1, keepdim=True)
    # The mean of t is zero, so that this is the logarithm of the mean, and every term is non-negative.
    terms = probability * _exponential_excess(t)
    if t.device.type == "cpu" and not bool((t > _LARGE_EXPONENT).any()):  # To ask another device takes longer.
        return torch.log1p(terms.sum(dim=1))
    grown = log_probability + t
    terms = torch.where(t > _LARGE_EXPONENT, grown.clamp(max=_LARGEST_EXPONENT).exp() - probability * (1 + t), terms)
    overflows = (grown > _LARGEST_EXPONENT).any(dim=1)
    return torch.where(overflows, torch.logsumexp(grown, dim=1), torch.log1p(terms.sum(dim=1)))


def _exponential_excess(t: Tensor) -> Tensor:
    """``exp(t) - 1 - t`` to full relative accuracy, of t that is not large."""
    series = torch.full_like(t, _COEFFICIENTS[-1])
    for coefficient in reversed(_COEFFICIENTS[:-1]):
        series.mul_(t).add_(coefficient)
    series.mul_(t).mul_(t)
    return torch.where(t.abs() <= _SERIES_BELOW, series, torch.expm1(t.clamp(max=_LARGE_EXPONENT)) - t)


class ExcessLoss(NamedTuple):
    """Sums over samples of their loss above that of their class mean. Nothing in it depends on an optimum.

    Attributes:
        counts: Samples per class ``(K,)``.
        anchors: A sample of each class ``(K, d)``; zero for a class without samples.
        offsets: Class means minus anchors ``(K, d)``, so that of equal samples they are exactly zero.
        sums: Excess loss of each class ``(K,)``, a sum over its samples.
    """

    counts: Tensor
    anchors: Tensor
    offsets: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, num_classes: int, feature_dim: int, device: torch.device | str | None = None) -> ExcessLoss:
        """That of no samples.

        Args:
            num_classes: K.
            feature_dim: d.
            device: Where it lives.

        Returns:
            The neutral element of :meth:`merge`, float64.
        """
        zeros = torch.zeros(num_classes, feature_dim + 2, dtype=torch.float64, device=device)
        return cls(zeros[:, 0], zeros[:, 2:], zeros[:, 2:], zeros[:, 1])

    def add(self, features: Tensor, labels: Tensor, head: HeadLoss) -> ExcessLoss:
        """That of these and further samples, on their device and without a transfer to the host.

        Args:
            features: ``(N, d)`` of any floating dtype. Many at once cost less than few at a time.
            labels: ``(N,)`` int64; samples with others than ``0..K-1`` are left out.
            head: The head, the same for all samples.

        Returns:
            A new one.
        """
        num_classes, dim = self.anchors.shape
        total, size = self, max(_ELEMENTS_AT_ONCE // dim, 4 * num_classes)
        with torch.no_grad():
            valid = (labels >= 0) & (labels < num_classes)
            # One bin more than classes takes the samples left out, so that no value is branched on.
            index = torch.where(valid, labels, num_classes)
            for rows, own in zip(torch.split(features.detach(), size), torch.split(index, size), strict=True):
                total = total._add(rows, own, head) if len(rows) else total
        return total

    def _add(self, features: Tensor, labels: Tensor, head: HeadLoss) -> ExcessLoss:
        num_classes, dim = self.anchors.shape
        place = torch.arange(len(labels), device=labels.device)
        first = torch.full((num_classes + 1,), len(labels) - 1, device=labels.device)
        first.scatter_reduce_(0, labels, place, "amin")
        known = torch.cat([self.counts, self.counts.new_zeros(1)]).unsqueeze(1) > 0
        anchors = torch.where(known, _with_a_row(self.anchors), features.index_select(0, first).to(self.anchors))
        counts, offsets = torch.zeros_like(anchors[:, 0]), torch.zeros_like(anchors)
        size = max(_ELEMENTS_AT_A_TIME // max(dim, num_classes), _LEAST_ROWS)
        parts = []
        for rows, index in zip(torch.split(features, size), torch.split(labels, size), strict=True):
            away = rows.to(anchors.dtype) - anchors.index_select(0, index)
            offsets.index_add_(0, index, away)
            counts.index_add_(0, index, torch.ones_like(index, dtype=counts.dtype))
            parts.append((away, index))
        offsets /= counts.clamp(min=1).unsqueeze(1)
        added = ExcessLoss(counts, anchors, offsets, torch.zeros_like(counts))
        moved, table = self._moved(ExcessLoss(*(each.narrow(0, 0, num_classes) for each in added)), head)
        offsets = _with_a_row(moved.offsets)
        for away, index in parts:
            # The table has no row for samples left out, whose divergences are dropped.
            rows = table.index_select(0, index.clamp(max=num_classes - 1))
            values = head.divergence(away.sub_(offsets.index_select(0, index)), rows)
            added.sums.index_add_(0, index, values)
        return moved._replace(sums=moved.sums + added.sums.narrow(0, 0, num_classes))

    @property
    def means(self) -> Tensor:
        """Class means ``(K, d)``; zero for a class without samples."""
        return self.anchors + self.offsets

    def merge(self, other: ExcessLoss, head: HeadLoss) -> ExcessLoss:
        """That of the union of two disjoint sets of samples.

        Args:
            other: Of the other samples.
            head: The head.

        Returns:
            A new one.
        """
        moved, table = self._moved(other, head)
        return moved._replace(sums=moved.sums + other._around(moved, table, head))

    def _moved(self, other: ExcessLoss, head: HeadLoss) -> tuple[ExcessLoss, Tensor]:
        """Counts and means of both, with the excess loss of these samples alone, and what is known of the new means."""
        mine, theirs = (self.counts > 0).unsqueeze(1), (other.counts > 0).unsqueeze(1)
        counts = self.counts + other.counts
        shift = torch.where(mine & theirs, (other.anchors - self.anchors) + (other.offsets - self.offsets), 0)
        shift = (other.counts / counts.clamp(min=1)).unsqueeze(1) * shift
        anchors = torch.where(mine, self.anchors, torch.where(theirs, other.anchors, 0))
        offsets = torch.where(mine, self.offsets + shift, torch.where(theirs, other.offsets, 0))
        moved = ExcessLoss(counts, anchors, offsets, self.sums)
        table = head.table(moved.means)
        return moved._replace(sums=self._around(moved, table, head)), table

    def _around(self, others: ExcessLoss, table: Tensor, head: HeadLoss) -> Tensor:
        """Excess loss of these samples above that of other means."""
        if self.counts.is_cpu and not self.counts.any():  # To ask another device takes longer.
            return self.sums
        away = (self.anchors - others.anchors) + (self.offsets - others.offsets)
        away = torch.where((self.counts > 0).unsqueeze(1), away, 0)
        size = max(_ELEMENTS_AT_A_TIME // len(away), _LEAST_ROWS)
        values = [
            head.divergence(each, table.narrow(0, i * size, len(each)))
            for i, each in enumerate(torch.split(away, size))
        ]
        return self.sums + self.counts * torch.cat(values)


def _with_a_row(rows: Tensor) -> Tensor:
    """Append a row of zeros, for samples that are left out."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
