"""Evaluation passes: a frozen model runs over a data set, and gatherers get its features."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from nclightning.errors import UserError
from nclightning.probe.batches import RowBuffer, unlabelled
from nclightning.probe.host import Host
from nclightning.probe.reader import PairReader
from nclightning.probe.sweep import generators_kept, or_online, sequential_loader, shared_buffers
from nclightning.ranks import failing_together
from nclightning.sharding import in_step, is_sharded, reshard

__all__ = ["Gatherer", "check_loader", "evaluate", "left_over"]


class Gatherer(Protocol):
    """Takes the features of an evaluation pass.

    Attributes:
        reader: Of the features that it takes.
        labelled: Whether labels of the data mean anything; the same of all that share a pass.
    """

    reader: PairReader
    labelled: bool

    def begin(self, host: Host, others: Sequence[Gatherer]) -> None:
        """Get ready for a pass, once its first batch has shown the head.

        Args:
            host: Of the model.
            others: Those that take the features of the same pass.
        """

    def add(self, features: dict[str, Tensor], labels: Tensor) -> None:
        """Take the rows of several batches.

        Args:
            features: ``(N, d)`` by name, those of the head under the empty one. Nobody writes to them any more.
            labels: ``(N,)`` int64.
        """


def evaluate(host: Host, loader: Any, gatherers: Sequence[Gatherer], limit: int | None = None) -> None:
    """Run a model over a data set, once for all gatherers that see the same features in it, and again for others.

    Where weights are sharded each forward is one of all processes, so that those with fewer batches repeat one.

    Args:
        host: Of the model.
        loader: Of the data set.
        gatherers: Get features and labels.
        limit: Number of batches to which training is held; None if to none.

    Raises:
        Exception: On all processes, if one of them fails or has no batch.
    """
    waiting = list(gatherers)
    while waiting:
        with failing_together(host.device):  # Each pass: who had no error would wait in the next one for who had.
            waiting = _run(host, loader, waiting, limit)


def _run(host: Host, loader: Any, gatherers: list[Gatherer], limit: int | None) -> list[Gatherer]:
    """Make one pass; return the gatherers that need another one."""
    module, sharded = host.module, is_sharded(host.module)
    watch, served, waiting, rows = None, gatherers, list[Gatherer](), RowBuffer()
    try:
        with generators_kept(loader), host.unseen(), shared_buffers(module, host.world_size), host.precision():
            own = sequential_loader(loader, host.rank, host.world_size, limit)
            batches = in_step(own, host.device) if sharded else ((each, True) for each in own)
            for each, is_new in _saying_so(module, loader, batches):
                batch = host.on_device(each)
                is_first = watch is None
                if watch is None:
                    for gatherer in gatherers:
                        gatherer.reader.check_batch(host, batch)
                    served = [each for each in gatherers if _sees_as(each, gatherers[0])]
                    waiting = [each for each in gatherers if each not in served]
                    reader = served[0].reader.together_with([each.reader for each in served[1:]])
                    watch = reader.watch(module)
                    rows = RowBuffer(*(each.add for each in served), pair=reader.pair)
                    for gatherer in served:
                        gatherer.begin(host, [each for each in served if each is not gatherer])
                inputs, labels = reader.split(batch, served[0].labelled)
                kept = watch.take((reader.call_again if is_first else reader.call)(module, inputs))
                if not served[0].labelled:
                    kept, labels = unlabelled(kept, reader.ignore_index)
                if is_new:
                    rows.add(kept, labels)
            if watch is not None:
                watch.verify()
        if watch is None:
            raise UserError(
                f"the data to sweep is empty for process {host.rank} of {host.world_size}: it must have a batch for "
                "each, and a loader must begin anew in each pass."
            )
        rows.flush()
    finally:
        if watch is not None:
            watch.remove()
        if sharded:
            reshard(module)
    return waiting


def _sees_as(one: Gatherer, other: Gatherer) -> bool:
    return one.labelled == other.labelled and one.reader.sees_as(other.reader)


def check_loader(host: Host, loader: Any, limit: int | None = None) -> None:
    """Refuse a loader that cannot be swept, before anything runs. All processes must come here.

    Raises:
        ValueError: With the reason.
    """
    with failing_together(host.device):
        sequential_loader(loader, host.rank, host.world_size, limit)


def _saying_so(module: nn.Module, loader: Any, batches: Iterable[Any]) -> Iterator[Any]:
    """Yield batches; if that fails where the last ones are never seen in training, say so."""
    try:
        yield from batches
    except UserError:
        raise
    except Exception as error:
        if getattr(loader, "drop_last", False):
            raise left_over(module, error) from error
        raise


def left_over(module: nn.Module, error: Exception, rest: int | None = None) -> UserError:
    """Say why a batch of the samples that training drops could not be read.

    Args:
        module: The model.
        error: What happened.
        rest: How many samples, if that is known.
    """
    many = "the last samples" if rest is None else f"a batch of the {rest} samples"
    return UserError(
        f"{type(module).__name__} could not be measured on {many} that drop_last=True leaves out of training, and an "
        f"evaluation pass over the training set reads: {type(error).__name__}: {error} Let forward and collate_fn take "
        f"batches of any size{or_online()}."
    )
