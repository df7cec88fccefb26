"""The end of a run: its picture, its row among the runs, and what is printed."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from rich.console import Console

from nclightning.errors import UserError
from nclightning.figures import draw_convergence, read_readings, summarize
from nclightning.figures.tables import rates_table
from nclightning.loggers import RunLogger
from nclightning.summaries import hyperparameters, record_summary
from nclightning.theory import UFMProblem

__all__ = ["close_run"]


def close_run(trainer: L.Trainer, seed: int | bool | None) -> None:
    """Draw the picture of a run, add it to TensorBoard's table of runs, and print what it reached.

    Args:
        trainer: After a fit with a :class:`~nclightning.loggers.RunLogger`; others are left alone.
        seed: Of the run.
    """
    # Of the logger, not of the trainer, which asks all processes: this one may be alone after an error.
    folder = next((Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, RunLogger)), None)
    if not trainer.is_global_zero or folder is None or not (folder / "readings.csv").is_file():
        return
    picture, summary = draw_convergence(folder), summarize(read_readings(folder))
    values = hyperparameters(trainer.lightning_module, trainer.optimizers[0], seed)
    record_summary(folder, summary, values, picture, trainer.state.finished)
    console = Console()
    console.print(rates_table(summary, problem=_predicted(trainer.lightning_module)))
    shown = Path(folder).relative_to(Path.cwd()) if Path(folder).is_relative_to(Path.cwd()) else folder
    console.print(f"Run folder:  {shown}", soft_wrap=True, highlight=False, markup=False)
    command = f"tensorboard --logdir {shown} --samples_per_plugin images=100"
    console.print(f"Look at it:  {command}", soft_wrap=True, highlight=False, markup=False)


def _predicted(model: L.LightningModule) -> UFMProblem | None:
    """Find the problem whose rates are predicted; None where another one was trained."""
    if not getattr(model, "features_are_free", False):
        return None
    try:
        problem: UFMProblem = model.problem  # type: ignore[assignment]
    except UserError:
        return None
    return problem
