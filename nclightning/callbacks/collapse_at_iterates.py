"""Neural collapse at iterates of full-batch modules."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor

from nclightning.callbacks.full_batch import as_full_batch, head_reader
from nclightning.callbacks.monitor import Batch, MonitorAtIterates
from nclightning.callbacks.problem import num_groups_of
from nclightning.functional import class_statistics
from nclightning.metrics import NeuralCollapse
from nclightning.probe.collectors import Measuring, merge_over_ranks
from nclightning.probe.first_batch import check_range

__all__ = ["CollapseAtIterates"]


class CollapseAtIterates(MonitorAtIterates):
    """Measures the training set at iterates.

    Args:
        every_n_iterations: Cadence.
        measuring: What to measure.
    """

    log10_tags = frozenset(f"nc/train/nc{i}" for i in (1, 2, 3))

    def __init__(self, every_n_iterations: int, measuring: Measuring) -> None:
        super().__init__(every_n_iterations)
        self._measuring = measuring
        self._metric: NeuralCollapse | None = None

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Find the head and check the labels once."""
        head = head_reader(as_full_batch(pl_module))
        check_range(batch[1], head, None)
        self._metric = self._measuring.metric(head)

    @torch.no_grad()
    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Measure the training set at an iterate."""
        assert self._metric is not None
        features, metric = as_full_batch(pl_module).features_of(batch[0]), self._metric
        stats = class_statistics(features, batch[1], metric.num_classes, scatter=metric.keeps_scatter, copy=False)
        return {f"nc/train/{name}": value for name, value in metric.read(merge_over_ranks(stats)).items()}
