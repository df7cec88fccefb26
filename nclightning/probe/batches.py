"""Batches of features, put together to rows of many batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import autocast_off
from nclightning.probe.features import pair_rows

__all__ = ["RowBuffer", "unlabelled"]

Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# What waits, at least so many rows and so many numbers: to take in many rows costs little more than to take in few.
_ROWS_AT_A_TIME, _ELEMENTS_AT_A_TIME = 2048, 2**18


class RowBuffer:
    """Keeps batches of features by name, and hands them on together, a few thousand rows at a time.

    Args:
        *takers: Get features by name, each ``(N, d)``, and labels ``(N,)`` int64.
        pair: Brings features and labels to such rows.

    Attributes:
        seen: Number of places in the batches so far.
    """

    def __init__(self, *takers: Callable[[dict[str, Tensor], Tensor], None], pair: Pair = pair_rows) -> None:
        self.seen = 0
        self._takers, self._pair, self._named = takers, pair, False
        self._waiting: list[tuple[dict[str, Tensor], Tensor]] = []
        self._num_rows = self._num_elements = 0

    def add(self, captured: dict[str, Tensor], labels: Tensor, num_own: int | None = None) -> None:
        """Take a batch, whose features nobody writes to any more; of the places behind ``num_own`` nothing."""
        rows = labels.shape[0]
        if num_own is not None:  # Seen and labels count places of the epoch, batch by batch.
            rows = max(min(rows, num_own - self.seen), 0)
            labels = labels.narrow(0, 0, rows)
            captured = {name: tensor.narrow(0, 0, rows) for name, tensor in captured.items()}
        if rows == 0 and self._named:  # The first batch, empty or not, makes the same metrics on all processes.
            return
        self._named = True
        self.seen += rows
        # A loader may fill the same memory with the next batch.
        self._waiting.append((captured, labels.clone()))
        for tensor in captured.values():
            self._num_elements += tensor.numel()
        self._num_rows += rows
        if self._num_rows >= _ROWS_AT_A_TIME and self._num_elements >= _ELEMENTS_AT_A_TIME:
            self.flush()

    def flush(self) -> None:
        """Hand on what waits.

        Raises:
            ValueError: If features of a layer are of different sizes in different batches.
        """
        waiting, self._waiting = self._waiting, []
        self._num_rows = self._num_elements = 0
        if not waiting:
            return
        features, labels = dict[str, Tensor](), waiting[0][1]
        for name in waiting[0][0]:
            batches = [self._rows(captured[name], labels) for captured, labels in waiting]
            if len(sizes := {h.shape[1] for h, _ in batches}) > 1:
                raise UserError(
                    f"features of the layer {name!r} have {min(sizes)} numbers in one batch and {max(sizes)} in "
                    "another: leave it out of layers, or pass layer_pooling='mean' if they differ in positions."
                )
            with autocast_off(batches[0][0].device):
                features[name], labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        for take in self._takers:
            take(features, labels)

    def _rows(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Pair rows where they are not paired already."""
        if features.ndim == 2 and labels.dtype == torch.int64 and labels.shape == features.shape[:1]:
            return features, labels
        return self._pair(features, labels)


def unlabelled(captured: dict[str, Tensor], ignore_index: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """Return head input of samples whose labels mean nothing here, all in one class that is not left out."""
    features = captured[""]
    labels = torch.full(features.shape[:-1], int(ignore_index == 0), dtype=torch.int64, device=features.device)
    return {"": features}, labels
