"""Neural collapse of models that Hugging Face's ``transformers.Trainer`` trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from nclightning.arguments import check_cadences, check_choices
from nclightning.compat.transformers import calling, prefix_of
from nclightning.errors import UserError
from nclightning.functional.statistics import BetweenWeights, GlobalMean
from nclightning.integrations.trained import TransformersHost, check_task, labels_by_name
from nclightning.metrics import MEASURES
from nclightning.probe.collectors import Measuring
from nclightning.probe.detection import HeadArgument
from nclightning.probe.evaluation import check_loader
from nclightning.probe.features import NoLabelsError
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import DataSet, SetReader
from nclightning.probe.sweep import (
    TraceError,
    compiled_parts,
    frozen,
    num_planned_batches,
    sequential_loader,
    without_online_hint,
)
from nclightning.probe.validation import names_of, plain_name
from nclightning.probe.watch import FirstStepHooks
from nclightning.quantities import DECISION_NAMES, NC, measure_named, tagged
from nclightning.ranks import failing_together, rank_zero_warn

try:
    from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
except ImportError as error:
    if error.name not in ("transformers", "accelerate"):  # Of what they import.
        raise
    raise ImportError(
        "NeuralCollapseCallback needs transformers and accelerate: pip install 'nclightning[huggingface]'."
    ) from error

__all__ = ["NeuralCollapseCallback"]

Stage = Literal["train", "eval", "test"]


class NeuralCollapseCallback(TrainerCallback):
    """Logs neural collapse of the training set and the evaluation sets where a Hugging Face ``Trainer`` logs.

    ``Trainer(..., callbacks=[NeuralCollapseCallback()])`` or ``trainer.add_callback(NeuralCollapseCallback())``. At
    ends of epochs it makes an evaluation pass over the training set, and after ``evaluate`` one over what was
    evaluated: through the trainer's own data loaders and collator, on its device and in its precision, the model frozen
    in eval mode, each sample once over all processes. Weights, optimizer, buffers, random states, the order of later
    epochs and all else that the trainer logs are afterwards as before, or an error says what is not. A model that
    cannot be measured is refused before the first step.

    Values go through ``trainer.log`` to ``trainer.state.log_history`` and all of ``report_to``. Those of an evaluation
    are also in the metrics that ``evaluate`` returns, so that ``metric_for_best_model="nc/nc1"`` with
    ``greater_is_better=False`` chooses by them.

    | key | value (formulas: :mod:`nclightning.functional`) | in TensorBoard |
    |---|---|---|
    | ``nc/<measure>`` | of the training set | ``train/nc/<measure>`` |
    | ``eval_nc/<measure>`` | of the evaluation set | ``eval/nc/<measure>`` |
    | ``eval_<name>_nc/<measure>`` | of one of several | ``eval/<name>_nc/<measure>`` |
    | ``test_nc/<measure>`` | in the metrics of ``predict``, if ``stages`` has ``"test"`` | |

    Args:
        head: The last layer: its dotted name, the module itself, or a function ``(model) -> (weight, bias)``. None
            finds the layer whose output is seen to be the model's output, or what that follows from.
        every_n_epochs: Cadence of the training set. An epoch that ends training counts, also one that ends early.
        every_n_steps: Measure the training set also whenever this number of optimizer steps has been made.
        measures: Names out of :data:`nclightning.metrics.MEASURES`, and ``ncc_accuracy``, ``ncc_mismatch``,
            ``accuracy``, ``cosine_margin``, which need the class means of the training set first and so a second pass;
            ``("all",)`` for all. None takes ``nc1``, ``nc2`` and ``nc3``.
        stages: What is measured, out of ``"train"``, ``"eval"`` and ``"test"`` (what ``predict`` predicts).
        layers: Dotted names of further modules to measure, as ``<layer>/nc1``.
        layer_pooling: ``"mean"`` averages maps over space and sequences over positions, ``"flatten"`` takes all
            entries.
        batch_fn: Splits a batch into model input and labels. None takes the labels that the trainer takes. Labels
            ``(B, T)`` are paired with features position by position; where the model's own loss is seen to shift them,
            as that of causal language models does, with the features one position before.
        forward_fn: Runs the model on the inputs of a batch, ``(model, inputs) -> output``. None calls the model.
        ood: Names of evaluation sets that are out of distribution: keys of ``eval_dataset``, or ``"eval"``. Of them
            ``nc5`` is measured, against the class means of the training set, and their labels are ignored.
        ignore_index: Label of samples and positions to leave out.
        global_mean: Convention of NC1 on unbalanced data: mean of ``"class"`` means or of ``"sample"``.
        between_weights: The same: ``"uniform"`` or ``"count"``.
        on_error: ``"raise"``, or ``"warn"``: say in one sentence why a measurement failed, leave it out, and go on.

    Raises:
        ValueError: If an argument is out of range, or the model or its labels cannot be measured.
    """

    def __init__(
        self,
        *,
        head: HeadArgument = None,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        measures: Sequence[str] | None = None,
        stages: Sequence[Stage] = ("train", "eval"),
        layers: Sequence[str] = (),
        layer_pooling: Literal["mean", "flatten"] = "mean",
        batch_fn: Callable[[Any], tuple[Any, Tensor]] | None = None,
        forward_fn: Callable[[Any, Any], Any] | None = None,
        ood: Sequence[str] = (),
        ignore_index: int | None = -100,
        global_mean: GlobalMean = "class",
        between_weights: BetweenWeights = "uniform",
        on_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        check_cadences(every_n_epochs=every_n_epochs, every_n_steps=every_n_steps)
        check_choices("layer_pooling", (layer_pooling,), "mean", "flatten")
        check_choices("on_error", (on_error,), "raise", "warn")
        if isinstance(stages, str):
            raise UserError(f"stages must be a sequence of names: write ({stages!r},).")
        check_choices("stages", tuple(stages), "train", "eval", "test")
        if isinstance(ood, str):
            raise UserError(f"ood must be a sequence of names: write ({ood!r},).")
        self._every_n_epochs, self._every_n_steps = every_n_epochs, every_n_steps
        self._stages, self._ood, self._on_error = tuple(stages), tuple(ood), on_error
        self._head, self._layers, self._pooling = head, names_of(layers), layer_pooling
        self._batch_fn, self._forward_fn, self._ignore_index = batch_fn, forward_fn, ignore_index
        self._measuring = Measuring(measures, ignore_index, global_mean=global_mean, between_weights=between_weights)
        self._sets: SetReader | None = None
        self._reader: PairReader | None = None
        self._step: FirstStepHooks | None = None
        self._measured_at: int | None = None  # The optimizer step.
        self._read, self._most_read = 0, 0  # Batches of this epoch, and of the longest one.
        self._skipped = 0  # Batches of the epoch in which a resumed run begins.

    # Training.

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        """Refuse a model that cannot be measured, and hook the model for its first step."""
        trainer = self._trainer()
        self._reader = self._sets = self._measured_at = None
        self._remove()
        # A stream of which a resumed run skips the beginning.
        self._skipped = 0 if args.ignore_data_skip else state.global_step * args.gradient_accumulation_steps
        self._most_read = self._skipped
        self._check_order(trainer)
        self._check_metric(trainer)
        self._check_ood(trainer)
        with self._guard():
            host = self._host(trainer)
            reader = self._check(trainer, host, train_dataloader)
            if not args.torch_compile and not compiled_parts(trainer.model_wrapped):
                self._step = reader.watch_first_step(host.module, head_only=True)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count batches."""
        self._read, self._skipped = self._skipped, 0

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a batch."""
        self._end_batch()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count a batch, and measure at the cadence in steps."""
        self._end_batch()
        if self._every_n_steps is not None and state.global_step % self._every_n_steps == 0:
            self._measure_training(state, control, **kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the cadence in epochs, and where training ends."""
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last or math.ceil(state.epoch or 0) % self._every_n_epochs == 0:
            self._measure_training(state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the last weights, if an evaluation after the last epoch ended training."""
        self._remove()
        if not (args.load_best_model_at_end and state.best_model_checkpoint is not None):
            self._measure_training(state, control, **kwargs)

    def _measure_training(self, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any) -> None:
        if "train" not in self._stages or self._measured_at == state.global_step:
            return
        trainer = self._trainer()
        values = dict[str, float]()
        with self._guard():
            values = self._read_sets(trainer, {"train": self._stream(train_dataloader)}, {}, training=True)
            self._measured_at = state.global_step
        self._log(trainer, control, tagged({tag.removeprefix("train/"): each for tag, each in values.items()}, NC))

    def _end_batch(self) -> None:
        self._read += 1
        self._most_read = max(self._most_read, self._read)
        if self._step is None:
            return
        step, self._step = self._step, None
        assert self._reader is not None
        _, runs = step.end()  # The batch is another one than the one that was examined.
        host = self._host(self._trainer())
        said = step.words(type(host.module).__name__, self._reader.head_of(host.module).name, differs=False, runs=runs)
        if said:
            rank_zero_warn(said)

    # Evaluation.

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Measure the evaluation set."""
        if "eval" in self._stages:
            trainer = self._trainer()
            values = dict[str, float]()
            with self._guard(evaluated=prefix_of(metrics, "eval")):
                values = self._measure_evaluated(trainer, prefix_of(metrics, "eval"), **kwargs)
            self._log(trainer, control, values)
            if metrics is not None:
                metrics.update(values)

    def on_predict(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Measure the set of ``predict``."""
        if "test" in self._stages and metrics is not None:
            with self._guard(evaluated=prefix_of(metrics, "test")):
                metrics.update(self._measure_evaluated(self._trainer(), prefix_of(metrics, "test"), **kwargs))

    def _measure_evaluated(
        self, trainer: Any, prefix: str, eval_dataloader: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> dict[str, float]:
        names = {prefix, prefix.removeprefix("eval_").removeprefix("test_")}
        is_ood = not names.isdisjoint(self._ood)
        trained = dict[str, DataSet]()
        if is_ood or self._measuring.decision_measures:
            if train_dataloader is None and trainer.train_dataset is None:
                raise UserError(
                    "decisions by nearest centre and nc5 need the class means of the training set, and the trainer has "
                    "none: pass train_dataset, or leave them out."
                )
            if train_dataloader is None:
                with frozen(torch.nn.Module()):  # Some samplers draw a seed when they are made.
                    train_dataloader = trainer.get_train_dataloader()
            trained = {"train": self._stream(train_dataloader)}
        data = DataSet(eval_dataloader)
        values = self._read_sets(trainer, trained, {prefix: data}, training=False, is_ood=is_ood)
        return {f"{prefix}_nc/{tag.removeprefix(f'{prefix}/')}": value for tag, value in values.items()}

    # Measuring.

    @staticmethod
    def _trainer() -> Any:
        trainer = calling(Trainer)
        if trainer is None:
            raise UserError(
                "NeuralCollapseCallback is called by no transformers.Trainer: pass it to Trainer(callbacks=[...]) or "
                "trainer.add_callback(...), or measure a loop of your own with nclightning.measure(model, data)."
            )
        return trainer

    def _host(self, trainer: Any) -> TransformersHost:
        return TransformersHost(trainer, self._head)

    def _stream(self, loader: Any) -> DataSet:
        """Limit a training loader without a length, which may be endless, to the batches that training has read."""
        if num_planned_batches(loader) is not None:
            return DataSet(loader)
        if not self._most_read:
            raise UserError(
                "the training set is a stream of which nothing has been read, so that it cannot be told where it ends: "
                "train first, or leave decisions and ood out."
            )
        return DataSet(loader, self._most_read)

    def _read_sets(
        self,
        trainer: Any,
        trained: Mapping[str, DataSet],
        others: Mapping[str, DataSet],
        training: bool,
        is_ood: bool = False,
    ) -> dict[str, float]:
        host = self._host(trainer)
        if self._sets is None:
            first = next(iter((*trained.values(), *others.values())))
            self._check(trainer, host, first.loader, labelled=bool(trained) or not is_ood)
        assert self._sets is not None
        ood = tuple(others) if is_ood else ()
        values = self._sets.read(host, trained, others, ood, training).values
        arrived = torch.stack([value.double() for value in values.values()]).tolist() if values else []
        return dict(zip(values, arrived, strict=True))

    def _check(self, trainer: Any, host: TransformersHost, loader: Any, labelled: bool = True) -> PairReader:
        """Examine the model by the first batch of a loader, on all processes together."""
        check_loader(host, loader)
        with failing_together(host.device), host.unseen():
            batch = next(iter(sequential_loader(loader, host.rank, host.world_size)), None)
            if batch is None:
                raise UserError(
                    f"the data is empty for process {host.rank} of {host.world_size}: each must have a sample."
                )
            batch = host.on_device(batch)
            batch_fn = self._batch_fn or labels_by_name(trainer, batch)
            names = tuple(plain_name(name, host.module) for name in self._layers)
            head = plain_name(self._head, host.module)
            reader = PairReader(head, names, self._pooling, batch_fn, self._forward_fn, self._ignore_index)
            if labelled and self._batch_fn is None:
                check_task(host.module, reader, batch)
            reader.check_batch(host, batch, labelled=labelled)
            self._reader, self._sets = reader, SetReader(reader, self._measuring)
        return reader

    def _check_order(self, trainer: Any) -> None:
        """Refuse an early-stopping callback that would look up values before they are measured."""
        metric, callbacks = trainer.args.metric_for_best_model or "", trainer.callback_handler.callbacks
        before = callbacks[: next((i for i, each in enumerate(callbacks) if each is self), 0)]
        if f"{NC}/" in metric and any(isinstance(each, EarlyStoppingCallback) for each in before):
            raise UserError(
                f"EarlyStoppingCallback looks for {metric!r} before NeuralCollapseCallback has measured it: put "
                "NeuralCollapseCallback first, as callbacks=[NeuralCollapseCallback(), EarlyStoppingCallback()]."
            )

    def _check_metric(self, trainer: Any) -> None:
        """Refuse, before training, to choose the best model by a value that is never measured."""
        metric = trainer.args.metric_for_best_model or ""
        _, found, name = metric.partition(f"{NC}/")
        if not found or name not in {*MEASURES, *DECISION_NAMES} or trainer.args.eval_strategy == "no":
            return  # What it does not find says the trainer.
        if "eval" not in self._stages:
            raise UserError(f"metric_for_best_model={metric!r} is of an evaluation: stages must have 'eval'.")
        if name not in (measured := self._measuring.tags(())):
            raise UserError(
                f"metric_for_best_model={metric!r} is not measured: put {name!r} into measures, which are "
                f"{', '.join(sorted(measured))}."
            )
        if trainer.args.greater_is_better and measure_named(name).collapsed == 0:
            rank_zero_warn(
                f"metric_for_best_model={metric!r} with greater_is_better=True takes the model that is least "
                "collapsed for the best: pass greater_is_better=False, which is not the trainer's default."
            )

    def _check_ood(self, trainer: Any) -> None:
        """Warn of names in ``ood`` that are not names of data sets."""
        sets = trainer.eval_dataset
        known = [*(sets if isinstance(sets, Mapping) else ["eval"]), *(["test"] if "test" in self._stages else [])]
        missing = [name for name in self._ood if name not in known and name.removeprefix("eval_") not in known]
        if missing and sets is not None:
            rank_zero_warn(
                f"ood names {', '.join(missing)}, and what is evaluated is {', '.join(known)}: nc5 is measured of no "
                "other than those that ood names."
            )

    @staticmethod
    def _log(trainer: Any, control: Any, values: Mapping[str, float]) -> None:
        """Log values of this step. If the trainer was about to log its own, it does so afterwards."""
        if not values:
            return
        about_to = control.should_log
        trainer.control = control  # A callback before this one may have returned another one than the trainer's.
        trainer.log(dict(values))
        if trainer.control is not control:  # As may one that gets the logs.
            vars(control).update(vars(trainer.control))
            trainer.control = control
        control.should_log = about_to

    @contextmanager
    def _guard(self, evaluated: str = "") -> Iterator[None]:
        """Turn errors inside into a warning where the user asked for that, and leave no hook behind.

        Args:
            evaluated: Name of a set whose evaluation is done, and goes on without labels as the trainer's does.
        """
        try:
            with without_online_hint():
                yield
        except Exception as error:
            self._remove()
            if evaluated and isinstance(error, NoLabelsError):
                rank_zero_warn(f"neural collapse of {evaluated!r} is not measured: {error}")
                return
            if self._on_error == "raise" or isinstance(error, TraceError):
                raise
            rank_zero_warn(f"no measurement of neural collapse: {error}")

    def _remove(self) -> None:
        if self._step is not None:
            self._step.remove()
        self._step = None
