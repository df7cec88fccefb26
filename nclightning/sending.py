"""Sending of values and rows to experiment loggers, by the rules of their clients.

W&B numbers its rows, and silently drops values that are logged for an earlier number. MLflow sends a request per call,
with up to a thousand values.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from nclightning.compat.experiments import batch_options, prefixed

__all__ = ["argument_names", "is_wandb_run", "join_row", "send_rows", "send_values", "wandb_run"]

Row = tuple[int, Mapping[str, float]]
_MAX_IN_A_BATCH = 1000  # MLflow's limit.
_NOT_IN_KEYS = re.compile(r"[^a-zA-Z0-9_/. -]")  # Characters that Lightning removes from MLflow's keys, with a warning.
# For each run: the number of the unfinished row with values from here, and the step of these values.
_open: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()


def argument_names(owner: Any, method: str) -> set[str]:
    """Return the names of a method's arguments; none if there is no such method, or it has only ``*args, **kwargs``.

    Args:
        owner: Any object.
        method: Name of the method.
    """
    try:
        return set(inspect.signature(getattr(owner, method)).parameters) - {"args", "kwargs"}
    except (AttributeError, TypeError, ValueError):
        return set()


# W&B.


def is_wandb_run(each: Any) -> bool:
    """Return whether an object is a run of W&B."""
    return {"data", "step", "commit"} <= argument_names(each, "log")


def wandb_run(logger: Any) -> Any:
    """Return the run of a ``WandbLogger``; None for another logger, and for a run that several processes share.

    Args:
        logger: Any logger.
    """
    if not {"key", "images", "step"} <= argument_names(logger, "log_image"):
        return None
    run = getattr(logger, "experiment", None)
    if not is_wandb_run(run) or getattr(getattr(run, "settings", None), "mode", "") == "shared":
        return None  # The rows of shared runs have no numbers.
    return run


def send_values(logger: Any, values: Mapping[str, Any], step: int | None) -> None:
    """Log values at a step, such that W&B does not drop what the user logs for the row with the number of this step.

    Args:
        logger: A logger of Lightning.
        values: Values by tag.
        step: Number of optimizer steps; with None, values are added to the row of W&B that is logged next.
    """
    run = wandb_run(logger)
    if run is None:
        logger.log_metrics(values, step)
    # If the user numbers rows by steps, the current row has this number: values are added, and the row stays open.
    elif step is None or _close_other(run, step) == step:
        join_row(logger, run, values, step)
    else:
        logger.log_metrics(values, step)
        _open.pop(run, None)


def join_row(logger: Any, run: Any, values: Mapping[str, Any], step: int | None) -> None:
    """Add values to the row of W&B that is logged next.

    Args:
        logger: The ``WandbLogger``.
        run: Its run.
        values: Values by tag.
        step: The trainer's step, which Lightning keeps in a column; None leaves the column unset.
    """
    joined = {prefixed(logger, tag): value for tag, value in values.items()}
    if step is not None:
        _open[run] = _close_other(run, step), step
        joined["trainer/global_step"] = step
    run.log(joined, commit=False)


def _close_other(run: Any, step: int) -> int:
    """Close a row with values of another step, which the next values would replace. Return the number of the row."""
    row: int = run.step
    if run in _open and _open[run][0] == row and _open[run][1] != step:
        run.log({}, commit=True)
        row += 1
    return row


# Rows.


def send_rows(logger: Any, rows: Sequence[Row]) -> Iterator[int]:
    """Log rows, with as few requests as the client allows.

    Args:
        logger: A logger of Lightning.
        rows: Pairs of iteration and values by tag, in order.

    Yields:
        The last logged iteration after each request.
    """
    if not _takes_batches(logger) or any(_NOT_IN_KEYS.search(tag) for _, values in rows for tag in values):
        for iteration, values in rows:
            logger.log_metrics(values, iteration)
            yield iteration
        return
    from mlflow.entities import Metric  # noqa: PLC0415 - installed if an MLflow logger exists

    now, batch, last = int(time.time() * 1000), list[Any](), -1
    for iteration, values in rows:
        if batch and len(batch) + len(values) > _MAX_IN_A_BATCH:
            _write(logger, batch)
            yield last
            batch = []
        batch += [Metric(prefixed(logger, tag), value, now, iteration) for tag, value in values.items()]
        last = iteration
    if batch:
        _write(logger, batch)
        yield last


def _takes_batches(logger: Any) -> bool:
    """Return whether a logger is an MLflow logger."""
    if not hasattr(logger, "run_id"):
        return False
    return {"run_id", "metrics"} <= argument_names(getattr(logger, "experiment", None), "log_batch")


def _write(logger: Any, batch: Sequence[Any]) -> None:
    """Send values to MLflow, in as many requests as its limit requires."""
    for start in range(0, len(batch), _MAX_IN_A_BATCH):  # One row may have more values than a batch.
        part = batch[start : start + _MAX_IN_A_BATCH]
        logger.experiment.log_batch(run_id=logger.run_id, metrics=part, **batch_options(logger))
