"""Sources that are Lightning checkpoints, measured with the model and data of their training."""

from __future__ import annotations

import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from nclightning.callbacks.collapse_at_iterates import CollapseAtIterates
from nclightning.callbacks.full_batch import full_batch
from nclightning.callbacks.host import LightningHost
from nclightning.callbacks.modules import name_loaders
from nclightning.compat.lightning import attach_as_in_a_fit
from nclightning.compat.torch import COMPILED_PREFIX
from nclightning.configurations import read_configuration
from nclightning.errors import UserError
from nclightning.probe.sets import DataSet
from nclightning.probe.sweep import limited_batches, untouched
from nclightning.series.classes import call_with, construct, import_named
from nclightning.series.loaders import given_loaders, own_loaders, unshuffled
from nclightning.series.opening import check_file, content_of, load_torch, weights_of
from nclightning.series.sets import ModelOptions, chosen_device, measure_sets, to_floats

__all__ = ["CheckpointSource", "Training", "checkpoint_sources"]

_HPARAMS = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
_BASES = {"model": "LightningModule", "data": "LightningDataModule"}
_LIMITS = ("limit_train_batches", "limit_val_batches", "overfit_batches")
_MAX_NAMES = 3


def checkpoint_sources(paths: Sequence[Path], training: Training) -> list[CheckpointSource]:
    """Return a source for each checkpoint.

    Raises:
        ValueError: If a file cannot be read, or is not a Lightning checkpoint.
    """
    return [CheckpointSource(path, training) for path in paths]


class CheckpointSource:
    """A checkpoint. Its step is its ``global_step``.

    Args:
        path: The file.
        training: Model and data, the same for all checkpoints.

    Raises:
        ValueError: If the file cannot be read, or is not a Lightning checkpoint.
    """

    def __init__(self, path: Path, training: Training) -> None:
        check_file(path)
        self.path, self._training = path, training
        self.name, self.size = str(path), path.stat().st_size
        self.step = int(self._load()["global_step"])

    def _load(self, checked: bool = False) -> dict[str, Any]:
        """Load the checkpoint, and raise unless it has a step and weights."""
        options = self._training.options
        content = load_torch(self.path, options.weights_only, checked)
        if not isinstance(content, dict) or "global_step" not in content or "state_dict" not in content:
            raise UserError(
                f"{self.path} is not a checkpoint of Lightning, which has state_dict and global_step. To measure saved "
                "features, give .npz, .npy, .pt or .safetensors files."
            )
        if not isinstance(content.get(options.state_dict), Mapping):
            have = [name for name, value in content.items() if isinstance(value, Mapping)]
            raise UserError(f"{self.path} has no weights under --state_dict {options.state_dict}, only {have}.")
        return content

    def fingerprint(self) -> str:
        """Return a fingerprint of the file."""
        return content_of([self.path])

    def weights(self) -> str:
        """Return a fingerprint of the weights. Two checkpoints with the same weights may differ in other entries."""
        return weights_of(self._load()[self._training.options.state_dict])

    def measure(self) -> dict[str, float]:
        """Load the weights into the model and measure it."""
        return self._training.measure(self._load(checked=True), self.name)


@dataclass(frozen=True)
class _Built:
    """A model with its trainer and loaders.

    Attributes:
        module: The model.
        sets: For each stage, the loaders with their names.
        datamodule: The data module; None if the loaders come from the model or from a function.
    """

    module: Any
    sets: dict[str, list[tuple[str, DataSet]]]
    datamodule: Any


