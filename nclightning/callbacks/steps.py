"""Neural collapse of the ordinary forwards of a trainer's steps: of validation and test, and online of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning as L
from torch import Tensor

from nclightning.callbacks.first_step import FirstTrainingStep
from nclightning.callbacks.host import LightningHost
from nclightning.callbacks.modules import evaluated_loaders, name_loaders
from nclightning.callbacks.publishing import Publisher
from nclightning.callbacks.training_data import TrainingSets
from nclightning.probe.collection import Centres, Measuring
from nclightning.probe.first_forward import FirstForward
from nclightning.probe.forwards import ForwardPass
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import SetReader, together
from nclightning.probe.sweep import TraceError
from nclightning.ranks import rank_zero_warn

__all__ = ["CollapseInEvaluation", "OnError", "StepForwards"]


class OnError:
    """What becomes of an error in a measurement.

    Args:
        choice: ``"raise"``, or ``"warn"``.
    """

    def __init__(self, choice: Literal["raise", "warn"]) -> None:
        self._choice = choice

    def raises(self, error: Exception) -> bool:
        """Whether an error ends the run: that a module was changed always does."""
        return self._choice == "raise" or isinstance(error, TraceError)

    @contextmanager
    def guard(self, callback: L.Callback) -> Iterator[None]:
        """Turn errors inside into a warning where the user asked for that, and leave no hook of the callback behind."""
        try:
            yield
        except Exception as error:
            callback.remove_hooks()  # type: ignore[attr-defined]
            if self.raises(error):
                raise
            rank_zero_warn(f"no reading of neural collapse: {error}")


class StepForwards:
    """A pass over the steps of a trainer.

    Args:
        of: Collects their features.
        on_error: What becomes of errors.
    """

    def __init__(self, of: ForwardPass, on_error: OnError) -> None:
        self._of, self._on_error = of, on_error
        self._places: dict[int, tuple[str, Any]] = {}

    def _place(self, loaders: Any, index: int) -> tuple[str, Any]:
        """Return name and loader by its number."""
        if index not in self._places:
            self._places[index] = list(name_loaders(loaders))[index]
        return self._places[index]

    def hook(
        self, pl_module: L.LightningModule, batch: Any, loaders: Any, index: int = 0, first: FirstForward | None = None
    ) -> None:
        """Hook the module before a step."""
        try:  # Not the guard itself, which costs as much as the rest.
            self._of.hook(LightningHost(pl_module), batch, self._place(loaders, index)[0], first)
        except Exception as error:
            self._fail(error)

    def collect(self, pl_module: L.LightningModule, loaders: Any, index: int = 0) -> None:
        """Take the features of the step."""
        try:
            self._of.collect(LightningHost(pl_module), *self._place(loaders, index))
        except Exception as error:
            self._fail(error)

    def read(self, pl_module: L.LightningModule) -> dict[str, Tensor]:
        """Evaluate the measures."""
        return self._of.read(LightningHost(pl_module))

    def _fail(self, error: Exception) -> None:
        if self._on_error.raises(error):
            self._of.remove()
            raise error
        self._of.fail(error)  # Processes hear of it together, when they read.

    def remove(self) -> None:
        """Remove the hooks. The next :meth:`hook` brings them back."""
        self._of.remove()


class CollapseInEvaluation(Publisher):
    """Measures the ordinary forwards of validation and test.

    Args:
        stages: Those that are read.
        ood: Names of loaders that are out of distribution.
        reader: Of features and labels.
        measuring: Which measures.
        training: Knows the training loaders, whose class means decisions and NC5 need.
        on_error: What becomes of errors.
    """

    def __init__(
        self,
        stages: tuple[str, ...],
        ood: tuple[str, ...],
        reader: PairReader,
        measuring: Measuring,
        training: TrainingSets,
        on_error: OnError,
    ) -> None:
        super().__init__()
        self._stages, self._ood, self._reader, self._measuring = stages, ood, reader, measuring
        self._training, self._on_error, self._sets = training, on_error, SetReader(reader, measuring)
        self._forwards: StepForwards | None = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start collecting."""
        self._forwards = None
        if _stage(trainer) not in self._stages or trainer.sanity_checking:
            return

        def centres() -> Centres:
            self._training.remember(trainer)
            host, sets = LightningHost(pl_module), self._training.needed()
            return together({name: self._sets.trained(host, data) for name, data in sets.items()})

        needed = bool(self._measuring.of_decisions or self._ood)
        forwards = ForwardPass(self._reader, self._measuring, self._ood, centres if needed else None)
        self._forwards = StepForwards(forwards, self._on_error)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Hook the module before the first batch."""
        if self._forwards is not None:
            self._forwards.hook(pl_module, batch, evaluated_loaders(trainer), dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Collect a batch; in Lightning's sanity check, see whether it can be read."""
        loaders = evaluated_loaders(trainer)
        if self._forwards is not None:
            self._forwards.collect(pl_module, loaders, dataloader_idx)
        elif trainer.sanity_checking and "val" in self._stages:  # By now weights exist.
            name = list(name_loaders(loaders))[dataloader_idx][0]
            with self._on_error.guard(self):
                FirstTrainingStep(self._reader).check_sanity(pl_module, batch, labelled=name not in self._ood)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log ``nc/val/...``, or in a test ``nc/test/...``."""
        if self._forwards is not None:
            with self._on_error.guard(self):
                values = self._forwards.read(pl_module)
                self.publish(pl_module, {f"nc/{_stage(trainer)}/{tag}": value for tag, value in values.items()})
        self._forwards = None

    on_test_epoch_start, on_test_epoch_end = on_validation_epoch_start, on_validation_epoch_end
    on_test_batch_start, on_test_batch_end = on_validation_batch_start, on_validation_batch_end

    def remove_hooks(self) -> None:
        """Leave no hook behind."""
        if self._forwards is not None:
            self._forwards.remove()
        self._forwards = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self.remove_hooks()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self.remove_hooks()


def _stage(trainer: L.Trainer) -> str:
    return "test" if trainer.testing else "val"
