"""Which samples an evaluation pass over a training set sees, and in which order."""

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
from nclightning.probe.sweep.at_once import batches_at_once
from nclightning.probe.sweep.checksums import fingerprint
from nclightning.probe.sweep.online import or_online
from nclightning.probe.sweep.states import drawing_apart, random_states_kept
from nclightning.ranks import world_size as running_processes

__all__ = ["known_indices", "limited_batches", "num_own_samples", "num_planned_batches", "sequential_loader"]


def sequential_loader(
    loader: Iterable[Any], rank: int = 0, world_size: int = 1, limit: int | None = None
) -> Iterable[Any]:
    """Make a loader over the samples that a loader can yield, in order, each exactly once over all ranks.

    Shuffling, dropped last batches and the duplicates that a distributed sampler pads with would make a measurement
    depend on the epoch, leave samples out or count some twice.

    | sampler, also inside a ``BatchSampler`` | samples seen |
    |---|---|
    | sequential, random, distributed | the whole data set that the sampler is of |
    | ``SubsetRandomSampler`` | its indices |
    | ``WeightedRandomSampler`` | all with a weight above 0, each once |
    | any other, or a list of indices | those of one pass over a copy of it, each once |
    | own batch sampler | the same, in the batches of that pass |

    Loaders that Hugging Face's accelerate has prepared are looked through: what counts is the sampler or stream of all
    processes, without the samples that are repeated to give each process as many, and without the batches that a
    resumed epoch skips.

    With a limit, a sampler with a fixed order is followed up to it: training never reads what comes later. A shuffling
    one of torch's comes to all its samples sooner or later, so that all of them are seen. Of any other sampler the pass
    ends at the limit.

    Args:
        loader: A ``DataLoader``, or any other iterable of batches.
        rank: Of this process.
        world_size: Number of processes, which must all come here.
        limit: Number of batches to which each process is held in an epoch; None if to none.

    Returns:
        The loader.

    Raises:
        ValueError: If samples cannot be shared out over several processes, if a subclass of ``DataLoader`` has an
            ``__iter__`` of its own (what it yields cannot be had from the dataset, and to run it would move it on), or
            if a sampler or an iterator cannot be copied, so that to run it would move it on.
    """
    origin = origin_of(loader)
    loader, limit = origin.loader, None if limit is None else limit * origin.per_step
    if isinstance(loader, DataLoader) and type(loader).__iter__ is not DataLoader.__iter__:
        raise UserError(
            f"{type(loader).__name__} is a DataLoader with an __iter__ of its own: a sweep over its dataset may see "
            f"other samples than it yields. Use a plain DataLoader{or_online()}."
        )
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if world_size > 1 and origin.streams == "same":
            return _share(origin, limit, rank, world_size)
        if world_size > 1 and origin.streams != "own":
            raise UserError(
                f"a {type(loader).__name__} without a map-style dataset cannot be shared out over {world_size} "
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
    """Return the number of batches to which a limit holds an epoch of training.

    Args:
        loader: Any loader.
        limit: A number of batches, or as a float the share of a loader with a length: Lightning's
            ``limit_train_batches``.
        read: Batches that training has read of a loader without a length, which may have no end.

    Returns:
        The number; None if the loader ends by itself before.
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
    """Return the indices that a sweep over a map-style data set sees, where they are known without running a sampler.

    Args:
        loader: Any ``DataLoader``.
        limit: As for :func:`sequential_loader`.

    Returns:
        The indices over all processes; None if they are not known.
    """
    origin = origin_of(loader)
    batches: Any = origin.batch_sampler
    limit = None if limit is None else limit * origin.per_step
    batched = batches is not None and type(batches).__iter__ is BatchSampler.__iter__
    if isinstance(origin.dataset, IterableDataset) or not batched:
        return None
    return _known_order(batches.sampler, None if limit is None else limit * batches.batch_size)


def _new_loader(loader: DataLoader[Any], dataset: Any, **plan: Any) -> DataLoader[Any]:
    """Make a loader with workers of its own, which the running pass does not lose."""
    if loader.num_workers > 0:
        plan |= {
            "timeout": loader.timeout,
            "prefetch_factor": loader.prefetch_factor,
            "multiprocessing_context": loader.multiprocessing_context,
        }
    at_once = batches_at_once(loader) if "batch_sampler" in plan else None
    return DataLoader(
        dataset if at_once is None else at_once,
        num_workers=loader.num_workers,
        collate_fn=drawing_apart(loader.collate_fn) if at_once is None else _as_it_is,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        generator=torch.Generator(),
        **plan,
    )


def _as_it_is(batch: Any) -> Any:
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
    """The batches of a stream that fall to one process."""

    def __init__(self, batches: Iterable[Any], rank: int, world_size: int) -> None:
        self._batches, self._rank, self._world_size = batches, rank, world_size

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._batches), self._rank, None, self._world_size)


def _stream(origin: Origin, limit: int | None) -> Iterable[Any]:
    loader, length = origin.loader, num_planned_batches(origin.loader)
    stream: Iterable[Any] = loader
    if isinstance(loader, DataLoader):
        moves = isinstance(origin.dataset, Iterator) and loader.num_workers == 0  # Workers have copies of their own.
        dataset = _copied(origin.dataset, loader) if moves else origin.dataset
        stream = _new_loader(loader, dataset, batch_size=loader.batch_size, drop_last=loader.drop_last)
        if origin.dataset is not loader.dataset:  # The length is that of one process.
            length = num_planned_batches(stream)
    elif isinstance(loader, Iterator):
        stream = _copied(loader, loader)
    if length is not None:  # More than its length is not read by training, either.
        limit = length if limit is None else min(limit, length)
    return stream if limit is None or (isinstance(loader, list | tuple) and limit == length) else _Stream(stream, limit)


def _share(origin: Origin, limit: int | None, rank: int, world_size: int) -> Iterable[Any]:
    """Give each process its batches of a stream that all of them go through.

    Raises:
        ValueError: If they are seen to go through different ones.
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
                f"a {type(origin.dataset).__name__} yields other samples on one process than on another, so that it "
                "cannot be shared out without counting samples twice: give it the same seed on all of them."
            )
    if error is not None:
        raise error
    return _Every(_stream(origin, limit), rank, world_size)


