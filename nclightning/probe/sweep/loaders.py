"""The samples that an evaluation pass over a loader reads, and their order."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from nclightning.compat.accelerate import Origin, is_seedable_random, num_real_samples, origin_of
from nclightning.compat.fabric import sampler_of_lightning
from nclightning.errors import UserError
from nclightning.probe.inputs import tensors_of
from nclightning.probe.sweep.checksums import fingerprint
from nclightning.probe.sweep.messages import online_hint
from nclightning.probe.sweep.row_batches import row_batches
from nclightning.probe.sweep.states import random_states_kept, with_own_generators
from nclightning.ranks import world_size as running_processes

__all__ = ["known_indices", "limited_batches", "num_own_samples", "num_planned_batches", "sequential_loader"]


def sequential_loader(
    loader: Iterable[Any], rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterable[Any]:
    """Return a loader of all samples that a loader can yield, in order, each exactly once over all ranks.

    The user's loader is not used directly. Its shuffling would make a measurement depend on the epoch, dropped batches
    would be left out, and the duplicates of a distributed sampler would count twice.

    | sampler, also inside a ``BatchSampler`` | samples |
    |---|---|
    | sequential, random, distributed | the whole data set of the sampler |
    | ``SubsetRandomSampler`` | its indices |
    | ``WeightedRandomSampler`` | all with a weight above 0, each once |
    | any other, or a list of indices | those of one pass over a copy of it, each once |
    | the user's own batch sampler | those of one pass over a copy of it, each once, in its batches |

    Loaders that Hugging Face's accelerate has prepared are unwrapped to the sampler or stream of all processes. Samples
    that accelerate repeats to give each process equally many are left out; batches that a resumed epoch skips are not.

    With a limit, a sampler with a fixed order is followed up to the limit, because training never reads the samples
    after it. A shuffling sampler of torch reaches all its samples in the course of the epochs, so that all are read.
    For any other sampler the pass ends at the limit.

    Args:
        loader: A ``DataLoader``, or any other iterable of batches.
        rank: Rank of this process.
        world_size: Number of processes, which must all call this function.
        limit: Largest number of batches that each process reads per epoch; None for no limit.

    Returns:
        The loader.

    Raises:
        ValueError: If samples cannot be divided between several processes; if a subclass of ``DataLoader`` has an
            ``__iter__`` of its own, which may yield other samples than its data set has; or if a sampler or iterator
            cannot be copied, so that reading it would advance it for training.
    """
    origin = origin_of(loader)
    loader, limit = origin.loader, None if limit is None else limit * origin.per_step
    if isinstance(loader, DataLoader) and type(loader).__iter__ is not DataLoader.__iter__:
        raise UserError(
            f"{type(loader).__name__} is a DataLoader with an __iter__ of its own: an evaluation pass over its dataset "
            f"may read other samples than it yields. Use a plain DataLoader{online_hint()}."
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if world_size > 1 and origin.streams == "same":
            return _share(origin, limit, rank, world_size)
        if world_size > 1 and origin.streams != "own":
            raise UserError(
                f"a {type(loader).__name__} without a map-style dataset cannot be divided between {world_size} "
                "processes without counting samples twice."
            )
        return _stream(origin, limit)
    plan: dict[str, Any]
    batches: Any = origin.batch_sampler
    if batches is not None and type(batches).__iter__ is not BatchSampler.__iter__:
        plan = {"batch_sampler": _batches(loader, batches, limit)[rank::world_size]}
    elif batches is not None:
        indices = _indices(loader, batches.sampler, None if limit is None else limit * batches.batch_size)
        plan = {"batch_sampler": BatchSampler(indices[rank::world_size], batches.batch_size, drop_last=False)}
    else:
        plan = {"batch_size": None, "sampler": _indices(loader, origin.sampler, limit)[rank::world_size]}
    return _new_loader(loader, loader.dataset, **plan)


def limited_batches(loader: Any, limit: float, read: int) -> int | None:
    """Return the number of batches in an epoch of training under Lightning's ``limit_train_batches``.

    Args:
        loader: Any loader.
        limit: The limit: a number of batches, or a float for a fraction of the loader's length.
        read: Number of batches that training has read so far, for a loader without a length.

    Returns:
        The number; None if the loader ends before the limit.
    """
    length = num_planned_batches(loader)
    if length is None:
        return limit if isinstance(limit, int) else read
    most = limit if isinstance(limit, int) else int(length * limit)
    return None if most >= length else most


def num_planned_batches(loader: Any) -> int | None:
    """Return the length of a loader or sampler, or None if it has none."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def known_indices(loader: DataLoader[Any], limit: int | None = None) -> Sequence[int] | None:
    """Return the indices that an evaluation pass reads from a map-style data set, without running a sampler.

    Args:
        loader: Any ``DataLoader``.
        limit: As for :func:`sequential_loader`.

    Returns:
        The indices over all processes; None if they are known only after running the sampler.
    """
    origin = origin_of(loader)
    batches: Any = origin.batch_sampler
    limit = None if limit is None else limit * origin.per_step
    batched = batches is not None and type(batches).__iter__ is BatchSampler.__iter__
    if isinstance(origin.dataset, IterableDataset) or not batched:
        return None
    return _known_order(batches.sampler, None if limit is None else limit * batches.batch_size)


