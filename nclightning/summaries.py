"""The summary of a run in TensorBoard: its row in the HPARAMS tab, and its picture."""

from __future__ import annotations

import inspect
import math
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from torch.optim import Optimizer

from nclightning.compat.hparams import (
    DATA_TYPE_FLOAT64,
    DATA_TYPE_STRING,
    STATUS_SUCCESS,
    Experiment,
    HParamInfo,
    HParamsPluginData,
    MetricInfo,
    MetricName,
    SessionEndInfo,
    SessionStartInfo,
    metadata,
)
from nclightning.compat.tensorboard import Event, Summary
from nclightning.figures.runs import known_problem, loss_of
from nclightning.figures.summary import RunSummary
from nclightning.files import delete
from nclightning.files.events import write_events
from nclightning.interrupts import deferred_interrupt
from nclightning.problems import Problem
from nclightning.quantities import CONVERGING

__all__ = ["hyperparameters", "is_recorded", "record_summary", "summary_scalars"]

Value = int | float | str
# TensorBoard shows five columns unless asked, those marked as different first, and five metrics, in order.
_SHOWN_FIRST = ("loss", "lambda_w", "lambda_h", "optimizer", "seed")


def hyperparameters(pl_module: L.LightningModule, optimizer: Optimizer, seed: int | bool | None) -> dict[str, Value]:
    """Return the hyperparameters of a run.

    TensorBoard takes the columns of all runs from one of them. Their names therefore must not depend on the optimizer,
    which is a single column with the options that differ from its defaults.

    Args:
        pl_module: The module. Its ``hparams`` that are numbers or text are included; a problem is described in words.
        optimizer: The optimizer after the fit.
        seed: The random seed; None or a bool, which the command line allows, is left out.

    Returns:
        Values by name.
    """
    defaults = {name: p.default for name, p in inspect.signature(type(optimizer)).parameters.items()}
    options = [
        f"{name}={value!r}"
        for name, value in optimizer.param_groups[0].items()
        if name in defaults and name != "params" and value != defaults[name]
    ]
    values = dict(pl_module.hparams) | {"optimizer": f"{type(optimizer).__name__}({', '.join(options)})"}
    if isinstance(problem := known_problem(values), Problem):
        values |= {"loss": loss_of(values, problem), "problem": problem.summary()}
    values["seed"] = None if isinstance(seed, bool) else seed
    values.pop("iterations_per_step", None)  # The iterates do not depend on it.
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, Value)
        and not name.startswith("_")
        and (not isinstance(value, float) or math.isfinite(value))
    }


def record_summary(
    folder: Path, summary: RunSummary, values: Mapping[str, Value], picture: Path, finished: bool = True
) -> None:
    """Add a run to TensorBoard's HPARAMS tab, and its picture to IMAGES, in a separate event file.

    The logger's file cannot be used, because it is closed. A second file of its writer would repeat the instruction to
    drop the readings that a resumed run replaces, and so drop the new ones. The file is written in one step, and
    replaces that of an earlier end of the run.

    Args:
        folder: The run folder.
        summary: The summary. Finite values are logged as ``summary/...``; last values as log10, because TensorBoard
            stores float32.
        values: The hyperparameters.
        picture: A PNG file, logged as ``convergence``.
        finished: False if the fit was interrupted.
    """
    metrics = _metrics(summary)
    scalars = [Summary.Value(tag=tag, simple_value=value) for tag, value in summary_scalars(summary).items()]
    table = [
        _plugin_value(metadata.EXPERIMENT_TAG, experiment=_columns(values, metrics)),
        _plugin_value(metadata.SESSION_START_INFO_TAG, session_start_info=_row(values)),
    ]
    if finished:
        ended = SessionEndInfo(status=STATUS_SUCCESS, end_time_secs=time.time())
        table.append(_plugin_value(metadata.SESSION_END_INFO_TAG, session_end_info=ended))
    now = time.time()
    events = [
        Event(wall_time=now, step=0, summary=Summary(value=table)),
        Event(wall_time=now, step=summary.iteration, summary=Summary(value=[*scalars, _image(picture)])),
    ]
    with deferred_interrupt():
        for earlier in (*folder.glob(_name("*", True)), *folder.glob(_name("*", False))):
            delete(earlier)
        write_events(folder, events, _suffix(summary.iteration, finished))


def summary_scalars(summary: RunSummary) -> dict[str, float]:
    """Return the finite values of a summary by tag ``summary/...``.

    Args:
        summary: The summary of a run.
    """
    values = {tag: value for tag, (_, value) in _metrics(summary).items()}
    return {tag: value for tag, value in values.items() if value is not None and math.isfinite(value)}


def is_recorded(folder: Path, iteration: int) -> bool:
    """Return whether :func:`record_summary` has been called for a finished run that ended at an iteration.

    Args:
        folder: The run folder.
        iteration: The last iteration.
    """
    return any(folder.glob(_name(iteration, finished=True)))


def _suffix(iteration: int | str, finished: bool) -> str:
    return f".{'finished' if finished else 'interrupted'}_at_{iteration}"


def _name(iteration: int | str, finished: bool) -> str:
    return f"events.out.tfevents.*{_suffix(iteration, finished)}"


def _image(picture: Path) -> Summary.Value:
    """Return the summary entry of a PNG file."""
    png = picture.read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    return Summary.Value(tag="convergence", image=image)


def _plugin_value(tag: str, **content: Any) -> Summary.Value:
    """Return a summary entry for TensorBoard's HPARAMS tab."""
    # The plugin's own helpers import TensorFlow.
    data = metadata.create_summary_metadata(HParamsPluginData(**content))
    return Summary.Value(tag=tag, metadata=data, tensor=metadata.NULL_TENSOR)


def _columns(values: Mapping[str, Value], metrics: Mapping[str, tuple[str, float | None]]) -> Experiment:
    """Return the columns of TensorBoard's HPARAMS tab."""
    types = {name: DATA_TYPE_STRING if isinstance(value, str) else DATA_TYPE_FLOAT64 for name, value in values.items()}
    return Experiment(
        hparam_infos=[HParamInfo(name=name, type=kind, differs=name in _SHOWN_FIRST) for name, kind in types.items()],
        metric_infos=[MetricInfo(name=MetricName(tag=tag), display_name=label) for tag, (label, _) in metrics.items()],
    )


def _row(values: Mapping[str, Value]) -> SessionStartInfo:
    """Return the row of a run in TensorBoard's HPARAMS tab."""
    row = SessionStartInfo(start_time_secs=time.time())
    for name, value in values.items():
        if isinstance(value, str):
            row.hparams[name].string_value = value
        else:
            row.hparams[name].number_value = value
    return row


def _metrics(summary: RunSummary) -> dict[str, tuple[str, float | None]]:
    """Return label and value by tag. The tags are the same for all runs, and the first five are the most important."""
    named: dict[str, tuple[str, float | None]] = {
        "summary/iterations": ("iterations", summary.iteration),
        "summary/kappa": ("kappa", summary.kappa),
    }
    for tag, each in CONVERGING.items():
        fit, last = summary.fits.get(tag), summary.last.get(tag, 0.0)
        for quantity, unit, value in (
            ("iterations_per_decade", "it./decade", fit.iterations_per_decade if fit else None),
            ("r_squared", "R^2", fit.r_squared if fit else None),
            ("log10", "log10 at the end", math.log10(last) if last > 0 else None),
        ):
            named[f"summary/{quantity}/{each.name}"] = f"{each.text_with_formula}: {unit}", value
    return named
