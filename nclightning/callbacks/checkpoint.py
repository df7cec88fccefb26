"""A checkpoint from which a run can always be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from nclightning.callbacks.full_batch import full_batch
from nclightning.callbacks.stopping import goes_on
from nclightning.callbacks.stops import Stops, may_end
from nclightning.compat.progress import count_as_before_batch, count_as_new_epoch, is_before_more, is_last_batch
from nclightning.compat.twins import is_termination, is_torch_checkpoint_io, run_last, termination
from nclightning.errors import UserError, say_the_same
from nclightning.files import FolderLock, check_checkpoint, is_sound, keep_as, make_folder
from nclightning.files import save_checkpoint as write_checkpoint
from nclightning.folders import checkpoint_of, find_run_logger, run_folder
from nclightning.interrupts import SIGTERM_STATUS, NotedTermination
from nclightning.overrides import ProtectedHooks, protected
from nclightning.ranks import count_over_ranks

__all__ = ["LastCheckpoint"]


class _CheckedCheckpointIO(TorchCheckpointIO):
    """Writes local checkpoints directly to disk, in one atomic step, and refuses to read damaged ones.

    Lightning's own class makes a second copy of each checkpoint in memory, and loads flipped bits without an error.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a checkpoint; if that fails, the file that was there is unchanged."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        make_folder(Path(path).parent)
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        """Read a checkpoint, or say that it is damaged."""
        if Path(path).is_file():
            check_checkpoint(Path(path), f"ckpt_path={path}")
        return super().load_checkpoint(path, *args, **options)


