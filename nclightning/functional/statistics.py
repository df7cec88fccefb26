"""Counts, class means and within-class scatter: the sufficient statistic of the features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nclightning.functional.chunks import add_gram_, chunks, sums, without

__all__ = ["BetweenWeights", "ClassStatistics", "GlobalMean", "class_statistics"]

GlobalMean = Literal["class", "sample"]
BetweenWeights = Literal["uniform", "count"]

# Samples are kept for a reading along K - 1 directions, which costs d / (K - 1) times less than their scatter, if that
# is so many times less and while they are no more than so many times d and so many bytes; or few bytes in few pieces.
_WORTH_KEEPING, _KEPT_PER_DIM, _KEPT_BYTES = 4, 128, 2**28
_FEW_BYTES, _FEW_PIECES = 2**25, 128


@dataclass
class ClassStatistics:
    r"""First and second moments of labelled features.

    Second moments of moderately many samples are not formed before they are needed: the samples are kept, as they came,
    for readings along few directions.

    Attributes:
        counts: Samples per class ``(K,)``, in the dtype of the means.
        means: Class means ``(K, d)``; zero for a class without samples.
        within: :attr:`spreads` as far as formed, ``(K,)``; empty while all samples are kept and nobody asked.
        lower: Lower triangle, at least, of the scatter ``(d, d)``; empty while all samples are kept, None in the light
            form, which has only spreads.
        num_invalid: Samples whose label was outside ``0..K-1``, int64 scalar. They entered nothing else.
        kept: Features and labels in turn of the samples that are kept, K for the label of those left out.
    """

    counts: Tensor
    means: Tensor
    within: Tensor
    lower: Tensor | None
    num_invalid: Tensor
    kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def empty(
        cls,
        num_classes: int,
        feature_dim: int,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
        *,
        scatter: bool = True,
    ) -> ClassStatistics:
        """Statistics of no samples, the neutral element of :meth:`merge`.

        Args:
            num_classes: K.
            feature_dim: d.
            dtype: Of all but ``num_invalid``.
            device: Where they live.
            scatter: False makes the light form, K d numbers instead of K d + d^2.

        Returns:
            Statistics.
        """
        keeps = scatter and feature_dim >= _WORTH_KEEPING * num_classes
        side = 0 if keeps else feature_dim
        return cls(
            counts=torch.zeros(num_classes, dtype=dtype, device=device),
            means=torch.zeros(num_classes, feature_dim, dtype=dtype, device=device),
            within=torch.zeros(0 if keeps else num_classes, dtype=dtype, device=device),
            lower=torch.zeros(side, side, dtype=dtype, device=device) if scatter else None,
            num_invalid=torch.zeros((), dtype=torch.int64, device=device),
        )

    @property
    def present(self) -> Tensor:
        """Which classes have samples, bool ``(K,)``."""
        return self.counts > 0

    @property
    def centred_means(self) -> Tensor:
        """Class means minus their unweighted mean over the classes present; zero rows for absent classes."""
        return self.centre_means()

    @property
    def spreads(self) -> Tensor:
        r"""Within-class spread of each class :math:`\sum_{i: y_i = k} \|h_i - \mu_k\|^2`, ``(K,)``, a sum."""
        if self.within.shape != self.counts.shape:
            self.within, _ = self._second_moments(with_scatter=False)
        return self.within

    @property
    def scatter(self) -> Tensor:
        r"""Within-class scatter :math:`\sum_i (h_i - \mu_{y_i})(h_i - \mu_{y_i})^\top`, ``(d, d)``, a sum.

        Raises:
            ValueError: In the light form.
        """
        self.fold_()  # Several measures read it; it is formed once.
        if self.lower is None:
            raise ValueError("this measure needs the (d, d) scatter: make the statistics with scatter=True.")
        return self.lower.tril() + self.lower.tril(-1).T

    def spread_along(self, directions: Tensor) -> Tensor:
        r"""Within-class spread along directions, :math:`\sum_i (v^\top (h_i - \mu_{y_i}))^2`.

        Args:
            directions: Vectors v ``(r, d)``.

        Returns:
            Non-negative sums ``(r,)``.

        Raises:
            ValueError: In the light form.
        """
        if not self._keeps:
            # A quadratic form of a Gram matrix: negative by rounding only.
            return ((directions @ self.scatter) * directions).sum(dim=1).clamp(min=0)
        spread = directions.new_zeros(len(directions))
        rest = directions.new_zeros(len(self.counts) + 1, len(directions))
        for away, index in self._deviations(for_scatter=False):
            along = without((directions @ away.T).T, index, len(self.counts))  # Twice as fast as the other way round.
            spread.add_(along.square().sum(dim=0))
            rest.index_add_(0, index, along)
        # As in the second moments.
        return (spread - (rest.narrow(0, 0, len(self.counts)).square() / self._divisors).sum(dim=0)).clamp(min=0)

    def fold_(self) -> ClassStatistics:
        """Form the second moments of the samples that are kept, in place, and keep none from here on.

        Returns:
            These statistics.
        """
        if self._keeps:
            self.within, self.lower, self.kept = *self._second_moments(), []
        return self

    @property
    def _keeps(self) -> bool:
        return self.lower is not None and self.lower.shape != (self.means.shape[1],) * 2

    @property
    def _divisors(self) -> Tensor:
        return self.counts.clamp(min=1).unsqueeze(1)

    def _second_moments(self, with_scatter: bool = True) -> tuple[Tensor, Tensor | None]:
        """Form spreads and, at least, the lower triangle of the scatter of all samples, or spreads alone."""
        if not self._keeps:
            return self.within, self.lower
        num_classes, dim = self.means.shape
        squares, rest = self.means.new_zeros(num_classes + 1), self.means.new_zeros(num_classes + 1, dim)
        lower = self.means.new_zeros(dim, dim) if with_scatter else None
        for away, index in self._deviations(with_scatter):
            without(away, index, num_classes)
            squares.index_add_(0, index, torch.linalg.vector_norm(away, dim=1).square_())
            rest.index_add_(0, index, away)
            if lower is not None:
                add_gram_(lower, away)
        # What the means are off by, which is their rounding, is no spread.
        off = rest.narrow(0, 0, num_classes) / self._divisors.sqrt()
        if lower is not None:
            add_gram_(lower, off, sign=-1)
        return (squares.narrow(0, 0, num_classes) - off.square().sum(dim=1)).clamp(min=0), lower

    def _deviations(self, for_scatter: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield deviations of the samples that are kept from their class means, with their labels."""
        means = torch.cat([self.means, self.means.new_zeros(1, self.means.shape[1])])
        for features, labels in zip(self.kept[::2], self.kept[1::2], strict=True):
            for rows, index in chunks(features, labels, for_scatter):
                yield means.index_select(0, index).sub_(rows), index

    def _can_keep(self, kept: list[Tensor]) -> bool:
        features, dim = kept[::2], max(self.means.shape[1], 1)
        bytes_ = sum(each.numel() * each.element_size() for each in features)
        few = bytes_ <= _FEW_BYTES and len(features) <= _FEW_PIECES
        return few or (sum(each.shape[0] for each in features) <= _KEPT_PER_DIM * dim and bytes_ <= _KEPT_BYTES)

    def global_mean(self, convention: GlobalMean = "class") -> Tensor:
        """Mean of the class means, or of all samples.

        Args:
            convention: ``"class"`` gives every class present the same weight (Papyan et al., 2020), ``"sample"`` every
                sample. They differ on unbalanced data only.

        Returns:
            ``(d,)``.

        Raises:
            ValueError: If there is no such convention.
        """
        weights = self._class_weights({"class": "uniform", "sample": "count"}.get(convention, convention))
        return (weights.unsqueeze(1) * self.means).sum(dim=0)

    def centre_means(self, global_mean: GlobalMean = "class") -> Tensor:
        """Class means minus the global mean.

        Args:
            global_mean: As for :meth:`global_mean`.

        Returns:
            ``(K, d)``; zero rows for absent classes.
        """
        # In two steps: the mean of the differences takes away what rounding left of a large common offset.
        present = self.present.unsqueeze(1)
        centred = (self.means - self.global_mean(global_mean)) * present
        weights = self._class_weights("uniform" if global_mean == "class" else "count")
        return (centred - (weights.unsqueeze(1) * centred).sum(dim=0)) * present

    def between_root(self, global_mean: GlobalMean = "class", between_weights: BetweenWeights = "uniform") -> Tensor:
        r"""Factor the between-class covariance: rows :math:`\sqrt{w_k}(\mu_k - \mu_G)`.

        Args:
            global_mean: As for :meth:`global_mean`.
            between_weights: ``"uniform"`` is :math:`w_k = 1/K` over the classes present, ``"count"`` is
                :math:`n_k/N`.

        Returns:
            ``(K, d)`` with :math:`\Sigma_B` = root^T root, of rank at most ``min(K - 1, d)`` for every convention,
            since the global mean lies in the affine hull of the class means.
        """
        return self._class_weights(between_weights).sqrt().unsqueeze(1) * self.centre_means(global_mean)

    def _class_weights(self, convention: str) -> Tensor:
        if convention not in ("uniform", "count"):
            raise ValueError(
                f"global_mean must be 'class' or 'sample' and between_weights 'uniform' or 'count', got {convention!r}."
            )
        weights = self.present.to(self.counts) if convention == "uniform" else self.counts
        return weights / weights.sum().clamp(min=1)

    def add_(
        self, features: Tensor, labels: Tensor, ignore_index: int | None = None, *, copy: bool = True
    ) -> ClassStatistics:
        """Take in samples, in place, on their device and without a transfer to the host.

        Each chunk is centred by its own class means and shifted by a share of their distance to the means so far
        (Chan, Golub and LeVeque, 1983): nothing is formed around the origin, so that nothing cancels near collapse,
        and the scatter stays a sum of Gram matrices.

        Args:
            features: ``(N, d)`` of any floating dtype.
            labels: ``(N,)`` int64. A label outside ``0..K-1`` is counted in ``num_invalid`` and enters nothing else.
            ignore_index: Label of samples to leave out without counting them as invalid.
            copy: False keeps features as they are, where they are kept, which must then not change before the last
                reading.

        Returns:
            These statistics.

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If features are not floating or labels not int64.
        """
        if features.ndim != 2 or not features.shape[1] or labels.shape != features.shape[:1]:
            raise ValueError(
                "features must be (N, d) with d at least 1 and labels (N,) with the same N, "
                f"got {tuple(features.shape)} and {tuple(labels.shape)}."
            )
        if features.shape[1] != self.means.shape[1]:
            raise ValueError(f"features must have shape (N, {self.means.shape[1]}), got {tuple(features.shape)}.")
        if not features.is_floating_point() or labels.dtype != torch.int64:
            raise TypeError(f"features must be floating and labels int64, got {features.dtype} and {labels.dtype}.")
        if not labels.shape[0]:
            return self  # Else each of them would stay as a sample that is kept.
        with torch.no_grad():
            valid = (labels >= 0) & (labels < len(self.counts))
            invalid = valid.logical_not()
            if ignore_index is not None:
                valid, invalid = valid & (labels != ignore_index), invalid & (labels != ignore_index)
            self.num_invalid.add_(invalid.sum())
            # One bin more than classes takes the samples left out, so that no value is branched on.
            index = torch.where(valid, labels, len(self.counts))
            features = features.detach()
            if not self._can_keep([*self.kept, features, index]):
                self.fold_()
            ulps = torch.finfo(features.dtype).eps / torch.finfo(self.means.dtype).eps
            for rows, classes in chunks(features, index, self.lower is not None and not self._keeps):
                # So few equal numbers, so many bits shorter than their sum, add up without a rounding.
                self._add_chunk(rows.to(self.means.dtype), classes, exact=len(rows) <= ulps)
            if self._keeps:
                self.kept += [features.clone() if copy else features, index]
                self.within = self.within.new_zeros(0)
        return self

    def _add_chunk(self, features: Tensor, index: Tensor, exact: bool) -> None:
        """Take in rows, whose sums are exact if they are equal or may be rounded."""
        num_classes = len(self.counts)
        ones = torch.ones_like(index, dtype=features.dtype)
        counts = features.new_zeros(num_classes + 1).index_add_(0, index, ones)
        divisors = counts.clamp(min=1).unsqueeze(1)
        means = sums(features, index, num_classes + 1) / divisors
        if not (self._keeps and exact):
            # From here on in place and with the sign turned: a pass over memory is what this costs.
            away = means.index_select(0, index).sub_(features)
            # The mean of equal numbers may be off by a rounding; the mean of the residuals takes that away.
            rest = sums(away, index, num_classes + 1) / divisors
            means = means - rest

        new = counts.narrow(0, 0, num_classes)
        total = (self.counts + new).clamp_(min=1)
        shift = (means.narrow(0, 0, num_classes) - self.means) * (new > 0).unsqueeze(1)
        if not self._keeps:
            between = (self.counts / total).sqrt().unsqueeze(1) * shift
            if self.lower is None:
                squares = sums(torch.linalg.vector_norm(away, dim=1).square_(), index, num_classes + 1)
                squares.sub_(counts * rest.square().sum(dim=1)).clamp_(min=0)
                self.within.add_(squares.narrow(0, 0, num_classes).add_(new * between.square().sum(dim=1)))
            else:
                # Deviations of a class sum to zero: the same shift of each row adds exactly the between-chunk part.
                rest.narrow(0, 0, num_classes).add_(between)
                without(away.sub_(rest.index_select(0, index)), index, num_classes)
                squares = torch.linalg.vector_norm(away, dim=1).square_()
                self.within.add_(sums(squares, index, num_classes + 1).narrow(0, 0, num_classes))
                add_gram_(self.lower, away)
        self.means.add_((new / total).unsqueeze(1) * shift)
        self.counts.add_(new)

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Statistics of the union of two disjoint sets of samples.

        Centred update of Chan, Golub and LeVeque (1983): moments are shifted by the difference of the means, never
        formed around the origin, so that nothing cancels near collapse. Order and split matter only to round-off.

        Args:
            other: Statistics over the same classes and feature dimension, light or not like this one.

        Returns:
            New statistics; the two operands are left as they are.

        Raises:
            ValueError: If the shapes differ, or one is light and the other is not.
        """
        if self.means.shape != other.means.shape:
            raise ValueError(
                "both statistics must have the same classes and feature dimension, "
                f"got {tuple(self.means.shape)} and {tuple(other.means.shape)}."
            )
        if (self.lower is None) != (other.lower is None):
            raise ValueError("both statistics must have the scatter, or neither: pass the same scatter=... to both.")
        counts = self.counts + other.counts
        share = other.counts / counts.clamp(min=1)
        # A class that one side lacks has no shift: its mean there is zero by convention only.
        shift = (other.means - self.means) * (other.present & self.present).unsqueeze(1)
        between = shift * (self.counts * share).sqrt().unsqueeze(1)
        within, lower, kept = self.within.new_zeros(0), self.lower, [*self.kept, *other.kept]
        if not (self._keeps and other._keeps and self._can_keep(kept)):
            (within, lower), (others, other_lower) = self._second_moments(), other._second_moments()
            within, kept = within + others + between.square().sum(dim=1), []
            if lower is not None and other_lower is not None:
                lower = lower + other_lower
                add_gram_(lower, between)
        return ClassStatistics(
            counts=counts,
            means=torch.where(self.present.unsqueeze(1), self.means + share.unsqueeze(1) * shift, other.means),
            within=within,
            lower=lower,
            num_invalid=self.num_invalid + other.num_invalid,
            kept=kept,
        )


def class_statistics(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    dtype: torch.dtype = torch.float64,
    *,
    scatter: bool = True,
    ignore_index: int | None = None,
    copy: bool = True,
) -> ClassStatistics:
    """Compute the statistics of a set of samples, on its device, without a host transfer.

    Args:
        features: ``(N, d)`` of any floating dtype.
        labels: ``(N,)`` int64. A label outside ``0..K-1`` is counted in ``num_invalid`` and enters nothing else.
        num_classes: K, at least 1.
        dtype: Dtype of accumulation and result, float64 or float32.
        scatter: False makes the light form without the ``(d, d)`` scatter.
        ignore_index: Label of samples to leave out without counting them as invalid.
        copy: As for :meth:`ClassStatistics.add_`.

    Returns:
        Statistics in ``dtype``. Zero scatter where the features of each class are equal to the last bit. Features
        that are not finite make the moments of their class ``nan``.

    Raises:
        ValueError: If a shape does not fit.
        TypeError: If features are not floating or labels not int64.
    """
    width = features.shape[1] if features.ndim == 2 else 0
    empty = ClassStatistics.empty(num_classes, max(width, 1), dtype, features.device, scatter=scatter)
    return empty.add_(features, labels, ignore_index, copy=copy)
