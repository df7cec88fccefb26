"""Measurement from the forwards of the user's own steps, where hooks read the features."""

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


class _LoaderCollectors(NamedTuple):
    """The collectors of one loader.

    Attributes:
        rows: The buffer that passes features on to the collectors.
        statistics: The collector of class statistics.
        decisions: The collector of decisions, if these are measured.
        num_own: Number of samples of this process that are not duplicates; None if all are.
    """

    rows: RowBuffer
    statistics: StatisticsCollector
    decisions: DecisionsCollector | None
    num_own: int | None


class StepMeasurement:
    """Measures the features of the user's steps over one or several loaders.

    Call :meth:`hook` before each step, :meth:`collect` after it, and :meth:`read` after all steps.

    Args:
        reader: Reader of features and labels.
        measuring: The measures to evaluate.
        ood: Names of out-of-distribution loaders.
        training_statistics: Function that returns the class statistics of the training set at the current weights.
            Decisions and NC5 need its class means; None leaves both out.
        online: Whether the steps are training steps. Weights then change during the pass, and the head is that at the
            end. Otherwise features and head belong to the same weights.

    Attributes:
        statistics: The class statistics that :meth:`read` evaluated, by the name of the loader.
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
        self._loaders: dict[str, _LoaderCollectors] = {}
        self._failure: Exception | None = None
        # Class means and head for the decisions, and fingerprints of the weights that they belong to.
        self._class_means: LayerStatistics | None = None
        self._head: Head | None = None
        self._weights: dict[str, tuple[int, ...]] = {}
        # The hooks that read features, earlier ones from before a pause, and the hook that copies the head.
        self._hooked = False
        self._watch: Watch | None = None
        self._done: list[Watch] = []
        self._handle: RemovableHandle | None = None
        # Inputs and labels of the current or last batch; its features, if its forward initialised the head.
        self._split: tuple[Any, Tensor] | None = None
        self._first: dict[str, Tensor] | None = None

    @property
    def hooked(self) -> bool:
        """Whether the model is hooked, or no hooks are needed because of an error."""
        return self._hooked or self._failure is not None

    @property
    def is_idle(self) -> bool:
        """Whether the model has not yet run on the current batch."""
        return self._watch is not None and self._watch.is_idle

    def hook(self, host: Host, batch: Any, name: str = "", first: FirstForward | None = None) -> None:
        """Hook the model before its first batch, and prepare for each batch.

        Before the first batch, the class means of the training set are measured, too, if decisions need them.

        Args:
            host: The host of the model.
            batch: The batch as the step gets it.
            name: Name of the loader.
            first: The hook for a model whose first forward initialises its head.

        Raises:
            ValueError: If training runs in a compiled graph; and as for :meth:`PairReader.check_batch`.
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
            self._reader.verify_head(host, self._reader.split(batch)[0])
        if self._training_statistics is not None and self._class_means is None:
            # Not earlier, because other callbacks may swap weights at the start of the epoch.
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
                # A step may swap weights while it runs. The head is therefore copied when its layer is called.
                self._handle = hook_call(self._reader.layer_of(module), lambda *_: self._take_head(module))
        self._begin(batch)

    def _hook_at_once(self, host: Host, batch: Any) -> None:
        """Hook the model after its first forward, and read the features of that batch by another forward."""
        self._split = self._reader.split(batch)
        self._first = self._reader.features(host, self._split[0])
        self._watch = self._reader.watch(host.module, in_steps=True, online=self._online)

    def _begin(self, batch: Any) -> None:
        """Prepare for the step of a batch."""
        if self._failure is None:
            self._split = self._reader.split(batch)
            if self._watch is not None:
                self._watch.begin(self._split[0])

    def _take_head(self, module: nn.Module) -> None:
        """Copy the current head, to which the features of this pass belong."""
        self._head = self._reader.head_snapshot(module)
        if self._training_statistics is not None:
            self._weights["validation or test step"] = _trained(module)

    def collect(self, host: Host, name: str = "", loader: Any = None) -> None:
        """Collect the features of the batch on which the step just ran.

        Args:
            host: The host of the model.
            name: Name of the loader.
            loader: The loader. It may repeat samples at its end, which are not counted.
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
                "decisions and nc5 need class means at the weights with which the step runs, and the step itself swaps "
                "weights: swap them in on_validation_epoch_start and back in on_validation_epoch_end, or leave "
                "these measures out."
            )
        if name not in self._loaders:
            self._loaders[name] = self._open(host.module, name, loader)
        if name in self._ood:
            kept, labels = unlabelled(kept, self._reader.ignore_index)
        of_loader = self._loaders[name]
        of_loader.rows.add(kept, labels, of_loader.num_own)

    def _open(self, module: nn.Module, name: str, loader: Any) -> _LoaderCollectors:
        """Construct the collectors of a loader."""
        head = self._reader.head_of(module) if self._head is None else self._head
        statistics, decisions = self._measuring.statistics_collector(head), None
        if self._class_means is not None and self._measuring.decides(self._class_means) and name not in self._ood:
            decisions = self._measuring.decisions_collector(head, self._class_means)
        rows = RowBuffer(*(each.add for each in (statistics, decisions) if each is not None))
        return _LoaderCollectors(rows, statistics, decisions, num_own_samples(loader))

    def read(self, host: Host) -> dict[str, Tensor]:
        """Evaluate all measures. Tags begin with the name of the loader if it has one.

        Raises:
            Exception: On all processes, if one of them failed.
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
        reshard(host.module)  # Gathered weights may have the lower precision of the last forward.
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
        """Raise if a check of the hooks failed."""
        for watch in self._done if self._watch is None else [*self._done, self._watch]:
            watch.verify()
        if self._online and self._split is not None:  # Operations after the head may have an effect by now.
            self._reader.verify_head(host, self._split[0])

    def fail(self, error: Exception) -> None:
        """Record an error and remove the hooks. All processes raise it in :meth:`read`."""
        self.remove()
        self._failure = error

    def remove(self) -> None:
        """Remove the hooks."""
        if self._watch is not None:
            self._watch.remove()
            self._done.append(self._watch)  # Training may continue after a validation within the epoch.
        if self._handle is not None:
            self._handle.remove()
        self._watch = self._handle = None
        self._hooked = False


def _trained(module: nn.Module) -> tuple[int, ...]:
    """Return a fingerprint of the trainable weights. A forward may change others, such as a momentum encoder's."""
    return fingerprint_together(parameter for parameter in module.parameters() if parameter.requires_grad)
