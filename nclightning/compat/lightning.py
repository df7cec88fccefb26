"""Uses of undocumented names of Lightning.

Each docstring lists the names, a version of Lightning that has them, and what would not work without them.
"""

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
    under Fabric returns a stand-in without ``training`` and ``strategy``. Without it a model could not be inspected
    outside of a fit.

    Args:
        pl_module: A LightningModule of either package.
    """
    return pl_module._trainer


def prepare_batch(pl_module: Any, batch: Any) -> Any:
    """Run the user's hook ``on_before_batch_transfer`` as the trainer does before it moves a batch to the device.

    Non-public: ``LightningModule._on_before_batch_transfer`` (lightning 2.6), which calls the hook of the data module
    if that has one. Without it an evaluation pass would measure other inputs than those of training.

    Args:
        pl_module: A module that is attached to a trainer.
        batch: A batch of a loader.
    """
    return pl_module._on_before_batch_transfer(batch)


_TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_LIGHTNING_HOOK_MODULES = {"lightning.pytorch.core.hooks", "pytorch_lightning.core.hooks"}


def moves_plainly(trainer: Any, pl_module: Any) -> bool:
    """Return whether batches are moved to the device without a hook of the user.

    Non-public: ``lightning.pytorch.core.hooks``, where Lightning's own hooks are defined (lightning 2.6). If these were
    elsewhere, batches would go through empty hooks, which takes three times as long for small batches.

    Args:
        trainer: The trainer of the module.
        pl_module: A LightningModule of either package.
    """
    owners = [each for each in (pl_module, trainer.datamodule) if each is not None]
    hooks = [(owner, name) for owner in owners for name in _TRANSFER_HOOKS]
    own = all(getattr(type(owner), name).__module__ in _LIGHTNING_HOOK_MODULES for owner, name in hooks)
    return own and not any(name in vars(owner) for owner, name in hooks)


def batches_read(trainer: Any) -> int:
    """Return the number of batches that training has read in the current epoch, or in the last one.

    Non-public: ``trainer.fit_loop``, ``epoch_loop.batch_idx`` (lightning 2.6). Training hooks get only the index of
    their own batch, and validation hooks do not get it. Without it an evaluation pass over a stream, which may be
    infinite, would read further than training has.

    Args:
        trainer: A trainer in a fit, or after it.
    """
    count: int = trainer.fit_loop.epoch_loop.batch_idx + 1
    return count


def count_iterations(trainer: Any, done: int, reached: int) -> None:
    """Increase the trainer's step counts by optimizer steps that it did not run itself.

    Non-public: ``trainer.fit_loop``, ``epoch_loop.manual_optimization``, ``optim_step_progress`` and
    ``epoch_loop._batches_that_stepped`` (lightning 2.6). Lightning counts one step for each call of a wrapped
    optimizer, which costs more than an iteration does. Without the first three, ``global_step`` would stay at 0,
    ``max_steps`` would not stop the run, and no checkpoint would be saved. Without the last, values that are logged
    through the module would be plotted against Lightning steps instead of iterations.

    Args:
        trainer: A trainer in a fit.
        done: Number of iterations since the last call.
        reached: Number of the last iteration.
    """
    loop = trainer.fit_loop.epoch_loop
    loop.manual_optimization.optim_step_progress.increment_by(done)
    loop._batches_that_stepped = reached


def iterations_done(checkpoint: Mapping[str, Any]) -> int:
    """Return the number of iterations in a checkpoint, as counted by :func:`count_iterations`.

    Non-public: the entry ``["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"]`` (lightning
    2.6). Without it a checkpoint with inconsistent counts would be resumed with shifted curves.

    Args:
        checkpoint: Lightning's checkpoint.

    Raises:
        KeyError: If there is no such entry.
        TypeError: If the entry has another type.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"]
    done: int = progress["total"]["completed"]
    return done


