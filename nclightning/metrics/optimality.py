"""Optimality gap and distance to the optimal set of any network as a streaming metric."""

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
from nclightning.metrics.gaps import SoftSums, read_optimality, read_soft
from nclightning.metrics.groups import stand_apart
from nclightning.metrics.neural_collapse import NeuralCollapse
from nclightning.metrics.reference import LossLike, Reference
from nclightning.problems import Problem
from nclightning.theory import UFMProblem

__all__ = ["Optimality"]


class Optimality(NeuralCollapse):
    r"""How far features and head are from the optimum of an unconstrained feature model.

    ``update`` accepts ``features (B, d)`` and ``labels (B,)``; ``compute`` returns float64 scalars:

    * ``gap``, F - F* without cancellation, ``distance`` to the optimal set, and ``relative_distance``, that divided by
      the norm of the optimum. ``nan`` where the optimum is not known; a warning says why, once.
    * ``certified_bound``, a number that F* is not below, from the residuals of the features seen alone, and
      ``certified_gap``, F minus that: ``F - bound >= F - F* >= 0`` for any loss, counts and d, up to rounding of about
      ``1e-15 F``. Where d is at least the rank of the optimum it vanishes like the distance. Above 4096 classes they
      are left out.
    * ``lambda_w`` and ``lambda_h`` if they are fitted, as :func:`nclightning.metrics.gaps.read_optimality` says.

    F is Problem (2) on the features seen; for a network, whose features are not free, F* is a lower bound. Nothing
    that is gathered depends on the penalties, so that they can be fitted to the same features. No feature is kept for
    long.

    With ``update(features, targets)``, targets ``(B, K)`` of a floating dtype, each sample has a target of its own:
    mixup, soft labels, several labels. Then there are the certified values only. Under ``"ce"`` a row whose sum is not
    1 counts with its sum as a weight, as in ``torch.nn.functional.cross_entropy``.

    Args:
        problem: A :class:`nclightning.theory.UFMProblem` or :class:`nclightning.problems.Problem`; labels are its
            groups, and must come exactly as often as it says. Or the loss alone, ``"mse"``, ``"ce"``, ``"bce"`` or a
            :class:`nclightning.problems.Loss`: then the problem is that of the samples seen, with any counts.
        head: The head, as for :class:`nclightning.metrics.NeuralCollapse`; read with the first batch after a reset,
            and not to change before ``compute``.
        lambda_w: With a loss: penalty on the head. None with ``lambda_h`` fits both.
        lambda_h: With a loss: penalty on the features, on the sum over all samples.
        lambda_b: With a loss: penalty on the bias of the head; 0.0 takes a bias as free.
        targets: With a loss: ``(M, K)``, whose row m is the target of label m, such as smoothed labels. None takes
            hard labels; for a head with one output 0 and 1.
        exact: False leaves out gap and distance. True finds optima without a formula for any sizes, None for
            ``M K <= 16384``, that of 128 classes: it takes seconds there, and minutes for a thousand classes. Penalties
            that are fitted change, and the optimum with them.
        **kwargs: Passed to :class:`torchmetrics.Metric`; ``ignore_index`` is the label of samples to leave out.

    Raises:
        ValueError: If an argument is out of range or the head does not fit; at ``compute``, if labels are not those of
            the problem.

    Example:
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
        # The statistics are of groups, which a head may have another number of rows for.
        super().__init__(num_groups, dim, None, measures=("nc1_ratio",), **kwargs)
        self.reference, self._head = reference, Borrowed(head)
        self._snapshot: Head | None = None
        self._loss: HeadLoss | None = None
        self._has_warned = False
        num_outputs = weight_shape(head)[0]
        for name, value in ExcessLoss.empty(num_groups, dim, num_outputs)._asdict().items():
            # Stacked over processes, then merged: sums around different means cannot be added.
            self.add_state(f"excess_{name}", default=value.clone(), dist_reduce_fx=None)
        for name, value in SoftSums.empty(num_outputs)._asdict().items():
            self.add_state(f"soft_{name}", default=value, dist_reduce_fx="sum")
        stand_apart(self)

    @without_autocast
    def update(self, features: Tensor, labels: Tensor, *, copy: bool = True) -> None:
        """Add a batch.

        Args:
            features: ``(B, d)``.
            labels: ``(B,)`` int64; or a target of its own for each sample, ``(B, K)`` floating.
            copy: As for :meth:`nclightning.functional.StatisticsBuffer.add`.
        """
        if self._snapshot is None:
            # With the first batch and not when samples are folded, which processes do at different times: to read a
            # head that is spread over them takes all of them.
            self._snapshot = read_head(self._head.get()).snapshot()
        if labels.is_floating_point():
            self._update_soft(features, labels)
            return
        buffer = _Buffer(self.statistics, self._folded_excess, self._head_loss)
        buffer.add(features, labels, self.ignore_index, copy=copy)
        self._set(buffer.statistics)
        self._set_excess(buffer.excess)

    def _update_soft(self, features: Tensor, targets: Tensor) -> None:
        head = self._head_loss()
        expected = (len(features), len(head.weight))
        if self.reference.is_problem or self.reference.targets is not None:
            raise UserError("labels must be int64, the rows of the targets that were given, got floating ones.")
        if features.ndim != 2 or features.shape[1] != self.feature_dim or tuple(targets.shape) != expected:
            raise UserError(
                f"features must have shape (B, {self.feature_dim}) and floating targets (B, {expected[1]}), got "
                f"{tuple(features.shape)} and {tuple(targets.shape)}."
            )
        if head.bias is not None and not self.reference.lambda_b:
            raise UserError(
                "lambda_b must be given where each sample has a target of its own and the head a bias: of a free bias "
                "the bound needs all residuals at once. Pass the penalty on the bias, such as its weight decay."
            )
        self._set_soft(self._soft.add(features, targets, self.reference.loss, head))

    def reset(self) -> None:
        """Forget samples and head."""
        super().reset()
        self._snapshot = self._loss = None

    def compute(self) -> dict[str, Tensor]:
        """Read gap, distance and certified gap.

        Returns:
            Float64 scalars by name.

        Raises:
            ValueError: If there are no samples, a label was outside ``0..M-1``, or labels are not those of the problem.
        """
        return self.read(self.checked_statistics())

    @without_autocast
    def read(self, stats: ClassStatistics) -> dict[str, Tensor]:
        """Evaluate gap, distance and certified gap.

        Args:
            stats: Statistics of all features seen; of several processes only while the states are synchronised.

        Returns:
            As :meth:`compute`.
        """
        if bool(self._soft.totals[0] > 0):
            if bool(stats.counts.any()):
                raise UserError("labels must be integers in all batches or floating in all, got both since the reset.")
            return read_soft(self._soft, self._head_loss(), self.reference)
        if not bool(stats.counts.any()):
            raise UserError("there are no samples: call update before compute.")
        values, missing = read_optimality(stats, self._excess, self._head_loss(), self.reference)
        if missing is not None and not self._has_warned:
            self._has_warned = True
            warnings.warn(f"gap or distance is nan, and certified_gap holds: {missing}", stacklevel=2)
        return values

    def _head_loss(self) -> HeadLoss:
        if self._snapshot is None:
            return self.reference.head_loss(self._head.get(), self.means.device)  # type: ignore[arg-type]
        if self._loss is None or self._loss.weight.device != self.means.device:
            self._loss = self.reference.head_loss(self._snapshot, self.means.device)
        return self._loss

    @property
    def _folded_excess(self) -> ExcessLoss:
        """Excess loss of the samples that are not kept."""
        return _excess_in(vars(self))

    @property
    def _excess(self) -> ExcessLoss:
        """Excess loss of everything seen, over all processes while the states are synchronised."""
        excess, head = self._folded_excess, self._head_loss()
        if excess.anchors.ndim == 2:
            return _with_kept(excess, self.statistics.kept, head)
        return reduce(lambda one, other: one.merge(other, head), map(ExcessLoss._make, zip(*excess, strict=True)))

    def _set_excess(self, excess: ExcessLoss) -> None:
        for name, value in excess._asdict().items():
            setattr(self, f"excess_{name}", value)

    @property
    def _soft(self) -> SoftSums:
        return _soft_in(vars(self))

    def _set_soft(self, sums: SoftSums) -> None:
        for name, value in sums._asdict().items():
            setattr(self, f"soft_{name}", value)

    def _fold(self) -> None:
        excess = self._excess
        super()._fold()
        self._set_excess(excess)

    def merge_states(self, earlier: dict[str, Any]) -> None:
        """Merge states exactly, where torchmetrics would stack them."""
        head, kept = self._head_loss(), earlier["kept"]
        excess = _with_kept(_excess_in(earlier), Samples(tuple(kept[::2]), tuple(kept[1::2])), head)
        excess = excess.merge(self._excess, head)
        self._set_soft(SoftSums(*(one + other for one, other in zip(_soft_in(earlier), self._soft, strict=True))))
        super().merge_states(earlier)
        super()._fold()  # They may be folded already.
        self._set_excess(excess)


class _Buffer(StatisticsBuffer):
    """Adds up the excess loss of the samples that are folded."""

    def __init__(self, statistics: ClassStatistics, excess: ExcessLoss, head: Callable[[], HeadLoss]) -> None:
        super().__init__(statistics)
        self.excess, self._head = excess, head

    def fold(self) -> None:
        self.excess = _with_kept(self.excess, self.kept, self._head())
        super().fold()


def _excess_in(states: Mapping[str, Any]) -> ExcessLoss:
    return ExcessLoss(*(states[f"excess_{name}"].double() for name in ExcessLoss._fields))


def _soft_in(states: Mapping[str, Any]) -> SoftSums:
    return SoftSums(*(states[f"soft_{name}"].double() for name in SoftSums._fields))


def _with_kept(excess: ExcessLoss, kept: Samples, head: HeadLoss) -> ExcessLoss:
    for features, labels in zip(kept.features, kept.labels, strict=True):
        excess = excess.add(features, labels, head)
    return excess
