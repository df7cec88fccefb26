"""How a monitor holds on to a module that knows nothing of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn

from nclightning.features import Taps, call_model, detect_head, find_head, split_batch
from nclightning.ranks import raise_together
from nclightning.sharding import in_step, is_sharded, reshard, whole_linear
from nclightning.sweep import compiled_parts, eager, frozen, sequential_loader, shared_buffers

__all__ = ["Attachment", "full_batch", "full_batch_method", "name_loaders", "unseen"]

Add = Callable[[dict[str, Tensor], Tensor], None]


class Attachment:
    """Head and layers of a module, and passes over data through them.

    Args:
        head: Dotted name of the head, or None to find it.
        layers: Dotted names of further layers.
        pooling: As for :class:`nclightning.features.Taps`.
        batch_fn: Splits a batch into input and labels; None is :func:`nclightning.features.split_batch`.
    """

    def __init__(
        self,
        head: str | None = None,
        layers: tuple[str, ...] = (),
        pooling: Literal["mean", "flatten"] = "mean",
        batch_fn: Callable[[Any], tuple[Any, Tensor]] | None = None,
    ) -> None:
        self._head, self._layers, self._pooling = head, layers, pooling
        self.split = batch_fn or split_batch
        self._found: tuple[weakref.ref[nn.Module], str] | None = None

    def forget(self) -> None:
        """Forget the head of the last module."""
        self._found = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_found": None}  # A weak reference cannot be pickled.

    def head_of(self, pl_module: L.LightningModule, inputs: Any = None) -> nn.Linear:
        """Find the head, by running the model where an input is at hand and nothing was found before."""
        name = self._head
        if name is None and self._found is not None and self._found[0]() is pl_module:
            name = self._found[1]
        if name is None and inputs is not None:
            with unseen(pl_module):
                head = detect_head(pl_module, inputs)
            name = next(path for path, child in pl_module.named_modules() if child is head)
            self._found = weakref.ref(pl_module), name
        return find_head(pl_module, name)

    def whole_head_of(self, pl_module: L.LightningModule) -> nn.Linear:
        """Find the head; of sharded weights a copy as they are now, for which all processes must ask."""
        reshard(pl_module)  # Gathered ones may be of a lower precision.
        return whole_linear(self.head_of(pl_module))

    def tap(self, pl_module: L.LightningModule, inputs: Any) -> Taps:
        """Hook head and layers.

        Raises:
            ValueError: If one does not exist.
        """
        layers = {name: _layer(pl_module, name) for name in self._layers}
        return Taps(self.head_of(pl_module, inputs), layers, self._pooling)

    def is_compiled(self, pl_module: L.LightningModule, inputs: Any) -> bool:
        """Whether the head or a layer runs inside a compiled graph, where hooks do not fire."""
        parts = compiled_parts(pl_module)
        watched = (
            [self.head_of(pl_module, inputs), *(_layer(pl_module, name) for name in self._layers)] if parts else []
        )
        return any(child is layer for part in parts for child in part.modules() for layer in watched)

    def features(self, pl_module: L.LightningModule, inputs: Any) -> dict[str, Tensor]:
        """Run the module once more on a batch, uncompiled and without a trace; return what was captured."""
        with unseen(pl_module), pl_module.trainer.precision_plugin.forward_context():
            taps = self.tap(pl_module, inputs)
            try:
                call_model(pl_module, inputs)
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
                    inputs, labels = self.split(trainer.strategy.batch_to_device(batch))
                    taps = self.tap(pl_module, inputs) if taps is None else taps
                    call_model(pl_module, inputs)
                    kept = taps.take(once=True)
                    if is_new:
                        add(kept, labels)
            if taps is None:
                raise ValueError(
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
            raise ValueError(
                f"{type(strategy).__name__} shards the weights, so that no process can read the head or run a sweep: "
                "train with ddp or with fully_shard under ModelParallelStrategy, or validate a checkpoint with the "
                "monitor in one process."
            )
        if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
            raise ValueError(
                "layers that are split over processes need the same batch on each, and a sweep would give them "
                "different ones: set ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1)."
            )


@contextmanager
def unseen(pl_module: L.LightningModule) -> Iterator[None]:
    """Run a module frozen and uncompiled, without a trace in it and in what its user logs.

    Calls of ``log``, ``log_dict`` and of the trainer's loggers in the forward do nothing.
    """
    trainer, names = pl_module.trainer, ("log", "log_dict")
    modules = [vars(child) for child in pl_module.modules() if isinstance(child, L.LightningModule)]
    own = [{name: state[name] for name in names if name in state} for state in modules]
    loggers = trainer.loggers
    try:
        for state in modules:
            state.update(dict.fromkeys(names, _log_nothing))
        trainer.loggers = [DummyLogger() for _ in loggers]
        with frozen(pl_module), eager():
            yield
    finally:
        trainer.loggers = loggers
        for state, before in zip(modules, own, strict=True):
            for name in names:
                del state[name]
            state.update(before)


def _log_nothing(*_: Any, **__: Any) -> None:
    """Stand in for ``LightningModule.log``."""


def full_batch(pl_module: L.LightningModule) -> bool:
    """Whether a module runs our full-batch iterations."""
    return hasattr(pl_module, "iterations_per_step")


def full_batch_method(pl_module: L.LightningModule, name: str) -> Callable[..., Any]:
    """Return a method by which full-batch modules are read.

    Raises:
        ValueError: If there is none.
    """
    method: Callable[..., Any] | None = getattr(pl_module, name, None)
    if method is None:
        raise ValueError(
            f"a full-batch module is read by its method {name}, which {type(pl_module).__name__} does not have: derive "
            "it from nclightning.models.RegularizedClassifier."
        )
    return method


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
        raise ValueError(f"layer {name!r} does not exist in {type(pl_module).__name__}; it has: {known}.") from None
