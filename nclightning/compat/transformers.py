"""Undocumented names of Hugging Face's transformers, which is not imported here."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["calling", "prefix_of", "prepared_inputs", "shares_batches"]


def calling(kind: type) -> Any:
    """Return the nearest instance of a class among the callers of this function; None if there is none.

    Callbacks use it to find their trainer, which is not passed to their hooks. Non-public: that methods of ``Trainer``
    call ``CallbackHandler``, which calls the hooks, in one thread, and name their first argument ``self`` (transformers
    5.24). Without it the user would have to pass the trainer to the callback after its construction.

    Args:
        kind: The class.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), kind):
            return found
        frame = frame.f_back
    return None


def prepared_inputs(trainer: Any, batch: Any) -> Any:
    """Convert a batch of a loader to the form in which the trainer passes it to the model.

    Non-public: ``Trainer._prepare_inputs`` (transformers 5.24), which subclasses override. Without it models would be
    measured on other inputs than in training.

    Args:
        trainer: The trainer.
        batch: The batch.
    """
    return trainer._prepare_inputs(batch)


def shares_batches(trainer: Any) -> bool:
    """Return whether several processes have parts of one model or one sample, so that each needs the same batch.

    Non-public: ``Trainer.get_tp_size``, ``get_cp_size``, ``get_sp_size``, ``accelerator.state.deepspeed_plugin`` with
    ``zero_stage`` (transformers 5.24, accelerate 1.15). Without them the forwards of an evaluation pass would wait
    for each other for ever.

    Args:
        trainer: The trainer.
    """
    sizes = (getattr(trainer, f"get_{kind}_size", lambda: 1)() for kind in ("tp", "cp", "sp"))
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return any(size > 1 for size in sizes) or getattr(plugin, "zero_stage", 0) == 3


def prefix_of(metrics: Mapping[str, Any] | None, default: str) -> str:
    """Return the prefix of the metrics of an evaluation, such as ``eval`` or ``eval_<data set>``.

    It is not passed to hooks. Non-public: that ``Trainer`` adds ``<prefix>_runtime`` and
    ``<prefix>_samples_per_second`` (transformers 5.24). Without it all data sets would be named ``default``.

    Args:
        metrics: The metrics by name.
        default: The prefix to return if it is not found.
    """
    names = list(metrics or ())
    ends = [name.removesuffix("_runtime") for name in names if name.endswith("_runtime")]
    return min((end for end in ends if f"{end}_samples_per_second" in names), key=len, default=default)
