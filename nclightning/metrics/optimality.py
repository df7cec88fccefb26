"""Optimality gap and distance to the optimal set, for any network, as a torchmetrics class."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional import ClassStatistics, ExcessLoss, HeadLoss, StatisticsBuffer
from nclightning.functional.samples import Samples
from nclightning.heads import Head, HeadSource, read_head, weight_shape
from nclightning.metrics.base import without_autocast
from nclightning.metrics.borrowed import Borrowed
from nclightning.metrics.compute_groups import separate_compute_group
from nclightning.metrics.gaps import SoftSums, read_optimality, read_soft
from nclightning.metrics.neural_collapse import NeuralCollapse
from nclightning.metrics.reference import LossLike, Reference
from nclightning.problems import Problem
from nclightning.theory import UFMProblem

__all__ = ["Optimality"]


class Optimality(NeuralCollapse):
    r"""Gap and distance of features and head from the optimum of an unconstrained feature model.

    ``update`` takes ``features (B, d)`` and ``labels (B,)``. ``compute`` returns float64 scalars:

    * ``gap``: F - F* without cancellation; ``distance``: the distance from the optimal set; ``relative_distance``: the
      distance divided by the norm of the optimum. All are 0 at an optimum. They are ``nan`` where the optimum is not
      known; one warning says why.
    * ``certified_bound``: a lower bound on F*, computed from the residuals of the features. ``certified_gap``: F minus
      this bound. ``F - bound >= F - F* >= 0`` holds for any loss, counts and d, up to rounding of about ``1e-15 F``. If
      d is at least the rank of the optimum, the certified gap is proportional to the distance near the optimal set.
      Both are left out above 4096 classes.
    * ``lambda_w`` and ``lambda_h``, if they are fitted.

    F is the objective of Problem (2) for the features since the last reset. The features of a network are not free, so
    that F* is only a lower bound for it. The states do not depend on the penalties, so that penalties can be fitted to
    the same features. Features are not stored, except for a short while.

    With ``update(features, targets)``, where targets are ``(B, K)`` of a floating dtype, each sample has its own
    target, as for mixup, soft labels and several labels. Then ``compute`` returns the certified values only. Under
    ``"ce"`` the sum of a row of targets is the weight of the sample, as in ``torch.nn.functional.cross_entropy``.

    Args:
        problem: A :class:`nclightning.theory.UFMProblem` or :class:`nclightning.problems.Problem`; labels number its
            groups, and their counts must be those of the problem. Or a loss, ``"mse"``, ``"ce"``, ``"bce"`` or a
            :class:`nclightning.problems.Loss`: then the problem is that of the given samples, with any counts.
        head: The head, as for :class:`nclightning.metrics.NeuralCollapse`. Its values are taken with the first batch
            after a reset, and must not change before ``compute``.
        lambda_w: With a loss: penalty on the head. None for both penalties fits them.
        lambda_h: With a loss: penalty on the features, on the sum over all samples.
        lambda_b: With a loss: penalty on the bias of the head; 0.0 means that the bias is free.
        targets: With a loss: ``(M, K)``; row m is the target of label m, such as a smoothed label. None means hard
            labels, and 0 and 1 for a head with one output.
        exact: Whether to compute gap and distance where the optimum has no formula. None does so for ``M K <= 16384``,
            that is, up to 128 classes, where it takes seconds; for a thousand classes it takes minutes. False leaves
            out gap and distance in any case. With fitted penalties the optimum is computed anew each time.
        **kwargs: Passed to :class:`torchmetrics.Metric`; ``ignore_index`` is the label of samples to leave out.

    Raises:
        ValueError: If an argument is out of range or the head does not fit. Also raised by ``compute``, if the labels
            do not fit the problem.

    Example:
        >>> from nclightning.metrics import Optimality
        >>> from nclightning.theory import UFMProblem
        >>> problem = UFMProblem("ce", num_classes=2, samples_per_class=3, feature_dim=4, lambda_w=0.1, lambda_h=0.1)
        >>> optimum = problem.random_optimum()
        >>> metric = Optimality(problem, optimum.weight)
        >>> metric.update(optimum.features, optimum.labels)
        >>> values = metric.compute()
        >>> bool(values["relative_distance"] < 1e-14)
        True
        >>> abs(float(values["certified_bound"]) - problem.optimal_value) < 1e-14
        True
    """

    def __init__(
        self,
        problem: UFMProblem | Problem | LossLike,
        head: HeadSource,
        lambda_w: float | None = None,
        lambda_h: float | None = None,
        lambda_b: float = 0.0,
        targets: Tensor | Sequence[Sequence[float]] | None = None,
        exact: bool | None = None,
        **kwargs: Any,
    ) -> None:
        reference = Reference(problem, lambda_w, lambda_h, lambda_b, targets, exact)
        num_groups, dim = reference.check_head(head)
        # The statistics are those of groups, whose number may differ from the number of rows of the head.
        super().__init__(num_groups, dim, None, measures=("nc1_ratio",), **kwargs)
        self.reference, self._head = reference, Borrowed(head)
        self._snapshot: Head | None = None
        self._loss: HeadLoss | None = None
        self._has_warned = False
        num_outputs = weight_shape(head)[0]
        for name, value in ExcessLoss.empty(num_groups, dim, num_outputs)._asdict().items():
            # States are stacked over processes and merged in compute: sums around different means cannot be added.
            self.add_state(f"excess_{name}", default=value.clone(), dist_reduce_fx=None)
        for name, value in SoftSums.empty(num_outputs)._asdict().items():
            self.add_state(f"soft_{name}", default=value, dist_reduce_fx="sum")
        separate_compute_group(self)

    @without_autocast
    def update(self, features: Tensor, labels: Tensor, *, copy: bool = True) -> None:
        """Add a batch.

        Args:
            features: ``(B, d)``.
            labels: ``(B,)`` int64; or the targets of the samples, ``(B, K)`` floating.
            copy: As for :meth:`nclightning.functional.StatisticsBuffer.add`.
        """
        if self._snapshot is None:
            # All processes must take part in reading a head that is sharded. They all have a first batch, but they fold
            # stored samples at different times.
            self._snapshot = read_head(self._head.get()).snapshot()
        if labels.is_floating_point():
            self._update_soft(features, labels)
            return
        buffer = _Buffer(self.statistics, self._folded_excess, self._head_loss)
        buffer.add(features, labels, self.ignore_index, copy=copy)
        self._set(buffer.statistics)
        self._set_excess(buffer.excess)

    def _update_soft(self, features: Tensor, targets: Tensor) -> None:
        """Add a batch of samples with individual targets."""
        head = self._head_loss()
        expected = (len(features), len(head.weight))
        if self.reference.is_problem or self.reference.targets is not None:
            raise UserError("labels must be int64, row numbers of the given targets, got floating ones.")
        if features.ndim != 2 or features.shape[1] != self.feature_dim or tuple(targets.shape) != expected:
            raise UserError(
                f"features must have shape (B, {self.feature_dim}) and floating targets (B, {expected[1]}), got "
                f"{tuple(features.shape)} and {tuple(targets.shape)}."
            )
        if head.bias is not None and not self.reference.lambda_b:
            raise UserError(
                "lambda_b must be given if each sample has its own target and the head has a bias: with a free bias "
                "the bound would need all residuals at once. Pass the penalty on the bias, such as its weight decay."
            )
        self._set_soft(self._soft.add(features, targets, self.reference.loss, head))

    def reset(self) -> None:
        """Remove all samples and the values of the head."""
        super().reset()
        self._snapshot = self._loss = None

    def compute(self) -> dict[str, Tensor]:
        """Compute gap, distance and certified gap.

        Returns:
            Float64 scalars by name.

        Raises:
            ValueError: If there are no samples, a label is outside ``0..M-1``, or the labels do not fit the problem.
        """
        return self.read(self.checked_statistics())

    @without_autocast
    def read(self, stats: ClassStatistics) -> dict[str, Tensor]:
        """Evaluate gap, distance and certified gap.

        Args:
            stats: Statistics of all features since the last reset. With several processes, call this only while the
                states are synchronised.

        Returns:
            As for :meth:`compute`.
        """
        if bool(self._soft.totals[0] > 0):
            if bool(stats.counts.any()):
                raise UserError("labels must be integers in all batches, or floating in all, got both since the reset.")
            return read_soft(self._soft, self._head_loss(), self.reference)
        if not bool(stats.counts.any()):
            raise UserError("there are no samples: call update before compute.")
        values, missing = read_optimality(stats, self._excess, self._head_loss(), self.reference)
        if missing is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"gap or distance is nan, and certified_gap is valid: {missing}", stacklevel=2)
        return values

    def _head_loss(self) -> HeadLoss:
        """Return the loss and the head, in float64 on the device of the states."""
        if self._snapshot is None:
            return self.reference.head_loss(self._head.get(), self.means.device)  # type: ignore[arg-type]
        if self._loss is None or self._loss.weight.device != self.means.device:
            self._loss = self.reference.head_loss(self._snapshot, self.means.device)
        return self._loss

    @property
    def _folded_excess(self) -> ExcessLoss:
        """Excess loss of the samples that are not stored."""
        return _excess_in(vars(self))

    @property
    def _excess(self) -> ExcessLoss:
        """Excess loss of all samples since the last reset; of all processes while the states are synchronised."""
        excess, head = self._folded_excess, self._head_loss()
        if excess.anchors.ndim == 2:
            return _with_kept(excess, self.statistics.kept, head)
        return reduce(lambda one, other: one.merge(other, head), map(ExcessLoss._make, zip(*excess, strict=True)))

    def _set_excess(self, excess: ExcessLoss) -> None:
        """Set the states of the excess loss."""
        for name, value in excess._asdict().items():
            setattr(self, f"excess_{name}", value)

    @property
    def _soft(self) -> SoftSums:
        return _soft_in(vars(self))

    def _set_soft(self, sums: SoftSums) -> None:
        """Set the states of samples with individual targets."""
        for name, value in sums._asdict().items():
            setattr(self, f"soft_{name}", value)

    def _fold(self) -> None:
        excess = self._excess
        super()._fold()
        self._set_excess(excess)

    def merge_states(self, earlier: dict[str, Any]) -> None:
        """Merge states exactly. torchmetrics would stack them."""
        head, kept = self._head_loss(), earlier["kept"]
        excess = _with_kept(_excess_in(earlier), Samples(tuple(kept[::2]), tuple(kept[1::2])), head)
        excess = excess.merge(self._excess, head)
        self._set_soft(SoftSums(*(one + other for one, other in zip(_soft_in(earlier), self._soft, strict=True))))
        super().merge_states(earlier)
        super()._fold()  # They may be folded already.
        self._set_excess(excess)


class _Buffer(StatisticsBuffer):
    """A statistics buffer that also sums the excess loss of the samples that it folds."""

    def __init__(self, statistics: ClassStatistics, excess: ExcessLoss, head: Callable[[], HeadLoss]) -> None:
        super().__init__(statistics)
        self.excess, self._head = excess, head

    def fold(self) -> None:
        self.excess = _with_kept(self.excess, self.kept, self._head())
        super().fold()


def _excess_in(states: Mapping[str, Any]) -> ExcessLoss:
    """Return the excess loss that is stored in states."""
    return ExcessLoss(*(states[f"excess_{name}"].double() for name in ExcessLoss._fields))


def _soft_in(states: Mapping[str, Any]) -> SoftSums:
    """Return the sums over samples with individual targets that are stored in states."""
    return SoftSums(*(states[f"soft_{name}"].double() for name in SoftSums._fields))


def _with_kept(excess: ExcessLoss, kept: Samples, head: HeadLoss) -> ExcessLoss:
    """Add stored samples to an excess loss."""
    for features, labels in zip(kept.features, kept.labels, strict=True):
        excess = excess.add(features, labels, head)
    return excess