def _in_this_process(loader: DataLoader[Any]) -> DataLoader[Any]:
    return DataLoader(
        loader.dataset,
        loader.batch_size,
        collate_fn=drawing_apart(loader.collate_fn),
        drop_last=loader.drop_last,
        generator=torch.Generator(),
    )


def _copied(iterator: Any, loader: Any, shared: Any = None) -> Any:
    """Copy what would otherwise be moved on by a pass over it."""
    try:
        return copy.deepcopy(iterator, {id(shared): shared})
    except Exception as error:
        raise UserError(
            f"a sweep over {type(loader).__name__} would move its {type(iterator).__name__} on, which cannot be copied "
            f"({error}): use a loader that can be read again from the start{or_online()}."
        ) from error


# Loaders with indices.


def _indices(loader: DataLoader[Any], sampler: Iterable[Any], limit: int | None) -> Sequence[Any]:
    """Return what a sampler can yield on all processes together, in order, each once."""
    if isinstance(sampler, BatchSampler):  # In the place of a sampler, where its items are whole batches.
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
    """Return the sampler that another one shares out over processes, and over how many; itself if there is none."""
    inner = sampler_of_lightning(sampler)
    # As catalyst's, which is copied to many a repository.
    inner = getattr(sampler, "sampler", None) if inner is None and isinstance(sampler, DistributedSampler) else inner
    return (inner, sampler.num_replicas) if isinstance(inner, Iterable) else (sampler, 1)


def _known_order(sampler: Any, limit: int | None) -> Sequence[int] | None:
    sampler, shared_by = _inside(sampler)
    limit = None if limit is None else limit * shared_by
    for kind, known in _KNOWN.items():
        if type(sampler).__iter__ is kind.__iter__:
            order, shuffled, copies = known(sampler)
            return order if shuffled or limit is None else order[: limit * copies]
    return range(len(sampler.data_source)) if is_seedable_random(sampler) else None


def _batches(loader: DataLoader[Any], sampler: Any, limit: int | None) -> list[list[Any]]:
    return _without_repeats(_one_pass(loader, sampler, limit))


def _without_repeats(batches: Iterable[Iterable[Any]]) -> list[list[Any]]:
    seen: set[Any] = set()
    unique = []
    for batch in batches:
        items = (item.item() if isinstance(item, Tensor | np.generic) else item for item in batch)
        if new := [item for item in dict.fromkeys(items) if item not in seen]:
            seen.update(new)
            unique.append(new)
    return unique


def _one_pass(loader: DataLoader[Any], sampler: Iterable[Any], limit: int | None) -> list[Any]:
    """Return what the samplers of all processes yield in one epoch, leaving samplers and random states as they are."""
    length = num_planned_batches(sampler)  # More than its length is not read by training, either.
    most = min((each for each in (length, limit) if each is not None), default=None)
    items: list[Any] = []
    error: Exception | None = None
    try:
        own = _copied(sampler, loader, loader.dataset)
        with random_states_kept():
            # The same on all processes and in each sweep.
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
            raise UserError(f"the sampler of process {everybody.index(None)} failed, which says why.")
        items = [item for each in everybody if each is not None for item in each]
    if error is not None:
        raise error
    return items


def _distributed(sampler: Any) -> tuple[Sequence[int], bool, int]:
    return range(len(sampler.dataset)), sampler.shuffle, sampler.num_replicas


def _weighted(sampler: Any) -> tuple[Sequence[int], bool, int]:
    return torch.as_tensor(sampler.weights).nonzero().flatten().tolist(), True, 1


# All that a sampler can yield, whether it shuffles, and how many processes share its epoch.
_KNOWN: dict[type[Any], Callable[[Any], tuple[Sequence[int], bool, int]]] = {
    SequentialSampler: lambda sampler: (range(len(sampler.data_source)), False, 1),
    RandomSampler: lambda sampler: (range(len(sampler.data_source)), True, 1),
    SubsetRandomSampler: lambda sampler: (sorted({int(i) for i in sampler.indices}), True, 1),
    WeightedRandomSampler: _weighted,
    DistributedSampler: _distributed,
}


def num_own_samples(loader: Any) -> int | None:
    """Count the samples of an epoch of this process that are not duplicates.

    A ``DistributedSampler`` pads the last places with samples that another process, or an earlier place, has too, and
    so do loaders that accelerate has prepared.

    Args:
        loader: Any loader.

    Returns:
        How many samples from the start of the epoch are real; None if all are.

    Raises:
        ValueError: If samples are repeated and it cannot be known how many, as of a stream.
    """
    try:
        real = num_real_samples(loader)
    except LookupError:
        raise UserError(
            f"a {type(loader).__name__} repeats samples at the end of an epoch to give each process as many, and it "
            "cannot be told which: measure by an evaluation pass, or with drop_last=True."
        ) from None
    if real is not None:
        return real
    # A loader that was given a batch sampler has a sequential sampler that it does not use.
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", getattr(loader, "sampler", None))
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    length = len(sampler.dataset)  # type: ignore[arg-type]
    if len(sampler) != -(-length // sampler.num_replicas):  # Of a subclass that draws as many as it likes.
        return None
    return len(range(sampler.rank, length, sampler.num_replicas))
