"""How a monitor holds on to a module that knows nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from nclightning.callbacks.first_batch import IGNORED, FirstBatch, Known, first_of
from nclightning.callbacks.first_forward import FirstForward
from nclightning.callbacks.full_batch import full_batch, full_batch_head, full_batch_method
from nclightning.callbacks.unseen import unseen
from nclightning.detection import HeadArgument
from nclightning.errors import UserError
from nclightning.features import Taps, call_model, describe, split_batch
from nclightning.heads import Head, HeadReader, weight_shape
from nclightning.observation import Observation
from nclightning.ranks import raise_together
from nclightning.sharding import in_step, is_sharded, reshard
from nclightning.sweep import compiled_parts, has_lazy_parts, sequential_loader, shared_buffers

__all__ = ["Attachment", "full_batch", "full_batch_head", "full_batch_method", "name_loaders"]

Add = Callable[[dict[str, Tensor], Tensor], None]
BatchFn = Callable[[Any], tuple[Any, Tensor]]
ForwardFn = Callable[[Any, Any], Any]


class Attachment:
    """Head and layers of a module, and passes over data through them.

    Args:
        head: Dotted name of the head, the module, or a function ``(model) -> (weight, bias)``; None finds it.
        layers: Dotted names of further layers.
        pooling: As for :class:`nclightning.features.Taps`.
        batch_fn: Splits a batch into input and labels; None is :func:`nclightning.features.split_batch`.
        forward_fn: Runs the module on the input of a batch; None is :func:`nclightning.features.call_model`.
        ignore_index: Label of samples to leave out.
    """

    def __init__(
        self,
        head: HeadArgument = None,
        layers: tuple[str, ...] = (),
        pooling: Literal["mean", "flatten"] = "mean",
        batch_fn: BatchFn | None = None,
        forward_fn: ForwardFn | None = None,
        ignore_index: int | None = None,
    ) -> None:
        self._head, self._layers, self._pooling = head, layers, pooling
        self._batch_fn, self._forward_fn = batch_fn, forward_fn
        self._ignore_index = ignore_index
        self._known: Known | None = None
        self.first: FirstForward | None = None

    def forget(self) -> None:
        """Forget what the last module showed."""
        self._known = None
        self.unwatch()

    def unwatch(self) -> None:
        """Leave no hook behind."""
        if self.first is not None:
            self.first.remove()
        self.first = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_known": None, "first": None}  # A weak reference cannot be pickled.

    def knows(self, pl_module: L.LightningModule) -> bool:
        """Whether the first batch of a module has been seen, and its head has not been replaced since."""
        if self._known is None or self._known.module() is not pl_module:
            return False
        reader = self._known.found.reader
        if reader.layer is None:
            return True
        same = reader.layer is dict(pl_module.named_modules()).get(reader.name)
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

    def check_first(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, ordinary: bool = False) -> None:
        """Check the first training batch as :meth:`check_batch` does, on all processes together.

        Args:
            trainer: Of the module.
            pl_module: The module.
            batch: As the step gets it.
            ordinary: Wait for the forward of its step, if that can be watched: until :meth:`finish_first`.

        Raises:
            Exception: On all processes, if one of them fails.
        """
        plain = self._forward_fn is None and not self._layers
        plain = plain and (self._head is None or isinstance(self._head, str | nn.Module))
        if ordinary and plain and not is_sharded(pl_module) and not compiled_parts(pl_module):
            own = first_of(batch, trainer.train_dataloader)
            self.first = FirstForward(pl_module, lambda seen: self.check_batch(trainer, pl_module, own, seen=seen))
            return
        error: Exception | None = None
        try:
            self.check_batch(trainer, pl_module, first_of(batch, trainer.train_dataloader))
        except Exception as own:
            error = own
        raise_together(error, pl_module.device)

    def finish_first(self) -> None:
        """End the first step.

        Raises:
            Exception: On all processes, if it did not show what :meth:`check_batch` needs.
        """
        if self.first is not None:
            first, self.first = self.first, None
            first.finish()

    def check_again(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> None:
        """Run a known module once more without a trace, for :meth:`call_again` alone."""
        with unseen(pl_module), trainer.precision_plugin.forward_context():
            self.call_again(pl_module, self.split(batch)[0])
        if is_sharded(pl_module):
            reshard(pl_module)

    def check_batch(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,
        *,
        labelled: bool = True,
        seen: Observation | None = None,
    ) -> None:
        """Find head, features and pairing on the first batch of a module, and check what they need.

        Runs the module without a trace, the first time only. All processes must come here.

        Args:
            trainer: Whose precision the forward has.
            pl_module: The module.
            batch: As the step gets it.
            labelled: Whether its labels mean anything.
            seen: An ordinary forward on it, which is enough if it shows everything.

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
                try:
                    self._known = self._examine(pl_module, batch, labelled, seen)
                except UserError:
                    if seen is None:
                        raise
                    # In training mode a model may do what it does not do in eval mode.
                    self._known = self._examine(pl_module, batch, labelled)
                if self._known.found.reader.normalizes:
                    rank_zero_warn(
                        f"{self._known.found.reader.name!r} is a cosine head: features and the rows of its weight are "
                        "divided by their norms before anything is measured."
                    )
            finally:
                if is_sharded(pl_module):
                    reshard(pl_module)

    def _examine(
        self, pl_module: L.LightningModule, batch: Any, labelled: bool, seen: Observation | None = None
    ) -> Known:
        for name in self._layers:
            _layer(pl_module, name)
        inputs, labels = self._split(batch)
        first = FirstBatch(pl_module, batch, inputs, labels if labelled else None, self.call)
        return first.examine(self._head, self._ignore_index, self._batch_fn is None, self._forward_fn is None, seen)

    def head_of(self, pl_module: L.LightningModule) -> HeadReader:
        """Return the head that the first batch showed."""
        assert self._known is not None
        assert self.knows(pl_module)
        return self._known.found.reader

    def whole_head_of(self, pl_module: L.LightningModule) -> Head:
        """Copy weight and bias as they are now, in eval mode and without a trace. All processes must ask."""
        reshard(pl_module)  # Gathered ones may be of a lower precision.
        return self.head_of(pl_module).read().snapshot()

    def tap(self, pl_module: L.LightningModule) -> Taps:
        """Hook the place where features arise, and further layers.

        Raises:
            ValueError: If one does not exist.
        """
        assert self._known is not None
        assert self.knows(pl_module)
        layers = {name: _layer(pl_module, name) for name in self._layers}
        return Taps(self._known.found.source(pl_module), layers, self._pooling)

    def layer_of(self, pl_module: L.LightningModule) -> nn.Module:
        """Return the layer at which features are seen; the head, where that is a layer."""
        assert self._known is not None
        assert self.knows(pl_module)
        return self._known.found.source(pl_module).layer

    def is_compiled(self, pl_module: L.LightningModule) -> bool:
        """Whether the head or a layer runs inside a compiled graph, where hooks do not fire."""
        parts = compiled_parts(pl_module)
        watched = [self.layer_of(pl_module), *(_layer(pl_module, name) for name in self._layers)] if parts else []
        return any(child is layer for part in parts for child in part.modules() for layer in watched)

    def features(self, pl_module: L.LightningModule, inputs: Any) -> dict[str, Tensor]:
        """Run the module once more on a batch, uncompiled and without a trace; return what was captured."""
        with unseen(pl_module), pl_module.trainer.precision_plugin.forward_context():
            taps = self.tap(pl_module)
            try:
                self.call(pl_module, inputs)
                return taps.take(once=True)
            finally:
                taps.remove()

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
        taps: Taps | None = None
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
                for each, is_new in batches:
                    batch = pl_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(each))
                    batch = trainer.strategy.batch_to_device(batch)
                    if taps is None:
                        self.check_batch(trainer, pl_module, batch)
                        taps = self.tap(pl_module)
                        again = self.call_again
                    inputs, labels = self.split(batch)
                    again(pl_module, inputs)
                    again = self.call
                    kept = taps.take(once=True)
                    if is_new:
                        add(kept, labels)
            if taps is None:
                raise UserError(
                    f"the data to sweep is empty for process {trainer.global_rank} of {trainer.world_size}: it must "
                    "have a batch for each, and a loader must begin anew in each pass."
                )
        finally:
            if taps is not None:
                taps.remove()
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

    @staticmethod
    def check(trainer: L.Trainer) -> None:
        """Refuse strategies under which a forward of the module has no weights, or not a batch of its own.

        Raises:
            ValueError: With the reason.
        """
        strategy = trainer.strategy
        if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
            raise UserError(
                f"{type(strategy).__name__} shards the weights, so that no process can read the head or run a sweep: "
                "train with ddp or with fully_shard under ModelParallelStrategy, or validate a checkpoint with the "
                "monitor in one process."
            )
        if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
            raise UserError(
                "layers that are split over processes need the same batch on each, and a sweep would give them "
                "different ones: set ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)."
            )


def name_loaders(loaders: Any) -> Iterator[tuple[str, Any]]:
    """Yield the loaders of a stage in Lightning's order with their names; the name of a single one is empty."""
    if isinstance(loaders, Mapping):
        yield from ((str(name), loader) for name, loader in loaders.items())
    elif isinstance(loaders, list | tuple):
        yield from ((str(i) if len(loaders) > 1 else "", loader) for i, loader in enumerate(loaders))
    else:
        yield "", loaders


def _layer(pl_module: L.LightningModule, name: str) -> nn.Module:
    try:
        return pl_module.get_submodule(name)
    except AttributeError:
        known = ", ".join(path for path, _ in pl_module.named_modules() if path)
        raise UserError(f"layer {name!r} does not exist in {type(pl_module).__name__}; it has: {known}.") from None
