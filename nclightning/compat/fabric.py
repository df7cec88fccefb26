"""Undocumented names of Lightning Fabric. Lightning is not imported here.

Fabric's wrappers are therefore recognised by the name of their class, and not by ``isinstance``.
"""

from __future__ import annotations

from typing import Any

__all__ = ["loader_of_fabric", "precision_of_fabric", "sampler_of_lightning"]

_SAMPLERS = ("lightning.fabric.utilities.distributed", "lightning_fabric.utilities.distributed")
_WRAPPERS = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")


def precision_of_fabric(module: Any) -> Any:
    """Return the precision of a module that ``fabric.setup(model)`` returned; None for any other module.

    Its methods ``convert_input`` and ``forward_context`` are documented, and so is ``module``, the model inside.

    Non-public: ``_FabricModule._strategy`` (lightning 2.6). Without it a model that trains in ``bf16-mixed`` would be
    measured in single precision, and one in ``16-true`` could not be run on its batches.

    Args:
        module: Any module.
    """
    return module._strategy.precision if _is_wrapper(module, "_FabricModule") else None


def loader_of_fabric(loader: Any) -> Any:
    """Return the loader inside the one that ``fabric.setup_dataloaders(loader)`` returned; any other loader unchanged.

    Non-public: ``_FabricDataLoader._dataloader`` (lightning 2.6). Without it an evaluation pass would see samples in
    a random order, those that a distributed sampler pads with twice, and would change the order of the next epoch.

    Args:
        loader: Any loader.
    """
    return loader._dataloader if _is_wrapper(loader, "_FabricDataLoader") else loader


def sampler_of_lightning(sampler: Any) -> Any:
    """Return the user's sampler inside the one by which Lightning divides it between processes; None for any other.

    Non-public: ``DistributedSamplerWrapper`` and ``_DatasetSamplerWrapper._sampler`` (lightning 2.6). Without them
    the indices of a ``WeightedRandomSampler`` are not known, and several processes would read other samples than one.

    Args:
        sampler: Any sampler.
    """
    if not _is_wrapper(sampler, "DistributedSamplerWrapper", _SAMPLERS):
        return None
    return getattr(sampler.dataset, "_sampler", None)


def _is_wrapper(thing: Any, name: str, modules: tuple[str, ...] = _WRAPPERS) -> bool:
    return any(kind.__name__ == name and kind.__module__ in modules for kind in type(thing).__mro__)
