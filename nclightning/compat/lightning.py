"""Names of Lightning that its documentation does not promise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment  # type: ignore[attr-defined]
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

__all__ = [
    "DescribedProgressBar",
    "GivenConfigurationCLI",
    "WriterLogger",
    "attach_as_in_a_fit",
    "batches_read",
    "cadence_of",
    "change_checkpointing",
    "count_iterations",
    "iterations_done",
    "moves_plainly",
    "prepare_batch",
    "present",
    "present_logged",
    "shown_as_validating",
    "splits_layers",
    "state_key_unchecked",
    "trainer_of",
    "write_hyperparameters",
    "writes_distributed_checkpoints",
]

Method = TypeVar("Method", bound=Callable[..., Any])


def trainer_of(pl_module: Any) -> Any:
    """Return the trainer of a module; None if it has none.

    Non-public: ``LightningModule._trainer`` (lightning 2.6). ``LightningModule.trainer`` raises without a trainer, and
    gives a stand-in without ``training`` and ``strategy`` under Fabric. Without it nothing could be asked of a model
    outside of a fit.

    Args:
        pl_module: Of either package.
    """
    return pl_module._trainer


def prepare_batch(pl_module: Any, batch: Any) -> Any:
    """Run the user's hook ``on_before_batch_transfer`` as the trainer does before it moves a batch to the device.

    Non-public: ``LightningModule._on_before_batch_transfer`` (lightning 2.6), which takes the hook of the data module
    where that has one. Without it a sweep would measure other inputs than training sees.

    Args:
        pl_module: Attached to a trainer.
        batch: Of a loader.
    """
    return pl_module._on_before_batch_transfer(batch)


_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_LIGHTNINGS_OWN = {"lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks"}


def moves_plainly(trainer: Any, pl_module: Any) -> bool:
    """Whether batches are only moved to the device on their way to a step, by no hook of the user's.

    Non-public: ``lightning.pytorch.core.hooks``, where Lightning's own hooks are (lightning 2.6). If they moved
    elsewhere, batches would go through empty hooks, which takes three times as long for small ones.

    Args:
        trainer: Of the module.
        pl_module: Of either package.
    """
    owners = [each for each in (pl_module, trainer.datamodule) if each is not None]
    hooks = [(owner, name) for owner in owners for name in _TRANSFER_HOOKS]
    own = all(getattr(type(owner), name).__module__ in _LIGHTNINGS_OWN for owner, name in hooks)
    return own and not any(name in vars(owner) for owner, name in hooks)


def batches_read(trainer: Any) -> int:
    """Count the batches that training has read in the present epoch, or in its last one.

    Non-public: ``trainer.fit_loop``, ``epoch_loop.batch_idx`` (lightning 2.6). Hooks are told the number of their own
    batch only, and a validation between two of them is told none. Without it a stream, which may have no end, would be
    swept further than training has read.

    Args:
        trainer: In a fit, or after it.
    """
    count: int = trainer.fit_loop.epoch_loop.batch_idx + 1
    return count


def count_iterations(trainer: Any, done: int, reached: int) -> None:
    """Let a trainer count the steps of an optimizer that it has not stepped itself.

    Non-public: ``trainer.fit_loop``, ``epoch_loop.manual_optimization``, ``optim_step_progress`` and
    ``epoch_loop._batches_that_stepped`` (lightning 2.6). Lightning counts one step for each call of a wrapped
    optimizer, which costs more than an iteration does. Without the first three ``global_step`` would stay at 0, and
    neither ``max_steps`` nor a checkpoint would come. Without the last, what is logged through the module would be
    drawn against Lightning steps instead of iterations.

    Args:
        trainer: In a fit.
        done: Iterations since the last call.
        reached: Number of the last iteration.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.manual_optimization.optim_step_progress.increment_by(done)
    loop._batches_that_stepped = reached


