"""Neural regression collapse of features, head and targets as a torchmetrics class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional import (
    ClassStatistics,
    StatisticsBuffer,
    gram_deviation,
    principal_residual,
    row_space_residual,
    target_rank,
)
from nclightning.functional.regression import as_targets
from nclightning.heads import HeadSource, read_head, weight_shape
from nclightning.metrics.base import StreamingMetric, without_autocast
from nclightning.metrics.borrowed import Borrowed
from nclightning.metrics.compute_groups import separate_compute_group
from nclightning.metrics.states import states_of, statistics_of

__all__ = ["RegressionCollapse"]

_SIDES = ("features", "targets")


class RegressionCollapse(StreamingMetric):
    """Measures of neural regression collapse for features and targets since the last reset, and for the current head.

    ``update`` takes ``features (B, d)`` of any floating dtype and ``targets (B, K)``, or ``(B,)`` for one target.
    ``compute`` returns float64 scalars:

    * ``nrc1``: :func:`nclightning.functional.principal_residual` for ``rank`` directions.
    * ``nrc2``: :func:`nclightning.functional.row_space_residual`.
    * ``nrc3``: the deviation of :func:`nclightning.functional.gram_deviation`.
    * ``gamma``: the gamma of :func:`nclightning.functional.gram_deviation`.
    * ``rank``: :func:`nclightning.functional.target_rank`, the number of directions along which targets spread.

    The first three are 0 at collapse. The split into batches, their order and their split over processes change only
    round-off. The metric stores about ``d^2 + K^2`` numbers, and single samples only for a while. ``update`` makes no
    transfer to the host. Leave out samples without targets: one target that is not finite makes ``nrc1``, ``nrc3``,
    ``gamma`` and ``rank`` ``nan``.

    Args:
        head: The head, as for :class:`nclightning.metrics.NeuralCollapse`. ``compute`` uses its current values. A head
            with a bias is compared with the covariance of the targets, one without a bias with their second moments
            around zero.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        TypeError: If the head has no weight.

    Example:
        >>> import torch
        >>> from nclightning.metrics import RegressionCollapse
        >>> metric = RegressionCollapse(torch.nn.Linear(8, 2))
        >>> metric.update(torch.randn(50, 8), torch.randn(50, 2))
        >>> list(metric.compute())
        ['nrc1', 'nrc2', 'nrc3', 'gamma', 'rank']
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False

    def __init__(self, head: HeadSource, **kwargs: Any) -> None:
        kwargs.setdefault("compute_with_cache", False)  # The head may change without an update.
        super().__init__(**kwargs)
        self.num_targets, self.feature_dim = weight_shape(head)
        self._head = Borrowed(head)  # Kept out of this module's parameters.
        for side, dim in zip(_SIDES, (self.feature_dim, self.num_targets), strict=True):
            states = states_of(ClassStatistics.empty(1, dim))
            self._names = tuple(states)
            for name, value in states.items():
                # States are stacked over processes and merged in compute. Summing centred moments would be wrong.
                self.add_state(f"{side}_{name}", default=value, dist_reduce_fx=None)
        separate_compute_group(self, self.num_targets, self.feature_dim)

    @property
    def features(self) -> ClassStatistics:
        """Statistics of all features since the last reset; of all processes while the states are synchronised."""
        return self._statistics(vars(self), "features")

    @property
    def targets(self) -> ClassStatistics:
        """Statistics of all targets since the last reset; of all processes while the states are synchronised."""
        return self._statistics(vars(self), "targets")

    @without_autocast
    def update(self, features: Tensor, targets: Tensor, *, copy: bool = True) -> None:
        """Add a batch.

        Args:
            features: ``(B, d)``.
            targets: ``(B, K)``, or ``(B,)`` for one target.
            copy: As for :meth:`nclightning.functional.StatisticsBuffer.add`.
        """
        targets = as_targets(targets, self.num_targets)
        if len(targets) != len(features):
            raise UserError(
                f"features and targets must have the same number of rows, got {len(features)} and {len(targets)}."
            )
        one = torch.zeros(len(targets), dtype=torch.int64, device=targets.device)
        added = {}
        for side, rows in zip(_SIDES, (features, targets), strict=True):
            buffer = StatisticsBuffer(self._statistics(vars(self), side))
            buffer.add(rows, one, copy=copy)
            added[side] = buffer.statistics
        for side, stats in added.items():
            self._set(side, stats)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch, and compute the measures of this batch alone; arguments as for :meth:`update`."""
        self.prepare_sync()  # forward copies the states each time, which would be slow with stored samples.
        return super().forward(*args, **kwargs)

    def prepare_sync(self) -> None:
        """Give the states the same shapes on all processes."""
        for side in _SIDES:
            self._set(side, self._statistics(vars(self), side).folded)

    def compute(self) -> dict[str, Tensor]:
        """Compute the measures, with the current values of the head.

        Returns:
            Float64 scalars by name.
        """
        return self.read(self.features, self.targets)

    @without_autocast
    def read(self, features: ClassStatistics, targets: ClassStatistics) -> dict[str, Tensor]:
        """Evaluate the measures on statistics, without a transfer to the host.

        Args:
            features: Statistics of the features.
            targets: Statistics of the targets of the same samples.

        Returns:
            As for :meth:`compute`.
        """
        head, rank = read_head(self._head.get()), target_rank(targets)
        weight = head.weight.detach().to(features.means.device)
        deviation, gamma = gram_deviation(targets, weight, centred=head.bias is not None)
        return {
            "nrc1": principal_residual(features, rank),
            "nrc2": row_space_residual(features, weight),
            "nrc3": deviation,
            "gamma": gamma,
            "rank": rank,
        }

    def set_dtype(self, dst_type: Any) -> RegressionCollapse:
        """Change the dtype of the statistics; counts of labels stay integers."""
        self.prepare_sync()
        super().set_dtype(dst_type)
        for name in (f"{side}_num_invalid" for side in _SIDES):
            setattr(self, name, getattr(self, name).long())
            self.change_default(name, torch.zeros_like(getattr(self, name)))
        return self

    def _statistics(self, states: Any, side: str) -> ClassStatistics:
        """Return the statistics of features or targets that are stored in states."""
        return statistics_of({name: states[f"{side}_{name}"] for name in self._names})

    def _set(self, side: str, stats: ClassStatistics) -> None:
        """Set the states of features or targets."""
        for name, value in states_of(stats).items():
            setattr(self, f"{side}_{name}", value)

    def merge_states(self, earlier: dict[str, Any]) -> None:
        """Merge states exactly. torchmetrics would stack them."""
        for side in _SIDES:
            self._set(side, self._statistics(earlier, side).merge(self._statistics(vars(self), side)))
