"""What Lightning's checkpoints say of epochs and batches, put right where a resume would count wrongly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["count_as_before_batch", "count_as_new_epoch", "epochs_done", "is_before_more", "is_last_batch"]


def is_last_batch(trainer: Any) -> bool:
    """Whether the present batch is the last one of its epoch.

    Non-public: ``trainer.fit_loop``, ``epoch_loop.batch_progress``, ``is_last_batch`` (lightning 2.6). Streams have no
    length to tell it by. Without it a run killed between two epochs would miss what callbacks decide at the end of one.

    Args:
        trainer: In a fit.
    """
    return bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)


def is_before_more(trainer: Any, batch_idx: int) -> bool:
    """Whether an epoch or a validation ends after a batch.

    What callbacks do then, such as a decision to stop, is not made up for in a resume from before.

    Non-public: ``trainer.fit_loop``, ``epoch_loop.total_batch_idx``, ``trainer.val_check_batch`` (lightning 2.6).
    Without them the batches before a validation in the middle of an epoch would not be known.

    Args:
        trainer: In a fit.
        batch_idx: Of the batch.
    """
    every = trainer.val_check_batch
    whole = trainer.check_val_every_n_epoch is None
    count = (trainer.fit_loop.epoch_loop.total_batch_idx if whole else batch_idx) + 1
    return is_last_batch(trainer) or (every is not None and math.isfinite(every) and count % every == 0)


def count_as_before_batch(checkpoint: Mapping[str, Any]) -> None:
    """Change a checkpoint that is saved before a batch so that a resume counts batches right.

    Non-public: the entry ``["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]`` (lightning 2.6).
    A resume adds one to it, as is right after a batch. Without it the values that a module logs would be drawn one step
    too late.

    Args:
        checkpoint: Lightning's, before it is written.
    """
    checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def count_as_new_epoch(checkpoint: Mapping[str, Any]) -> None:
    """Change a checkpoint that is saved after the last batch of an epoch so that a resume begins a whole one.

    Non-public: the entry ``["loops"]["fit_loop"]["epoch_loop.batch_progress"]`` with ``current`` and ``is_last_batch``
    (lightning 2.6). Without it the batches of the old epoch would count among those of the next, which would end too
    early.

    Args:
        checkpoint: Lightning's, before it is written.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    progress |= {"current": dict.fromkeys(progress["current"], 0), "is_last_batch": False}


def epochs_done(checkpoint: Mapping[str, Any]) -> int:
    """Read from a checkpoint how many epochs were trained.

    Non-public: the entry ``["loops"]["fit_loop"]["epoch_progress"]`` (lightning 2.6), of whose counts ``processed`` is
    what ``min_epochs`` is compared with. Without it a run would be held to be finished that goes on up to there.

    Args:
        checkpoint: Lightning's.
    """
    done: int = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return done