class Training:
    """Model and data of a series of checkpoints.

    They are constructed once in each process. A model with ``strict_loading=False`` is constructed for each checkpoint.

    Args:
        config: Path of a configuration that LightningCLI saved; None if there is none.
        model: ``module:Class`` of the model; None if the configuration has its ``class_path``.
        data: ``module:Class`` of a data module, or ``module:function`` that returns loaders; None if the configuration
            has a ``class_path``, or the model has loaders of its own.
        precision: Precision of the trainer; None is that of the configuration, or that of the weights.
        options: Options of the measurement.
    """

    def __init__(
        self, config: Path | None, model: str | None, data: str | None, precision: str | None, options: ModelOptions
    ) -> None:
        self.options, self._paths = options, {"model": model, "data": data}
        self._config_path = config
        self._precision = precision
        self._built: _Built | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**{name: value for name, value in vars(self).items() if name != "config"}, "_built": None}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The configuration; empty if there is none."""
        if self._config_path is None:
            return {}
        content = read_configuration(self._config_path)
        inner = next((content[name] for name in ("fit", "validate", "test") if name in content), content)
        if not isinstance(inner, dict):
            raise UserError(f"--config {self._config_path}: expected a mapping of options.")
        return inner

    @property
    def _trainer_options(self) -> dict[str, Any]:
        options = self.config.get("trainer")
        return options if isinstance(options, dict) else {}

    def measure(self, checkpoint: dict[str, Any], name: str) -> dict[str, float]:
        """Measure the model with the weights of a checkpoint.

        Args:
            checkpoint: The content of the checkpoint.
            name: Its path.
        """
        # Weights that a checkpoint leaves out, such as frozen ones, must not be those of the last checkpoint.
        if self._built is None or not self._built.module.strict_loading:
            self._built = self._build(checkpoint, name)
        built = self._built
        _load_weights(built.module, checkpoint, self.options.state_dict, name)
        try:
            if full_batch(built.module):
                return self._measure_full_batch(built)
            return measure_sets(LightningHost(built.module), built.sets, self.options)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error

    def _measure_full_batch(self, built: _Built) -> dict[str, float]:
        """Measure a model that is trained on the full batch."""
        batch = next(iter(built.sets["train"][0][1].loader))
        monitor = CollapseAtIterates(1, self.options.measuring())
        monitor.prepare(built.module, batch)
        with untouched(built.module):
            return to_floats(monitor.read(built.module, batch))

    # Model and data.

    def _build(self, checkpoint: dict[str, Any], name: str) -> _Built:
        """Construct model, data and trainer."""
        seed = self.config.get("seed_everything")
        L.seed_everything(seed if type(seed) is int else self.options.seed, verbose=False)
        module = self._make("model", checkpoint, name)
        package = _package_of(module)
        data = self._make("data", checkpoint, name) if self._has("data") else None
        datamodule = data if hasattr(data, "train_dataloader") else None
        with _quiet(package):
            trainer = self._trainer(package, checkpoint)
        attach_as_in_a_fit(trainer, module, datamodule)
        if datamodule is not None and type(datamodule).__qualname__ in checkpoint:
            datamodule.load_state_dict(checkpoint[type(datamodule).__qualname__])
        return _Built(module, _sets(trainer, module, data, self.options.stages), datamodule)

    def _has(self, part: str) -> bool:
        return self._paths[part] is not None or self.config.get(part) is not None

    def check(self) -> None:
        """Import the classes of model and data before any checkpoint is read.

        Raises:
            ValueError: If a class is not known, or cannot be imported.
        """
        self._kind("model")
        if self._has("data"):
            self._kind("data")

    def _section(self, part: str) -> dict[str, Any]:
        """Return the section of the configuration for the model or the data."""
        section = self.config.get(part)
        if isinstance(section, str):  # The path of a separate file, relative to the configuration.
            assert self._config_path is not None
            section = read_configuration(self._config_path.parent / section, f"--config {self._config_path}: {part}")
        return section if isinstance(section, dict) else {}

    def _kind(self, part: str) -> Any:
        """Return the class of the model or the data, or the function that returns loaders."""
        option, path, section = f"--{part}", self._paths[part], self._section(part)
        where = f"--config {self._config_path}"
        if path is not None:
            return import_named(option, path)
        if "class_path" in section:
            kind = import_named(f"{where}: {part}.class_path", str(section["class_path"]))
            if not _is_lightnings(kind, _BASES[part]):
                # The configuration is found beside the checkpoints: what it names is called only if it can be meant.
                raise UserError(
                    f"{where}: {part}.class_path: {section['class_path']} is no subclass of {_BASES[part]}. "
                    f"If it is a function of yours that makes one, name it by {option} module:function."
                )
            return kind
        raise UserError(
            f"the class of the {part} is not known"
            + (f", {where} has no {part}.class_path" if self._config_path else "")
            + f": give {option} module:Class"
            + (f" together with {where}" if self._config_path is not None else "")
            + (", or a --config with its class_path." if self._config_path is None else ".")
        )

    def _make(self, part: str, checkpoint: dict[str, Any], name: str) -> Any:
        """Construct the model or the data."""
        kind, section, known = self._kind(part), self._section(part), checkpoint.get(_HPARAMS[part])
        known = dict(known) if isinstance(known, Mapping) else {}
        if section:
            arguments = section.get("init_args") or {} if "class_path" in section else section
            # Arguments that the configuration links to others are found only in the checkpoint.
            taken = inspect.signature(kind).parameters
            missing = {name: known[name] for name in taken if name not in arguments and name in known}
            return construct(kind, missing | arguments, f"--config {self._config_path}: {part}")
        if not hasattr(kind, "load_from_checkpoint"):
            return call_with(kind, known, f"--{part} {self._paths[part]}")
        return _from_checkpoint(kind, Path(name), self.options.weights_only, f"--{part} {self._paths[part]}")

    def _trainer(self, package: str, checkpoint: dict[str, Any]) -> Any:
        """Construct a trainer with the precision and the limits of training."""
        device = chosen_device(self.options.device)
        given = self._trainer_options
        precision = self._precision or given.get("precision") or _precision_of(checkpoint[self.options.state_dict])
        trainer = import_module(package).Trainer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return trainer(
                    accelerator="cpu" if device.type == "cpu" else "gpu" if device.type == "cuda" else device.type,
                    devices=[device.index or 0] if device.type == "cuda" else 1,
                    precision=precision,
                    logger=False,
                    enable_checkpointing=False,
                    enable_progress_bar=False,
                    enable_model_summary=False,
                    **{name: given[name] for name in _LIMITS if given.get(name) is not None},
                )
            except ValueError as error:
                raise UserError(f"--precision {precision}: {str(error).splitlines()[0]}") from error


def _is_lightnings(kind: Any, base: str) -> bool:
    """Whether something is a class made from one of Lightning's, of either of its packages."""
    return inspect.isclass(kind) and any(each.__name__ == base for each in kind.__mro__)


