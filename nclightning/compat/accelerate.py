"""The original data set and samplers of loaders that accelerate or transformers prepared. Imports neither library."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

__all__ = ["is_seedable_random", "num_real_samples", "origin_of"]

_LOADERS = "accelerate.data_loader"
_STREAM_SHARDS = (_LOADERS, "transformers.trainer_pt_utils")


class Origin(NamedTuple):
    """The loader, data set and samplers of all processes from which the loader of one process was made.

    Attributes:
        loader: The torch loader inside; the loader itself if it was not prepared.
        dataset: The data set of all processes.
        batch_sampler: The batch sampler of all processes; None if there is none.
        sampler: The sampler of all processes; None if there is none.
        per_step: Number of its batches that all processes read together in one step.
        streams: How processes read a stream: all read the ``"same"`` one, or each its ``"own"`` part; empty if it is
            not known, or there is no stream.
    """

    loader: Any
    dataset: Any
    batch_sampler: Any
    sampler: Any
    per_step: int = 1
    streams: str = ""


def origin_of(loader: Any) -> Origin:
    """Remove the wrappers of ``Accelerator.prepare``, ``skip_first_batches`` and the shards of both libraries.

    Non-public: ``DataLoaderShard``, ``DataLoaderDispatcher``, ``SkipDataLoader`` with ``base_dataloader``,
    ``BatchSamplerShard``, ``SkipBatchSampler``, ``IterableDatasetShard`` with what they wrap (accelerate 1.15,
    transformers 5.24). Without them a prepared loader would be read as it is: shuffled by the next epoch's seed, and
    with the repeated samples at its end counted twice.

    Args:
        loader: Any loader.
    """
    inner, per_step, streams = loader, 1, ""
    kinds = _named(_LOADERS, "DataLoaderShard", "DataLoaderDispatcher", "SkipDataLoader")
    # isinstance is not used, because a subclass with its own __iter__ may yield other batches.
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
    """Return the number of samples of this process in an epoch that are not repeated by accelerate.

    Accelerate repeats samples at the end of an epoch to give each process equally many.

    Non-public: as for :func:`origin_of`, and ``_drop_last`` (accelerate 1.15). Without them repeated samples would
    count twice in measurements from training's own forwards.

    Args:
        loader: Any loader.

    Returns:
        The number; None if no sample is repeated, or the loader is not accelerate's.

    Raises:
        LookupError: If samples are repeated and their number is not known.
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
    size = math.ceil(rest / processes)  # Size of the last batch, which is split into equal parts.
    own = whole * (of_step // processes) + min(max(rest - size * loader.state.process_index, 0), size)
    return max(int(own - skipped * (of_step // processes)), 0)


def is_seedable_random(sampler: Any) -> bool:
    """Return whether a sampler is accelerate's ``SeedableRandomSampler``, which shuffles its whole data set.

    Non-public: the class (accelerate 1.15). Without it indices would be found by running a copy of the sampler.
    """
    return any(type(sampler).__iter__ is kind.__iter__ for kind in _named(_LOADERS, "SeedableRandomSampler"))


def _named(module: str, *names: str) -> tuple[Any, ...]:
    """Return classes of a library by name; none if it is not imported, because then they have no instances."""
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
    """Return the number of samples in an epoch of a batch sampler of all processes."""
    try:
        return len(batches.sampler)
    except (AttributeError, TypeError) as error:
        raise LookupError from error


def _share(total: int, batch: int, processes: int, index: int, *, split: bool) -> int:
    """Return the number of samples of a process, which reads a slice of each batch (``split``) or every n-th batch."""
    whole, rest = divmod(total, batch)
    if split:
        part = batch // processes
        return whole * part + min(max(rest - part * index, 0), part)
    return len(range(index, whole, processes)) * batch + (rest if whole % processes == index else 0)
