"""NC1-NC3 during a fit, a validation or a test."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from nclightning.callbacks.monitor import Batch, ReadingsMonitor
from nclightning.features import (
    capture_features,
    detect_head,
    find_head,
    frozen,
    sequential_loader,
    split_batch,
)
from nclightning.functional import class_statistics
from nclightning.metrics import NeuralCollapse

__all__ = ["NeuralCollapseMonitor"]


class NeuralCollapseMonitor(ReadingsMonitor):
    """Logs ``nc/<stage>/nc1``, ``nc2`` and ``nc3``, with the stage ``train``, ``val`` or ``test``.

    Formulas: :mod:`nclightning.functional`.

    On our full-batch modules it reads the training set at iterates, with ``log10`` versions. On any other module it
    sweeps the training set at ends of epochs: the model frozen in eval mode, every sample once and in order, over all
    processes; weights, gradients, buffers, training modes and random states are as before. In validation and test it
    collects the features of the ordinary forwards. Readings reach ``trainer.callback_metrics``.

    Batches are ``(x, y)`` or mappings with the labels under ``labels``, ``label``, ``y``, ``target`` or ``targets``.

    Args:
        every_n_iterations: Cadence on full-batch modules.
        head: Dotted name of the linear head. None finds it: the ``nn.Linear`` whose output is the model's output, else
            by the common names (:func:`nclightning.features.find_head`).
        every_n_epochs: Cadence of sweeps on other modules.

    Raises:
        ValueError: If a cadence is below 1, the head cannot be found, or labels do not fit it.
    """

    log10_tags = frozenset(f"nc/train/nc{i}" for i in (1, 2, 3))

    def __init__(self, every_n_iterations: int = 10, head: str | None = None, every_n_epochs: int = 1) -> None:
        super().__init__(every_n_iterations)
        if every_n_epochs < 1:
            raise ValueError(f"every_n_epochs must be at least 1, got {every_n_epochs}.")
        self.head = head
        self.every_n_epochs = every_n_epochs
        self._found: str | None = None
        self._metric: NeuralCollapse | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._features: Tensor | None = None

    def _head_of(self, pl_module: L.LightningModule, inputs: Any = None) -> nn.Linear:
        """Find the head, by running the model where an input is at hand and nothing was found before."""
        name = self.head or self._found
        if name is None and inputs is not None:
            head = detect_head(pl_module, inputs)
            name = self._found = next(path for path, child in pl_module.named_modules() if child is head)
        return find_head(pl_module, name)

    def _new_metric(self, pl_module: L.LightningModule, head: nn.Linear) -> NeuralCollapse:
        return NeuralCollapse(head.out_features, head.in_features, head).to(pl_module.device)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell full-batch modules from others."""
        self._found = None
        if _is_full_batch(pl_module):
            super().on_fit_start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Read the first iterate of a full-batch run."""
        if _is_full_batch(pl_module):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sweep the training set of a module that is not full-batch."""
        if not _is_full_batch(pl_module) and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._log(pl_module, "train", self._sweep(trainer, pl_module))

    def _sweep(self, trainer: L.Trainer, pl_module: L.LightningModule) -> NeuralCollapse:
        metric, loader = None, trainer.train_dataloader
        if loader is None:
            raise ValueError("NeuralCollapseMonitor found no training data to sweep.")
        with frozen(pl_module), trainer.precision_plugin.forward_context():
            for batch in sequential_loader(loader, trainer.global_rank, trainer.world_size):
                inputs, labels = split_batch(trainer.strategy.batch_to_device(batch))
                head = self._head_of(pl_module, inputs)
                metric = self._new_metric(pl_module, head) if metric is None else metric
                metric.update(capture_features(pl_module, head, inputs), labels)
        if metric is None:
            raise ValueError("the training data to sweep is empty.")
        return metric

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Find the head and check the labels once."""
        head, labels = self._head_of(pl_module), batch[1]
        self._metric = self._new_metric(pl_module, head)
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
        features = capture_features(pl_module, self._head_of(pl_module), inputs)
        stats = class_statistics(features, labels, self._metric.num_classes)
        return {f"nc/train/{name}": value for name, value in self._metric.read(stats).items()}

    def _log(self, pl_module: L.LightningModule, stage: str, metric: NeuralCollapse) -> None:
        # The metric has merged all processes; averaging equal values is what keeps Lightning from warning.
        pl_module.log_dict({f"nc/{stage}/{name}": v for name, v in metric.compute().items()}, sync_dist=True)

    def _start_pass(self, pl_module: L.LightningModule) -> None:
        head = self._head_of(pl_module)
        self._metric = self._new_metric(pl_module, head)
        self._hook = head.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        self._features = args[0]

    def _collect(self, batch: Batch) -> None:
        assert self._metric is not None
        if self._features is None:
            raise ValueError("the head did not run in this step, so there are no features to read.")
        self._metric.update(self._features, split_batch(batch)[1])
        self._features = None

    def _end_pass(self, pl_module: L.LightningModule, stage: str) -> None:
        assert self._metric is not None
        self._remove_hook()
        self._log(pl_module, stage, self._metric)

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


def _is_full_batch(pl_module: L.LightningModule) -> bool:
    return hasattr(pl_module, "iterations_per_step")