def _package_of(module: Any) -> str:
    """Return the package of a LightningModule: ``lightning.pytorch`` or ``pytorch_lightning``."""
    owner = next((each for each in type(module).__mro__ if each.__name__ == "LightningModule"), None)
    if owner is None:
        raise UserError(f"the model must be a LightningModule, got a {type(module).__name__}.")
    return "pytorch_lightning" if owner.__module__.startswith("pytorch_lightning") else "lightning.pytorch"


@contextmanager
def _quiet(package: str) -> Iterator[None]:
    """Silence the messages of Lightning about accelerators and the like."""
    logger = logging.getLogger(package)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _precision_of(state: Mapping[str, Any]) -> str:
    """Return the precision of a trainer that saves such weights."""
    kinds = {each.dtype for each in state.values() if isinstance(each, Tensor) and each.is_floating_point()}
    true = {torch.float64: "64-true", torch.float16: "16-true", torch.bfloat16: "bf16-true"}
    return true.get(next(iter(kinds)), "32-true") if len(kinds) == 1 else "32-true"


def _from_checkpoint(kind: Any, path: Path, weights_only: bool, where: str) -> Any:
    """Construct an object with the hyperparameters of a checkpoint, as Lightning does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The weights are checked when they are loaded below.
        strict = {"strict": False} if issubclass(kind, nn.Module) else {}
        try:
            return kind.load_from_checkpoint(path, map_location="cpu", weights_only=weights_only, **strict)
        except TypeError as error:
            found = re.search(r"missing \d+ required (?:positional|keyword-only) arguments?: (.+)", str(error))
            if found is None:
                raise
            raise UserError(
                f"{where}: {kind.__name__} needs {found[1]}, which {path} does not have as hyperparameters: give a "
                "--config with its init_args, or call save_hyperparameters() in its constructor."
            ) from error
        except RuntimeError as error:
            raise _other_model(error, path) from error


def _other_model(error: RuntimeError, name: object) -> Exception:
    """Return a user error if weights have other shapes than the model's, else the error itself."""
    found = re.search(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", str(error))
    if found is None:
        return error
    return UserError(
        f"{name} is a checkpoint of another model: its {found[1]} has shape ({found[2]}), that of the model "
        f"({found[3]})."
    )


def _load_weights(module: Any, checkpoint: dict[str, Any], key: str, name: str) -> None:
    """Load the weights of a checkpoint into a model.

    Raises:
        ValueError: If they belong to another model.
    """
    try:
        module.on_load_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    state = _renamed(checkpoint[key], module.state_dict())
    try:
        found = module.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise _other_model(error, name) from error
    if (found.missing_keys or found.unexpected_keys) and module.strict_loading:
        raise UserError(
            f"{name} is a checkpoint of another model: "
            + "; ".join(
                f"{said} {', '.join(names[:_MAX_NAMES])}{' and others' if len(names) > _MAX_NAMES else ''}"
                for said, names in (("it has no", found.missing_keys), ("the model has no", found.unexpected_keys))
                if names
            )
            + "."
        )


def _renamed(state: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """Rename weights to the names that the model expects. Compiled and wrapped models add prefixes."""
    names = {_plain(name): name for name in expected}
    found = {names.get(_plain(name), name): value for name, value in state.items()}
    if not found.keys() & expected.keys():
        found = {names.get(_plain(name.removeprefix("module.")), name): value for name, value in state.items()}
    return found


def _plain(name: str) -> str:
    return name.replace(COMPILED_PREFIX, "")


# The loaders.


def _sets(trainer: Any, module: Any, data: Any, stages: Sequence[str]) -> dict[str, list[tuple[str, DataSet]]]:
    """Return the loaders of each stage, with the limits of training and validation."""
    if data is None or hasattr(data, "train_dataloader"):
        owner = module if data is None else data
        if "test" in stages:
            owner.setup("test")
        loaders = {stage: own_loaders(owner, f"{stage}_dataloader") for stage in ("train", *stages)}
        if all(each is None for each in loaders.values()):
            raise UserError(
                "the data are not known: give --data module:Class of a data module, or module:function that returns "
                "loaders, or a --config with a section data."
            )
    else:
        loaders = given_loaders(data)
    limits = {"train": trainer.limit_train_batches, "val": trainer.limit_val_batches}
    return {
        stage: [
            (name, DataSet(loader, limited_batches(loader, limits.get(stage, 1.0), 0)))
            for name, loader in name_loaders(unshuffled(each) if trainer.overfit_batches and stage == "train" else each)
        ]
        for stage, each in loaders.items()
        if each is not None
    }
