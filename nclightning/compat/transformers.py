"""Names of Hugging Face's transformers that its documentation does not promise. Does not load it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

__all__ = ["calling", "prefix_of", "prepared_inputs", "shares_batches"]


def calling(kind: type) -> Any:
    """Return the object of a class in one of whose methods this runs, the nearest first; None if there is none.

    Hooks of callbacks get no trainer. Non-public: that methods of ``Trainer`` call ``CallbackHandler``, which calls the
    hooks, in one thread, and name their first argument ``self`` (transformers 5.24). Without it a callback would have
    to be given its trainer after that was made.

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
    """Bring a batch of a loader into the form in which a step of the trainer gives it to the model.

    Non-public: ``Trainer._prepare_inputs`` (transformers 5.24), which subclasses override. Without it, models would be
    measured on other inputs than theirs.

    Args:
        trainer: The trainer.
        batch: The batch.
    """
    return trainer._prepare_inputs(batch)


def shares_batches(trainer: Any) -> bool:
    """Whether several processes have parts of one model or of one sample, so that each needs the same batch.

    Non-public: ``Trainer.get_tp_size``, ``get_cp_size``, ``get_sp_size``, ``accelerator.state.deepspeed_plugin`` with
    ``zero_stage`` (transformers 5.24, accelerate 1.15). Without them, forwards of an evaluation pass would wait for
    each other for ever.

    Args:
        trainer: The trainer.
    """
    sizes = (getattr(trainer, f"get_{kind}_size", lambda: 1)() for kind in ("tp", "cp", "sp"))
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return any(size > 1 for size in sizes) or getattr(plugin, "zero_stage", 0) == 3


def prefix_of(metrics: Mapping[str, Any] | None, default: str) -> str:
    """Return what the names of an evaluation's metrics begin with, such as ``eval`` or ``eval_<data set>``.

    Hooks do not get it. Non-public: that ``Trainer`` adds ``<prefix>_runtime`` and ``<prefix>_samples_per_second``
    (transformers 5.24). Without it all data sets would be named ``default``.

    Args:
        metrics: By name.
        default: The prefix if it cannot be told.
    """
    names = list(metrics or ())
    ends = [name.removesuffix("_runtime") for name in names if name.endswith("_runtime")]
    return min((end for end in ends if f"{end}_samples_per_second" in names), key=len, default=default)
