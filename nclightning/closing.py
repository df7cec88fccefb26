"""The end of a run: its picture, its row in TensorBoard's table of runs, and the printed summary."""

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
    """Return why a run has ended at a checkpoint.

    Args:
        checkpoint: Lightning's checkpoint.
        trainer: The trainer before the fit, with the current settings.
        model: The module.

    Returns:
        A sentence; None if the run continues from the checkpoint.
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
    """Draw the picture of a run, log its summary to TensorBoard and other loggers, and print it.

    Args:
        trainer: The trainer after a fit. Without a :class:`~nclightning.loggers.RunLogger` nothing is done.
        seed: Random seed of the run.
    """
    # trainer.log_dir communicates between processes. After an error this process may be the only one left.
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
    """Send the summary of a run to a logger that accepts pictures. An error is only a warning: the fit is complete."""
    try:
        if picture_writers([logger]):
            logger.log_hyperparams(dict(values))
            log_picture(logger, "convergence", picture, summary.iteration)
            send_values(logger, summary_scalars(summary), summary.iteration)
            logger.save()
    except Exception as error:
        rank_zero_warn(f"{type(logger).__name__} did not accept the summary of the run: {error}")


def close_again(
    folder: Path, checkpoint: Mapping[str, Any], model: L.LightningModule, seed: int | bool | None, ending: str
) -> None:
    """Print the summary of a run that had already ended, and write files that are missing because it was killed.

    Args:
        folder: The run folder.
        checkpoint: The last checkpoint.
        model: The module.
        seed: Random seed of the run.
        ending: The reason why the run ended.
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
            if not _is_complete(folder, summary):  # Another process may have written the files in the meantime.
                optimizer = only_optimizer(model.configure_optimizers())
                optimizer.load_state_dict(checkpoint["optimizer_states"][0])
                record_summary(folder, summary, hyperparameters(model, optimizer, seed), draw_convergence(folder))
        finally:
            lock.release()
    _print(folder, summary, model)


def _is_complete(folder: Path, summary: RunSummary) -> bool:
    """Return whether the summary and the picture of a run exist."""
    return is_recorded(folder, summary.iteration) and (folder / "convergence.png").is_file()


def _print(folder: Path, summary: RunSummary, model: L.LightningModule) -> None:
    """Print the rates of a run, its folder, and the command to view it."""
    console = Console()
    console.print(rates_table(summary, problem=_predicted(model)))
    shown = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    console.print(f"Run folder:  {shown}", soft_wrap=True, highlight=False, markup=False)
    command = f"tensorboard --logdir {shown} --samples_per_plugin images=100"
    console.print(f"View with:   {command}", soft_wrap=True, highlight=False, markup=False)


def _predicted(model: L.LightningModule) -> AnyProblem | None:
    """Return the problem whose rates are predicted; None if the model is not an unconstrained feature model."""
    if not getattr(model, "features_are_free", False):
        return None
    try:
        return find_problem(model)
    except UserError:
        return None
