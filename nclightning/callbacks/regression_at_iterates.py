"""Neural regression collapse at iterates of full-batch modules."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from nclightning.callbacks.full_batch import as_full_batch, head_reader
from nclightning.callbacks.monitor import Batch, MonitorAtIterates
from nclightning.errors import UserError
from nclightning.functional import ClassStatistics, sample_statistics
from nclightning.metrics import RegressionCollapse
from nclightning.objective import Objective
from nclightning.probe.collectors import merge_over_ranks
from nclightning.problems.frames import one_hot
from nclightning.quantities import NRC, mirrored_tags, tagged

__all__ = ["RegressionAtIterates"]


class RegressionAtIterates(MonitorAtIterates):
    """Measures the training set at iterates, against the targets of the module's objective."""

    log10_tags = mirrored_tags(NRC, "train")

    def __init__(self, every_n_iterations: int) -> None:
        super().__init__(every_n_iterations)
        self._metric: RegressionCollapse | None = None
        self._targets: ClassStatistics | None = None

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Find head and targets once."""
        targets = _targets_of(pl_module).to(batch[1].device).index_select(0, batch[1])
        self._targets = merge_over_ranks(sample_statistics(targets))
        self._metric = RegressionCollapse(head_reader(as_full_batch(pl_module))).to(batch[1].device)

    @torch.no_grad()
    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Measure the training set at an iterate."""
        assert self._metric is not None
        assert self._targets is not None
        features = sample_statistics(as_full_batch(pl_module).features_of(batch[0]))
        values = self._metric.read(merge_over_ranks(features), self._targets)
        return dict(tagged(values, NRC, "train"))


def _targets_of(pl_module: L.LightningModule) -> Tensor:
    """Return the targets ``(M, K)`` of a module's objective, of which labels number the rows."""
    objective = getattr(pl_module, "objective", None)
    if not isinstance(objective, Objective):
        raise UserError(
            "RegressionCollapseMonitor takes the targets of a full-batch run from its objective, and "
            f"{type(pl_module).__name__} has none: derive it from nclightning.models.RegularizedClassifier."
        )
    targets = objective.targets
    return targets if isinstance(targets, Tensor) else one_hot(as_full_batch(pl_module).head.out_features)
