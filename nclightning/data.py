"""Full-batch data that lives on the training device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

__all__ = ["FullBatchLoader", "IndexDataModule"]


class FullBatchLoader:
    """Yields the same resident batch again and again: no workers, no copies, no random numbers.

    Args:
        batch: What to yield.
        length: Batches per epoch.
    """

    def __init__(self, batch: tuple[Tensor, Tensor], length: int) -> None:
        self.batch = batch
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.length):
            yield self.batch

    # All batches are equal, so a loader that resumes within an epoch has nothing to remember.
    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept it."""


class IndexDataModule(L.LightningDataModule):
    """Sample indices with balanced labels: the training set of the unconstrained feature model.

    The whole set is one batch ``(index, labels)``, class after class, on the training device. ``validate`` and
    ``test`` get the same batch once; there is no other data.

    Args:
        num_classes: K. None takes it from the model, which is where it is set; a value that differs is refused.
        samples_per_class: n, likewise.
        steps_per_epoch: Lightning steps per epoch; it only sets how often epoch hooks run.

    Raises:
        ValueError: If a size is missing or differs from the model's.
    """

    def __init__(
        self, num_classes: int | None = None, samples_per_class: int | None = None, steps_per_epoch: int = 10
    ) -> None:
        super().__init__()
        if steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}.")
        self.num_classes = num_classes
        self.samples_per_class = samples_per_class
        self.steps_per_epoch = steps_per_epoch

    def setup(self, stage: str) -> None:
        """Take the sizes over from the model, or check them against it."""
        self.adopt(None if self.trainer is None else self.trainer.lightning_module)

    def adopt(self, model: L.LightningModule | None) -> None:
        """Take the sizes over from a model, or check them against it.

        Args:
            model: With hyperparameters ``num_classes`` and ``samples_per_class``; None if there is none.

        Raises:
            ValueError: If a size is missing, out of range or differs from the model's.
        """
        hparams = {} if model is None else model.hparams
        self.num_classes = self._size("num_classes", 2, hparams)
        self.samples_per_class = self._size("samples_per_class", 1, hparams)

    def _size(self, name: str, least: int, hparams: Mapping[str, Any]) -> int:
        given: int | None = getattr(self, name)
        expected: int | None = hparams.get(name)
        if given is None and expected is None:
            raise ValueError(f"IndexDataModule({name}=...) is missing, and the model has no hyperparameter {name!r}.")
        if given is not None and expected is not None and given != expected:
            raise ValueError(
                f"IndexDataModule({name}={given}) differs from the model's {expected}. Set it on the model only."
            )
        size = expected if given is None else given
        assert size is not None
        if size < least:
            raise ValueError(f"{name} must be at least {least}, got {size}.")
        return size

    def batch(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Build the training set.

        Args:
            device: Where to put it.

        Returns:
            Indices ``(N,)`` and labels ``(N,)``, int64.
        """
        assert self.num_classes is not None
        assert self.samples_per_class is not None
        labels = torch.arange(self.num_classes, device=device).repeat_interleave(self.samples_per_class)
        return torch.arange(len(labels), device=device), labels

    def _loader(self, length: int) -> FullBatchLoader:
        assert self.trainer is not None
        return FullBatchLoader(self.batch(self.trainer.strategy.root_device), length)

    def train_dataloader(self) -> FullBatchLoader:
        """Return the full batch, once per Lightning step."""
        return self._loader(self.steps_per_epoch)

    def val_dataloader(self) -> FullBatchLoader | list[Any]:
        """Return the full batch once; nothing during a fit, where the readings cover it already."""
        assert self.trainer is not None
        return [] if self.trainer.state.fn == TrainerFn.FITTING else self._loader(1)

    def test_dataloader(self) -> FullBatchLoader:
        """Return the full batch once."""
        return self._loader(1)