def _new_loader(loader: DataLoader[Any], dataset: Any, **plan: Any) -> DataLoader[Any]:
    """Return a loader with its own worker processes, so that a running pass of training keeps its workers."""
    if loader.num_workers > 0:
        plan |= {
            "timeout": loader.timeout,
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    at_once = row_batches(loader) if "batch_sampler" in plan else None
    return DataLoader(
        dataset if at_once is None else at_once,
        num_workers=loader.num_workers,
        collate_fn=with_own_generators(loader.collate_fn) if at_once is None else _identity,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),
        **plan,
    )


def _identity(batch: Any) -> Any:
    return batch


# Loaders without indices.


class _Stream:
    """The first batches of an iterable."""

    def __init__(self, batches: Iterable[Any], limit: int) -> None:
        self._batches, self._limit = batches, limit

    def __len__(self) -> int:
        length = num_planned_batches(self._batches)
        return self._limit if length is None else min(length, self._limit)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._batches), self._limit)


class _Every:
    """The batches of a stream that one process reads: every ``world_size``-th one."""

    def __init__(self, batches: Iterable[Any], rank: int, world_size: int) -> None:
        self._batches, self._rank, self._world_size = batches, rank, world_size

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._batches), self._rank, None, self._world_size)


def _stream(origin: Origin, limit: int | None) -> Iterable[Any]:
    """Return the batches of a loader without indices, up to its length and the limit."""
    loader, length = origin.loader, num_planned_batches(origin.loader)
    stream: Iterable[Any] = loader
    if isinstance(loader, DataLoader):
        moves = (
            isinstance(origin.dataset, Iterator) and loader.num_workers == 0
        )  # Worker processes have their own copies.
        dataset = _copied(origin.dataset, loader) if moves else origin.dataset
        stream = _new_loader(loader, dataset, batch_size=loader.batch_size, drop_last=loader.drop_last)
        if origin.dataset is not loader.dataset:  # The length is that of one process.
            length = num_planned_batches(stream)
    elif isinstance(loader, Iterator):
        stream = _copied(loader, loader)
    if length is not None:  # Training does not read more than the length either.
        limit = length if limit is None else min(limit, length)
    return stream if limit is None or (isinstance(loader, list | tuple) and limit == length) else _Stream(stream, limit)


def _share(origin: Origin, limit: int | None, rank: int, world_size: int) -> Iterable[Any]:
    """Return this process's batches of a stream that all processes iterate over.

    Raises:
        ValueError: If the first batch differs between processes.
    """
    seen, error = tuple[int, ...](), None
    try:
        first = _stream(origin._replace(loader=_in_this_process(origin.loader)), 1)
        with random_states_kept():
            seen = fingerprint(tensors_of(next(iter(first), None)))
    except Exception as own_error:
        error = own_error
    if running_processes() > 1:
        everybody: list[Any] = [None] * running_processes()
        dist.all_gather_object(everybody, None if error is not None else seen)
        if error is None and None in everybody:
            raise UserError(f"the data set of process {everybody.index(None)} failed, which says why.")
        if error is None and any(each != seen for each in everybody):
            raise UserError(
                f"a {type(origin.dataset).__name__} yields different samples on different processes, so that it "
                "cannot be divided without counting samples twice: give it the same seed on all of them."
            )
    if error is not None:
        raise error
    return _Every(_stream(origin, limit), rank, world_size)


