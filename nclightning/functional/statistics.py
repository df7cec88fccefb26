"""Counts, class means and within-class spread: the sufficient statistic of labelled features.

Samples that are kept are read in two passes: class means first, deviations from them second. Samples that are not kept
any more are in the totals, which are moved to the class means of all samples as Chan, Golub and LeVeque (1983) do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import invertible_power_of_two, norm, root_sum_of_squares, triangular_factor
from nclightning.functional.moments import Means, Moments
from nclightning.functional.rounding import beyond_rounding, mean_rounding
from nclightning.functional.samples import Samples

__all__ = ["BetweenWeights", "ClassStatistics", "GlobalMean"]

GlobalMean = Literal["class", "sample"]
BetweenWeights = Literal["uniform", "count"]


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    r"""First and second moments of labelled features: a value, which no method changes.

    The last samples are kept as they came; of those before there are totals. Along few directions the spread of samples
    costs less than their ``(d, d)`` scatter, which is formed only when it is read or when samples become many. What is
    read is computed at its first reading, once. :func:`nclightning.functional.class_statistics` makes the statistics of
    samples that are there at once, :class:`nclightning.functional.StatisticsBuffer` those of batch after batch.

    Attributes:
        totals: Moments of the samples that are not kept.
        num_invalid: Samples whose label was outside ``0..K-1``, int64 scalar. They entered nothing else.
        kept: The samples that are kept.
    """

    totals: Moments
    num_invalid: Tensor
    kept: Samples = field(default_factory=Samples)

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
        totals = Moments.empty(num_classes, feature_dim, dtype, device, scatter=scatter)
        return cls(totals, torch.zeros((), dtype=torch.int64, device=device))

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Statistics of the union of two disjoint sets of samples.

        Moments are shifted by the difference of the means, never formed around the origin, so that nothing cancels
        near collapse. Order and split matter only to round-off.

        Args:
            other: Statistics over the same classes and feature dimension, light or not like this one.

        Returns:
            New statistics.

        Raises:
            ValueError: If the shapes differ, or one is light and the other is not.
        """
        if self.totals.means.shape != other.totals.means.shape:
            raise UserError(
                "both statistics must have the same classes and feature dimension, "
                f"got {tuple(self.totals.means.shape)} and {tuple(other.totals.means.shape)}."
            )
        if self.is_light != other.is_light:
            raise UserError("both statistics must have the scatter, or neither: pass the same scatter=... to both.")
        totals, kept = self.totals.merge(other.totals), self.kept.join(other.kept)
        merged = ClassStatistics(totals, self.num_invalid + other.num_invalid, kept)
        return merged if kept.are_few(len(totals.counts), self.is_light) else merged.folded

    @property
    def is_light(self) -> bool:
        """Whether there is no ``(d, d)`` scatter, nor samples to form it of once they become many."""
        return self.totals.root is None

    @property
    def counts(self) -> Tensor:
        """Samples per class ``(K,)``, in the dtype of the means."""
        return self._first.counts

    @property
    def means(self) -> Tensor:
        """Class means ``(K, d)``; zero for a class without samples, ``nan`` where a feature is not finite."""
        return self._first.means

    @cached_property
    def present(self) -> Tensor:
        """Which classes have samples, bool ``(K,)``."""
        return self.counts > 0

    @cached_property
    def _first(self) -> Means:
        """Counts, class means and rounding of all samples."""
        if self.kept.is_empty:
            return self.totals.first
        kept = self.kept.means(self.totals.means)
        return kept if self.totals.is_empty else self.totals.first.merge(kept)[0]

    @cached_property
    def epsilon(self) -> Tensor:
        """Machine epsilon to which the features were rounded: that of their dtype, or of a narrower one they show."""
        shown, of_dtype = self._first.rounding.unbind()
        return torch.where(shown.isinf(), of_dtype, torch.maximum(shown, of_dtype))

    @cached_property
    def mean_rounding(self) -> Tensor:
        """What rounding of the features explains of the mean of each class ``(K,)``."""
        return mean_rounding(self)

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
        return self._around_class_mean if global_mean == "class" else self._around(global_mean)

    @cached_property
    def _around_class_mean(self) -> Tensor:
        return self._around("class")

    def _around(self, global_mean: GlobalMean) -> Tensor:
        # In two steps: the mean of the differences takes away what rounding left of a large common offset.
        first, present = self._first, self.present.unsqueeze(1)
        centred = ((first.means - self.global_mean(global_mean)) + first.tails) * present
        weights = self._class_weights("uniform" if global_mean == "class" else "count")
        return (centred - (weights.unsqueeze(1) * centred).sum(dim=0)) * present

    @cached_property
    def centred_means(self) -> Tensor:
        """Class means minus their unweighted mean over the classes present.

        Zero rows for absent classes, and for means that are in the centre up to rounding of the features, which have no
        direction. For measures of directions; :attr:`mean_offsets` is for others.
        """
        return beyond_rounding(self, each=True)

    @cached_property
    def mean_offsets(self) -> Tensor:
        """The same with means that are nearly in the centre as they are; all zero if all are up to rounding."""
        return beyond_rounding(self, each=False)

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
        return self._equal_weights if convention == "uniform" else self.counts / self.counts.sum().clamp(min=1)

    @cached_property
    def _equal_weights(self) -> Tensor:
        present = self.present.to(self.counts)
        return present / present.sum().clamp(min=1)

    @property
    def norms(self) -> Tensor:
        r"""Root of the within-class spread of each class ``(K,)``; right at every scale of the features."""
        return self._spread[0]

    @property
    def spreads(self) -> Tensor:
        r"""Within-class spread of each class :math:`\sum_{i: y_i = k} \|h_i - \mu_k\|^2`, ``(K,)``, a sum."""
        return self.norms.square()

    @property
    def widths(self) -> Tensor:
        """Root of the within-class spread of each coordinate ``(d,)``."""
        return self._spread[1]

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

    def norms_along(self, directions: Tensor) -> Tensor:
        r"""Root of :meth:`spread_along`, right at every scale of the features."""
        *spread, along = self._spread_with(directions)
        # The spread of classes and of coordinates came with it: that property need not go through the samples again.
        vars(self).setdefault("_spread", tuple(spread))
        return along

    @cached_property
    def _spread(self) -> tuple[Tensor, ...]:
        """Roots of the spread of classes and of coordinates."""
        return self._spread_with()

    def _spread_with(self, *directions: Tensor) -> tuple[Tensor, ...]:
        """The same and, for each set of directions, roots of the spread along them.

        Around the class means of all samples, spread is a sum of three: that of the totals around their own class
        means, what moving it to the others adds, and that of the samples that are kept.
        """
        first, totals = self._first, self.totals
        kept = () if self.kept.is_empty else self.kept.spread(first, self._sums_are_exact, *directions)
        if kept and totals.is_empty:
            return kept
        own = totals.norms, totals.widths, *(norm(each @ self._root_of_totals().T, dim=1) for each in directions)
        if not kept:
            return own
        rows = totals.first.moved_to(first)
        moved = norm(rows, dim=1), norm(rows, dim=0), *(norm(each @ rows.T, dim=1) for each in directions)
        return tuple(root_sum_of_squares(*parts) for parts in zip(own, moved, kept, strict=True))

    @property
    def _sums_are_exact(self) -> bool:
        """Whether rounding left nothing of the class means."""
        return self.totals.is_empty and self.kept.sums_are_exact(self.totals.means.dtype)

    @property
    def root(self) -> Tensor:
        r"""Square root R of the within-class scatter, ``(d, d)`` upper triangular with :math:`R^\top R` = scatter.

        Raises:
            ValueError: In the light form.
        """
        return self.folded._root_of_totals()

    @property
    def scatter(self) -> Tensor:
        r"""Within-class scatter :math:`\sum_i (h_i - \mu_{y_i})(h_i - \mu_{y_i})^\top`, ``(d, d)``, a sum.

        What is small in it, along some direction, is below the rounding of what is large: see :meth:`spread_along`.
        """
        root = self.root
        return root.T @ root

    def _root_of_totals(self) -> Tensor:
        if self.totals.root is None:
            raise UserError("this measure needs the (d, d) scatter: make the statistics with scatter=True.")
        return self.totals.root

    @property
    def folded(self) -> ClassStatistics:
        """The same statistics with all samples in the totals and none kept: of one size whatever the samples are."""
        root = self.totals.root
        return self if self.kept.is_empty and (root is None or len(root) == root.shape[1]) else self._folded

    @cached_property
    def _folded(self) -> ClassStatistics:
        root, (norms, widths) = None if self.is_light else self._form_root(), self._spread
        return ClassStatistics(
            Moments(**self._first._asdict(), norms=norms, widths=widths, root=root), self.num_invalid
        )

    def _form_root(self) -> Tensor:
        """Triangular factor of all rows whose squares add up to the scatter, filled up with zeros to d rows."""
        first, totals, own = self._first, self.totals.first, self._root_of_totals()
        unit = invertible_power_of_two(first.means)
        rows = [own / unit] if self.totals.is_empty else [own / unit, totals.moved_to(first) / unit]
        for away, _ in self.kept.deviations(first, unit, self._sums_are_exact, least=4 * own.shape[1]):
            rows = [triangular_factor([*rows, away])]
        return torch.nn.functional.pad(rows[0] * unit, (0, 0, 0, own.shape[1] - len(rows[0])))
