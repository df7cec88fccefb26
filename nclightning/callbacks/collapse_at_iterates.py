"""Neural collapse at iterates of full-batch modules."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import lightning as L
import torch
from torch import Tensor

from nclightning.callbacks.full_batch import as_full_batch, head_reader
from nclightning.callbacks.monitor import Batch, MonitorAtIterates
from nclightning.callbacks.problem import num_groups_of
from nclightning.errors import UserError
from nclightning.functional import class_statistics
from nclightning.metrics import NeuralCollapse
from nclightning.probe.collectors import Measuring, merge_over_ranks
from nclightning.probe.first_batch import check_range
from nclightning.quantities import DEFAULT_MEASURES_OF_GROUPS, NC, mirrored_tags, tag_of, tagged

__all__ = ["CollapseAtIterates"]


class CollapseAtIterates(MonitorAtIterates):
    """Measures the training set at iterates.

    Where labels say groups of samples with the same target, such as mixed ones, and no classes of the head, it reads of
    them what :class:`nclightning.metrics.NeuralCollapse` reads of groups.

    Args:
        every_n_iterations: Cadence.
        measuring: What to measure.
        stages: Of validation and test, those that are read.
    """

    log10_tags = mirrored_tags(NC, "train")

    def __init__(
        self, every_n_iterations: int, measuring: Measuring, stages: Collection[str] = ("val", "test")
    ) -> None:
        super().__init__(every_n_iterations)
        self._measuring, self._stages = measuring, stages
        self._metric: NeuralCollapse | None = None

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Find the head and check the labels once."""
        head = head_reader(as_full_batch(pl_module))
        groups = self._measuring.num_groups = num_groups_of(pl_module)
        if groups is None:
            check_range(batch[1], head, None)
        elif int(batch[1].min()) < 0 or int(batch[1].max()) >= groups:
            raise UserError(
                f"labels must be within 0..{groups - 1}, the groups of the problem of {type(pl_module).__name__}, got "
                f"{int(batch[1].min())}..{int(batch[1].max())}."
            )
        self._metric = self._measuring.metric(head)
        if groups is not None:
            self.log10_tags = frozenset(tag_of(NC, "train", name) for name in DEFAULT_MEASURES_OF_GROUPS)

    @torch.no_grad()
    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Measure the training set at an iterate."""
        return dict(tagged(self._read(pl_module, batch), NC, "train"))

    def _read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor]:
        assert self._metric is not None
        features, metric = as_full_batch(pl_module).features_of(batch[0]), self._metric
        stats = class_statistics(features, batch[1], metric.num_classes, scatter=metric.keeps_scatter, copy=False)
        return metric.read(merge_over_ranks(stats))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Log those of groups in a full-batch validation, whose labels :class:`CollapseInEvaluation` cannot take."""
        self._log_pass("val", pl_module, batch)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Log those of groups in a full-batch test."""
        self._log_pass("test", pl_module, batch)

    @torch.no_grad()
    def _log_pass(self, stage: str, pl_module: L.LightningModule, batch: Batch) -> None:
        if num_groups_of(pl_module) is None or stage not in self._stages or pl_module.trainer.sanity_checking:
            return
        self.prepare(pl_module, batch)
        with torch.inference_mode(False):
            values = self._read(pl_module, (batch[0].clone(), batch[1].clone()))
        pl_module.log_dict(tagged(values, NC, stage), sync_dist=True, batch_size=1)
