"""Counts of epochs and batches in Lightning's trainer and checkpoints, with corrections for a resume."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["count_as_before_batch", "count_as_new_epoch", "epochs_done", "is_before_more", "is_last_batch"]


def is_last_batch(trainer: Any) -> bool:
    """Return whether the current batch is the last one of its epoch.

    Non-public: ``trainer.fit_loop``, ``epoch_loop.batch_progress``, ``is_last_batch`` (lightning 2.6). The length
    cannot be used, because streams have none. Without it a run that was killed between two epochs would miss what
    callbacks decide at the end of an epoch.

    Args:
        trainer: A trainer in a fit.
    """
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def is_before_more(trainer: Any, batch_idx: int) -> bool:
    """Return whether an epoch ends, or a validation begins, after a batch.

    Callbacks act then, for example by a decision to stop. A resume from a checkpoint before that does not repeat it.

    Non-public: ``trainer.fit_loop``, ``epoch_loop.total_batch_idx``, ``trainer.val_check_batch`` (lightning 2.6).
    Without them a validation in the middle of an epoch could not be foreseen.

    Args:
        trainer: A trainer in a fit.
        batch_idx: Index of the batch.
    """
    every = trainer.val_check_batch
    whole = trainer.check_val_every_n_epoch is None
    count = (trainer.fit_loop.epoch_loop.total_batch_idx if whole else batch_idx) + 1
    return is_last_batch(trainer) or (every is not None and math.isfinite(every) and count % every == 0)


def count_as_before_batch(checkpoint: Mapping[str, Any]) -> None:
    """Change a checkpoint that is saved before a batch so that a resume counts batches correctly.

    Non-public: the entry ``["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]`` (lightning 2.6).
    A resume adds one to it, which is correct after a batch. Without it the values that a module logs would be drawn one
    step too late.

    Args:
        checkpoint: Lightning's checkpoint before it is written.
    """
    checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def count_as_new_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Change a checkpoint that is saved after the last batch of an epoch so that a resume begins a complete epoch.

    Non-public: the entry ``["loops"]["fit_loop"]["epoch_loop.batch_progress"]`` with ``current`` and ``is_last_batch``
    (lightning 2.6). Without it the batches of the old epoch would count among those of the next, which would end too
    early.

    Args:
        checkpoint: Lightning's checkpoint before it is written.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress |= {"current": dict.fromkeys(progress["current"], 0), "is_last_batch": False}


def epochs_done(checkpoint: Mapping[str, Any]) -> int:
    """Return the number of trained epochs in a checkpoint.

    Non-public: the entry ``["loops"]["fit_loop"]["epoch_progress"]`` (lightning 2.6), whose count ``processed`` is
    compared with ``min_epochs``. Without it a run that has not reached ``min_epochs`` would be taken for finished.

    Args:
        checkpoint: Lightning's checkpoint.
    """
    done: int = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return done
