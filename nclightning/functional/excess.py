r"""The loss of samples above that of their class means, from one pass and without cancellation.

With logits :math:`z_i = W h_i + b` and a convex loss :math:`L(z, y)` let
:math:`D(z, a) = L(z, y) - L(a, y) - \langle\nabla L(a, y), z - a\rangle \ge 0` be its Bregman divergence. Sums over the
samples of a class, which share the target y and have the mean :math:`\bar z`, obey

.. math::
    \sum_i L(z_i, y) - n L(\bar z, y) = \sum_i D(z_i, \bar z), \qquad
    \sum_i D(z_i, a) = \sum_i D(z_i, \bar z) + n D(\bar z, a)

for every a (Banerjee et al., Clustering with Bregman divergences, 2005, Prop. 1). The second one moves a sum around one
mean to another, as centred moments are moved: all terms are non-negative, so that nothing cancels. Divergences are
formed from differences of features, so that equal features give exact zeros.

Classes may be any groups of samples with the same target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["ExcessLoss", "HeadLoss"]

# So many numbers are taken at once, of more rows than classes: what is done once for each class takes no longer. Of
# these, so many at a time: what is formed of them stays in the cache of a CPU.
_ELEMENTS_AT_ONCE, _ELEMENTS_AT_A_TIME, _LEAST_ROWS = 2**18, 2**17, 256
# 128 MiB, 4096 classes.
_MOST_RESIDUALS = 2**24


class LossOfLogits(Protocol):
    """What is asked of a loss, as a :class:`nclightning.problems.Loss` answers it; all arguments are ``(B, K)``."""

    def divergence_along(self, step: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Bregman divergence of ``reference + step`` from ``reference``, ``(B,)``."""

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Gradient in the logits, ``(B, K)``."""


@dataclass(frozen=True)
class HeadLoss:
    """A loss of the logits of a linear head.

    Attributes:
        loss: The loss.
        targets: ``(M, K)``, float64; row m is the target of the samples with label m.
        weight: ``(K, d)``, float64.
        bias: ``(K,)``, float64, or None.
    """

    loss: LossOfLogits
    targets: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self, features: Tensor) -> Tensor:
        """Logits ``(B, K)`` of features ``(B, d)``."""
        return linear(features, self.weight, self.bias)


class ExcessLoss(NamedTuple):
    r"""Sums over samples of their loss above that of their class mean. Nothing in it depends on an optimum.

    Attributes:
        counts: Samples per class ``(M,)``.
        anchors: A sample of each class ``(M, d)``; zero for a class without samples.
        offsets: Class means minus anchors ``(M, d)``, so that of equal samples they are exactly zero.
        sums: Excess loss of each class ``(M,)``, a sum over its samples.
        residuals: Sum of the gradients of the loss in the logits :math:`r_i` over the samples of each class ``(M, K)``;
            ``(M, 0)`` where that would be too many numbers.
        slopes: Sum of :math:`\langle r_i, W h_i\rangle` over the samples of each class ``(M,)``: how the loss changes
            with the scale of head or features.
    """

    counts: Tensor
    anchors: Tensor
    offsets: Tensor
    sums: Tensor
    residuals: Tensor
    slopes: Tensor

    @classmethod
    def empty(
        cls, num_classes: int, feature_dim: int, num_outputs: int, device: torch.device | str | None = None
    ) -> ExcessLoss:
        """That of no samples.

        Args:
            num_classes: M.
            feature_dim: d.
            num_outputs: K.
            device: Where it lives.

        Returns:
            The neutral element of :meth:`merge`, float64.
        """
        columns = num_outputs if num_classes * num_outputs <= _MOST_RESIDUALS else 0
        zeros = torch.zeros(num_classes, max(feature_dim, columns), dtype=torch.float64, device=device)
        number, rows = zeros[:, 0], zeros[:, :feature_dim]
        return cls(number, rows, rows, number, zeros[:, :columns], number)

    def add(self, features: Tensor, labels: Tensor, head: HeadLoss) -> ExcessLoss:
        """That of these and further samples, on their device and without a transfer to the host.

        Args:
            features: ``(N, d)`` of any floating dtype. Many at once cost less than few at a time.
            labels: ``(N,)`` int64; samples with others than ``0..M-1`` are left out.
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
        counts, offsets = anchors.new_zeros(len(anchors)), torch.zeros_like(anchors)
        size = max(_ELEMENTS_AT_A_TIME // max(dim, len(head.weight)), _LEAST_ROWS)
        parts = []
        for rows, index in zip(torch.split(features, size), torch.split(labels, size), strict=True):
            away = rows.to(anchors.dtype) - anchors.index_select(0, index)
            offsets.index_add_(0, index, away)
            counts.index_add_(0, index, torch.ones_like(index, dtype=counts.dtype))
            parts.append((away, index))
        offsets /= counts.clamp(min=1).unsqueeze(1)
        zero = torch.zeros_like(counts)
        added = ExcessLoss(counts, anchors, offsets, zero, _with_a_row(torch.zeros_like(self.residuals)), zero.clone())
        moved, logits = self._moved(ExcessLoss(*(each.narrow(0, 0, num_classes) for each in added)), head)
        offsets = _with_a_row(moved.offsets)
        for away, index in parts:
            # There are no logits and targets for samples left out, of which nothing is kept.
            known = index.clamp(max=num_classes - 1)
            targets, reference = head.targets.index_select(0, known), logits.index_select(0, known)
            step = away.sub_(offsets.index_select(0, index)) @ head.weight.T
            added.sums.index_add_(0, index, head.loss.divergence_along(step, reference, targets))
            residuals = head.loss.residual(step.add_(reference), targets)
            without = step if head.bias is None else step - head.bias
            added.slopes.index_add_(0, index, (residuals * without).sum(dim=1))
            if added.residuals.shape[1]:
                added.residuals.index_add_(0, index, residuals)
        return moved._replace(
            **{
                name: getattr(moved, name) + getattr(added, name).narrow(0, 0, num_classes)
                for name in ("sums", "residuals", "slopes")
            }
        )

    @property
    def means(self) -> Tensor:
        """Class means ``(M, d)``; zero for a class without samples."""
        return self.anchors + self.offsets

    def merge(self, other: ExcessLoss, head: HeadLoss) -> ExcessLoss:
        """That of the union of two disjoint sets of samples.

        Args:
            other: Of the other samples.
            head: The head.

        Returns:
            A new one.
        """
        moved, logits = self._moved(other, head)
        return moved._replace(
            sums=moved.sums + other._around(moved, logits, head),
            residuals=self.residuals + other.residuals,
            slopes=self.slopes + other.slopes,
        )

    def _moved(self, other: ExcessLoss, head: HeadLoss) -> tuple[ExcessLoss, Tensor]:
        """Counts and means of both, with sums over these samples alone, and the logits of the new means."""
        mine, theirs = (self.counts > 0).unsqueeze(1), (other.counts > 0).unsqueeze(1)
        counts = self.counts + other.counts
        shift = torch.where(mine & theirs, (other.anchors - self.anchors) + (other.offsets - self.offsets), 0)
        shift = (other.counts / counts.clamp(min=1)).unsqueeze(1) * shift
        anchors = torch.where(mine, self.anchors, torch.where(theirs, other.anchors, 0))
        offsets = torch.where(mine, self.offsets + shift, torch.where(theirs, other.offsets, 0))
        moved = self._replace(counts=counts, anchors=anchors, offsets=offsets)
        logits = head.logits(moved.means)
        return moved._replace(sums=self._around(moved, logits, head)), logits

    def _around(self, others: ExcessLoss, logits: Tensor, head: HeadLoss) -> Tensor:
        """Excess loss of these samples above that of other means, with their logits."""
        if self.counts.is_cpu and not self.counts.any():  # To ask another device takes longer.
            return self.sums
        away = (self.anchors - others.anchors) + (self.offsets - others.offsets)
        away = torch.where((self.counts > 0).unsqueeze(1), away, 0)
        size = max(_ELEMENTS_AT_A_TIME // len(head.weight), _LEAST_ROWS)
        pieces = zip(*(torch.split(each, size) for each in (away, logits, head.targets)), strict=True)
        values = [head.loss.divergence_along(shift @ head.weight.T, *rest) for shift, *rest in pieces]
        return self.sums + self.counts * torch.cat(values)


def _with_a_row(rows: Tensor) -> Tensor:
    """Append a row of zeros, for samples that are left out."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