class LastCheckpoint(ProtectedHooks, Checkpoint):
    """Saves ``checkpoints/last.ckpt`` in the run folder: at a cadence, at the end, and on an interrupt or error.

    Lightning's ``ModelCheckpoint`` does not save the last iterate of a run whose length is not a multiple of its
    cadence. The file is replaced in one atomic step, so that a crash while saving leaves the previous checkpoint.
    Lightning runs checkpoint callbacks after all others, so that the readings up to the checkpoint are on disk before
    it. The checkpoint that is replaced is kept as ``previous.ckpt``.

    The run folder is that of a ``RunLogger``, or else of the first logger that has one, or else the trainer's
    ``default_root_dir``. A folder is refused if it has the checkpoint of another run, or if another process is writing
    to it. With ``fast_dev_run`` nothing is saved. A trainer with this callback checks each checkpoint that it reads and
    refuses a damaged one.

    Each checkpoint of a trainer with this callback records whether training was stopped and by which callback, such as
    ``EarlyStopping``, ``Timer`` or any other that sets ``trainer.should_stop``. A fit that resumes from it ends at once
    and says so, unless the settings that stopped it have changed.

    Args:
        every_n_iterations: Cadence. A checkpoint is saved at the end of the first Lightning step at or past each
            multiple.
        keep_previous: Whether ``previous.ckpt`` is kept.

    Raises:
        ValueError: If the cadence is below 1; at the start of a fit, if the folder is that of another run.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import lightning as L
        >>> from nclightning.callbacks import LastCheckpoint
        >>> from nclightning.data import IndexDataModule
        >>> from nclightning.models import UFM
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> model = UFM(num_classes=3, samples_per_class=5, feature_dim=4, loss="mse", lambda_=0.01)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = L.Trainer(max_steps=100, accelerator="cpu", default_root_dir=folder,
        ...                         callbacks=[LastCheckpoint(every_n_iterations=50)], **quiet)
        ...     trainer.fit(model, IndexDataModule())
        ...     sorted(path.name for path in Path(folder).rglob("*.ckpt"))
        ['last.ckpt']
    """

    def __init__(self, every_n_iterations: int = 1000, keep_previous: bool = True) -> None:
        if every_n_iterations < 1:
            raise UserError(f"every_n_iterations must be at least 1, got {every_n_iterations}.")
        self.every_n_iterations = every_n_iterations
        self.keep_previous = keep_previous
        self._saved: int | None = None  # None until a fit has started.
        self._first = 0
        self._path: Path | None = None
        self._own = False  # Whether this callback wrote the file that is there.
        self._lock: FolderLock | None = None
        self._termination = NotedTermination()
        self._stops: Stops | None = None
        self._has_ended = False  # Whether the fit is over when a checkpoint is saved.
        self._is_between = False  # Whether a checkpoint is saved before a batch instead of after one.
        self._stops_at_first = False  # Whether a resumed fit is to end with its first Lightning step.

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Reset the state of an earlier fit, and replace Lightning's checkpoint IO unless the user chose one."""
        self._saved, self._stops = None, Stops(trainer)
        self._has_ended = self._stops_at_first = False
        run_last(trainer, self)
        if is_torch_checkpoint_io(trainer.strategy.checkpoint_io):
            trainer.strategy.checkpoint_io = _CheckedCheckpointIO()

    @protected
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """End a run again that had been stopped, unless the settings that stopped it have changed."""
        stop = checkpoint.get("stop")
        if not stop or self._stops is None or trainer.state.fn != "fit":
            return
        # The first process decides for all, because attributes of the others may differ.
        ending = trainer.strategy.broadcast(self._stops.standing(checkpoint, pl_module))
        if ending is None:
            trainer.print(goes_on(stop["iteration"]))
            return
        self._stops.take_over(stop)
        if not may_end(trainer, checkpoint):
            trainer.should_stop = True
            trainer.print(f"{ending} By min_steps or min_epochs training goes on up to there.")
            return
        trainer.print(f"The run is finished. {ending}")
        self._stops_at_first = full_batch(pl_module) and _lacks_last_row(trainer, stop)
        trainer.should_stop = not self._stops_at_first

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save where an epoch or a validation has ended, and let a run end again whose last row is to be made up."""
        if self._is_due(trainer):
            self._is_between = True
            try:
                self._save(trainer)
            finally:
                self._is_between = False
        if self._stops_at_first:
            self._stops_at_first, trainer.should_stop = False, True

    @protected
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record which callback stopped training."""
        stop = None if self._stops is None else self._stops.record(pl_module)
        checkpoint["stop"] = None if stop is None else stop | {"complete": self._has_ended}
        if self._is_between:
            count_as_before_batch(checkpoint)
        if self._has_ended and is_last_batch(trainer):
            count_as_new_epoch(checkpoint)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the run folder, and count from the iterate that the run starts from."""
        if self._stops is not None:
            self._stops.begin()
        before, refusal = self._path, None
        try:
            self._take(trainer)
        except UserError as error:
            refusal = error
        # The folder is that of the first process. If it refuses, all processes stop together.
        path, reason = trainer.strategy.broadcast((self._path, str(refusal) if refusal else None))
        if reason is not None:
            raise refusal or UserError(reason)
        self._path, self._own = path, self._own and path == before
        self._saved = self._first = trainer.global_step
        self._termination = NotedTermination()
        if trainer.world_size > 1:
            self._termination.hold()

    def _take(self, trainer: L.Trainer) -> None:
        """Find the run folder, and refuse it if another run has its checkpoint there."""
        before, folder = self._path, run_folder(trainer)
        self._path = None if folder is None else checkpoint_of(folder)
        if folder is None or self._path is None or not trainer.is_global_zero:
            return
        if self._path.exists() and not (self._own and self._path == before) and not self._continues(trainer):
            raise UserError(
                f"{self._path} is the checkpoint of another run. Go on with that run by ckpt_path, or give this one a "
                "folder of its own: a RunLogger counts them up, and so does each default_root_dir."
            )
        if find_run_logger(trainer) is None:  # A RunLogger locks the folder itself.
            make_folder(folder)
            self._lock = FolderLock(folder)
            self._lock.acquire()

    def _continues(self, trainer: L.Trainer) -> bool:
        """Whether the fit goes on from a checkpoint in the folder that it writes."""
        assert self._path is not None
        given = trainer.ckpt_path
        if given is None or "://" in str(given):
            return False
        parent = Path(given).absolute().parent
        return parent.is_dir() and parent.samefile(self._path.parent)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the cadence, but not the last iterate: its row is complete when training has ended.

        Processes that train together end together here if one of them is asked to.
        """
        if trainer.world_size > 1 and count_over_ranks(int(self._termination.waiting), trainer.strategy.root_device):
            raise termination(trainer)
        if self._is_due(trainer) and not _is_ending(trainer) and not is_before_more(trainer, batch_idx):
            self._save(trainer)

    def _is_due(self, trainer: L.Trainer) -> bool:
        assert self._saved is not None
        return trainer.global_step // self.every_n_iterations > self._saved // self.every_n_iterations

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last iterate, after all its values were logged."""
        if self._saved == trainer.global_step != self._first:
            self._saved = self._first  # What ended the run came after the checkpoint of this iterate.
        self._has_ended = True
        self._save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the iterate that was reached. If a resume was refused, its checkpoint is left unchanged."""
        asked = isinstance(exception, KeyboardInterrupt) or is_termination(exception)
        # Saving needs all processes. A request to stop reaches all of them, an error may reach one only.
        if trainer.training and (asked or trainer.world_size == 1):
            try:
                self._save(trainer)
            except (UserError, OSError) as error:  # The first error is the one to raise.
                if not say_the_same(error, exception):
                    rank_zero_warn(f"the last checkpoint could not be saved: {error}")
        if asked and self._path is not None and self._saved is not None:
            signal = "SIGINT" if isinstance(exception, KeyboardInterrupt) else "SIGTERM"
            rank_zero_info(f"{signal}: the run is saved at iteration {self._saved}. It goes on from {self._path}.")
        if is_termination(exception) and trainer.is_global_zero:
            assert isinstance(exception, SystemExit)
            # Lightning's exit has status 0. Only the first process changes it: if another process had a
            # nonzero status, Lightning would kill the first one.
            exception.code = SIGTERM_STATUS
        self._release()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release the lock of the folder."""
        self._release()

    def _release(self) -> None:
        self._termination.release()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _save(self, trainer: L.Trainer) -> None:
        if self._path is None or self._saved is None or trainer.global_step <= self._saved:
            return
        for logger in trainer.loggers:
            logger.save()  # The readings up to the checkpoint must be on disk before it.
        if trainer.is_global_zero:
            self._keep(self._path)
        trainer.save_checkpoint(self._path, weights_only=False)
        self._saved, self._own = trainer.global_step, True

    def _keep(self, path: Path) -> None:
        """Keep the checkpoint that is to be replaced, unless it is damaged."""
        if self.keep_previous and path.is_file() and (self._own or is_sound(path)):
            keep_as(path, path.with_name("previous.ckpt"))


def _is_ending(trainer: L.Trainer) -> bool:
    """Whether training ends with the present Lightning step, as far as is known by now."""
    steps, epochs = trainer.global_step, trainer.current_epoch + 1
    stops = trainer.should_stop and steps >= (trainer.min_steps or 0) and epochs >= (trainer.min_epochs or 0)
    return stops or 0 <= trainer.max_steps <= steps


def _lacks_last_row(trainer: L.Trainer, stop: Mapping[str, Any]) -> bool:
    """Whether the row of the iterate at which a run was stopped may be missing."""
    logger = find_run_logger(trainer)
    if logger is None or not logger.table.path.exists():
        return not stop["complete"]
    return logger.table.last < int(stop["iteration"])
