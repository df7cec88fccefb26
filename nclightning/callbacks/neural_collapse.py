"""NC1-NC3 during a fit, a validation or a test."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from nclightning.callbacks.monitor import Batch, ReadingsMonitor
from nclightning.features import capture_features, find_head
from nclightning.functional import class_statistics
from nclightning.metrics import NeuralCollapse

__all__ = ["NeuralCollapseMonitor"]


class NeuralCollapseMonitor(ReadingsMonitor):
    """Logs ``nc/<stage>/nc1``, ``nc2`` and ``nc3`` (stage ``train``, ``val`` or ``test``) and their ``log10``.

    During a fit it reads the features of the whole training set at iterates; in ``validate`` and ``test`` it
    collects the features of the ordinary forwards and logs at the end of the pass. Formulas:
    :mod:`nclightning.functional`.

    Args:
        every_n_iterations: Cadence during a fit.
        head: Dotted name of the linear head; None looks for the attribute ``head`` or the only linear layer.

    Raises:
        ValueError: If the head cannot be found or labels do not fit it.
    """

    log10_tags = frozenset(f"nc/train/nc{i}" for i in (1, 2, 3))

    def __init__(self, every_n_iterations: int = 10, head: str | None = None) -> None:
        super().__init__(every_n_iterations)
        self.head = head
        self._metric: NeuralCollapse | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._features: Tensor | None = None

    def _new_metric(self, pl_module: L.LightningModule) -> tuple[NeuralCollapse, nn.Linear]:
        head = find_head(pl_module, self.head)
        return NeuralCollapse(head.out_features, head.in_features, head).to(pl_module.device), head

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Find the head and check the labels once."""
        self._metric, head = self._new_metric(pl_module)
        labels = batch[1]
        if int(labels.min()) < 0 or int(labels.max()) >= head.out_features:
            raise ValueError(
                f"labels must be within 0..{head.out_features - 1}, the outputs of the head, "
                f"got {int(labels.min())}..{int(labels.max())}."
            )

    @torch.no_grad()
    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Measure NC1-NC3 on the training set."""
        assert self._metric is not None
        inputs, labels = batch
        features = capture_features(pl_module, find_head(pl_module, self.head), inputs)
        stats = class_statistics(features, labels, self._metric.num_classes)
        return {f"nc/train/{name}": value for name, value in self._metric.read(stats).items()}

    def _start_pass(self, pl_module: L.LightningModule) -> None:
        self._metric, head = self._new_metric(pl_module)
        self._hook = head.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = args[0]

    def _collect(self, batch: Batch) -> None:
        assert self._metric is not None
        if self._features is None:
            raise ValueError("the head did not run in this step, so there are no features to read.")
        self._metric.update(self._features, batch[1])
        self._features = None

    def _end_pass(self, pl_module: L.LightningModule, stage: str) -> None:
        assert self._metric is not None
        pl_module.log_dict({f"nc/{stage}/{name}": value for name, value in self._metric.compute().items()})
        self._remove_hook()

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._features = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start collecting."""
        self._start_pass(pl_module)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Collect a batch."""
        self._collect(batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log ``nc/val/...``."""
        self._end_pass(pl_module, "val")

    def on_test_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start collecting."""
        self._start_pass(pl_module)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Collect a batch."""
        self._collect(batch)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log ``nc/test/...``."""
        self._end_pass(pl_module, "test")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._remove_hook()
        super().on_exception(trainer, pl_module, exception)
