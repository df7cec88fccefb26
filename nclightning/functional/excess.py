r"""The excess loss: how much larger the loss of the samples is than the loss of their class means.

With logits :math:`z_i = W h_i + b` and a convex loss :math:`L(z, y)` let
:math:`D(z, a) = L(z, y) - L(a, y) - \langle\nabla L(a, y), z - a\rangle \ge 0` be its Bregman divergence. Sums over the
samples of a class, which share the target y and have the mean :math:`\bar z`, obey

.. math::
    \sum_i L(z_i, y) - n L(\bar z, y) = \sum_i D(z_i, \bar z), \qquad
    \sum_i D(z_i, a) = \sum_i D(z_i, \bar z) + n D(\bar z, a)

for every a (Banerjee et al., Clustering with Bregman divergences, 2005, Prop. 1). The second identity changes the
reference point of a sum, as in the parallel axis theorem. All terms are non-negative, so that nothing cancels. One
pass over the samples is enough. Divergences are formed from differences of features, so that equal features give
exact zeros.

A class may be any group of samples with the same target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from nclightning.functional.linear import ELEMENTS_PER_STEP

__all__ = ["ExcessLoss", "HeadLoss"]

# A block has about _ELEMENTS_PER_BLOCK elements, and more rows than classes, so that the work for each class takes no
# longer than that for the samples. Within a block, steps of ELEMENTS_PER_STEP elements or at least _LEAST_ROWS rows
# keep intermediate results in the cache of a CPU.
_ELEMENTS_PER_BLOCK, _LEAST_ROWS = 2 * ELEMENTS_PER_STEP, 256
# The (M, K) residuals are stored only up to this number of elements: 128 MiB, 4096 classes.
_MOST_RESIDUALS = 2**24


class LossOfLogits(Protocol):
    """The methods of a loss that are used here, as in :class:`nclightning.problems.Loss`. Arguments are ``(B, K)``."""

    def divergence_along(self, step: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        """Compute the Bregman divergence of ``reference + step`` from ``reference``, ``(B,)``."""

    def residual(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the gradient of the loss with respect to the logits, ``(B, K)``."""


@dataclass(frozen=True)
class HeadLoss:
    """A loss together with a linear head and the targets.

    Attributes:
        loss: The loss.
        targets: ``(M, K)``, float64. Row m is the target of all samples with label m.
        weight: ``(K, d)``, float64.
        bias: ``(K,)``, float64, or None.

    Example:
        >>> import torch
        >>> from nclightning.functional import HeadLoss
        >>> from nclightning.problems import CrossEntropy
        >>> identity = torch.eye(2, dtype=torch.float64)
        >>> head = HeadLoss(CrossEntropy(), targets=identity, weight=3 * identity, bias=None)
        >>> head.logits(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
        tensor([[3., 6.]], dtype=torch.float64)
    """

    loss: LossOfLogits
    targets: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self, features: Tensor) -> Tensor:
        """Compute the logits ``(B, K)`` of features ``(B, d)``."""
        return linear(features, self.weight, self.bias)


