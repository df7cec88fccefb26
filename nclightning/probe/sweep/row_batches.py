"""Fast batches for a ``TensorDataset``: whole batches are indexed at once, and not sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

__all__ = ["row_batches"]


class _Rows(Dataset[Any]):
    """A data set that returns the same batches as ``default_collate`` makes of its samples.

    Args:
        dataset: The original data set.
        tensors: The tensors whose rows are the samples.
        places: Indices of the rows, ``(N,)``; None for all.
    """

    def __init__(self, dataset: Dataset[Any], tensors: Sequence[Tensor], places: Tensor | None) -> None:
        self._dataset, self._tensors, self._places = dataset, tensors, places

    def __getitems__(self, indices: list[Any]) -> Any:
        if not all(type(each) is int and each >= 0 for each in indices):
            return default_collate([self._dataset[each] for each in indices])
        rows = torch.tensor(indices, dtype=torch.int64, device="cpu")
        rows = rows if self._places is None else self._places.index_select(0, rows)
        return [each.index_select(0, rows.to(each.device)) for each in self._tensors]


def row_batches(loader: DataLoader[Any]) -> Dataset[Any] | None:
    """Return a data set whose ``__getitems__`` returns whole batches, bit for bit those of a loader.

    Args:
        loader: A loader with batches of samples.

    Returns:
        The data set. None if samples are not rows of a ``TensorDataset`` or a subset of one, or ``collate_fn`` is not
        the default.
    """
    dataset, places = loader.dataset, None
    # In worker processes the user's functions may refer to the data set.
    if loader.collate_fn is not default_collate or loader.num_workers > 0:
        return None
    while type(dataset) is Subset:
        own = _as_places(dataset.indices)
        if own is None or (places is not None and len(places) and int(places.max()) >= len(own)):
            return None
        dataset, places = dataset.dataset, own if places is None else own.index_select(0, places)
    if type(dataset) is not TensorDataset or not all(map(_has_plain_rows, dataset.tensors)):
        return None
    return _Rows(loader.dataset, dataset.tensors, places)


def _as_places(indices: Any) -> Tensor | None:
    """Return the indices of a subset as a tensor; None if they are not all non-negative integers."""
    try:
        places = torch.as_tensor(indices, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    return places if places.dtype == torch.int64 and places.ndim == 1 and bool((places >= 0).all()) else None


def _has_plain_rows(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_quantized