def iterations_done(checkpoint: Mapping[str, Any]) -> int:
    """Read from a checkpoint how many iterations were counted by :func:`count_iterations`.

    Non-public: the entry ``["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"]`` (lightning
    2.6). Without it a checkpoint whose counts disagree would be resumed with curves that are shifted.

    Args:
        checkpoint: Lightning's.

    Raises:
        KeyError: If there is no such entry.
        TypeError: If it is of another kind.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"]
    done: int = progress["total"]["completed"]
    return done


def present(trainer: Any, values: Mapping[str, Tensor]) -> None:
    """Put values in ``trainer.callback_metrics``, also where ``LightningModule.log`` refuses to.

    Non-public: that ``Trainer.callback_metrics`` is the mapping in which Lightning itself keeps the values (lightning
    2.6). Without it EarlyStopping and ModelCheckpoint would not find what was measured in the middle of an epoch, or
    before a resume.

    Args:
        trainer: In a fit.
        values: By name.
    """
    trainer.callback_metrics.update(values)


def present_logged(trainer: Any, values: Mapping[str, Tensor]) -> None:
    """Put values in ``trainer.logged_metrics``, also where ``LightningModule.log`` refuses to.

    Non-public: that ``Trainer.logged_metrics`` is the mapping in which Lightning itself keeps the values (lightning
    2.6). Without it they would not have what went to the loggers past Lightning.

    Args:
        trainer: In a fit.
        values: By name.
    """
    trainer.logged_metrics.update(values)


def attach_as_in_a_fit(trainer: Any, pl_module: Any, datamodule: Any) -> None:
    """Bring a module and its data to where they are when a fit begins: set up, converted and on the device.

    Non-public: ``Trainer._data_connector``, ``trainer.call._call_setup_hook``, ``trainer.call._call_configure_model``,
    and that ``Trainer.state.fn`` and ``Trainer.validating`` can be set (lightning 2.6). A fit would also make the
    user's optimizers and run steps. As in an evaluation pass of a fit, the trainer says that it validates. Without it
    hooks of the user that set up models or data, or change batches, would not run, and a checkpoint would be measured
    on other inputs than training saw.

    Args:
        trainer: Of one process and the package of the module.
        pl_module: Of either package.
        datamodule: None if the module has loaders of its own.
    """
    call = import_module(f"{type(trainer).__module__.rpartition('.')[0]}.call")
    trainer.strategy.connect(pl_module)
    trainer.state.fn, trainer.validating = "fit", True
    trainer._data_connector.attach_data(pl_module, datamodule=datamodule)
    trainer._data_connector.prepare_data()
    call._call_setup_hook(trainer)
    call._call_configure_model(trainer)
    trainer.strategy.model = trainer.precision_plugin.convert_module(pl_module)
    trainer.strategy.model_to_device()


@contextmanager
def shown_as_validating(trainer: Any) -> Iterator[None]:
    """Let a trainer that trains say that it validates.

    Non-public: that ``Trainer.validating`` and ``Trainer.state.stage`` can be set (lightning 2.6). Without it hooks of
    the user that ask ``trainer.training`` would augment the batches of a sweep.

    Args:
        trainer: Of either package.
    """
    stage = trainer.state.stage
    try:
        if trainer.training:
            trainer.validating = True
        yield
    finally:
        trainer.state.stage = stage


def state_key_unchecked(method: Method) -> Method:
    """Let several callbacks of a class whose states in checkpoints would be taken for one another be in a trainer.

    Non-public: that Lightning, which refuses them in ``_validate_callbacks_list``, looks at what a method wraps
    (lightning 2.6). Its message knows no repair. Without it the message that names the repair would come second.

    Args:
        method: ``state_dict`` of a callback.
    """
    return wraps(L.Callback.state_dict)(method)  # type: ignore[return-value]


def cadence_of(checkpoint: Any) -> int:
    """Return after how many steps a checkpoint callback saves; 0 if it does not go by steps.

    Non-public: ``ModelCheckpoint._every_n_train_steps`` (lightning 2.6). Without it a cadence that never comes true,
    because the full-batch loop makes many iterations at once, would not be refused, and nothing would be saved.

    Args:
        checkpoint: Any callback.
    """
    return getattr(checkpoint, "_every_n_train_steps", 0) or 0


def splits_layers(strategy: ModelParallelStrategy) -> bool:
    """Whether a strategy is to share out layers, and not samples only; its processes need not run yet.

    Non-public: ``ModelParallelStrategy._tensor_parallel_size`` (lightning 2.6). ``device_mesh`` is there only when the
    processes run. Without it a run that cannot work would be refused after its start on all processes.

    Args:
        strategy: Of a trainer.
    """
    size = strategy._tensor_parallel_size
    return (strategy.num_processes if size == "auto" else int(size)) > 1


def writes_distributed_checkpoints(strategy: ModelParallelStrategy) -> bool:
    """Whether the checkpoints of a strategy are folders, which a single process cannot read.

    Non-public: ``ModelParallelStrategy._save_distributed_checkpoint`` (lightning 2.6). Without it such a run would be
    refused when it saves its first checkpoint.

    Args:
        strategy: Of a trainer.
    """
    return bool(strategy._save_distributed_checkpoint)


def change_checkpointing(
    strategy: ModelParallelStrategy,
    optimizer_state: Callable[[Any], dict[str, Any]],
    load_checkpoint: Callable[..., dict[str, Any]],
) -> None:
    """Replace two methods of a strategy that a trainer has made already.

    Non-public: that ``Strategy.optimizer_state`` is called with the optimizer, and ``Strategy.load_checkpoint`` with
    ``(checkpoint_path, weights_only)`` (lightning 2.6). Without it the state of ArmijoGD would be lost in checkpoints.

    Args:
        strategy: Whose methods are replaced.
        optimizer_state: Instead of its method of that name.
        load_checkpoint: The same.
    """
    strategy.optimizer_state = optimizer_state  # type: ignore[method-assign,assignment]
    strategy.load_checkpoint = load_checkpoint  # type: ignore[method-assign]


def write_hyperparameters(path: Any, hparams: Any) -> None:
    """Write ``hparams.yaml`` as Lightning's loggers do.

    Non-public: ``lightning.pytorch.core.saving`` (lightning 2.6). Without it run folders would have no
    ``hparams.yaml``, by which a folder is known as that of a run.

    Args:
        path: To write to.
        hparams: By name.
    """
    save_hparams_to_yaml(path, hparams)


class WriterLogger(TensorBoardLogger):
    """TensorBoard logger with a writer of its own, which counts its versions up.

    Non-public: ``TensorBoardLogger._experiment``, ``TensorBoardLogger._kwargs``, ``TensorBoardLogger._version``
    (lightning 2.6). Without the first ``finalize`` would leave the event file open; without the second options of the
    user for the writer would be lost; without the third two runs that start together would write in one folder.
    """

    def make_writer(self, options: dict[str, Any]) -> Any:
        """Make the writer, when something is to be written for the first time.

        Args:
            options: Arguments that the logger was given for it.
        """
        raise NotImplementedError

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """TensorBoard's writer; the first access makes the run folder."""
        if self._experiment is None:
            self._experiment = self.make_writer(self._kwargs)
        return self._experiment

    @property
    def has_writer(self) -> bool:
        """Whether the writer was made."""
        return self._experiment is not None

    def set_writer_option(self, name: str, value: Any) -> None:
        """Set an argument for the writer that is to be made."""
        self._kwargs[name] = value

    def count_version_up(self) -> None:
        """Go on to the next number."""
        self._version = int(self.version) + 1


class DescribedProgressBar(RichProgressBar):
    """Rich progress bar that says itself what it counts.

    Non-public: ``RichProgressBar._get_train_description``, ``RichProgressBar.train_progress_bar_id`` (lightning 2.6).
    Without the first the bar would say ``Epoch 0/-2``, without the second each epoch would begin a new bar.
    """

    def describe_training(self) -> str:
        """Say what is counted."""
        raise NotImplementedError

    @property
    def has_training_bar(self) -> bool:
        """Whether the bar of training is there."""
        return self.train_progress_bar_id is not None

    def _get_train_description(self, current_epoch: int) -> str:
        return self.describe_training()


class GivenConfigurationCLI(LightningCLI):
    """Command line whose configuration is the given one, also with a checkpoint.

    Non-public: ``LightningCLI._parse_ckpt_path`` (lightning 2.6). Without it the hyperparameters of a checkpoint would
    win over the configuration in silence.
    """

    def _parse_ckpt_path(self) -> None:
        pass
