"""Batches of samples that are rows of tensors: taken at once, where a loader takes sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

__all__ = ["batches_at_once"]


class _Rows(Dataset[Any]):
    """Gives the batches that ``default_collate`` makes of the samples of a data set.

    Args:
        dataset: The data set.
        tensors: Whose rows the samples are.
        places: Numbers of the rows, ``(N,)``; None of all.
    """

    def __init__(self, dataset: Dataset[Any], tensors: Sequence[Tensor], places: Tensor | None) -> None:
        self._dataset, self._tensors, self._places = dataset, tensors, places

    def __getitems__(self, indices: list[Any]) -> Any:
        if not all(type(each) is int and each >= 0 for each in indices):
            return default_collate([self._dataset[each] for each in indices])
        rows = torch.tensor(indices, dtype=torch.int64, device="cpu")
        rows = rows if self._places is None else self._places.index_select(0, rows)
        return [each.index_select(0, rows.to(each.device)) for each in self._tensors]


def batches_at_once(loader: DataLoader[Any]) -> Dataset[Any] | None:
    """Return a data set whose ``__getitems__`` gives whole batches, the same as a loader makes, bit for bit.

    Args:
        loader: Any, with batches of samples.

    Returns:
        None unless samples are rows of a ``TensorDataset``, or of a subset of one, and collated as by default.
    """
    dataset, places = loader.dataset, None
    # In workers, functions of the user's may ask for the data set.
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
    """Return the numbers of a subset; None where they may mean something else than rows from the start."""
    try:
        places = torch.as_tensor(indices, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        return None
    return places if places.dtype == torch.int64 and places.ndim == 1 and bool((places >= 0).all()) else None


def _has_plain_rows(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_quantized
