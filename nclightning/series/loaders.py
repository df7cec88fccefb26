"""Loaders from a model, a data module, or a function of the user."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, RandomSampler

from nclightning.errors import UserError

__all__ = ["given_loaders", "own_loaders", "unshuffled"]


def given_loaders(data: Any) -> dict[str, Any]:
    """Return the loaders that a function of the user returned, by stage.

    Raises:
        ValueError: If the stages are not clear.
    """
    loaders = data if isinstance(data, Mapping) else {"train": data}
    if isinstance(data, tuple | list):
        loaders = dict(zip(("train", "val"), data, strict=False)) if len(data) == 2 else {}
    if not loaders or not loaders.keys() <= {"train", "val", "test"} or all(each is None for each in loaders.values()):
        came = (
            f"the names {', '.join(map(str, data))}"
            if isinstance(data, Mapping)
            else (f"{len(data)} of them" if isinstance(data, tuple | list) else f"{data!r}")
        )
        raise UserError(
            f"--data: a function must return a loader, (train, val), or a mapping of train, val and test; got {came}."
        )
    return dict(loaders)


def own_loaders(owner: Any, hook: str) -> Any:
    """Return what a hook of a model or a data module returns; None if its class does not define the hook."""
    method = getattr(type(owner), hook, None)
    if method is None or method.__module__.partition(".")[0] in ("lightning", "pytorch_lightning"):
        return None
    return getattr(owner, hook)()


def unshuffled(loaders: Any) -> Any:
    """Return loaders without shuffling, as Lightning makes them for ``overfit_batches``.

    Args:
        loaders: One loader, or several in lists, tuples and mappings.
    """
    if isinstance(loaders, Mapping):
        return {name: unshuffled(each) for name, each in loaders.items()}
    if isinstance(loaders, tuple | list):
        return [unshuffled(each) for each in loaders]
    if not isinstance(loaders, DataLoader) or not isinstance(loaders.sampler, RandomSampler):
        return loaders
    return DataLoader(
        loaders.dataset,
        loaders.batch_size,
        num_workers=loaders.num_workers,
        collate_fn=loaders.collate_fn,
        drop_last=loaders.drop_last,
        worker_init_fn=loaders.worker_init_fn,
    )
