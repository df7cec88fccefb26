"""Measurements of the ordinary forwards of the user's steps."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Collection as Names
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nclightning.errors import UserError
from nclightning.heads import Head
from nclightning.probe.collection import Centres, Collection, Decisions, Measuring, orthogonality
from nclightning.probe.first_forward import FirstForward
from nclightning.probe.hooks import hook_call
from nclightning.probe.host import Host
from nclightning.probe.reader import PairReader
from nclightning.probe.sweep import fingerprint_together, num_own_samples
from nclightning.probe.watch import Watch
from nclightning.ranks import raise_together
from nclightning.sharding import is_sharded, reshard

__all__ = ["ForwardPass"]


class ForwardPass:
    """Collects the features of the user's steps over one or several loaders.

    Args:
        reader: Of features and labels.
        measuring: What to measure.
        ood: Names of loaders that are out of distribution.
        centres: Makes the statistics of the training set for decisions by nearest centre and NC5, at the weights of the
            moment; None leaves both out.
        online: Whether this is a pass of training, whose weights change on the way: its features are read with the
            head as it is at the end. Else features and head are of the same weights.
    """

    def __init__(
        self,
        reader: PairReader,
        measuring: Measuring,
        ood: Names[str] = (),
        centres: Callable[[], Centres] | None = None,
        online: bool = False,
    ) -> None:
        self._reader, self._measuring = reader, measuring
        self._ood, self._sweep_centres, self._online = ood, centres, online
        self._centres: Centres | None = None
        self._head: Head | None = None
        self._weights: dict[str, tuple[int, ...]] = {}
        self._watch: Watch | None = None
        self._done: list[Watch] = []
        # Inputs and labels of the batch that runs, or did last.
        self._split: tuple[Any, Tensor] | None = None
        self._handle: RemovableHandle | None = None
        self._hooked = False
        self._first: dict[str, Tensor] | None = None
        self._failure: Exception | None = None
        self._collections: dict[str, Collection] = {}
        self._decisions: dict[str, Decisions] = {}
        self._num_own: dict[str, int | None] = {}

    @property
    def hooked(self) -> bool:
        """Whether the model is hooked, or need not be any more."""
        return self._hooked or self._failure is not None

    def hook(self, host: Host, batch: Any, name: str = "", first: FirstForward | None = None) -> None:
        """Hook the model before its first batch, and get ready for each.

        Then the class means of the weights that are to decide are swept, too.

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
        if self._sweep_centres is not None and self._centres is None:
            # Not before: at the start of the epoch other callbacks may still be about to swap weights.
            self._weights["class means"] = _trained(module)
            self._centres = self._sweep_centres()
        compiled = self._reader.is_compiled(module)
        if compiled and self._online:
            raise UserError(
                "source='online' needs the features of training's own forwards, which a compiled model does not show "
                "to hooks: use source='sweep', which runs it uncompiled."
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
        if self._sweep_centres is not None:
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
        if not self._collections and self._watch is not None:
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
        if name not in self._collections:
            self._open(host.module, name, loader)
        if name in self._ood:
            kept, labels = self._measuring.unlabelled(kept)
        self._collections[name].add(kept, labels, self._num_own[name])
        if name in self._decisions:
            self._decisions[name].add(kept, labels, self._num_own[name])

    def _open(self, module: nn.Module, name: str, loader: Any) -> None:
        """Start reading a loader."""
        head = self._reader.head_of(module) if self._head is None else self._head
        self._collections[name] = self._measuring.collection(head)
        if self._centres is not None and self._measuring.decides(self._centres) and name not in self._ood:
            self._decisions[name] = self._measuring.decisions(head, self._centres)
        self._num_own[name] = num_own_samples(loader)

    def read(self, host: Host) -> dict[str, Tensor]:
        """Evaluate all measures, with the name of the loader in the tag where there are several.

        Raises:
            Exception: On all processes, if one of them failed on the way.
        """
        if self._failure is None:
            try:
                self._verify(host)
            except Exception as error:
                self._failure = error
        self.remove()
        raise_together(self._failure, host.device)
        reshard(host.module)  # The head in its own precision, not in that of the last forward.
        values: dict[str, Tensor] = {}
        for name, collection in self._collections.items():
            stats = collection.statistics()
            if name in self._ood:
                read = {} if self._centres is None else {"nc5": orthogonality(self._centres[""], stats[""])}
            else:
                read = collection.read(stats)
            if name in self._decisions:
                read |= self._decisions[name].read()
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
