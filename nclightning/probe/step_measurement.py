"""Measurements of the user's own steps: hooks see the features in forwards that run anyway."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection as Names
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nclightning.errors import UserError
from nclightning.heads import Head
from nclightning.probe.batches import RowBuffer, unlabelled
from nclightning.probe.collectors import (
    DecisionsCollector,
    LayerStatistics,
    Measuring,
    StatisticsCollector,
    orthogonality,
)
from nclightning.probe.first_forward import FirstForward
from nclightning.probe.hooks import hook_call
from nclightning.probe.host import Host
from nclightning.probe.reader import PairReader
from nclightning.probe.sweep import fingerprint_together, num_own_samples
from nclightning.probe.watch import Watch
from nclightning.quantities import NC5
from nclightning.ranks import raise_together
from nclightning.sharding import is_sharded, reshard

__all__ = ["StepMeasurement"]


class _OfLoader(NamedTuple):
    """What is collected of a loader.

    Attributes:
        rows: Hands them on to the others.
        statistics: Of its features.
        decisions: About them, if they are measured.
        num_own: How many samples of this process are not repeated ones; None if all.
    """

    rows: RowBuffer
    statistics: StatisticsCollector
    decisions: DecisionsCollector | None
    num_own: int | None


class StepMeasurement:
    """Measures the features of the user's steps over one or several loaders.

    Before each step comes :meth:`hook`, after it :meth:`collect`, after all of them :meth:`read`.

    Args:
        reader: Of features and labels.
        measuring: What to measure.
        ood: Names of loaders that are out of distribution.
        training_statistics: Makes the statistics of the training set at the weights as they are, whose class means
            decisions and NC5 need; None leaves both out.
        online: Whether this is a pass of training, whose weights change on the way: its features are read with the
            head as it is at the end. Else features and head are of the same weights.

    Attributes:
        statistics: What :meth:`read` evaluated, by the name of the loader.
    """

    def __init__(
        self,
        reader: PairReader,
        measuring: Measuring,
        ood: Names[str] = (),
        training_statistics: Callable[[], LayerStatistics] | None = None,
        online: bool = False,
    ) -> None:
        self._reader, self._measuring = reader, measuring
        self._ood, self._training_statistics, self._online = ood, training_statistics, online
        self.statistics: dict[str, LayerStatistics] = {}
        self._loaders: dict[str, _OfLoader] = {}
        self._failure: Exception | None = None
        # What decides: class means and head, and fingerprints of the weights that they are of.
        self._class_means: LayerStatistics | None = None
        self._head: Head | None = None
        self._weights: dict[str, tuple[int, ...]] = {}
        # Hooks: those that see features, those of before a pause, and the one that copies the head.
        self._hooked = False
        self._watch: Watch | None = None
        self._done: list[Watch] = []
        self._handle: RemovableHandle | None = None
        # Inputs and labels of the batch that runs, or did last; its features, if it made the head.
        self._split: tuple[Any, Tensor] | None = None
        self._first: dict[str, Tensor] | None = None

    @property
    def hooked(self) -> bool:
        """Whether the model is hooked, or need not be any more."""
        return self._hooked or self._failure is not None

    @property
    def is_idle(self) -> bool:
        """Whether the model has not run on the batch for which it was hooked."""
        return self._watch is not None and self._watch.is_idle

    def hook(self, host: Host, batch: Any, name: str = "", first: FirstForward | None = None) -> None:
        """Hook the model before its first batch, and get ready for each.

        Before the first batch the class means of the training set are measured, too, if decisions need them.

        Args:
            host: Of the model.
            batch: As the step gets it.
            name: Of its loader.
            first: Of a model whose first forward is to make its head.

        Raises:
            ValueError: If training runs inside a compiled graph, or as :meth:`PairReader.check_batch`.
        """
        if self.hooked:
            self._begin(batch)
            return
        if first is not None and self._online:
            self._hooked = True
            first.follow(lambda: self._hook_at_once(host, batch))
            return
        module = host.module
        self._reader.check_batch(host, batch, labelled=name not in self._ood)
        if not self._online:
            self._reader.check_again(host, self._reader.split(batch)[0])
        if self._training_statistics is not None and self._class_means is None:
            # Not before: at the start of the epoch other callbacks may still be about to swap weights.
            self._weights["class means"] = _trained(module)
            self._class_means = self._training_statistics()
        compiled = self._reader.is_compiled(module)
        if compiled and self._online:
            raise UserError(
                "source='online' and Probe.online need the features of training's own forwards, which a compiled model "
                "does not show to hooks: use source='sweep' or Probe.read, which run it uncompiled."
            )
        self._hooked = True
        if not compiled:
            self._watch = self._reader.watch(module, in_steps=True, online=self._online)
            if not self._online and not is_sharded(module):
                # A step may run with other weights than there are before and after it.
                self._handle = hook_call(self._reader.layer_of(module), lambda *_: self._take_head(module))
        self._begin(batch)

    def _hook_at_once(self, host: Host, batch: Any) -> None:
        """Hook the model once its first forward is over, and read that batch by one more."""
        self._split = self._reader.split(batch)
        self._first = self._reader.features(host, self._split[0])
        self._watch = self._reader.watch(host.module, in_steps=True, online=self._online)

    def _begin(self, batch: Any) -> None:
        if self._failure is None:
            self._split = self._reader.split(batch)
            if self._watch is not None:
                self._watch.begin(self._split[0])

    def _take_head(self, module: nn.Module) -> None:
        """Copy the head as it is now, with which the features of this pass are read."""
        self._head = self._reader.whole_head_of(module)
        if self._training_statistics is not None:
            self._weights["validation or test step"] = _trained(module)

    def collect(self, host: Host, name: str = "", loader: Any = None) -> None:
        """Take the features of the batch that just ran.

        Args:
            host: Of the model.
            name: Of the loader.
            loader: The loader, which may repeat samples at its end.
        """
        if self._failure is not None:
            return
        assert self._split is not None
        inputs, labels = self._split
        if self._first is not None:
            kept, self._first = self._first, None
        elif self._watch is None:
            kept = self._reader.features(host, inputs)
        else:
            kept = self._watch.take(labels=labels)
        if not self._loaders and self._watch is not None:
            self._watch.verify()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._head is None and not self._online:
            self._take_head(host.module)
        if len(set(self._weights.values())) > 1:
            raise UserError(
                "decisions and nc5 need class means of the weights that the step runs with, and the step changes "
                "weights inside: swap them in on_validation_epoch_start and back in on_validation_epoch_end, or leave "
                "these measures out."
            )
        if name not in self._loaders:
            self._loaders[name] = self._open(host.module, name, loader)
        if name in self._ood:
            kept, labels = unlabelled(kept, self._reader.ignore_index)
        of_loader = self._loaders[name]
        of_loader.rows.add(kept, labels, of_loader.num_own)

    def _open(self, module: nn.Module, name: str, loader: Any) -> _OfLoader:
        """Make what collects the features of a loader."""
        head = self._reader.head_of(module) if self._head is None else self._head
        statistics, decisions = self._measuring.statistics_collector(head), None
        if self._class_means is not None and self._measuring.decides(self._class_means) and name not in self._ood:
            decisions = self._measuring.decisions_collector(head, self._class_means)
        rows = RowBuffer(*(each.add for each in (statistics, decisions) if each is not None))
        return _OfLoader(rows, statistics, decisions, num_own_samples(loader))

    def read(self, host: Host) -> dict[str, Tensor]:
        """Evaluate all measures, with the name of the loader in the tag where there are several.

        Raises:
            Exception: On all processes, if one of them failed on the way.
        """
        if self._failure is None:
            try:
                self._verify(host)
                for of_loader in self._loaders.values():
                    of_loader.rows.flush()
            except Exception as error:
                self._failure = error
        self.remove()
        raise_together(self._failure, host.device)
        reshard(host.module)  # The head in its own precision, not in that of the last forward.
        values: dict[str, Tensor] = {}
        for name, (_, statistics, decisions, _) in self._loaders.items():
            stats = self.statistics[name] = statistics.statistics()
            if name in self._ood:
                read = {} if self._class_means is None else {NC5.name: orthogonality(self._class_means[""], stats[""])}
            else:
                read = statistics.read(stats)
            if decisions is not None:
                read |= decisions.read()
            values |= {f"{name}/{tag}" if name else tag: value for tag, value in read.items()}
        return values

    def _verify(self, host: Host) -> None:
        for watch in self._done if self._watch is None else [*self._done, self._watch]:
            watch.verify()
        if self._online and self._split is not None:  # What starts without effect may have one by now.
            self._reader.check_again(host, self._split[0])

    def fail(self, error: Exception) -> None:
        """Give up; the others hear of it when they read."""
        self.remove()
        self._failure = error

    def remove(self) -> None:
        """Remove the hooks."""
        if self._watch is not None:
            self._watch.remove()
            self._done.append(self._watch)  # It may go on after a validation in the middle of an epoch.
        if self._handle is not None:
            self._handle.remove()
        self._watch = self._handle = None
        self._hooked = False


def _trained(module: nn.Module) -> tuple[int, ...]:
    """Tell weights from others; a forward may change those that are not trained, such as a momentum encoder's."""
    return fingerprint_together(parameter for parameter in module.parameters() if parameter.requires_grad)
