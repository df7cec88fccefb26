"""How a monitor holds on to a module that knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from nclightning.callbacks.first_batch import IGNORED, FirstBatch, Known, check_range, parts_of
from nclightning.callbacks.first_forward import FirstForward
from nclightning.callbacks.modules import check_strategy, layer_named
from nclightning.callbacks.remainder import check_rest, check_split, labels_of, num_left_over, saying_so
from nclightning.callbacks.unseen import unseen
from nclightning.compat.lightning import prepare_batch
from nclightning.errors import UserError
from nclightning.heads import Head, HeadReader, weight_shape
from nclightning.probe.detection import HeadArgument
from nclightning.probe.features import call_model, describe, split_batch
from nclightning.probe.likeness import Like
from nclightning.probe.sweep import compiled_parts, has_lazy_parts, sequential_loader, shared_buffers
from nclightning.probe.watch import FirstStep, Watch
from nclightning.ranks import raise_together
from nclightning.sharding import in_step, is_sharded, reshard

__all__ = ["Attachment"]

Add = Callable[[dict[str, Tensor], Tensor], None]
BatchFn = Callable[[Any], tuple[Any, Tensor]]
ForwardFn = Callable[[Any, Any], Any]
Reads = Literal["sweep", "online", ""]


class Attachment:
    """Head and layers of a module, and passes over data through them.

    Args:
        head: Dotted name of the head, the module, or a function ``(model) -> (weight, bias)``; None finds it.
        layers: Dotted names of further layers.
        pooling: As for :class:`nclightning.probe.features.Taps`.
        batch_fn: Splits a batch into input and labels; None is :func:`nclightning.probe.features.split_batch`.
        forward_fn: Runs the module on the input of a batch; None is :func:`nclightning.probe.features.call_model`.
        ignore_index: Label of samples to leave out.
        like: As for :func:`nclightning.probe.detection.find_head`.
    """

    def __init__(
        self,
        head: HeadArgument = None,
        layers: tuple[str, ...] = (),
        pooling: Literal["mean", "flatten"] = "mean",
        batch_fn: BatchFn | None = None,
        forward_fn: ForwardFn | None = None,
        ignore_index: int | None = None,
        like: Like = "factor",
    ) -> None:
        self.like: Like = like
        self._head, self._layers, self._pooling = head, layers, pooling
        self._batch_fn, self._forward_fn = batch_fn, forward_fn
        self._ignore_index = ignore_index
        self._known: Known | None = None
        self.first_step: FirstStep | None = None
        self.first: FirstForward | None = None

    def forget(self) -> None:
        """Forget what the last module showed."""
        self._known = None
        self.unwatch()

    def unwatch(self) -> None:
        """Leave no hook behind."""
        self.end_first_step()
        if self.first is not None:
            self.first.remove()
        self.first = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known": None, "first_step": None, "first": None}  # A weak reference cannot be pickled.

    def knows(self, pl_module: L.LightningModule) -> bool:
        """Whether the first batch of a module has been seen, and its head has not been replaced since."""
        if self._known is None or self._known.module() is not pl_module:
            return False
        reader = self._known.found.reader
        if reader.layer is None:
            return True
        same = reader.layer is dict(pl_module.named_modules(remove_duplicate=False)).get(reader.name)
        return same and (reader.form != "weight" or weight_shape(reader.layer) == weight_shape(reader))

    @property
    def splits_plainly(self) -> bool:
        """Whether labels are what the data set holds under that name or in that place."""
        return self._batch_fn is None

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Split a batch into what the module is called with, and the labels as they belong to the feature rows."""
        inputs, labels = self._split(batch)
        if self._known is None:
            return inputs, labels
        if self._known.shifted:
            last = torch.full_like(labels[:, :1], IGNORED)
            labels = torch.cat([labels[:, 1:], last], dim=1)
        if labels.ndim > 1 and self._ignore_index not in (None, IGNORED):
            labels = labels.masked_fill(labels == IGNORED, self._ignore_index)
        return batch if self._known.with_labels else inputs, labels

    def _split(self, batch: Any) -> tuple[Any, Tensor]:
        if self._batch_fn is None:
            return split_batch(batch)
        split = self._batch_fn(batch)
        if not isinstance(split, tuple | list) or len(split) != 2:
            raise UserError(f"batch_fn must return (inputs, labels), it returned {describe(split)}.")
        return split[0], split[1]

    def call(self, pl_module: L.LightningModule, inputs: Any) -> Any:
        """Run the module on the input of a batch."""
        return call_model(pl_module, inputs) if self._forward_fn is None else self._forward_fn(pl_module, inputs)

    def call_again(self, pl_module: L.LightningModule, inputs: Any) -> Any:
        """Run the frozen module on the input of a batch, and see that the head is still what it was found to be."""
        assert self._known is not None
        return self._known.found.call_again(pl_module, lambda: self.call(pl_module, inputs))

    def check_first(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        read: Literal["sweep", "online", ""] = "sweep",
    ) -> None:
        """Check the first training batch as :meth:`check_batch` does, on all processes together.

        Args:
            trainer: Of the module.
            pl_module: The module.
            batch: As the step gets it, of all loaders.
            read: How training is read, if it is.

        Raises:
            Exception: On all processes, if one of them fails.
        """
        if read == "online" and has_lazy_parts(pl_module):
            self._wait(trainer, pl_module, batch)
            return
        error: Exception | None = None
        try:
            parts = [batch] if read == "online" else list(parts_of(batch, trainer.train_dataloader))
            check_split(self.split, parts)
            self.check_batch(trainer, pl_module, parts[0])
            for other in parts[1:] if read else []:
                check_range(
                    labels_of(self.split, other), self.head_of(pl_module), self._ignore_index, self.like == "factor"
                )
            if read == "sweep" and (rest := num_left_over(trainer)):
                check_rest(pl_module, self.split, self.features, parts[0], rest)
            if read == "online" and not self.knows(pl_module):  # The forward made the head, and it was put back.
                self._wait(trainer, pl_module, batch)
            elif read and not compiled_parts(pl_module) and self.knows(pl_module):
                assert self._known is not None
                self.first_step = FirstStep(pl_module, self._known.entry, self.layer_of(pl_module))
        except Exception as own:
            error = own
        raise_together(error, pl_module.device)

    def check_sanity(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, labelled: bool) -> None:
        """Check a batch of Lightning's sanity check as :meth:`check_batch` does, and forget it: training has others.

        Raises:
            Exception: On all processes, if one of them fails.
        """
        error: Exception | None = None
        try:
            self.check_batch(trainer, pl_module, batch, labelled=labelled)
        except Exception as own:
            error = own
        self.forget()
        raise_together(error, pl_module.device)

    def _wait(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Examine the module once its first forward is over, until :meth:`finish_first`."""
        self.first = FirstForward(pl_module, lambda: self.check_batch(trainer, pl_module, batch))

    def finish_first(self) -> None:
        """End the first step of a module whose first forward makes its head.

        Raises:
            Exception: On all processes, if it did not show what :meth:`check_batch` needs.
        """
        if self.first is not None:
            first, self.first = self.first, None
            first.finish()

    def end_first_step(self, pl_module: L.LightningModule | None = None, *, online: bool = False) -> None:
        """Say where the first step of training did something else than what was examined; without a module, do not.

        Raises:
            ValueError: If features of the steps themselves are read, and their inputs are other ones.
        """
        step, self.first_step = self.first_step, None
        if step is None:
            return
        differs, runs = step.end()
        if pl_module is None:
            return
        said = step.words(type(pl_module).__name__, self.head_of(pl_module).name, differs, runs)
        if said and differs and online:
            raise UserError(said)
        if said:
            rank_zero_warn(said)

    def check_again(self, trainer: L.Trainer, pl_module: L.LightningModule, inputs: Any) -> None:
        """Run a known module once more without a trace, for :meth:`call_again` alone."""
        with unseen(pl_module), trainer.precision_plugin.forward_context():
            self.call_again(pl_module, inputs)
        if is_sharded(pl_module):
            reshard(pl_module)

    def check_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, *, labelled: bool = True
    ) -> None:
        """Find head, features and pairing on the first batch of a module, and check what they need.

        Runs the module without a trace, the first time only. All processes must come here.

        Args:
            trainer: Whose precision the forward has.
            pl_module: The module.
            batch: As the step gets it.
            labelled: Whether its labels mean anything.

        Raises:
            ValueError: With what was seen and the argument that repairs it: if the batch cannot be split, the forward
                fails, no layer is seen to be the head, a further layer does not exist, or labels do not pair with
                features or fit the head.
            TypeError: If labels are no integers.
        """
        if self.knows(pl_module):
            return
        self._known = None
        if has_lazy_parts(pl_module):
            raise UserError(
                f"{type(pl_module).__name__} has lazy layers without weights, which its first forward makes by chance: "
                "run it once on a batch before, or train it with a plain NeuralCollapseMonitor."
            )
        with unseen(pl_module), trainer.precision_plugin.forward_context():
            try:
                self._known = self._examine(pl_module, batch, labelled)
                if self._known.found.reader.normalizes:
                    rank_zero_warn(
                        f"{self._known.found.reader.name!r} is a cosine head: features and the rows of its weight are "
                        "divided by their norms before anything is measured."
                    )
            finally:
                if is_sharded(pl_module):
                    reshard(pl_module)

    def _examine(self, pl_module: L.LightningModule, batch: Any, labelled: bool) -> Known:
        for name in self._layers:
            layer_named(pl_module, name)
        inputs, labels = self._split(batch)
        first = FirstBatch(pl_module, batch, inputs, labels if labelled else None, self.call)
        plain = self._batch_fn is None, self._forward_fn is None
        return first.examine(self._head, self._ignore_index, *plain, self.like)

    check = staticmethod(check_strategy)

    def head_of(self, pl_module: L.LightningModule) -> HeadReader:
        """Return the head that the first batch showed."""
        assert self._known is not None
        assert self.knows(pl_module)
        return self._known.found.reader

    def whole_head_of(self, pl_module: L.LightningModule) -> Head:
        """Copy weight and bias as they are now, in eval mode and without a trace. All processes must ask."""
        reshard(pl_module)  # Gathered ones may be of a lower precision.
        return self.head_of(pl_module).read().snapshot()

    def watch(self, pl_module: L.LightningModule, *, in_steps: bool = False, online: bool = False) -> Watch:
        """Hook the place where features arise, and further layers.

        Args:
            pl_module: The module.
            in_steps: Whether steps of the user are watched, and not forwards of our own.
            online: Whether they are those of training.

        Raises:
            ValueError: If a layer does not exist.
        """
        assert self._known is not None
        assert self.knows(pl_module)
        layers = {name: layer_named(pl_module, name) for name in self._layers}
        entry = self._known.entry.layers if in_steps else None
        return Watch(self._known.found, pl_module, layers, self._pooling, entry, online)

    def layer_of(self, pl_module: L.LightningModule) -> nn.Module:
        """Return the layer at which features are seen; the head, where that is a layer."""
        assert self._known is not None
        assert self.knows(pl_module)
        return self._known.found.source(pl_module).layer

    def is_compiled(self, pl_module: L.LightningModule) -> bool:
        """Whether the head or a layer runs inside a compiled graph, where hooks do not fire."""
        parts = compiled_parts(pl_module)
        watched = [self.layer_of(pl_module), *(layer_named(pl_module, name) for name in self._layers)] if parts else []
        return any(child is layer for part in parts for child in part.modules() for layer in watched)

    def features(self, pl_module: L.LightningModule, inputs: Any) -> dict[str, Tensor]:
        """Run the module once more on a batch, uncompiled and without a trace; return what was captured."""
        with unseen(pl_module), pl_module.trainer.precision_plugin.forward_context():
            watch = self.watch(pl_module)
            try:
                kept = watch.take(self.call(pl_module, inputs))
                watch.verify()
                return kept
            finally:
                watch.remove()

    def sweep(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loader: Any, add: Add, limit: int | None = None
    ) -> None:
        """Run the module once over a data set without a trace, and hand on features and labels batch by batch.

        Where weights are sharded each forward is one of all processes, so that those with fewer batches repeat one.

        Args:
            trainer: Of the module.
            pl_module: The module.
            loader: Of the data set.
            add: Takes features by name, and labels.
            limit: Number of batches to which training is held; None if to none.

        Raises:
            Exception: On all processes, if one of them fails or has no batch.
        """
        error: Exception | None = None
        try:
            self._sweep(trainer, pl_module, loader, add, limit)
        except Exception as own:
            error = own
        raise_together(error, pl_module.device)

    def _sweep(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loader: Any, add: Add, limit: int | None
    ) -> None:
        watch: Watch | None = None
        again = self.call
        sharded = is_sharded(pl_module)
        try:
            with (
                unseen(pl_module),
                shared_buffers(pl_module, trainer.world_size),
                trainer.precision_plugin.forward_context(),
            ):
                own = sequential_loader(loader, trainer.global_rank, trainer.world_size, limit)
                batches = in_step(own, pl_module.device) if sharded else ((each, True) for each in own)
                for each, is_new in saying_so(pl_module, loader, batches):
                    batch = prepare_batch(pl_module, trainer.precision_plugin.convert_input(each))
                    batch = trainer.strategy.batch_to_device(batch)
                    if watch is None:
                        self.check_batch(trainer, pl_module, batch)
                        watch = self.watch(pl_module)
                        again = self.call_again
                    inputs, labels = self.split(batch)
                    kept = watch.take(again(pl_module, inputs))
                    again = self.call
                    if is_new:
                        add(kept, labels)
                if watch is not None:
                    watch.verify()
            if watch is None:
                raise UserError(
                    f"the data to sweep is empty for process {trainer.global_rank} of {trainer.world_size}: it must "
                    "have a batch for each, and a loader must begin anew in each pass."
                )
        finally:
            if watch is not None:
                watch.remove()
            if sharded:
                reshard(pl_module)

    @staticmethod
    def check_loader(trainer: L.Trainer, pl_module: L.LightningModule, loader: Any, limit: int | None = None) -> None:
        """Refuse a loader that cannot be swept, before anything runs. All processes must come here.

        Raises:
            ValueError: With the reason.
        """
        error: Exception | None = None
        try:
            sequential_loader(loader, trainer.global_rank, trainer.world_size, limit)
        except Exception as own:
            error = own
        raise_together(error, pl_module.device)