class ExcessLoss(NamedTuple):
    r"""Excess loss of each class: the loss of its samples minus the loss of their mean, summed over the samples.

    Merge the results of several batches with :meth:`merge`. They can be computed at any parameters, without an optimum.

    Attributes:
        counts: Samples per class ``(M,)``.
        anchors: One sample of each class ``(M, d)``; zero for a class without samples.
        offsets: Class means minus anchors ``(M, d)``; exactly zero if all samples of the class are equal.
        sums: Excess loss of each class ``(M,)``, a sum over its samples.
        residuals: Sum over the samples of each class of :math:`r_i`, the gradient of the loss with respect to the
            logits, ``(M, K)``; ``(M, 0)`` if that would be more than 128 MiB.
        slopes: Sum of :math:`\langle r_i, W h_i\rangle` over the samples of each class ``(M,)``, the derivative of the
            loss with respect to a factor of the head or of the features, at 1.

    Example:
        >>> import torch
        >>> from nclightning.functional import ExcessLoss, HeadLoss
        >>> from nclightning.problems import SquaredError
        >>> identity = torch.eye(2, dtype=torch.float64)
        >>> head = HeadLoss(SquaredError(), targets=identity, weight=identity, bias=None)
        >>> features = torch.tensor([[1.0, 0.5], [1.0, -0.5], [0.0, 1.0]], dtype=torch.float64)
        >>> empty = ExcessLoss.empty(num_classes=2, feature_dim=2, num_outputs=2)
        >>> empty.add(features, torch.tensor([0, 0, 1]), head).sums.round(decimals=6)  # 2 * 0.5 * 0.5^2 in class 0
        tensor([0.2500, 0.0000], dtype=torch.float64)
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
        """Make the excess loss of no samples.

        Args:
            num_classes: M.
            feature_dim: d.
            num_outputs: K.
            device: Device of the tensors.

        Returns:
            The neutral element of :meth:`merge`, float64.
        """
        columns = num_outputs if num_classes * num_outputs <= _MOST_RESIDUALS else 0
        zeros = torch.zeros(num_classes, max(feature_dim, columns), dtype=torch.float64, device=device)
        number, rows = zeros[:, 0], zeros[:, :feature_dim]
        return cls(number, rows, rows, number, zeros[:, :columns], number)

    def add(self, features: Tensor, labels: Tensor, head: HeadLoss) -> ExcessLoss:
        """Add samples, on their device and without a transfer to the host.

        Args:
            features: ``(N, d)`` of any floating dtype. One large batch is faster than many small ones.
            labels: ``(N,)`` int64. Samples with a label outside ``0..M-1`` are left out.
            head: The loss and the head. They must be the same in every call.

        Returns:
            The excess loss of all samples so far, a new object.
        """
        num_classes, dim = self.anchors.shape
        total, size = self, max(_ELEMENTS_PER_BLOCK // dim, 4 * num_classes)
        with torch.no_grad():
            valid = (labels >= 0) & (labels < num_classes)
            # Samples to leave out go to an additional bin M: selecting them would need a transfer to the host.
            index = torch.where(valid, labels, num_classes)
            for rows, own in zip(torch.split(features.detach(), size), torch.split(index, size), strict=True):
                total = total._add(rows, own, head) if len(rows) else total
        return total

    def _add(self, features: Tensor, labels: Tensor, head: HeadLoss) -> ExcessLoss:
        """Add one block of samples. The label M marks samples to leave out."""
        num_classes, dim = self.anchors.shape
        place = torch.arange(len(labels), device=labels.device)
        first = torch.full((num_classes + 1,), len(labels) - 1, device=labels.device)
        first.scatter_reduce_(0, labels, place, "amin")
        known = torch.cat([self.counts, self.counts.new_zeros(1)]).unsqueeze(1) > 0
        anchors = torch.where(known, _append_zero_row(self.anchors), features.index_select(0, first).to(self.anchors))
        counts, offsets = anchors.new_zeros(len(anchors)), torch.zeros_like(anchors)
        size = max(ELEMENTS_PER_STEP // max(dim, len(head.weight)), _LEAST_ROWS)
        parts = []
        for rows, index in zip(torch.split(features, size), torch.split(labels, size), strict=True):
            deviations = rows.to(anchors.dtype) - anchors.index_select(0, index)
            offsets.index_add_(0, index, deviations)
            counts.index_add_(0, index, torch.ones_like(index, dtype=counts.dtype))
            parts.append((deviations, index))
        offsets /= counts.clamp(min=1).unsqueeze(1)
        zero = torch.zeros_like(counts)
        added = ExcessLoss(
            counts, anchors, offsets, zero, _append_zero_row(torch.zeros_like(self.residuals)), zero.clone()
        )
        moved, logits = self._with_joint_means(ExcessLoss(*(each.narrow(0, 0, num_classes) for each in added)), head)
        offsets = _append_zero_row(moved.offsets)
        for deviations, index in parts:
            # Samples to leave out use the values of the last class; the results of their bin are dropped.
            known = index.clamp(max=num_classes - 1)
            targets, reference = head.targets.index_select(0, known), logits.index_select(0, known)
            step = deviations.sub_(offsets.index_select(0, index)) @ head.weight.T
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
        """Compute the excess loss of the union of two disjoint sets of samples.

        Args:
            other: Excess loss of the other samples.
            head: The loss and the head with which both were computed.

        Returns:
            A new object.
        """
        moved, logits = self._with_joint_means(other, head)
        return moved._replace(
            sums=moved.sums + other._sums_around(moved, logits, head),
            residuals=self.residuals + other.residuals,
            slopes=self.slopes + other.slopes,
        )

    def _with_joint_means(self, other: ExcessLoss, head: HeadLoss) -> tuple[ExcessLoss, Tensor]:
        """Replace counts and class means by those of both sets. The sums still include only the samples of this set.

        Returns:
            The new object, and the logits of the new class means.
        """
        mine, theirs = (self.counts > 0).unsqueeze(1), (other.counts > 0).unsqueeze(1)
        counts = self.counts + other.counts
        shift = torch.where(mine & theirs, (other.anchors - self.anchors) + (other.offsets - self.offsets), 0)
        shift = (other.counts / counts.clamp(min=1)).unsqueeze(1) * shift
        anchors = torch.where(mine, self.anchors, torch.where(theirs, other.anchors, 0))
        offsets = torch.where(mine, self.offsets + shift, torch.where(theirs, other.offsets, 0))
        moved = self._replace(counts=counts, anchors=anchors, offsets=offsets)
        logits = head.logits(moved.means)
        return moved._replace(sums=self._sums_around(moved, logits, head)), logits

    def _sums_around(self, others: ExcessLoss, logits: Tensor, head: HeadLoss) -> Tensor:
        """Compute the excess loss of these samples relative to the class means of ``others``, with their logits."""
        if self.counts.is_cpu and not self.counts.any():  # On another device this check would cost more than it saves.
            return self.sums
        deviations = (self.anchors - others.anchors) + (self.offsets - others.offsets)
        deviations = torch.where((self.counts > 0).unsqueeze(1), deviations, 0)
        size = max(ELEMENTS_PER_STEP // len(head.weight), _LEAST_ROWS)
        pieces = zip(*(torch.split(each, size) for each in (deviations, logits, head.targets)), strict=True)
        values = [head.loss.divergence_along(shift @ head.weight.T, *rest) for shift, *rest in pieces]
        return self.sums + self.counts * torch.cat(values)


def _append_zero_row(rows: Tensor) -> Tensor:
    """Append a row of zeros for the samples to leave out."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