def _in_this_process(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Return the same loader without worker processes."""
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        collate_fn=with_own_generators(loader.collate_fn),
        drop_last=loader.drop_last,
        generator=torch.Generator(),
    )


def _copied(iterator: Any, loader: Any, shared: Any = None) -> Any:
    """Copy an iterator or sampler that an evaluation pass would otherwise advance for training."""
    try:
        return copy.deepcopy(iterator, {id(shared): shared})
    except Exception as error:
        raise UserError(
            f"a pass over {type(loader).__name__} would advance its {type(iterator).__name__}, which cannot "
            f"be copied ({error}): use a loader that can be read again from the start{online_hint()}."
        ) from error


# Loaders with indices.


def _indices(loader: DataLoader[Any], sampler: Iterable[Any], limit: int | None) -> Sequence[Any]:
    """Return the indices that a sampler can yield on all processes together, in order, each once."""
    if isinstance(sampler, BatchSampler):  # Passed as ``sampler``, so that its items are whole batches.
        return _batches(loader, sampler, limit)
    if (order := _known_order(sampler, limit)) is not None:
        return order
    inner, copies = _inside(sampler)
    items = _one_pass(loader, inner, None if limit is None else limit * copies)
    if loader.batch_sampler is None and items and isinstance(items[0], list):  # Its items are whole batches.
        return _without_repeats(items)
    unique = list(dict.fromkeys(item.item() if isinstance(item, Tensor | np.generic) else item for item in items))
    return sorted(unique) if all(isinstance(item, int) for item in unique) else unique


def _inside(sampler: Any) -> tuple[Any, int]:
    """Return the sampler that a distributed one wraps, and the number of processes; itself and 1 if there is none."""
    inner = sampler_of_lightning(sampler)
    # The DistributedSamplerWrapper of catalyst, which many repositories copy, has an attribute ``sampler``.
    inner = getattr(sampler, "sampler", None) if inner is None and isinstance(sampler, DistributedSampler) else inner
    return (inner, sampler.num_replicas) if isinstance(inner, Iterable) else (sampler, 1)


def _known_order(sampler: Any, limit: int | None) -> Sequence[int] | None:
    """Return the indices of a sampler whose class is known; None for any other."""
    sampler, shared_by = _inside(sampler)
    limit = None if limit is None else limit * shared_by
    for kind, describe in _KNOWN.items():
        if type(sampler).__iter__ is kind.__iter__:
            order, shuffled, copies = describe(sampler)
            return order if shuffled or limit is None else order[: limit * copies]
    return range(len(sampler.data_source)) if is_seedable_random(sampler) else None


def _batches(loader: DataLoader[Any], sampler: Any, limit: int | None) -> list[list[Any]]:
    """Return the batches that a batch sampler can yield, with each item once."""
    return _without_repeats(_one_pass(loader, sampler, limit))


def _without_repeats(batches: Iterable[Iterable[Any]]) -> list[list[Any]]:
    """Return batches without the items that occurred before."""
    seen: set[Any] = set()
    unique = []
    for batch in batches:
        items = (item.item() if isinstance(item, Tensor | np.generic) else item for item in batch)
        if new := [item for item in dict.fromkeys(items) if item not in seen]:
            seen.update(new)
            unique.append(new)
    return unique


def _one_pass(loader: DataLoader[Any], sampler: Iterable[Any], limit: int | None) -> list[Any]:
    """Return what the samplers of all processes yield in one epoch. Samplers and random states are not advanced."""
    length = num_planned_batches(sampler)  # Training does not read more than the length either.
    most = min((each for each in (length, limit) if each is not None), default=None)
    items: list[Any] = []
    error: Exception | None = None
    try:
        own = _copied(sampler, loader, loader.dataset)
        with random_states_kept():
            # The same seed on all processes and in each pass.
            random.seed(0)
            np.random.seed(0)  # noqa: NPY002
            torch.manual_seed(0)
            items = list(islice(iter(own), most))
    except Exception as own_error:
        error = own_error
    if running_processes() > 1:
        everybody: list[Any] = [None] * running_processes()
        dist.all_gather_object(everybody, None if error is not None else items)
        if error is None and None in everybody:
            raise UserError(f"the sampler of process {everybody.index(None)} failed: see the error of that process.")
        items = [item for each in everybody if each is not None for item in each]
    if error is not None:
        raise error
    return items


def _distributed(sampler: Any) -> tuple[Sequence[int], bool, int]:
    """Return indices, shuffling and number of processes of a ``DistributedSampler``."""
    return range(len(sampler.dataset)), sampler.shuffle, sampler.num_replicas


def _weighted(sampler: Any) -> tuple[Sequence[int], bool, int]:
    """Return indices, shuffling and number of processes of a ``WeightedRandomSampler``."""
    return torch.as_tensor(sampler.weights).nonzero().flatten().tolist(), True, 1


# For each sampler class: all indices that it can yield, whether it shuffles, and how many processes share an epoch.
_KNOWN: dict[type[Any], Callable[[Any], tuple[Sequence[int], bool, int]]] = {
    SequentialSampler: lambda sampler: (range(len(sampler.data_source)), False, 1),
    RandomSampler: lambda sampler: (range(len(sampler.data_source)), True, 1),
    SubsetRandomSampler: lambda sampler: (sorted({int(i) for i in sampler.indices}), True, 1),
    WeightedRandomSampler: _weighted,
    DistributedSampler: _distributed,
}


def num_own_samples(loader: Any) -> int | None:
    """Return the number of samples of this process in an epoch that are not duplicates.

    A ``DistributedSampler``, and loaders that accelerate has prepared, repeat samples at the end of an epoch to give
    each process equally many.

    Args:
        loader: Any loader.

    Returns:
        The number of samples, counted from the start of the epoch, that are not duplicates; None if all are not.

    Raises:
        ValueError: If samples are repeated and their number cannot be known, for example for a stream.
    """
    try:
        real = num_real_samples(loader)
    except LookupError:
        raise UserError(
            f"a {type(loader).__name__} repeats samples at the end of an epoch to give each process equally many, and "
            "it is not known which: measure by an evaluation pass, or with drop_last=True."
        ) from None
    if real is not None:
        return real
    # A loader with a batch sampler also has a sequential sampler, which it does not use.
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    length = len(sampler.dataset)  # type: ignore[arg-type]
    if len(sampler) != -(-length // sampler.num_replicas):  # A subclass with a length of its own.
        return None
    return len(range(sampler.rank, length, sampler.num_replicas))
