"""Neural collapse of any module during a fit, a validation or a test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from nclightning.arguments import check_cadences, check_choices
from nclightning.callbacks import modules
from nclightning.callbacks.attach import Attachment, Reads
from nclightning.callbacks.collection import Measuring, merge_over_ranks
from nclightning.callbacks.first_batch import check_range
from nclightning.callbacks.forwards import ForwardPass
from nclightning.callbacks.full_batch import full_batch, full_batch_head, full_batch_method
from nclightning.callbacks.monitor import Batch, ReadingsMonitor
from nclightning.callbacks.pictures import draw_angles
from nclightning.callbacks.publishing import Publisher, changed_settings
from nclightning.callbacks.sweeps import Sweeps, Swept
from nclightning.errors import UserError
from nclightning.functional import class_statistics
from nclightning.functional.statistics import BetweenWeights, GlobalMean
from nclightning.metrics import NeuralCollapse
from nclightning.probe.detection import HeadArgument
from nclightning.probe.sweep import TraceError, fingerprint, has_lazy_parts
from nclightning.ranks import count_over_ranks

__all__ = ["NeuralCollapseMonitor"]

Stage = Literal["train", "val", "test"]
# Arguments that do not say which values are logged.
_CADENCES = {"every_n_iterations", "every_n_epochs", "every_n_steps", "pictures_every_n_epochs"}
_OTHER_ARGUMENTS = frozenset(_CADENCES | {"batch_fn", "forward_fn", "on_error"})


class NeuralCollapseMonitor(ReadingsMonitor):
    """Logs ``nc/<stage>/nc1``, ``nc2`` and ``nc3``, or the measures chosen, with the stage train, val or test.

    On our full-batch modules it reads the training set at iterates, with ``log10`` versions. On any other module it
    makes an evaluation pass over the training set at ends of epochs: the model frozen in eval mode, every sample once
    and in order, over all processes. All that the model remembers, random states and its own logs are as before, or
    the run stops and says what is not; a data set that draws from a generator of its own is moved on. In validation
    and test it collects the features of the ordinary forwards (of a compiled model, of one more forward per batch),
    without the duplicates that a distributed sampler pads with.

    The pass sees what training can read: of a subset sampler the subset
    (:func:`nclightning.probe.sweep.sequential_loader`); under ``limit_train_batches`` or ``overfit_batches`` the first batches of an order that does not change; of a
    loader without a length as many batches as its longest epoch read so far. A further set without a length ends at
    ``limit_val_batches``. Features, head and class means of a measurement are of the same weights.

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
            what that follows from (:func:`nclightning.probe.detection.find_head`). What comes after the layer, such as
            a temperature, is not part of it.
        every_n_epochs: Cadence on other modules.
        every_n_steps: Sweep also whenever ``trainer.global_step`` reaches or steps over a multiple of this.
        measures: Names out of :data:`nclightning.metrics.MEASURES`, and ``ncc_accuracy``, ``ncc_mismatch``,
            ``accuracy``, ``cosine_margin``, which need the class means first and so a second pass over the training
            set; ``("all",)`` for all. None takes ``nc1``, ``nc2`` and ``nc3``.
        source: ``"sweep"``, or ``"online"``: the training reading is of the features of the epoch's ordinary forwards,
            while weights change and in training mode, with the head of the epoch's end, and costs no forward.
        stages: Stages to read.
        layers: Dotted names of further modules to read.
        layer_pooling: ``"mean"`` averages maps ``(B, C, H, W)`` over space and sequences ``(B, T, d)`` over
            positions, ``"flatten"`` takes all entries.
        batch_fn: Splits a batch into model input and labels. None takes pairs ``(x, y)`` and mappings with the labels
            under ``labels``, ``label``, ``y``, ``target`` or ``targets``. Labels ``(B, T)`` for features ``(B, T, d)``
            are paired position by position; where the model's own loss is seen to shift them, as that of causal
            language models does, with the features one position before.
        forward_fn: Runs the module on the inputs of a batch, ``(module, inputs) -> output``, where its ``forward`` is
            not what makes the logits. None calls the module.
        datasets: Further loaders by name, swept at the same times as the training set, whether or not that is read.
        ood: Names among ``datasets``, or of validation and test loaders (their number, or key), that are
            out of distribution: of them ``nc5`` is read, and their labels are not looked at.
        pictures_every_n_epochs: Cadence of a picture of the angles between class means and head in TensorBoard, under
            ``nc/train/angles``; None draws none.
        ignore_index: Label of samples to leave out; -100 is what torch's cross-entropy leaves out.
        global_mean: Convention of NC1 on unbalanced data: mean of ``"class"`` means or of ``"sample"``.
        between_weights: The same: ``"uniform"`` or ``"count"``.
        on_error: ``"raise"``, or ``"warn"``: say in one sentence why a reading failed, leave it out, and go on
            training.

    Raises:
        ValueError: If an argument is out of range, the head or a layer cannot be found, or labels do not fit the head.
    """

    log10_tags = frozenset(f"nc/train/nc{i}" for i in (1, 2, 3))

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
        super().__init__(every_n_iterations)
        self._settings = changed_settings(NeuralCollapseMonitor.__init__, given, _OTHER_ARGUMENTS)
        check_cadences(
            every_n_epochs=every_n_epochs, every_n_steps=every_n_steps, pictures_every_n_epochs=pictures_every_n_epochs
        )
        check_choices("source", (source,), "sweep", "online")
        check_choices("layer_pooling", (layer_pooling,), "mean", "flatten")
        check_choices("on_error", (on_error,), "raise", "warn")
        check_choices("stages", tuple(stages), "train", "val", "test")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.source = source
        self.stages = tuple(stages)
        self.datasets = dict(datasets or {})
        modules.check_names(self.datasets, ood)
        self.ood, self.layers = tuple(ood), tuple(layers)
        self.pictures_every_n_epochs = pictures_every_n_epochs
        self.on_error = on_error
        self._measuring = Measuring(measures, ignore_index, global_mean=global_mean, between_weights=between_weights)
        if source == "online":
            modules.check_online(self.stages, self._measuring.of_decisions, every_n_steps, pictures_every_n_epochs)
        self._attachment = Attachment(head, self.layers, layer_pooling, batch_fn, forward_fn, ignore_index)
        self._metric: NeuralCollapse | None = None
        self._full_batch = self._checked = False
        self._pass: ForwardPass | None = None
        self._waiting: ForwardPass | None = None
        self._sweeps = Sweeps(self._attachment, self._measuring, self.datasets, self.ood)
        self._step = 0
        # The last sweep at a step: the step, the weights, and what was read.
        self._at_step: tuple[int, tuple[int, ...], Swept] | None = None

    def tags(self, pl_module: L.LightningModule) -> set[str]:
        """Return tags that are logged, but for the names of the trainer's loaders in them."""
        sets = {*self.stages, *self.datasets, *(("train",) if full_batch(pl_module) else ())} - set(self.ood)
        tags = {f"{name}/{tag}" for name in sets for tag in self._measuring.tags(self.layers)}
        tags |= {f"{name}/nc5" for name in self.ood} | ({"train/angles"} if self.pictures_every_n_epochs else set())
        return {f"nc/{tag}" for tag in tags}

    # Full-batch modules: readings at iterates.

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell full-batch modules from others."""
        self._attachment.forget()
        self._checked, self._full_batch = False, full_batch(pl_module)
        if self._full_batch:
            if self.datasets:
                raise UserError(
                    f"datasets are swept on other modules than {type(pl_module).__name__}, which runs full-batch "
                    "iterations: leave them out, and pass a validation loader."
                )
            super().on_fit_start(trainer, pl_module)
            return
        self._attachment.check(trainer)
        Publisher.on_fit_start(self, trainer, pl_module)

    def prepare(self, pl_module: L.LightningModule, batch: Batch) -> None:
        """Find the head and check the labels once."""
        head = full_batch_head(pl_module)
        check_range(batch[1], head, None)
        self._metric = self._measuring.metric(head)

    @torch.no_grad()
    def read(self, pl_module: L.LightningModule, batch: Batch) -> dict[str, Tensor | float]:
        """Measure the training set at an iterate."""
        assert self._metric is not None
        features, metric = full_batch_method(pl_module, "features_of")(batch[0]), self._metric
        stats = class_statistics(features, batch[1], metric.num_classes, scatter=metric.keeps_scatter, copy=False)
        return {f"nc/train/{name}": value for name, value in metric.read(merge_over_ranks(stats)).items()}

    # Training of other modules: a sweep, or the ordinary forwards.

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say which out-of-distribution sets there are not, and refuse loaders that cannot be swept."""
        known = self.datasets.keys() | {name for name, _ in modules.name_loaders(trainer.val_dataloaders)}
        if unknown := [name for name in self.ood if name not in known]:
            rank_zero_warn(
                f"ood={unknown} are neither datasets nor validation loaders, which are {sorted(known - {''})}: this "
                "fit has no nc5 of them."
            )
        self._step, self._at_step = trainer.global_step, None
        if not self._full_batch:
            self._sweeps.forget()
            with self._guard():
                self._sweeps.check(trainer, pl_module, self._sweeps_training)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start collecting the ordinary forwards."""
        if self.source == "online" and "train" in self.stages and self._is_due(trainer):
            self._pass = ForwardPass(self._attachment, self._measuring, online=True)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Read the first iterate of a full-batch run; of another, check the first batch, and hook the head."""
        if self._full_batch:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            return
        if not self._checked and (self._reads_training == "online" or not has_lazy_parts(pl_module)):
            self._checked = True
            with self._guard():
                self._attachment.check_first(trainer, pl_module, batch, self._reads_training)
        self._hook(trainer, pl_module, batch, trainer.train_dataloader)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Collect a batch, or sweep at the cadence in steps."""
        if self._full_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            return
        with self._guard() if self._attachment.first is not None else nullcontext():
            self._attachment.finish_first()
        self._collect(pl_module, batch, trainer.train_dataloader)
        if self._attachment.first_step is not None:
            with self._guard():
                self._attachment.end_first_step(pl_module, online=self.source == "online")
        if self.every_n_steps is None or not self._has_sets:
            return
        # Crossed, not hit: several optimizers advance the step by more than one.
        before, self._step = self._step, trainer.global_step
        if self._step // self.every_n_steps > before // self.every_n_steps:
            with self._guard():
                self._sweep(trainer, pl_module, at_step=True)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the training set and the further ones, if the module is not full-batch."""
        self._sweeps.remember(trainer)
        if self.source == "online":
            self._end(trainer, pl_module, "train")
        if self._has_sets and self._is_due(trainer):
            with self._guard():
                self._sweep(trainer, pl_module)

    def _is_due(self, trainer: L.Trainer) -> bool:
        return not self._full_batch and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    @property
    def _reads_training(self) -> Reads:
        return self.source if "train" in self.stages else ""

    @property
    def _sweeps_training(self) -> bool:
        return self.source == "sweep" and "train" in self.stages

    @property
    def _has_sets(self) -> bool:
        return self._sweeps_training or bool(self.datasets)

    def _sweep(self, trainer: L.Trainer, pl_module: L.LightningModule, at_step: bool = False) -> None:
        step, last = trainer.global_step, self._at_step
        weights: tuple[int, ...] = ()
        if self.every_n_steps is not None:
            weights = fingerprint((*pl_module.parameters(), *pl_module.buffers()))
        other = last is None or last[:2] != (step, weights)
        if count_over_ranks(int(other), pl_module.device):
            last = step, weights, self._sweeps.read(trainer, pl_module, self._sweeps_training)
        assert last is not None
        swept, values = last[2], {f"nc/{tag}": value for tag, value in last[2].values.items()}
        if at_step:
            self._at_step = last
            self._publish_at_step(trainer, values)
            return
        if last is self._at_step:  # The loggers have them at this step.
            self._publish_to_callbacks(pl_module, values)
        else:
            self._publish(pl_module, values)
        self._at_step = None
        every = self.pictures_every_n_epochs
        due = every is not None and self._sweeps_training and (trainer.current_epoch + 1) % every == 0
        if due and swept.centres is not None and trainer.is_global_zero:
            draw_angles(trainer.loggers, "nc/train/angles", swept.centres[""], swept.head.weight, step)

    # Validation and test: the ordinary forwards.

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start collecting."""
        self._start(trainer, pl_module, "test" if trainer.testing else "val")

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hook the head before the first batch."""
        self._hook(trainer, pl_module, batch, modules.evaluated_loaders(trainer), dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a batch."""
        self._collect(pl_module, batch, modules.evaluated_loaders(trainer), dataloader_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log ``nc/val/...``, or in a test ``nc/test/...``."""
        self._end(trainer, pl_module, "test" if trainer.testing else "val")

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end
    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: Stage) -> None:
        self._waiting, self._pass = self._pass, None  # An online pass goes on after a validation in its middle.
        if self._waiting is not None:
            self._waiting.remove()
        if stage in self.stages and not trainer.sanity_checking:
            with self._guard():
                needed = self._measuring.of_decisions or self.ood
                centres = partial(self._sweeps.centres, trainer, pl_module) if needed else None
                self._pass = ForwardPass(self._attachment, self._measuring, self.ood, centres)

    def _hook(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, loaders: Any, index: int = 0) -> None:
        if self._pass is not None:
            try:
                self._pass.hook(trainer, pl_module, batch, loaders, index)
            except Exception as error:
                self._fail(error)

    def _collect(self, pl_module: L.LightningModule, batch: Any, loaders: Any, index: int = 0) -> None:
        if self._pass is not None:
            try:  # Not the guard itself, which costs as much as the rest.
                self._pass.collect(pl_module, batch, loaders, index)
            except Exception as error:
                self._fail(error)
        elif pl_module.trainer.sanity_checking and "val" in self.stages:  # By now weights exist.
            with self._guard():
                name = list(modules.name_loaders(loaders))[index][0]
                self._attachment.check_sanity(pl_module.trainer, pl_module, batch, labelled=name not in self.ood)

    def _fail(self, error: Exception) -> None:
        assert self._pass is not None
        if self.on_error == "raise" or isinstance(error, TraceError):
            self._drop()
            raise error
        self._pass.fail(error)

    def _end(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: Stage) -> None:
        if self._pass is not None:
            with self._guard():
                self._publish(pl_module, {f"nc/{stage}/{tag}": v for tag, v in self._pass.read(pl_module).items()})
        self._pass, self._waiting = self._waiting, None

    @contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn errors of a reading into a warning where the user asked for that."""
        try:
            yield
        except Exception as error:
            self._drop()
            if self.on_error == "raise" or isinstance(error, TraceError):
                raise
            rank_zero_warn(f"no reading of neural collapse: {error}")

    def _drop(self) -> None:
        self._attachment.unwatch()
        for each in (self._pass, self._waiting):
            if each is not None:
                each.remove()
        self._pass = self._waiting = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._drop()
        super().on_exception(trainer, pl_module, exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._drop()
        super().teardown(trainer, pl_module, stage)
