"""How values and rows reach experiment loggers whose clients have rules of their own.

W&B numbers its rows, and drops in silence what a user logs later for a number that is past. MLflow makes a request of
each call, and takes up to a thousand values in one.
"""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from nclightning.compat.experiments import batch_options, prefixed

__all__ = ["arguments", "is_wandb_run", "join_row", "send_rows", "send_values", "wandb_run"]

Row = tuple[int, Mapping[str, float]]
_MOST_IN_A_BATCH = 1000  # MLflow's limit.
_NOT_IN_KEYS = re.compile(r"[^a-zA-Z0-9_/. -]")  # What Lightning takes out of MLflow's keys, with a warning.
# By run: its row with values of ours that was not closed, and the step of the values.
_open: WeakKeyDictionary[Any, tuple[int, int]] = WeakKeyDictionary()


def arguments(owner: Any, method: str) -> set[str]:
    """Return the names of a method's arguments; none if there is no such method, or if it takes whatever comes.

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
    """Whether an object is a run of W&B."""
    return {"data", "step", "commit"} <= arguments(each, "log")


def wandb_run(logger: Any) -> Any:
    """Return the run of a ``WandbLogger``; None of another logger, and of a run that many processes share.

    Args:
        logger: Of any kind.
    """
    if not {"key", "images", "step"} <= arguments(logger, "log_image"):
        return None
    run = getattr(logger, "experiment", None)
    if not is_wandb_run(run) or getattr(getattr(run, "settings", None), "mode", "") == "shared":
        return None  # Rows of shared runs have no numbers.
    return run


def send_values(logger: Any, values: Mapping[str, Any], step: int | None) -> None:
    """Log values at a step, so that what the user logs for W&B's row of that number is not dropped.

    Args:
        logger: Of Lightning.
        values: By tag.
        step: Optimizer steps done; without it values join the row of W&B that is logged next.
    """
    run = wandb_run(logger)
    if run is None:
        logger.log_metrics(values, step)
    # A user who numbers rows by steps goes on with this one: values join it, and it stays open.
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
        values: By tag.
        step: The trainer's step, which Lightning keeps in a column; None leaves the column to others.
    """
    joined = {prefixed(logger, tag): value for tag, value in values.items()}
    if step is not None:
        _open[run] = _close_other(run, step), step
        joined["trainer/global_step"] = step
    run.log(joined, commit=False)


def _close_other(run: Any, step: int) -> int:
    """Close a row that holds values of ours of another step, which the next ones would replace; return W&B's count."""
    row: int = run.step
    if run in _open and _open[run][0] == row and _open[run][1] != step:
        run.log({}, commit=True)
        row += 1
    return row


# Rows.


def send_rows(logger: Any, rows: Sequence[Row]) -> Iterator[int]:
    """Log rows, in as few requests as the client allows.

    Args:
        logger: Of Lightning.
        rows: Pairs of iteration and values by tag, in order.

    Yields:
        The last iteration that was logged, as they go.
    """
    if not _takes_batches(logger) or any(_NOT_IN_KEYS.search(tag) for _, values in rows for tag in values):
        for iteration, values in rows:
            logger.log_metrics(values, iteration)
            yield iteration
        return
    from mlflow.entities import Metric  # noqa: PLC0415 - its user has it.

    now, batch, last = int(time.time() * 1000), list[Any](), -1
    for iteration, values in rows:
        if batch and len(batch) + len(values) > _MOST_IN_A_BATCH:
            _write(logger, batch)
            yield last
            batch = []
        batch += [Metric(prefixed(logger, tag), value, now, iteration) for tag, value in values.items()]
        last = iteration
    if batch:
        _write(logger, batch)
        yield last


def _takes_batches(logger: Any) -> bool:
    """Whether a logger is of MLflow."""
    if not hasattr(logger, "run_id"):
        return False
    return {"run_id", "metrics"} <= arguments(getattr(logger, "experiment", None), "log_batch")


def _write(logger: Any, batch: Sequence[Any]) -> None:
    for start in range(0, len(batch), _MOST_IN_A_BATCH):  # One row may be more than a batch.
        part = batch[start : start + _MOST_IN_A_BATCH]
        logger.experiment.log_batch(run_id=logger.run_id, metrics=part, **batch_options(logger))
