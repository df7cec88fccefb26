"""Evaluation passes: a frozen model runs over a data set, and gatherers receive its features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from nclightning.errors import UserError
from nclightning.probe.batches import RowBuffer, unlabelled
from nclightning.probe.host import Host
from nclightning.probe.reader import PairReader
from nclightning.probe.sweep import generators_kept, online_hint, sequential_loader, shared_buffers
from nclightning.ranks import failing_together
from nclightning.sharding import in_step, is_sharded, reshard

__all__ = ["Gatherer", "check_loader", "evaluate", "leftover_error"]


class Gatherer(Protocol):
    """Receives the features of an evaluation pass.

    Attributes:
        reader: Reader of features and labels.
        labelled: Whether the labels of the data have a meaning. Gatherers that share a pass agree in it.
    """

    reader: PairReader
    labelled: bool

    def begin(self, host: Host, others: Sequence[Gatherer]) -> None:
        """Prepare for a pass. Called once the first batch has shown the head.

        Args:
            host: The host of the model.
            others: Other gatherers of the same pass.
        """

    def add(self, features: dict[str, Tensor], labels: Tensor) -> None:
        """Receive the features of several batches.

        Args:
            features: ``(N, d)`` by name; those at the head under the empty name. They are not written to afterwards.
            labels: ``(N,)`` int64.
        """


def evaluate(host: Host, loader: Any, gatherers: Sequence[Gatherer], limit: int | None = None) -> None:
    """Run a model over a data set. Gatherers that need the same features share one pass.

    If weights are sharded, all processes must take part in each forward. Processes with fewer batches than others then
    repeat one, which is not counted.

    Args:
        host: The host of the model.
        loader: The loader of the data set.
        gatherers: Objects that receive features and labels.
        limit: Largest number of batches that training reads per epoch; None for no limit.

    Raises:
        Exception: On all processes, if one of them fails or has no batch.
    """
    waiting = list(gatherers)
    while waiting:
        with failing_together(host.device):  # In each pass: a process without an error would wait in the next one.
            waiting = _run(host, loader, waiting, limit)


def _run(host: Host, loader: Any, gatherers: list[Gatherer], limit: int | None) -> list[Gatherer]:
    """Make one pass; return the gatherers that need another one."""
    module, sharded = host.module, is_sharded(host.module)
    watch, served, waiting, rows = None, gatherers, list[Gatherer](), RowBuffer()
    try:
        with generators_kept(loader), host.unseen(), shared_buffers(module, host.world_size), host.precision():
            own = sequential_loader(loader, host.rank, host.world_size, limit)
            batches = in_step(own, host.device) if sharded else ((each, True) for each in own)
            for each, is_new in _with_leftover_error(module, loader, batches):
                batch = host.on_device(each)
                is_first = watch is None
                if watch is None:
                    for gatherer in gatherers:
                        gatherer.reader.check_batch(host, batch)
                    served = [each for each in gatherers if _share_features(each, gatherers[0])]
                    waiting = [each for each in gatherers if each not in served]
                    reader = served[0].reader.together_with([each.reader for each in served[1:]])
                    watch = reader.watch(module)
                    rows = RowBuffer(*(each.add for each in served), pair=reader.pair)
                    for gatherer in served:
                        gatherer.begin(host, [each for each in served if each is not gatherer])
                inputs, labels = reader.split(batch, served[0].labelled)
                kept = watch.take((reader.call_and_verify if is_first else reader.call)(module, inputs))
                if not served[0].labelled:
                    kept, labels = unlabelled(kept, reader.ignore_index)
                if is_new:
                    rows.add(kept, labels)
            if watch is not None:
                watch.verify()
        if watch is None:
            raise UserError(
                f"the data are empty for process {host.rank} of {host.world_size}: an evaluation pass needs a batch "
                "for each process, and a loader that starts again in each pass."
            )
        rows.flush()
    finally:
        if watch is not None:
            watch.remove()
        if sharded:
            reshard(module)
    return waiting


def _share_features(one: Gatherer, other: Gatherer) -> bool:
    return one.labelled == other.labelled and one.reader.shares_features_with(other.reader)


def check_loader(host: Host, loader: Any, limit: int | None = None) -> None:
    """Raise if an evaluation pass over a loader is not possible. All processes must call it.

    Raises:
        ValueError: With the reason.
    """
    with failing_together(host.device):
        sequential_loader(loader, host.rank, host.world_size, limit)


def _with_leftover_error(module: nn.Module, loader: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches. If a model fails on samples that ``drop_last`` leaves out of training, the error says so."""
    try:
        yield from batches
    except UserError:
        raise
    except Exception as error:
        if getattr(loader, "drop_last", False):
            raise leftover_error(module, error) from error
        raise


def leftover_error(module: nn.Module, error: Exception, rest: int | None = None) -> UserError:
    """Return the error for a batch of samples that ``drop_last`` leaves out of training.

    Args:
        module: The model.
        error: The error that was raised.
        rest: Number of these samples, if known.
    """
    many = "the last samples" if rest is None else f"a batch of the {rest} samples"
    return UserError(
        f"{type(module).__name__} could not be measured on {many} that drop_last=True leaves out of training, and an "
        f"evaluation pass over the training set reads: {type(error).__name__}: {error} Let forward and collate_fn take "
        f"batches of any size{online_hint()}."
    )
