"""What monitors ask of the modules and loaders of a trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn

from nclightning.errors import UserError
from nclightning.heads import HeadReader
from nclightning.sweep import eager, frozen

__all__ = [
    "check_names",
    "check_online",
    "check_strategy",
    "evaluated_loaders",
    "full_batch",
    "full_batch_head",
    "full_batch_method",
    "layer_named",
    "name_loaders",
    "only_loader",
    "unseen",
]


@contextmanager
def unseen(pl_module: L.LightningModule) -> Iterator[None]:
    """Run a module frozen and uncompiled, without a trace in it and in what its user logs.

    Calls of ``log``, ``log_dict`` and of the trainer's loggers in the forward do nothing. While a trainer trains,
    it says that it validates: hooks of the user that augment batches look at that, too.
    """
    trainer, names = pl_module.trainer, ("log", "log_dict")
    modules = [vars(child) for child in pl_module.modules() if isinstance(child, L.LightningModule)]
    own = [{name: state[name] for name in names if name in state} for state in modules]
    loggers, stage = trainer.loggers, trainer.state.stage
    try:
        if trainer.training:
            trainer.validating = True
        for state in modules:
            state.update(dict.fromkeys(names, _log_nothing))
        trainer.loggers = [DummyLogger() for _ in loggers]
        with frozen(pl_module), eager():
            yield
    finally:
        trainer.loggers, trainer.state.stage = loggers, stage
        for state, before in zip(modules, own, strict=True):
            for name in names:
                del state[name]
            state.update(before)


def _log_nothing(*_: Any, **__: Any) -> None:
    """Stand in for ``LightningModule.log``."""


def check_names(datasets: Iterable[str], ood: Sequence[str]) -> None:
    """Refuse names of further data sets that are taken, and what is no sequence of names.

    Raises:
        ValueError: With the reason.
    """
    if clash := {"train", "val", "test"} & set(datasets):
        raise UserError(f"datasets must not be named like a stage, got {sorted(clash)}.")
    if isinstance(ood, str):
        raise UserError(f"ood must be a sequence of names: write ({ood!r},).")


def check_online(
    stages: Sequence[str], of_decisions: Sequence[str], every_n_steps: int | None, pictures: int | None
) -> None:
    """Refuse what cannot be read of the forwards of training.

    Raises:
        ValueError: With the reason.
    """
    if every_n_steps is not None or pictures is not None:
        raise UserError("source='online' reads once an epoch: leave out every_n_steps and pictures_every_n_epochs.")
    if "train" in stages and of_decisions:
        raise UserError(
            f"measures {list(of_decisions)} need fixed class means: use source='sweep', or leave 'train' out of stages."
        )


def check_strategy(trainer: L.Trainer) -> None:
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
        raise UserError(
            f"a full-batch module is read by its method {name}, which {type(pl_module).__name__} does not have: derive "
            "it from nclightning.models.RegularizedClassifier."
        )
    return method


def full_batch_head(pl_module: L.LightningModule) -> HeadReader:
    """Return the head of a full-batch module, its attribute ``head``.

    Raises:
        ValueError: If it has none.
    """
    head = getattr(pl_module, "head", None)
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"a full-batch module is read by its attribute head, an nn.Linear; that of {type(pl_module).__name__} is "
            f"{type(head).__name__}: derive it from nclightning.models.RegularizedClassifier."
        )
    return HeadReader(head, "head", "weight", False, head.out_features, head.in_features)


def name_loaders(loaders: Any) -> Iterator[tuple[str, Any]]:
    """Yield the loaders of a stage in Lightning's order with their names; the name of a single one is empty."""
    if isinstance(loaders, Mapping):
        yield from ((str(name), loader) for name, loader in loaders.items())
    elif isinstance(loaders, list | tuple):
        yield from ((str(i) if len(loaders) > 1 else "", loader) for i, loader in enumerate(loaders))
    else:
        yield "", loaders


def layer_named(pl_module: L.LightningModule, name: str) -> nn.Module:
    """Return a part of a module by its dotted name.

    Raises:
        ValueError: If there is none.
    """
    try:
        return pl_module.get_submodule(name)
    except AttributeError:
        known = ", ".join(path for path, _ in pl_module.named_modules() if path)
        raise UserError(f"layer {name!r} does not exist in {type(pl_module).__name__}; it has: {known}.") from None


def only_loader(trainer: L.Trainer) -> Any:
    """Return the training loader.

    Raises:
        ValueError: If there are several.
    """
    (_, loader), *others = name_loaders(trainer.train_dataloader)
    if others:
        raise UserError(
            f"OptimalityMonitor reads one training set, and there are {1 + len(others)} training loaders: make them "
            "one with torch.utils.data.ConcatDataset."
        )
    return loader


def evaluated_loaders(trainer: L.Trainer) -> Any:
    """Return the loaders of the validation or test that runs."""
    return trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