def present(trainer: Any, values: Mapping[str, Tensor]) -> None:
    """Add values to ``trainer.callback_metrics``, also in hooks where ``LightningModule.log`` raises an error.

    Non-public: that ``Trainer.callback_metrics`` is the mapping in which Lightning itself keeps the values (lightning
    2.6). Without it EarlyStopping and ModelCheckpoint would not find values that were measured in the middle of an
    epoch, or before a resume.

    Args:
        trainer: A trainer in a fit.
        values: Values by name.
    """
    trainer.callback_metrics.update(values)


def present_logged(trainer: Any, values: Mapping[str, Tensor]) -> None:
    """Add values to ``trainer.logged_metrics``, also in hooks where ``LightningModule.log`` raises an error.

    Non-public: that ``Trainer.logged_metrics`` is the mapping in which Lightning itself keeps the values (lightning
    2.6). Without it the mapping would miss values that are sent to loggers directly.

    Args:
        trainer: A trainer in a fit.
        values: Values by name.
    """
    trainer.logged_metrics.update(values)


def attach_as_in_a_fit(trainer: Any, pl_module: Any, datamodule: Any) -> None:
    """Set up a module and its data as at the start of a fit: all setup hooks have run, and the model is on the device.

    Non-public: ``Trainer._data_connector``, ``trainer.call._call_setup_hook``, ``trainer.call._call_configure_model``,
    and that ``Trainer.state.fn`` and ``Trainer.validating`` can be set (lightning 2.6). A fit itself cannot be used,
    because it would also construct the user's optimizers and run steps. The trainer is in the state of validation, as
    in an evaluation pass of a fit. Without it the user's hooks that set up models or data, or change batches, would not
    run, and a checkpoint would be measured on other inputs than those of training.

    Args:
        trainer: A trainer for one process, from the package of the module.
        pl_module: A LightningModule of either package.
        datamodule: The data module; None if the module has its own loaders.
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
    """In the block, let a trainer that is training report that it is validating.

    Non-public: that ``Trainer.validating`` and ``Trainer.state.stage`` can be set (lightning 2.6). Without it hooks of
    the user that check ``trainer.training`` would augment the batches of an evaluation pass.

    Args:
        trainer: A trainer of either package.
    """
    stage = trainer.state.stage
    try:
        if trainer.training:
            trainer.validating = True
        yield
    finally:
        trainer.state.stage = stage


def state_key_unchecked(method: Method) -> Method:
    """Disable Lightning's check that callbacks of a trainer have different keys for their states.

    The package makes this check itself, with a message that says how to fix the error. Non-public: that Lightning's
    check, in ``_validate_callbacks_list``, looks at the function that a method wraps (lightning 2.6). Without it
    Lightning's own message, which does not say how to fix the error, would appear instead.

    Args:
        method: The method ``state_dict`` of a callback.
    """
    return wraps(L.Callback.state_dict)(method)  # type: ignore[return-value]


def cadence_of(checkpoint: Any) -> int:
    """Return the number of steps between two saves of a checkpoint callback; 0 if it does not count steps.

    Non-public: ``ModelCheckpoint._every_n_train_steps`` (lightning 2.6). Without it there would be no error for a
    cadence that is never met, because the full-batch loop makes many iterations at once, and nothing would be saved.

    Args:
        checkpoint: Any callback.
    """
    return getattr(checkpoint, "_every_n_train_steps", 0) or 0


def splits_layers(strategy: ModelParallelStrategy) -> bool:
    """Return whether a strategy splits layers between processes, and not only samples. It works before their start.

    Non-public: ``ModelParallelStrategy._tensor_parallel_size`` (lightning 2.6). ``device_mesh`` exists only after the
    start of the processes. Without it the error for an unsupported strategy would come only after this start.

    Args:
        strategy: The strategy of a trainer.
    """
    size = strategy._tensor_parallel_size
    return (strategy.num_processes if size == "auto" else int(size)) > 1


def writes_distributed_checkpoints(strategy: ModelParallelStrategy) -> bool:
    """Return whether the checkpoints of a strategy are folders, which a single process cannot read.

    Non-public: ``ModelParallelStrategy._save_distributed_checkpoint`` (lightning 2.6). Without it the error for such a
    run would come only when it saves its first checkpoint.

    Args:
        strategy: The strategy of a trainer.
    """
    return bool(strategy._save_distributed_checkpoint)


def change_checkpointing(
    strategy: ModelParallelStrategy,
    optimizer_state: Callable[[Any], dict[str, Any]],
    load_checkpoint: Callable[..., dict[str, Any]],
) -> None:
    """Replace the two methods with which a strategy saves the state of optimizers and loads checkpoints.

    Non-public: that ``Strategy.optimizer_state`` is called with the optimizer, and ``Strategy.load_checkpoint`` with
    ``(checkpoint_path, weights_only)`` (lightning 2.6). Without it the state of ArmijoGD would be lost in checkpoints.

    Args:
        strategy: The strategy.
        optimizer_state: Replacement for its method of the same name.
        load_checkpoint: Replacement for its method of the same name.
    """
    strategy.optimizer_state = optimizer_state  # type: ignore[method-assign,assignment]
    strategy.load_checkpoint = load_checkpoint  # type: ignore[method-assign]


def write_hyperparameters(path: Any, hparams: Any) -> None:
    """Write ``hparams.yaml`` as Lightning's loggers do.

    Non-public: ``lightning.pytorch.core.saving`` (lightning 2.6). Without it run folders would have no
    ``hparams.yaml``, by which they are recognised.

    Args:
        path: The file to write.
        hparams: Hyperparameters by name.
    """
    save_hparams_to_yaml(path, hparams)


class WriterLogger(TensorBoardLogger):
    """TensorBoard logger whose subclass constructs the writer, and can change the version.

    Non-public: ``TensorBoardLogger._experiment``, ``TensorBoardLogger._kwargs``, ``TensorBoardLogger._version``
    (lightning 2.6). Without the first, ``finalize`` would leave the event file open; without the second, the user's
    options for the writer would be lost; without the third, two runs that start together would write to one folder.
    """

    def make_writer(self, options: dict[str, Any]) -> Any:
        """Construct the writer at its first use.

        Args:
            options: The logger's arguments for the writer.
        """
        raise NotImplementedError

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """TensorBoard's writer. The first access creates the run folder."""
        if self._experiment is None:
            self._experiment = self.make_writer(self._kwargs)
        return self._experiment

    @property
    def has_writer(self) -> bool:
        """Whether the writer exists."""
        return self._experiment is not None

    def set_writer_option(self, name: str, value: Any) -> None:
        """Set an argument for the writer before its construction."""
        self._kwargs[name] = value

    def count_version_up(self) -> None:
        """Increase the version by one."""
        self._version = int(self.version) + 1


class DescribedProgressBar(RichProgressBar):
    """Rich progress bar with its own description of training.

    Non-public: ``RichProgressBar._get_train_description``, ``RichProgressBar.train_progress_bar_id`` (lightning 2.6).
    Without the first, the bar would show ``Epoch 0/-2``; without the second, each epoch would start a new bar.
    """

    def describe_training(self) -> str:
        """Return the description of the training bar."""
        raise NotImplementedError

    @property
    def has_training_bar(self) -> bool:
        """Whether the training bar exists."""
        return self.train_progress_bar_id is not None

    def _get_train_description(self, current_epoch: int) -> str:
        return self.describe_training()


class GivenConfigurationCLI(LightningCLI):
    """Command line that does not replace the given configuration by the hyperparameters of a checkpoint.

    Non-public: ``LightningCLI._parse_ckpt_path`` (lightning 2.6). Without it the hyperparameters of a checkpoint would
    silently override the configuration.
    """

    def _parse_ckpt_path(self) -> None:
        pass
