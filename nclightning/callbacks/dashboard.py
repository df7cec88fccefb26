"""The page of a run: its charts laid out for TensorBoard, and pictures for all loggers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import lightning as L

from nclightning.callbacks.full_batch import as_full_batch, full_batch, head_reader
from nclightning.callbacks.monitor import Batch
from nclightning.callbacks.neural_collapse import NeuralCollapseMonitor
from nclightning.callbacks.optimality import OptimalityMonitor
from nclightning.callbacks.pictures import draw_angles
from nclightning.callbacks.problem import num_groups_of
from nclightning.functional import class_statistics
from nclightning.probe.collectors import merge_over_ranks
from nclightning.probe.sweep import frozen
from nclightning.quantities import (
    ANGLES,
    CERTIFIED_GAP,
    DISTANCE,
    ERROR_BOUND_RATIO,
    EVALUATIONS,
    GAP,
    GRAD_NORM,
    LOSS,
    NC1,
    NC2,
    NC3,
    PREDICTED_DECAY,
    RELATIVE_DISTANCE,
    STEP_SIZE,
    Quantity,
    log10_tag,
)

__all__ = ["TensorBoardDashboard"]

Charts = dict[str, list[Any]]


class TensorBoardDashboard(L.Callback):
    """Lays out TensorBoard's Custom Scalars tab, and draws class means and head of full-batch runs.

    The tab gets charts of the values that the monitors of the trainer log: one of gap, distance and gradient norm, one
    of NC1-NC3, and those of the line search. The pictures, tag ``nc/train/angles``, show the cosines among class means,
    among rows of the head and between the two. They are drawn at iterates 0, 1, 2, 4, 8, ... and at the first and last
    iterate of the fit. TensorBoard shows ten of them unless it is started with ``--samples_per_plugin images=100``. For
    other modules, ``NeuralCollapseMonitor(pictures_every_n_epochs=...)`` draws them. Pictures go to every logger that
    takes them (:mod:`nclightning.pictures`), the layout goes to TensorBoard's.

    Args:
        pictures: Whether to draw pictures.

    Example:
        >>> import lightning as L
        >>> from nclightning.callbacks import NeuralCollapseMonitor, TensorBoardDashboard
        >>> callbacks = [NeuralCollapseMonitor(), TensorBoardDashboard(pictures=False)]
        >>> trainer = L.Trainer(max_epochs=3, accelerator="cpu", callbacks=callbacks)  # Logs to TensorBoard.
    """

    def __init__(self, pictures: bool = True) -> None:
        self.pictures = pictures
        self._batch: Batch | None = None
        self._drawn_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Lay out the tab, after module and monitors have accepted the run."""
        self._batch, self._drawn_at = None, -1
        layout = _lay_out(trainer, pl_module)
        for logger in trainer.loggers:
            writer: Any = getattr(logger, "experiment", None)
            if layout and hasattr(writer, "add_custom_scalars"):
                writer.add_custom_scalars(layout)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """Draw the iterate that a full-batch run starts from."""
        if self._batch is None and self.pictures and full_batch(pl_module):
            self._draw(trainer, pl_module, batch, trainer.global_step)

    def on_iteration_end(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, iteration: int) -> None:
        """Draw iterates whose number is a power of two."""
        if self.pictures and iteration & (iteration - 1) == 0:
            self._draw(trainer, pl_module, batch, iteration)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the last iterate."""
        if self._batch is not None and self._drawn_at != trainer.global_step:
            self._draw(trainer, pl_module, self._batch, trainer.global_step)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Drop the batch."""
        self._batch = None

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, iteration: int) -> None:
        self._batch, self._drawn_at = batch, iteration
        if num_groups_of(pl_module) is not None:
            return  # Groups of samples that are not classes do not correspond to rows of the head.
        inputs, labels = batch
        with frozen(pl_module):
            features = as_full_batch(pl_module).features_of(inputs)
            head = head_reader(as_full_batch(pl_module)).read()
            stats = merge_over_ranks(class_statistics(features, labels, head.out_features, scatter=False, copy=False))
        if not trainer.is_global_zero:
            return
        if (
            int(stats.counts.sum()) == as_full_batch(pl_module).num_samples
        ):  # Class means of a part of the samples would differ.
            draw_angles(trainer.loggers, ANGLES.tag("train"), stats, head.weight, iteration)


def _lay_out(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Charts]:
    """Return the categories of charts for the tags that will be logged."""
    monitors = trainer.callbacks  # type: ignore[attr-defined]
    optimality = next((monitor for monitor in monitors if isinstance(monitor, OptimalityMonitor)), None)
    collapse = any(isinstance(monitor, NeuralCollapseMonitor) for monitor in monitors)
    convergence, neural_collapse, line_search = Charts(), Charts(), Charts()
    if full_batch(pl_module):
        if optimality is not None:
            known = (CERTIFIED_GAP,) if optimality.find_problem(pl_module) is None else (GAP, DISTANCE)
            convergence = {
                "log10 of gap, distance, gradient norm": _logarithms(*known, GRAD_NORM),
                "objective F": _lines(LOSS),
                "error-bound ratio: distance / gradient norm": _lines(ERROR_BOUND_RATIO),
            }
            if optimality.predicts(pl_module):
                title = "log10 of the gap, and of the decay that the theory predicts for the steps taken"
                convergence[title] = _logarithms(GAP, PREDICTED_DECAY)
            if any(hasattr(optimizer, "outcome") for optimizer in trainer.optimizers):
                line_search = {
                    "step size": _lines(STEP_SIZE),
                    "evaluations of F and its gradient, in all": _lines(EVALUATIONS),
                }
        if collapse:
            neural_collapse["log10 of NC1, NC2, NC3"] = _logarithms(NC1, NC2, NC3, place="train")
    else:
        if optimality is not None:
            convergence = {
                "gap F - F*": _lines(GAP),
                "distance to the optimum, relative to its norm": _lines(RELATIVE_DISTANCE),
            }
        if collapse:
            neural_collapse["NC1, NC2, NC3 of the training set"] = _lines(NC1, NC2, NC3, place="train")
            if trainer.enable_validation:
                neural_collapse["NC1, NC2, NC3 of the validation set"] = _lines(NC1, NC2, NC3, place="val")
    categories = {"Convergence": convergence, "Neural collapse": neural_collapse, "Line search": line_search}
    return {title: charts for title, charts in categories.items() if charts}


def _lines(*quantities: Quantity, place: str = "") -> list[Any]:
    """Return a chart with a curve for each quantity."""
    return _chart(each.tag(place) for each in quantities)


def _logarithms(*quantities: Quantity, place: str = "") -> list[Any]:
    """Return a chart with the logarithm of each quantity."""
    return _chart(log10_tag(each.tag(place)) for each in quantities)


def _chart(tags: Iterable[str]) -> list[Any]:
    """Return a chart of tags, as regular expressions: TensorBoard matches them from the start of a tag."""
    return ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]]
