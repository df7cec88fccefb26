"""Neural collapse of any module during a fit, a validation or a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import lightning as L
from torch import Tensor

from nclightning.arguments import check_cadences, check_choices
from nclightning.callbacks.collapse_at_epochs import CollapseAtEpochs, EpochSettings
from nclightning.callbacks.collapse_at_iterates import CollapseAtIterates
from nclightning.callbacks.collapse_in_evaluation import CollapseInEvaluation
from nclightning.callbacks.either import EitherMonitor
from nclightning.callbacks.full_batch import full_batch, warn_of_steps
from nclightning.callbacks.modules import check_names, check_online
from nclightning.callbacks.monitor import Batch
from nclightning.callbacks.problem import num_groups_of
from nclightning.callbacks.publishing import Publisher, changed_settings
from nclightning.callbacks.steps import OnError
from nclightning.callbacks.training_data import TrainingSets
from nclightning.errors import UserError
from nclightning.functional.statistics import BetweenWeights, GlobalMean
from nclightning.probe.collectors import Measuring
from nclightning.probe.detection import HeadArgument
from nclightning.probe.reader import PairReader
from nclightning.quantities import ANGLES, NC, NC5, tag_of

__all__ = ["NeuralCollapseMonitor"]

Stage = Literal["train", "val", "test"]
# Arguments that do not say which values are logged.
_CADENCES = {"every_n_iterations", "every_n_epochs", "every_n_steps", "pictures_every_n_epochs"}
_OTHER_ARGUMENTS = frozenset(_CADENCES | {"batch_fn", "forward_fn", "on_error"})


class NeuralCollapseMonitor(EitherMonitor[CollapseAtIterates, CollapseAtEpochs]):
    """Logs ``nc/<stage>/nc1``, ``nc2`` and ``nc3``, or the measures chosen, with the stage train, val or test.

    On full-batch modules of this package it measures the training set at iterates, and also logs ``log10`` of the
    values. If the labels number groups of samples that are not classes (mixed, multi-label or real targets), it logs
    ``nc1_ratio`` and ``nc1_cdnv`` of the groups, and ``nc2``.

    On any other module it makes an evaluation pass over the training set at ends of epochs: the model frozen
    in eval mode, every sample once and in order, over all processes. All that the model remembers, random states and
    its own logs are as before, or the run stops and says what is not; a data set that draws from a generator of its own
    is moved on. In validation and test it collects the features of the ordinary forwards (of a compiled model, of one
    more forward per batch), without the duplicates that a distributed sampler pads with.

    The pass sees what training can read: of a subset sampler the subset; under ``limit_train_batches`` or
    ``overfit_batches`` the first batches of an order that does not change; of a loader without a length as many batches
    as its longest epoch read so far. A further set without a length ends at ``limit_val_batches``. Features, head and
    class means of a measurement are of the same weights. Monitors of one trainer that look at the same loader share one
    pass, unless a callback that could change something has its turn between theirs.

    Values reach every logger at the number of optimizer steps done, and ``trainer.callback_metrics``, after a resume
    from the start. Two monitors in one trainer must log different tags.

    | tag | value (formulas: :mod:`nclightning.functional`) |
    |---|---|
    | ``nc/<stage>/<measure>`` | of the head's input; several loaders of a stage: ``nc/<stage>/<loader>/<measure>`` |
    | ``nc/<stage>/<layer>/nc1``, ``nc1_cdnv``, ``ncc_accuracy`` | of a further layer |
    | ``nc/<name>/<measure>`` | of a further data set |
    | ``nc/<...>/nc5`` | of an out-of-distribution set, against the training class means |

    Args:
        every_n_iterations: Cadence on full-batch modules.
        head: The last layer: its dotted name, the module itself, or a function ``(model) -> (weight, bias)`` that
            returns them as the loss sees them. Convolutions with kernels of size 1 are heads, too; of cosine heads
            features and rows are normalised. None finds the layer whose output is seen to be the model's output, or
            what that follows from. What comes after the layer, such as
            a temperature, is not part of it.
        every_n_epochs: Cadence on other modules.
        every_n_steps: Measure also whenever ``trainer.global_step`` reaches or passes a multiple of this.
        measures: Names out of :data:`nclightning.metrics.MEASURES`, and ``ncc_accuracy``, ``ncc_mismatch``,
            ``accuracy``, ``cosine_margin``, which need the class means first and so a second pass over the training
            set; ``("all",)`` for all. None takes ``nc1``, ``nc2`` and ``nc3``.
        source: ``"sweep"``, or ``"online"``: the training reading is of the features of the epoch's ordinary forwards,
            while weights change and in training mode, with the head of the epoch's end, and costs no forward.
        stages: Stages in which to measure: ``"train"``, ``"val"`` and ``"test"``.
        layers: Dotted names of further modules whose outputs are measured.
        layer_pooling: ``"mean"`` averages maps ``(B, C, H, W)`` over space and sequences ``(B, T, d)`` over
            positions, ``"flatten"`` takes all entries.
        batch_fn: Splits a batch into model input and labels. None takes pairs ``(x, y)`` and mappings with the labels
            under ``labels``, ``label``, ``y``, ``target`` or ``targets``. Labels ``(B, T)`` for features ``(B, T, d)``
            are paired position by position; where the model's own loss is seen to shift them, as that of causal
            language models does, with the features one position before.
        forward_fn: Runs the module on the inputs of a batch, ``(module, inputs) -> output``, where its ``forward`` is
            not what makes the logits. None calls the module.
        datasets: Further loaders by name. They are measured at the same times as the training set, even if that is not.
        ood: Names among ``datasets``, or of validation and test loaders (their number, or key), that are
            out of distribution: ``nc5`` of them is measured, and their labels are ignored.
        pictures_every_n_epochs: Cadence of a picture of the angles between class means and head, under
            ``nc/train/angles``, for the loggers that take pictures (:mod:`nclightning.pictures`); None draws none.
        ignore_index: Label of samples to leave out; -100 is what torch's cross-entropy leaves out.
        global_mean: Convention of NC1 on unbalanced data: mean of ``"class"`` means or of ``"sample"``.
        between_weights: The same: ``"uniform"`` or ``"count"``.
        on_error: ``"raise"``, or ``"warn"``: if a measurement fails, warn with the reason, leave it out, and go on
            training.

    Raises:
        ValueError: If an argument is out of range, the head or a layer cannot be found, or labels do not fit the head.

    Example:
        >>> import lightning as L
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from nclightning.callbacks import NeuralCollapseMonitor
        >>> class Classifier(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        ...     def forward(self, x):
        ...         return self.model(x)
        ...     def training_step(self, batch, batch_idx):
        ...         return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> loader = DataLoader(TensorDataset(torch.randn(30, 5), torch.arange(30) % 3), batch_size=10)
        >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        ...          "enable_model_summary": False}
        >>> trainer = L.Trainer(max_epochs=1, accelerator="cpu", log_every_n_steps=1,
        ...                     callbacks=[NeuralCollapseMonitor()], **quiet)
        >>> trainer.fit(Classifier(), loader)
        >>> sorted(trainer.callback_metrics)
        ['nc/train/nc1', 'nc/train/nc2', 'nc/train/nc3']
    """

    separation = ", or give NeuralCollapseMonitor(measures=..., stages=..., datasets=...) that do not overlap"

    def __init__(
        self,
        every_n_iterations: int = 10,
        head: HeadArgument = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        measures: Sequence[str] | None = None,
        source: Literal["sweep", "online"] = "sweep",
        stages: Sequence[Stage] = ("train", "val", "test"),
        layers: Sequence[str] = (),
        layer_pooling: Literal["mean", "flatten"] = "mean",
        batch_fn: Callable[[Any], tuple[Any, Tensor]] | None = None,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        datasets: Mapping[str, Iterable[Any]] | None = None,
        ood: Sequence[str] = (),
        pictures_every_n_epochs: int | None = None,
        ignore_index: int | None = -100,
        global_mean: GlobalMean = "class",
        between_weights: BetweenWeights = "uniform",
        on_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        given = dict(locals())
        super().__init__()
        check_names({} if datasets is None else datasets, ood)
        self._settings = changed_settings(NeuralCollapseMonitor.__init__, given, _OTHER_ARGUMENTS)
        check_cadences(
            every_n_iterations=every_n_iterations,
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            pictures_every_n_epochs=pictures_every_n_epochs,
        )
        check_choices("source", (source,), "sweep", "online")
        check_choices("layer_pooling", (layer_pooling,), "mean", "flatten")
        check_choices("on_error", (on_error,), "raise", "warn")
        check_choices("stages", tuple(stages), "train", "val", "test")
        self._every_n_iterations, self._layers = every_n_iterations, tuple(layers)
        self._measuring = Measuring(measures, ignore_index, global_mean=global_mean, between_weights=between_weights)
        if source == "online":
            check_online(stages, self._measuring.decision_measures, every_n_steps, pictures_every_n_epochs)
        self._reader = PairReader(head, self._layers, layer_pooling, batch_fn, forward_fn, ignore_index)
        self._at_epochs = EpochSettings(
            every_n_epochs=every_n_epochs,
            every_n_steps=every_n_steps,
            source=source,
            stages=tuple(stages),
            datasets=dict(datasets or {}),
            ood=tuple(ood),
            pictures_every_n_epochs=pictures_every_n_epochs,
        )
        self._training, self._on_error = TrainingSets(), OnError(on_error)
        self._evaluation = CollapseInEvaluation(
            tuple(stages),
            tuple(ood),
            tuple(datasets or ()),
            self._reader,
            self._measuring,
            self._training,
            self._on_error,
        )

    def make_at_iterates(self) -> CollapseAtIterates:
        """Make the callback for full-batch modules."""
        return CollapseAtIterates(self._every_n_iterations, self._measuring, self._at_epochs.stages)

    def make_at_epochs(self) -> CollapseAtEpochs:
        """Make the callback for other modules."""
        return CollapseAtEpochs(self._at_epochs, self._reader, self._measuring, self._training, self._on_error)

    def always(self) -> list[Publisher]:
        """Return the callback for validation and test."""
        return [self._evaluation]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """See what labels say."""
        self._measuring.num_groups = num_groups_of(pl_module) if full_batch(pl_module) else None
        super().setup(trainer, pl_module, stage)

    def tags(self, pl_module: L.LightningModule) -> set[str]:
        """Return tags that are logged, but for the names of the trainer's loaders in them."""
        chosen = self._at_epochs
        sets = {*chosen.stages, *chosen.datasets, *(("train",) if full_batch(pl_module) else ())} - set(chosen.ood)
        tags = {tag_of(NC, name, tag) for name in sets for tag in self._measuring.tags(self._layers)}
        tags |= {NC5.tag(name) for name in chosen.ood}
        return tags | ({ANGLES.tag("train")} if chosen.pictures_every_n_epochs else set())

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse arguments that mean nothing for a full-batch module."""
        if full_batch(pl_module) and self._at_epochs.datasets:
            raise UserError(
                f"datasets are swept on other modules than {type(pl_module).__name__}, which runs full-batch "
                "iterations: leave them out, and pass a validation loader."
            )
        if full_batch(pl_module) and self._at_epochs.every_n_steps is not None:
            warn_of_steps(pl_module, self._at_epochs.every_n_steps)
        super().on_fit_start(trainer, pl_module)

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Check head and labels of a full-batch module."""
        self.at_iterates().prepare(pl_module, batch)

    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Measure a full-batch module at its parameters."""
        return self.at_iterates().read(pl_module, batch)
