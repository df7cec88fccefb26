"""A buffer that joins the features of several batches before they are processed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import autocast_off
from nclightning.probe.features import pair_rows

__all__ = ["RowBuffer", "unlabelled"]

Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# The buffer is passed on once it has at least this many rows and numbers. Processing many rows at once costs little
# more than processing few.
_ROWS_AT_A_TIME, _ELEMENTS_AT_A_TIME = 2048, 2**18


class RowBuffer:
    """Keeps batches of features, and passes them on together, a few thousand rows at a time.

    Args:
        *takers: Functions that receive a dictionary of features ``(N, d)`` by name, and labels ``(N,)`` int64.
        pair: Function that brings features and labels of a batch to this form.

    Attributes:
        seen: Number of samples so far.
    """

    def __init__(self, *takers: Callable[[dict[str, Tensor], Tensor], None], pair: Pair = pair_rows) -> None:
        self.seen = 0
        self._takers, self._pair, self._named = takers, pair, False
        self._waiting: list[tuple[dict[str, Tensor], Tensor]] = []
        self._num_rows = self._num_elements = 0

    def add(self, captured: dict[str, Tensor], labels: Tensor, num_own: int | None = None) -> None:
        """Add a batch.

        Args:
            captured: Features by name. They must not be written to afterwards.
            labels: The labels of the batch.
            num_own: Number of samples of the epoch that count. Samples after these are duplicates and are dropped.
        """
        rows = labels.shape[0]
        if num_own is not None:
            rows = max(min(rows, num_own - self.seen), 0)
            labels = labels.narrow(0, 0, rows)
            captured = {name: tensor.narrow(0, 0, rows) for name, tensor in captured.items()}
        # The first batch counts even if it is empty, so that all processes construct the same metrics.
        if rows == 0 and self._named:
            return
        self._named = True
        self.seen += rows
        # The labels are copied because a loader may write the next batch to the same memory.
        self._waiting.append((captured, labels.clone()))
        for tensor in captured.values():
            self._num_elements += tensor.numel()
        self._num_rows += rows
        if self._num_rows >= _ROWS_AT_A_TIME and self._num_elements >= _ELEMENTS_AT_A_TIME:
            self.flush()

    def flush(self) -> None:
        """Pass on all batches in the buffer.

        Raises:
            ValueError: If features of a layer have different sizes in different batches.
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
        """Return features and labels row by row."""
        if features.ndim == 2 and labels.dtype == torch.int64 and labels.shape == features.shape[:1]:
            return features, labels
        return self._pair(features, labels)


def unlabelled(captured: dict[str, Tensor], ignore_index: int | None) -> tuple[dict[str, Tensor], Tensor]:
    """Return the features at the head with labels that put all samples into one class, which is not ignored."""
    features = captured[""]
    labels = torch.full(features.shape[:-1], int(ignore_index == 0), dtype=torch.int64, device=features.device)
    return {"": features}, labels
