"""The end of a run: its picture, its row among the runs, and what is printed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console

from nclightning.callbacks import OptimalityMonitor
from nclightning.callbacks.problem import AnyProblem, find_problem
from nclightning.callbacks.stops import may_end, standing_stop
from nclightning.errors import UserError
from nclightning.figures import draw_convergence, read_readings, summarize
from nclightning.figures.summary import RunSummary
from nclightning.figures.tables import rates_table
from nclightning.files import FolderLock
from nclightning.folders import find_run_logger
from nclightning.loggers import RunLogger
from nclightning.models import RegularizedClassifier
from nclightning.models.schedules import only_optimizer
from nclightning.pictures import log_picture, picture_writers
from nclightning.sending import send_values
from nclightning.summaries import hyperparameters, is_recorded, record_summary, summary_scalars

__all__ = ["close_again", "close_run", "ending_of"]


def ending_of(checkpoint: Mapping[str, Any], trainer: L.Trainer, model: L.LightningModule) -> str | None:
    """Say why the run of a checkpoint has ended where the checkpoint is.

    Args:
        checkpoint: Lightning's.
        trainer: Before the fit, with the settings that hold now.
        model: The module.

    Returns:
        A sentence; None if the run goes on from there.
    """
    if trainer.max_steps == checkpoint["global_step"]:
        return f"It has done all of its trainer.max_steps={trainer.max_steps} iterations."
    if not isinstance(model, RegularizedClassifier):
        return _stopped(checkpoint, trainer, model)
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    endings = [each.ending_of(checkpoint, model) for each in callbacks if isinstance(each, OptimalityMonitor)]
    endings = [model.ending_of(checkpoint), *endings, _stopped(checkpoint, trainer, model)]
    return next((each for each in endings if each is not None), None)


def _stopped(checkpoint: Mapping[str, Any], trainer: L.Trainer, model: L.LightningModule) -> str | None:
    return standing_stop(checkpoint, trainer, model) if may_end(trainer, checkpoint) else None


def close_run(trainer: L.Trainer, seed: int | bool | None) -> None:
    """Draw the picture of a run, add it to TensorBoard's table of runs and other loggers, and print what it reached.

    Args:
        trainer: After a fit with a :class:`~nclightning.loggers.RunLogger`; others are left alone.
        seed: Of the run.
    """
    # Of the logger, not of the trainer, which asks all processes: this one may be alone after an error.
    logger = find_run_logger(trainer)
    folder = None if logger is None else Path(logger.log_dir)
    if trainer.is_global_zero and folder is not None and (folder / "readings.csv").is_file():
        values = hyperparameters(trainer.lightning_module, trainer.optimizers[0], seed)
        summary = summarize(read_readings(folder))
        picture = draw_convergence(folder)
        record_summary(folder, summary, values, picture, trainer.state.finished)
        _print(folder, summary, trainer.lightning_module)
        for other in trainer.loggers:
            if not isinstance(other, RunLogger):
                _send_summary(other, summary, values, picture)


def _send_summary(logger: Logger, summary: RunSummary, values: Mapping[str, Any], picture: Path) -> None:
    """Give a logger that takes pictures what the run folder has; the fit is over, and an error cannot undo it."""
    try:
        if picture_writers([logger]):
            logger.log_hyperparams(dict(values))
            log_picture(logger, "convergence", picture, summary.iteration)
            send_values(logger, summary_scalars(summary), summary.iteration)
            logger.save()
    except Exception as error:
        rank_zero_warn(f"{type(logger).__name__} did not take the summary of the run: {error}")


def close_again(
    folder: Path, checkpoint: Mapping[str, Any], model: L.LightningModule, seed: int | bool | None, ending: str
) -> None:
    """Print what a run reached that had ended before, and make up what a kill at its end left out.

    Args:
        folder: Of the run.
        checkpoint: Its last one.
        model: The module.
        seed: Of the run.
        ending: Why it ended.
    """
    console = Console()
    console.print(f"The run is finished. {ending}", soft_wrap=True, highlight=False, markup=False)
    if not (folder / "readings.csv").is_file():
        return
    summary = summarize(read_readings(folder))
    if not _is_complete(folder, summary):
        lock = FolderLock(folder)
        lock.acquire()
        try:
            if not _is_complete(folder, summary):  # Else another process has done it in the meantime.
                optimizer = only_optimizer(model.configure_optimizers())
                optimizer.load_state_dict(checkpoint["optimizer_states"][0])
                record_summary(folder, summary, hyperparameters(model, optimizer, seed), draw_convergence(folder))
        finally:
            lock.release()
    _print(folder, summary, model)


def _is_complete(folder: Path, summary: RunSummary) -> bool:
    """Whether the report of a run that ended is there."""
    return is_recorded(folder, summary.iteration) and (folder / "convergence.png").is_file()


def _print(folder: Path, summary: RunSummary, model: L.LightningModule) -> None:
    console = Console()
    console.print(rates_table(summary, problem=_predicted(model)))
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    console.print(f"Run folder:  {shown}", soft_wrap=True, highlight=False, markup=False)
    command = f"tensorboard --logdir {shown} --samples_per_plugin images=100"
    console.print(f"Look at it:  {command}", soft_wrap=True, highlight=False, markup=False)


def _predicted(model: L.LightningModule) -> AnyProblem | None:
    """Find the problem whose rates are predicted; None where another one was trained."""
    if not getattr(model, "features_are_free", False):
        return None
    try:
        return find_problem(model)
    except UserError:
        return None
