"""Loaders of Hugging Face's accelerate and transformers, and what they were made from. Loads neither of them."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

__all__ = ["is_seedable_random", "num_real_samples", "origin_of"]

_LOADERS = "accelerate.data_loader"
_STREAM_SHARDS = (_LOADERS, "transformers.trainer_pt_utils")


class Origin(NamedTuple):
    """What the loader of a process was made from, for all processes together.

    Attributes:
        loader: The loader of torch inside; the loader itself where it was not prepared.
        dataset: Its data set, not that of one process.
        batch_sampler: Its batch sampler, not that of one process; None if it has none.
        sampler: The same of its sampler.
        per_step: How many of its batches all processes together read while each reads one of its own.
        streams: What processes do with a stream: all go through the ``"same"`` one, each through its ``"own"`` part,
            or it is not known.
    """

    loader: Any
    dataset: Any
    batch_sampler: Any
    sampler: Any
    per_step: int = 1
    streams: str = ""


def origin_of(loader: Any) -> Origin:
    """Look through what ``Accelerator.prepare``, ``skip_first_batches`` and the shards of both libraries put around.

    Non-public: ``DataLoaderShard``, ``DataLoaderDispatcher``, ``SkipDataLoader`` with ``base_dataloader``,
    ``BatchSamplerShard``, ``SkipBatchSampler``, ``IterableDatasetShard`` with what they wrap (accelerate 1.15,
    transformers 5.24). Without them a prepared loader would be read as it is: shuffled by the next epoch's seed, and
    with the samples that are repeated at its end counted twice.

    Args:
        loader: Any.
    """
    inner, per_step, streams = loader, 1, ""
    kinds = _named(_LOADERS, "DataLoaderShard", "DataLoaderDispatcher", "SkipDataLoader")
    # Not isinstance: a subclass with an __iter__ of its own yields what only that knows.
    is_prepared = hasattr(loader, "__iter__") and any(type(loader).__iter__ is kind.__iter__ for kind in kinds)
    if is_prepared:
        inner, streams = loader.base_dataloader, "own"
    if is_prepared and _is_dispatcher(loader):
        per_step, streams = 1 if loader.split_batches else loader.state.num_processes, "same"
    dataset, sampler = getattr(inner, "dataset", None), getattr(inner, "sampler", None)
    batch_sampler, shards = getattr(inner, "batch_sampler", None), _named(_LOADERS, "BatchSamplerShard")
    for shard in (*_wrappers(batch_sampler), *_wrappers(sampler)):
        if isinstance(shard, shards):
            per_step *= 1 if shard.split_batches else shard.num_processes
    if isinstance(dataset, _stream_shards()):
        per_step, streams, dataset = dataset.num_processes, "same", dataset.dataset
    if not isinstance(dataset, IterableDataset):
        streams = ""
    return Origin(inner, dataset, _inside(batch_sampler), _inside(sampler), per_step, streams)


def num_real_samples(loader: Any) -> int | None:
    """Count the samples of an epoch of this process that accelerate does not repeat to make all processes even.

    They come first. Non-public: as for :func:`origin_of`, ``_drop_last`` (accelerate 1.15). Without them samples
    that are repeated would count twice in measurements of forwards that run anyway.

    Args:
        loader: Any.

    Returns:
        How many; None if all are real, or the loader is not accelerate's.

    Raises:
        LookupError: If samples are repeated, and it is not known how many.
    """
    shards = _wrappers(getattr(loader, "batch_sampler", None)) or _wrappers(getattr(loader, "sampler", None))
    skipped = sum(each.skip_batches for each in shards if hasattr(each, "skip_batches"))
    shard = next((each for each in shards if hasattr(each, "even_batches")), None)
    if shard is not None:
        if not shard.even_batches or shard.drop_last or shard.batch_size is None:
            return None
        total = _count(_inside(shard))
        own = _share(total, shard.batch_size, shard.num_processes, shard.process_index, split=shard.split_batches)
        of_batch = shard.batch_size // shard.num_processes if shard.split_batches else shard.batch_size
        return max(own - int(skipped * of_batch), 0)
    streams = origin_of(loader).streams
    shared = isinstance(getattr(loader, "dataset", None), _stream_shards())
    dispatches = _is_dispatcher(loader) and loader.state.num_processes > 1
    if (shared and loader.dataset.num_processes > 1 and not loader.dataset.drop_last) or (
        dispatches and streams and not loader._drop_last
    ):
        raise LookupError
    if not dispatches or loader._drop_last:
        return None
    total, processes, batch = _count(_inside(loader.batch_sampler)), loader.state.num_processes, loader.batch_size
    batch = loader.batch_sampler.batch_size if batch is None else batch
    of_step = batch if loader.split_batches else batch * processes
    whole, rest = divmod(total, of_step)
    size = math.ceil(rest / processes)  # Of the last, which is cut into equal parts.
    own = whole * (of_step // processes) + min(max(rest - size * loader.state.process_index, 0), size)
    return max(int(own - skipped * (of_step // processes)), 0)


def is_seedable_random(sampler: Any) -> bool:
    """Whether a sampler shuffles its whole data set as accelerate's ``SeedableRandomSampler`` does.

    Non-public: the class (accelerate 1.15). Without it, indices would be those of one pass over a copy of it.
    """
    return any(type(sampler).__iter__ is kind.__iter__ for kind in _named(_LOADERS, "SeedableRandomSampler"))


def _named(module: str, *names: str) -> tuple[Any, ...]:
    """Return classes of a library, if it was loaded: else nothing is of them."""
    library = sys.modules.get(module)
    return () if library is None else tuple(getattr(library, name) for name in names if hasattr(library, name))


def _stream_shards() -> tuple[Any, ...]:
    return tuple(kind for module in _STREAM_SHARDS for kind in _named(module, "IterableDatasetShard"))


def _is_dispatcher(loader: Any) -> bool:
    return any(type(loader).__iter__ is kind.__iter__ for kind in _named(_LOADERS, "DataLoaderDispatcher"))


def _wrappers(sampler: Any) -> list[Any]:
    """Return the wrappers around a batch sampler, from the outside in."""
    kinds, found = _named(_LOADERS, "BatchSamplerShard", "SkipBatchSampler"), list[Any]()
    while kinds and isinstance(sampler, kinds):
        found.append(sampler)
        sampler = sampler.batch_sampler
    return found


def _inside(sampler: Any) -> Any:
    wrappers = _wrappers(sampler)
    return wrappers[-1].batch_sampler if wrappers else sampler


def _count(batches: Any) -> int:
    """Count the samples of an epoch of a batch sampler for all processes."""
    try:
        return len(batches.sampler)
    except (AttributeError, TypeError) as error:
        raise LookupError from error


def _share(total: int, batch: int, processes: int, index: int, *, split: bool) -> int:
    """Count samples of a process: of each batch its slice, or of batches every so many."""
    whole, rest = divmod(total, batch)
    if split:
        part = batch // processes
        return whole * part + min(max(rest - part * index, 0), part)
    return len(range(index, whole, processes)) * batch + (rest if whole % processes == index else 0)
