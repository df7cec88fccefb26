"""The largest curvature of the training objective, against the largest at which the optimizer is stable."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from nclightning.callbacks.host import LightningHost
from nclightning.compat.lightning import shown_as_validating
from nclightning.compat.twins import logging_nothing
from nclightning.errors import UserError
from nclightning.functional import extreme_eigenvalues
from nclightning.optim.rules import curvature_scales, weight_decays
from nclightning.probe.inputs import tensors_of
from nclightning.probe.sweep import eager, generators_kept, sequential_loader, untouched
from nclightning.quantities import SHARPNESS, SHARPNESS_OVER_LIMIT

__all__ = ["LossFn", "Sharpness", "TrainingLoss"]

LossFn = Callable[[Any, Any], Tensor]


class TrainingLoss:
    """The mean loss of a module on a fixed set of batches.

    Args:
        data: The batches, or a loader of them. They are read once and stay on the device.
        loss_fn: ``(module, batch) -> loss``, the mean over the samples of a batch.
    """

    def __init__(self, data: Iterable[Any], loss_fn: LossFn) -> None:
        self._data, self._loss_fn = data, loss_fn
        self._batches: list[tuple[Any, int]] = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_batches": []}

    def forget(self) -> None:
        """Let go of the batches."""
        self._batches = []

    def prepare(self, pl_module: L.LightningModule) -> None:
        """Read the batches, without a trace.

        Raises:
            ValueError: If there are none.
        """
        if self._batches:
            return
        host = LightningHost(pl_module)
        with untouched(pl_module), generators_kept(self._data), shown_as_validating(pl_module.trainer):
            for batch in sequential_loader(self._data):
                moved = host.on_device(batch)
                sizes = [len(each) for each in tensors_of(moved) if each.ndim]
                self._batches.append((moved, sizes[0] if sizes else 1))
        if not self._batches:
            raise UserError("data has no batch, and the sharpness is that of the loss on it.")

    def __call__(self, pl_module: L.LightningModule) -> Tensor:
        """Evaluate the loss with its graph.

        Raises:
            ValueError: If ``loss_fn`` returns something else than one number, or one without a graph.
        """
        count = sum(size for _, size in self._batches)
        total: Tensor | None = None
        for batch, size in self._batches:
            loss = self._loss_fn(pl_module, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise UserError(f"loss_fn must return the mean loss of a batch, a tensor of one number, got {what}.")
            if not loss.requires_grad:
                raise UserError(
                    "loss_fn returned a loss without a graph, of which no curvature can be taken: leave out detach, "
                    "item and torch.no_grad, and take the loss of the module that is passed."
                )
            part = loss.reshape(()) * (size / count)
            total = part if total is None else total + part
        assert total is not None
        return total


class Sharpness:
    """Computes the sharpness of a run without changing the run.

    The objective is the loss with the coupled weight decay of the optimizer, as a function of all parameters that it
    trains. The module stays in its modes, as it trains: batch norm takes the statistics of the batch. Random numbers,
    as those of dropout, are the same at each reading.

    Args:
        loss: Evaluates the loss of a module with its graph.
        tolerance: Relative error of the eigenvalue.
        max_products: Largest number of products with the Hessian, after which Lanczos' method ends unconverged.
    """

    def __init__(
        self, loss: Callable[[L.LightningModule], Tensor], tolerance: float = 1e-4, max_products: int = 200
    ) -> None:
        self.loss, self._options = loss, {"tolerance": tolerance, "max_products": max_products}
        self._reported = set[str]()

    def read(self, pl_module: L.LightningModule) -> dict[str, Tensor | float]:
        """Read ``laws/sharpness`` and, where a limit is known, ``laws/sharpness_over_limit``.

        Raises:
            ValueError: If several optimizers train the module, or the loss has no second derivative.
        """
        optimizer, *others = pl_module.trainer.optimizers
        if others:
            raise UserError(
                f"sharpness_every_n_steps reads runs with one optimizer, got {1 + len(others)}: set it to None."
            )
        with untouched(pl_module), logging_nothing(pl_module.trainer, pl_module), eager():
            torch.manual_seed(0)  # Put back afterwards.
            return self._read(pl_module, optimizer)

    def _read(self, pl_module: L.LightningModule, optimizer: Optimizer) -> dict[str, Tensor | float]:
        decays = weight_decays(optimizer)
        params = [p for p, _ in decays]

        def value() -> Tensor:
            penalties = [0.5 * decay * p.square().sum() for p, decay in decays if decay]
            return self.loss(pl_module) + sum(penalties)

        sharpness = self._largest(value, params)
        values: dict[str, Tensor | float] = {SHARPNESS.tag(): sharpness}
        scales = curvature_scales(optimizer)
        if scales is None:
            if optimizer.state:  # Before the first step of Adam there is no preconditioner yet.
                kind = type(optimizer).__name__
                self._tell(f"{SHARPNESS_OVER_LIMIT.tag()} is left out: the stable curvature of {kind} is not known.")
        elif all(isinstance(each, float) for each in scales) and len(set(scales)) == 1:
            values[SHARPNESS_OVER_LIMIT.tag()] = sharpness * float(scales[0]) ** 2
        else:
            values[SHARPNESS_OVER_LIMIT.tag()] = self._largest(value, params, scales)
        return values

    def _largest(
        self, value: Callable[[], Tensor], params: list[Tensor], scales: list[Tensor | float] | None = None
    ) -> Tensor:
        try:
            found = extreme_eigenvalues(value, params, ends="largest", scales=scales, **self._options)  # type: ignore[arg-type]
        except RuntimeError as error:
            if not any(words in str(error) for words in ("derivative", "double backward")):
                raise
            raise UserError(
                f"the loss has no second derivative, which sharpness_every_n_steps needs: {error} Let loss_fn evaluate "
                "it with parts that have one, such as attention within "
                "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)."
            ) from error
        if not found.converged:
            self._tell(
                f"{SHARPNESS.tag()} is a lower bound: Lanczos' method has not converged after {found.products} "
                "products with the Hessian."
            )
        return found.largest[0]

    def _tell(self, sentence: str) -> None:
        """Report a sentence once."""
        if sentence not in self._reported:
            self._reported.add(sentence)
            rank_zero_info(sentence)
