"""What monitors ask of the modules and loaders of a trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L

from nclightning.compat.twins import is_strategy
from nclightning.errors import UserError, UserTypeError
from nclightning.ranks import rank_zero_warn

__all__ = [
    "check_names",
    "check_online",
    "check_strategy",
    "evaluated_loaders",
    "name_loaders",
    "only_loader",
    "tell_unknown_ood",
]


def check_names(datasets: Any, ood: Sequence[str]) -> None:
    """Refuse names of further data sets that are taken, and what is no sequence of names.

    Raises:
        ValueError: With the reason.
        TypeError: If there is no mapping of data sets.
    """
    if not isinstance(datasets, Mapping):
        raise UserTypeError(
            f"datasets must be a mapping from names to loaders, got a {type(datasets).__name__}: write "
            "datasets={'name': loader}."
        )
    if clash := {"train", "val", "test"} & set(datasets):
        raise UserError(f"datasets must not be named like a stage, got {sorted(clash)}.")
    if isinstance(ood, str):
        raise UserError(f"ood must be a sequence of names: write ({ood!r},).")


def tell_unknown_ood(ood: Sequence[str], datasets: Iterable[str], loaders: Any, what: str) -> None:
    """Say which out-of-distribution sets are not there.

    Args:
        ood: Their names.
        datasets: Names of further data sets.
        loaders: Those of the stage that reads further ones; None if it does not.
        what: Runs: ``"fit"``, ``"validation"`` or ``"test"``.
    """
    known = {*datasets, *(name for name, _ in name_loaders(loaders))} - {""}
    if unknown := [name for name in ood if name not in known]:
        there = f"which are {', '.join(map(repr, sorted(known)))}" if known else "of which none has a name"
        rank_zero_warn(
            f"ood={unknown} are neither datasets nor loaders that this {what} reads, {there}: it has no nc5 of them. "
            f"Pass datasets={{{unknown[0]!r}: loader}}."
        )


def check_online(
    stages: Sequence[str], decision_measures: Sequence[str], every_n_steps: int | None, pictures: int | None
) -> None:
    """Refuse what cannot be read of the forwards of training.

    Raises:
        ValueError: With the reason.
    """
    if every_n_steps is not None or pictures is not None:
        raise UserError("source='online' reads once an epoch: leave out every_n_steps and pictures_every_n_epochs.")
    if "train" in stages and decision_measures:
        raise UserError(
            f"measures {list(decision_measures)} need fixed class means: use source='sweep', or leave 'train' out of "
            "stages."
        )


def check_strategy(trainer: L.Trainer) -> None:
    """Refuse strategies under which a forward of the module has no weights, or not a batch of its own.

    Raises:
        ValueError: With the reason.
    """
    strategy: Any = trainer.strategy
    if is_strategy(strategy, "FSDPStrategy", "DeepSpeedStrategy"):
        raise UserError(
            f"{type(strategy).__name__} shards the weights, so that no process can read the head or run a sweep: "
            "train with ddp or with fully_shard under ModelParallelStrategy, or validate a checkpoint with the "
            "monitor in one process."
        )
    if is_strategy(strategy, "ModelParallelStrategy") and strategy.device_mesh["tensor_parallel"].size() > 1:
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


def only_loader(trainer: L.Trainer, monitor: str = "OptimalityMonitor") -> Any:
    """Return the training loader.

    Args:
        trainer: Of the fit.
        monitor: Name of the callback that reads it.

    Raises:
        ValueError: If there are several.
    """
    (_, loader), *others = name_loaders(trainer.train_dataloader)
    if others:
        raise UserError(
            f"{monitor} reads one training set, and there are {1 + len(others)} training loaders: make them "
            "one with torch.utils.data.ConcatDataset."
        )
    return loader


def evaluated_loaders(trainer: L.Trainer) -> Any:
    """Return the loaders of the validation or test that runs."""
    return trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
