"""Counts, class means and within-class spread: the sufficient statistic of labelled features.

Recent samples are stored. They are processed in two passes: the first computes class means, the second deviations from
them. Older samples have been added to running totals, which are shifted to the class means of all samples by the
formula of Chan, Golub and LeVeque (1983).
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
    r"""First and second moments of labelled features. The object is immutable.

    The most recent samples are stored, and running totals describe the earlier ones. The ``(d, d)`` scatter is formed
    only when it is needed or when there are many samples: the spread along a few directions is cheaper without it.
    Each quantity is computed when it is first used, and only once.

    :func:`nclightning.functional.class_statistics` computes the statistics of one set of samples,
    :class:`nclightning.functional.StatisticsBuffer` those of a sequence of batches.

    Attributes:
        totals: Moments of the samples that are not stored.
        num_invalid: Number of samples whose label is outside ``0..K-1``, int64 scalar. No other statistic includes
            them.
        kept: The stored samples.

    Example:
        >>> import torch
        >>> from nclightning.functional import ClassStatistics, class_statistics
        >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
        >>> stats = class_statistics(features, torch.tensor([0, 0, 1]), num_classes=2)
        >>> stats.means
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
        >>> stats.spreads.round(decimals=6)  # sums of squared deviations from the class means
        tensor([2., 0.], dtype=torch.float64)
        >>> stats.merge(ClassStatistics.empty(num_classes=2, feature_dim=2)).counts
        tensor([2., 1.], dtype=torch.float64)
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
        """Make the statistics of no samples, the neutral element of :meth:`merge`.

        Args:
            num_classes: K.
            feature_dim: d.
            dtype: Dtype of everything except ``num_invalid``.
            device: Device of the tensors.
            scatter: False makes light statistics, which have no ``(d, d)`` scatter: K d numbers instead of K d + d^2.

        Returns:
            Statistics.
        """
        totals = Moments.empty(num_classes, feature_dim, dtype, device, scatter=scatter)
        return cls(totals, torch.zeros((), dtype=torch.int64, device=device))

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """Compute the statistics of the union of two disjoint sets of samples.

        Moments are shifted by the difference of the class means and never formed around the origin: near collapse,
        moments around the origin would cancel. The order of merging and the split into sets change only round-off.

        Args:
            other: Statistics over the same classes and feature dimension. Both must be light, or neither.

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
            raise UserError(
                "both statistics must have the scatter, or both must be without it: pass the same scatter=... to both."
            )
        totals, kept = self.totals.merge(other.totals), self.kept.join(other.kept)
        merged = ClassStatistics(totals, self.num_invalid + other.num_invalid, kept)
        return merged if kept.are_worth_keeping(len(totals.counts), self.is_light) else merged.folded

    @property
    def is_light(self) -> bool:
        """Whether these are light statistics, from which no ``(d, d)`` scatter can be computed."""
        return self.totals.root is None

    @property
    def counts(self) -> Tensor:
        """Samples per class ``(K,)``, in the dtype of the means."""
        return self._class_means.counts

    @property
    def means(self) -> Tensor:
        """Class means ``(K, d)``: zero for a class without samples, ``nan`` where a feature is not finite."""
        return self._class_means.means

    @cached_property
    def present(self) -> Tensor:
        """Bool ``(K,)``: True for the classes that have samples."""
        return self.counts > 0

    @cached_property
    def _class_means(self) -> Means:
        """Counts, class means and detected precision of all samples, stored ones included."""
        if self.kept.is_empty:
            return self.totals.first
        kept = self.kept.means(self.totals.means)
        return kept if self.totals.is_empty else self.totals.first.merge(kept)[0]

    @cached_property
    def epsilon(self) -> Tensor:
        """Machine epsilon of the precision in which the features were computed.

        This is the precision of their dtype, or a lower one that their values reveal, as after a cast from bfloat16.
        """
        shown, of_dtype = self._class_means.rounding.unbind()
        return torch.where(shown.isinf(), of_dtype, torch.maximum(shown, of_dtype))

    @cached_property
    def mean_rounding(self) -> Tensor:
        """Largest error in the mean of each class that rounding of the features can cause, ``(K,)``."""
        return mean_rounding(self)

    def global_mean(self, convention: GlobalMean = "class") -> Tensor:
        """Compute the mean of the class means, or of all samples.

        Args:
            convention: ``"class"`` gives each class present the same weight (Papyan et al., 2020); ``"sample"`` gives
                each sample the same weight. The two differ on unbalanced data only.

        Returns:
            Global mean ``(d,)``.

        Raises:
            ValueError: If the convention is unknown.
        """
        weights = self._class_weights({"class": "uniform", "sample": "count"}.get(convention, convention))
        return (weights.unsqueeze(1) * self.means).sum(dim=0)

    def centre_means(self, global_mean: GlobalMean = "class") -> Tensor:
        """Subtract the global mean from the class means.

        Args:
            global_mean: As for :meth:`global_mean`.

        Returns:
            ``(K, d)``; zero rows for absent classes.
        """
        return self._minus_mean_of_means if global_mean == "class" else self._minus_global_mean(global_mean)

    @cached_property
    def _minus_mean_of_means(self) -> Tensor:
        return self._minus_global_mean("class")

    def _minus_global_mean(self, global_mean: GlobalMean) -> Tensor:
        """Subtract the global mean from the class means."""
        # The second subtraction removes the rounding error that a large common offset leaves after the first.
        first, present = self._class_means, self.present.unsqueeze(1)
        centred = ((first.means - self.global_mean(global_mean)) + first.tails) * present
        weights = self._class_weights("uniform" if global_mean == "class" else "count")
        return (centred - (weights.unsqueeze(1) * centred).sum(dim=0)) * present

    @cached_property
    def centred_means(self) -> Tensor:
        """Class means minus their unweighted mean over the classes present, for measures of directions.

        Rows of absent classes are zero. The row of a class whose mean equals the global mean up to rounding of the
        features is zero too, because its direction is undefined. Measures of lengths use :attr:`mean_offsets`.
        """
        return beyond_rounding(self, each=True)

    @cached_property
    def mean_offsets(self) -> Tensor:
        """Class means minus their unweighted mean over the classes present, for measures of lengths.

        Unlike :attr:`centred_means` it keeps the row of a class whose mean nearly equals the global mean. All rows are
        zero if all class means are equal up to rounding of the features.
        """
        return beyond_rounding(self, each=False)

    def between_root(self, global_mean: GlobalMean = "class", between_weights: BetweenWeights = "uniform") -> Tensor:
        r"""Factor the between-class covariance: rows :math:`\sqrt{w_k}(\mu_k - \mu_G)`.

        Args:
            global_mean: As for :meth:`global_mean`.
            between_weights: ``"uniform"`` is :math:`w_k = 1/K` over the classes present, ``"count"`` is
                :math:`n_k/N`.

        Returns:
            ``(K, d)`` with :math:`\Sigma_B` = root^T root. Its rank is at most ``min(K - 1, d)`` under each convention,
            since the global mean lies in the affine hull of the class means.
        """
        return self._class_weights(between_weights).sqrt().unsqueeze(1) * self.centre_means(global_mean)

    def _class_weights(self, convention: str) -> Tensor:
        """Return the weights of the classes; an error for an unknown convention."""
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
        r"""Square root of :attr:`spreads`, ``(K,)``. It neither over- nor underflows at any scale of the features."""
        return self._spread[0]

    @property
    def spreads(self) -> Tensor:
        r"""Within-class spread of each class, the sum :math:`\sum_{i: y_i = k} \|h_i - \mu_k\|^2`, ``(K,)``."""
        return self.norms.square()

    @property
    def widths(self) -> Tensor:
        """Square root of the within-class spread of each coordinate, ``(d,)``."""
        return self._spread[1]

    def spread_along(self, directions: Tensor) -> Tensor:
        r"""Compute the within-class spread along directions, :math:`\sum_i (v^\top (h_i - \mu_{y_i}))^2`.

        It is a sum of squared projections. Its relative error is about eps times the square root of the ratio of the
        largest spread in any direction to the spread in this one.

        Args:
            directions: Vectors v ``(r, d)``.

        Returns:
            Non-negative sums ``(r,)``.

        Raises:
            ValueError: For light statistics.
        """
        return self.norms_along(directions).square()

    def norms_along(self, directions: Tensor) -> Tensor:
        r"""Compute the square root of :meth:`spread_along`, which neither over- nor underflows."""
        *spread, along = self._compute_spread(directions)
        # The same pass gave the spread of classes and coordinates. Storing it saves another pass over the samples.
        vars(self).setdefault("_spread", tuple(spread))
        return along

    @cached_property
    def _spread(self) -> tuple[Tensor, ...]:
        """Square roots of the spread of each class and of each coordinate."""
        return self._compute_spread()

    def _compute_spread(self, *directions: Tensor) -> tuple[Tensor, ...]:
        """Compute square roots of the spread of each class, of each coordinate, and along each set of directions.

        The spread around the class means of all samples has three parts: the spread of the totals around their own
        class means, the squared shift from those means to the means of all samples, and the spread of the stored
        samples.
        """
        first, totals = self._class_means, self.totals
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
        """Whether the class means have no rounding error."""
        return self.totals.is_empty and self.kept.sums_are_exact(self.totals.means.dtype)

    @property
    def root(self) -> Tensor:
        r"""Square root R of the within-class scatter, ``(d, d)`` upper triangular with :math:`R^\top R` = scatter.

        Raises:
            ValueError: For light statistics.
        """
        return self.folded._root_of_totals()

    @property
    def scatter(self) -> Tensor:
        r"""Within-class scatter, the sum :math:`\sum_i (h_i - \mu_{y_i})(h_i - \mu_{y_i})^\top`, ``(d, d)``.

        Do not compute a small spread as :math:`v^\top S v` from it: rounding of the large entries would hide the
        result. Use :meth:`spread_along`.
        """
        root = self.root
        return root.T @ root

    def _root_of_totals(self) -> Tensor:
        """Return the square root of the scatter of the totals; an error for light statistics."""
        if self.totals.root is None:
            raise UserError("this measure needs the (d, d) scatter: make the statistics with scatter=True.")
        return self.totals.root

    @property
    def folded(self) -> ClassStatistics:
        """The same statistics with all samples in the totals and none stored. Its size does not depend on N."""
        root = self.totals.root
        return self if self.kept.is_empty and (root is None or len(root) == root.shape[1]) else self._folded

    @cached_property
    def _folded(self) -> ClassStatistics:
        root, (norms, widths) = None if self.is_light else self._form_root(), self._spread
        return ClassStatistics(
            Moments(**self._class_means._asdict(), norms=norms, widths=widths, root=root), self.num_invalid
        )

    def _form_root(self) -> Tensor:
        """Compute the triangular factor of the rows whose outer products sum to the scatter, padded to d rows."""
        first, totals, own = self._class_means, self.totals.first, self._root_of_totals()
        unit = invertible_power_of_two(first.means)
        rows = [own / unit] if self.totals.is_empty else [own / unit, totals.moved_to(first) / unit]
        for deviations, _ in self.kept.deviations(first, unit, self._sums_are_exact, least=4 * own.shape[1]):
            rows = [triangular_factor([*rows, deviations])]
        return torch.nn.functional.pad(rows[0] * unit, (0, 0, 0, own.shape[1] - len(rows[0])))
