"""Counts, class means and within-class spread: the sufficient statistic of the features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from nclightning.errors import UserError, UserTypeError
from nclightning.functional.linear import invertible_power_of_two, norm, root_sum_of_squares, triangular_factor
from nclightning.functional.moments import Moments
from nclightning.functional.rounding import beyond_rounding
from nclightning.functional.samples import Samples, append

__all__ = ["BetweenWeights", "ClassStatistics", "GlobalMean", "class_statistics"]

GlobalMean = Literal["class", "sample"]
BetweenWeights = Literal["uniform", "count"]


@dataclass
class ClassStatistics:
    r"""First and second moments of labelled features.

    Samples are kept as they came, and are folded into moments when they become many.

    Attributes:
        folded: Moments of the samples that are not kept any more.
        num_invalid: Samples whose label was outside ``0..K-1``, int64 scalar. They entered nothing else.
        kept: Features and labels in turn of the samples that are kept, K for the label of those left out.
    """

    folded: Moments
    num_invalid: Tensor
    kept: list[Tensor] = field(default_factory=list)
    _first: Moments | None = field(default=None, init=False, repr=False, compare=False)
    _second: tuple[Tensor, Tensor] | None = field(default=None, init=False, repr=False, compare=False)

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
        moments = Moments.empty(num_classes, feature_dim, dtype, device, scatter=scatter)
        return cls(moments, torch.zeros((), dtype=torch.int64, device=device))

    @property
    def counts(self) -> Tensor:
        """Samples per class ``(K,)``, in the dtype of the means."""
        return self._first_moments().counts

    @property
    def means(self) -> Tensor:
        """Class means ``(K, d)``; zero for a class without samples, ``nan`` where a feature is not finite."""
        return self._first_moments().means

    @property
    def present(self) -> Tensor:
        """Which classes have samples, bool ``(K,)``."""
        return self.counts > 0

    @property
    def centred_means(self) -> Tensor:
        """Class means minus their unweighted mean over the classes present.

        Zero rows for absent classes, and for means that are in the centre up to rounding of the features, which have no
        direction. For measures of directions; :attr:`mean_offsets` is for others.
        """
        return beyond_rounding(self, each=True)

    @property
    def mean_offsets(self) -> Tensor:
        """The same with means that are nearly in the centre as they are; all zero if all are up to rounding."""
        return beyond_rounding(self, each=False)

    @property
    def norms(self) -> Tensor:
        r"""Root of the within-class spread of each class ``(K,)``; right at every scale of the features."""
        return self._second_moments()[0]

    @property
    def spreads(self) -> Tensor:
        r"""Within-class spread of each class :math:`\sum_{i: y_i = k} \|h_i - \mu_k\|^2`, ``(K,)``, a sum."""
        return self.norms.square()

    @property
    def root(self) -> Tensor:
        r"""Square root R of the within-class scatter, ``(d, d)`` upper triangular with :math:`R^\top R` = scatter.

        Raises:
            ValueError: In the light form.
        """
        return self.fold_()._folded_root()  # Several measures read it; it is formed once.

    @property
    def scatter(self) -> Tensor:
        r"""Within-class scatter :math:`\sum_i (h_i - \mu_{y_i})(h_i - \mu_{y_i})^\top`, ``(d, d)``, a sum.

        What is small in it, along some direction, is below the rounding of what is large: see :meth:`spread_along`.
        """
        root = self.root
        return root.T @ root

    def norms_along(self, directions: Tensor) -> Tensor:
        r"""Root of :meth:`spread_along`, right at every scale of the features."""
        first, root = self._first_moments(), self._folded_root()
        parts = [norm(directions @ root.T, dim=1)] if len(root) else []
        if len(root) and self.kept:
            parts.append(norm(directions @ self.folded.moved_to(first).T, dim=1))
        if self.kept:
            *second, along = self._deviate(directions)
            self._second = self._second or (second[0], second[1])
            parts.append(along)
        return root_sum_of_squares(*parts) if parts else directions.new_zeros(len(directions))

    def spread_along(self, directions: Tensor) -> Tensor:
        r"""Within-class spread along directions, :math:`\sum_i (v^\top (h_i - \mu_{y_i}))^2`.

        A sum of squares of projections: relative error about eps times the ratio of the root of the largest spread in
        any direction to that of this one.

        Args:
            directions: Vectors v ``(r, d)``.

        Returns:
            Non-negative sums ``(r,)``.

        Raises:
            ValueError: In the light form.
        """
        return self.norms_along(directions).square()

    @property
    def epsilon(self) -> Tensor:
        """Machine epsilon to which the features were rounded: that of their dtype, or of a narrower one they show."""
        shown, of_dtype = self._first_moments().rounding.unbind()
        return torch.where(shown.isinf(), of_dtype, torch.maximum(shown, of_dtype))

    @property
    def widths(self) -> Tensor:
        """Root of the within-class spread of each coordinate ``(d,)``."""
        return self._second_moments()[1]

    def fold_(self) -> ClassStatistics:
        """Fold the samples that are kept into the moments, in place, and keep none from here on.

        Returns:
            These statistics.
        """
        first, root = self._first_moments(), self.folded.root
        if self.kept:
            norms, widths = self._second_moments()
            if root is not None:
                unit = invertible_power_of_two(first.means)
                parts = [root / unit, self.folded.moved_to(first) / unit] if len(root) else []
                for away, _ in self._deviations(unit, 4 * root.shape[1]):
                    parts = [triangular_factor([*parts, away])]
                root = parts[0] * unit
            self.folded = first._replace(norms=norms, widths=widths, root=root)
        if root is not None and len(root) < root.shape[1]:  # The same shape on all processes.
            root = torch.cat([root, root.new_zeros(root.shape[1] - len(root), root.shape[1])])
            self.folded = self.folded._replace(root=root)
        self.kept, self._first, self._second = [], None, None
        return self

    def _folded_root(self) -> Tensor:
        if self.folded.root is None:
            raise UserError("this measure needs the (d, d) scatter: make the statistics with scatter=True.")
        return self.folded.root

    def _first_moments(self) -> Moments:
        """Counts, class means and rounding of all samples; the rest is that of the folded ones."""
        if not self.kept:
            return self.folded
        if self._first is None:
            kept = Samples(self.kept).moments(self.folded.means)
            self._first = kept if self.folded.is_empty else self.folded._replace(root=None).merge(kept)
        return self._first

    def _second_moments(self) -> tuple[Tensor, Tensor]:
        """Roots of the spreads of classes and of coordinates."""
        if not self.kept:
            return self.folded.norms, self.folded.widths
        if self._second is None:
            self._second = self._deviate(None)[:2]
        return self._second

    def _deviate(self, directions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Go through the samples that are kept once.

        Returns:
            Roots of the spreads of classes and of coordinates, of all samples; along directions, of those kept.
        """
        first, K = self._first_moments(), len(self.folded.counts)
        unit = invertible_power_of_two(first.means)
        norms, widths = unit.new_zeros(K + 1), unit.new_zeros(self.folded.means.shape[1])
        along = unit.new_zeros(0 if directions is None else len(directions))
        for away, index in self._deviations(unit):
            norms.index_add_(0, index, torch.linalg.vector_norm(away, dim=1).square_())
            widths += torch.linalg.vector_norm(away, dim=0).square_()
            if directions is not None:
                along += (directions @ away.T).square_().sum(dim=1)  # Twice as fast as the other way round.
        of_classes, of_coordinates = unit * norms.narrow(0, 0, K).sqrt(), unit * widths.sqrt()
        if not self.folded.is_empty:
            moved = self.folded.moved_to(first)
            of_classes = root_sum_of_squares(self.folded.norms, norm(moved, dim=1), of_classes)
            of_coordinates = root_sum_of_squares(self.folded.widths, norm(moved, dim=0), of_coordinates)
        return of_classes, of_coordinates, unit * along.sqrt()

    def _deviations(self, unit: Tensor, least: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        first = self._first_moments()
        tails = None if self.folded.is_empty and Samples(self.kept).sums_are_exact(unit.dtype) else first.tails / unit
        return Samples(self.kept).deviations(first.means / unit, tails, 1 / unit, least)

    def _can_keep(self, kept: list[Tensor]) -> bool:
        return not kept or Samples(kept).are_few(len(self.folded.counts), light=self.folded.root is None)

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
        first, present = self._first_moments(), self.present.unsqueeze(1)
        centred = ((first.means - self.global_mean(global_mean)) + first.tails) * present
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
            raise UserError(
                f"global_mean must be 'class' or 'sample' and between_weights 'uniform' or 'count', got {convention!r}."
            )
        weights = self.present.to(self.counts) if convention == "uniform" else self.counts
        return weights / weights.sum().clamp(min=1)

    def add_(
        self, features: Tensor, labels: Tensor, ignore_index: int | None = None, *, copy: bool = True
    ) -> ClassStatistics:
        """Take in samples, in place, on their device and without a transfer to the host.

        They are kept as they are, and folded into the moments when they become many: the cost of a call does not grow
        with the number of calls.

        Args:
            features: ``(N, d)`` of any floating dtype.
            labels: ``(N,)`` int64. A label outside ``0..K-1`` is counted in ``num_invalid`` and enters nothing else.
            ignore_index: Label of samples to leave out without counting them as invalid.
            copy: False keeps features as they are, which must then not change before the last reading.

        Returns:
            These statistics.

        Raises:
            ValueError: If a shape does not fit.
            TypeError: If features are not floating or labels not int64.
        """
        if features.ndim != 2 or not features.shape[1] or labels.shape != features.shape[:1]:
            raise UserError(
                "features must be (N, d) with d at least 1 and labels (N,) with the same N, "
                f"got {tuple(features.shape)} and {tuple(labels.shape)}."
            )
        num_classes, dim = self.folded.means.shape
        if features.shape[1] != dim:
            raise UserError(f"features must have shape (N, {dim}), got {tuple(features.shape)}.")
        if not features.is_floating_point() or labels.dtype != torch.int64:
            raise UserTypeError(f"features must be floating and labels int64, got {features.dtype} and {labels.dtype}.")
        if not labels.shape[0]:
            return self  # Else each of them would stay as a sample that is kept.
        with torch.no_grad():
            valid = (labels >= 0) & (labels < num_classes)
            invalid = valid.logical_not()
            if ignore_index is not None:
                valid, invalid = valid & (labels != ignore_index), invalid & (labels != ignore_index)
            self.num_invalid = self.num_invalid + invalid.sum()
            # One bin more than classes takes the samples left out, so that no value is branched on.
            index = torch.where(valid, labels, num_classes)
            features = features.detach()
            if not self._can_keep([*self.kept, features, index]):
                self.fold_()
            self.kept = append(self.kept, features.clone() if copy else features, index)
            self._first = self._second = None
            if not self._can_keep(self.kept):
                self.fold_()
        return self

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Statistics of the union of two disjoint sets of samples.

        Moments are shifted by the difference of the means, never formed around the origin, so that nothing cancels
        near collapse. Order and split matter only to round-off.

        Args:
            other: Statistics over the same classes and feature dimension, light or not like this one.

        Returns:
            New statistics; the two operands are left as they are.

        Raises:
            ValueError: If the shapes differ, or one is light and the other is not.
        """
        if self.folded.means.shape != other.folded.means.shape:
            raise UserError(
                "both statistics must have the same classes and feature dimension, "
                f"got {tuple(self.folded.means.shape)} and {tuple(other.folded.means.shape)}."
            )
        if (self.folded.root is None) != (other.folded.root is None):
            raise UserError("both statistics must have the scatter, or neither: pass the same scatter=... to both.")
        folded, kept = self.folded.merge(other.folded), [*self.kept, *other.kept]
        merged = ClassStatistics(folded, self.num_invalid + other.num_invalid, kept)
        return merged if merged._can_keep(merged.kept) else merged.fold_()


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
