"""``python -m nclightning fit|validate|test --config NAME``."""

from __future__ import annotations

import logging
import sys
import textwrap
import warnings
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from pydoc import locate
from typing import Any

import lightning as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from nclightning.arguments import resolve_lambdas
from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from nclightning.callbacks.used import check_used
from nclightning.closing import close_again, close_run, ending_of
from nclightning.compat.lightning import GivenConfigurationCLI
from nclightning.configurations import shipped_configs
from nclightning.data import FullBatchDataModule
from nclightning.errors import UserError
from nclightning.files import check_checkpoint
from nclightning.folders import find_run_logger, folder_of_checkpoint
from nclightning.interrupts import ends_with_launcher
from nclightning.loggers import RunLogger
from nclightning.models import RegularizedClassifier
from nclightning.models.resume import check_resumable, check_weights
from nclightning.parsing import ConfigFile, HelpFormatter, ParserMessage, RunParser, in_order, takes_lambda
from nclightning.quantities import NC
from nclightning.resuming import continue_elsewhere
from nclightning.saved_config import SaveRunConfig
from nclightning.table import check_rows
from nclightning.wording import library_errors_worded

__all__ = ["run_training"]

_USAGE = "python -m nclightning {command} --config NAME [--KEY VALUE ...]"
_PURPOSE = {
    "fit": "Train to the optimum, measure on the way, and leave a run folder in lightning_logs/.",
    "validate": f"Measure a checkpoint (tags {NC}/val/...) and print the values; no run folder is made.",
    "test": f"Measure a checkpoint (tags {NC}/test/...) and print the values; no run folder is made.",
}
_DESCRIPTION = """nclightning: neural collapse, trained to its closed-form optimum and measured on the way.

what you will want to set (every key of a configuration is an option; the full list is below):
  --config NAME                            a YAML file here, or a configuration that is shipped, see below
  --lambda X                               lambda_w = n X and lambda_h = X, as in the paper
  --model.init_args.lambda_w X             either penalty alone; likewise lambda_h, num_classes (K),
                                           samples_per_class (n), feature_dim (d), loss, init_scale, dtype
  --model.init_args.problem.init_args.X V  an argument of the problem, where the configuration names one
  --model.init_args.optimizer.init_args.c1 X   an option of the line search
  --seed_everything N                      another initial point
  --trainer.max_steps N                    gradient-descent iterations at most
  --optimality.stop_distance X             stop at this distance to the optimal set; null: at max_steps,
                                           or at the round-off floor (--optimality.stop_at_floor false: not there)
  --optimality.every_n_iterations N        cadence of gap, distance and gradient norm
  --neural_collapse.every_n_iterations N   cadence of NC1-NC3
  --ckpt_path RUN/checkpoints/last.ckpt    go on with an interrupted run, in its folder

shipped configurations:
{configs}"""
_EPILOG = """examples:
  python -m nclightning fit --config ufm_mse.yaml
  python -m nclightning fit --config ufm_ce --lambda 5e-4 --seed_everything 1
  python -m nclightning fit --config ufm_ce --model.init_args.lambda_h 1e-4 --trainer.max_steps 5000
  python -m nclightning fit --config ufm_label_smoothing --model.init_args.problem.init_args.smoothing 0.2
  python -m nclightning fit --config ufm_mse --ckpt_path lightning_logs/version_0/checkpoints/last.ckpt
  python -m nclightning validate --config ufm_mse --ckpt_path lightning_logs/version_0/checkpoints/last.ckpt

further commands, each with a --help of its own:
  python -m nclightning measure RUN        neural collapse of checkpoints, or of saved features
  python -m nclightning reproduce --quick  the paper's four figures from recorded runs, and what became of its claims
  python -m nclightning report RUN [RUN ...]   one HTML page: verdicts, curves, rates, settings
  python -m nclightning plot RUN [RUN ...] the same figures from run folders
  python -m nclightning theory --config ufm_ce   optimum, Hessian spectrum and rates that the theory predicts for it

To change more, copy a shipped configuration and edit it. 'python -m nclightning fit --model.help UFM' lists the
options of a class with their meaning."""


class RunCLI(GivenConfigurationCLI):
    """LightningCLI with our defaults, run folders and closing report."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Offer what makes sense for readings of a training set: no prediction."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in _PURPOSE}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Create a parser whose ``--config`` knows the shipped configurations."""
        kwargs.setdefault("dump_header", [f"nclightning, lightning.pytorch=={L.__version__}"])
        parser = RunParser(**kwargs)
        self._parsers = [*getattr(self, "_parsers", []), parser]
        parser.add_argument(
            "-c", "--config", action=ConfigFile, help="a YAML file, or the name of a shipped configuration"
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the monitors, whose options are then set in one place."""
        parser.add_lightning_class_args(OptimalityMonitor, "optimality")
        parser.add_lightning_class_args(NeuralCollapseMonitor, "neural_collapse")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the paper's single lambda spelled out."""
        words = sys.argv[1:] if args is None else args
        starts = ("-c", "--config", "--model", "--print_config", "-h", "--help")
        if words and words[0] in _PURPOSE and not any(word.startswith(starts) for word in words[1:]):
            raise UserError(f"give a configuration: --config NAME, where shipped are {', '.join(shipped_configs())}.")
        try:
            self.config = parser.parse_args(in_order(words))
        except ParserMessage as message:
            options = [f"--{key}" for each in self._parsers for key in vars(each.get_defaults().as_flat())]
            raise message.sentence(words, options) from message
        self._words = words
        seed = self.config[self.config.subcommand].seed_everything
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"--seed_everything must be between 0 and 2**32 - 1, got {seed}.")

    def instantiate_classes(self) -> None:
        """Make the objects; a value that Lightning or torch refuses is the user's."""
        with library_errors_worded(self._words):
            super().instantiate_classes()

    def before_instantiate_classes(self) -> None:
        """Resolve what the configuration leaves to a rule, so that the saved one states it."""
        config = self.config[self.subcommand]
        model = config.model.get("init_args", {})
        if takes_lambda(config.model.get("class_path"), model.keys()) and model["lambda_"] is not None:
            if model.get("problem") is not None:
                raise UserError(
                    f"--lambda {model['lambda_']}: the penalties of a model that has a problem are the problem's: set "
                    "--model.init_args.problem.init_args.lambda_w and lambda_h."
                )
            if model["samples_per_class"] is None:
                raise UserError("--lambda needs --model.init_args.samples_per_class: lambda_w is n times it.")
            model["lambda_w"], model["lambda_h"] = resolve_lambdas(
                model.get("lambda_w"), model.get("lambda_h"), model["lambda_"], model["samples_per_class"]
            )
            model["lambda_"] = None
        trainer, disabled = config.trainer, list[type]()
        if trainer.enable_progress_bar is False:
            disabled.append(ProgressBar)
        if trainer.enable_checkpointing is False:
            disabled.append(Checkpoint)
        if trainer.callbacks is not None:
            given = trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]
            trainer.callbacks = [c for c in given if not _makes(c.class_path, tuple(disabled))]
        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            options = logger.get("init_args") if isinstance(logger, Namespace) else None
            if options is not None and "save_dir" in options and options.save_dir is None:
                options.save_dir = trainer.default_root_dir  # None is the working directory for both.
        if self.subcommand != "fit":
            trainer.logger = False  # Looking at a checkpoint makes no run folder.

    def before_fit(self) -> None:
        """Find everything wrong that can be found before a run folder is made."""
        if isinstance(self.datamodule, FullBatchDataModule):
            self.datamodule.adopt(self.model)
        self._check_monitors()
        if isinstance(self.model, RegularizedClassifier):
            self.model.check_parameters()
            self.model.check_trainer(self.trainer)
            with library_errors_worded(self._words, "model.init_args.optimizer"):
                self.model.configure_optimizers()
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, OptimalityMonitor):
                    callback.find_problem(self.model)
        self._start = 0
        # Folder, checkpoint and ending of a run that has ended.
        self._again: tuple[Path, dict[str, Any], str] | None = None
        path = self.config.fit.ckpt_path
        if path is not None and not self._continue_run(Path(path)):
            return
        for logger in self.trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.claim()

    def _check_monitors(self) -> None:
        """Refuse arguments of monitors that do nothing here."""
        config = self.config.fit
        full = isinstance(self.datamodule, FullBatchDataModule)
        validates = not full and any(map(_validates, (self.model, self.datamodule)))
        for name, kind in (("neural_collapse", NeuralCollapseMonitor), ("optimality", OptimalityMonitor)):
            check_used(kind, vars(config[name]), self.model, validates, f"--{name}.")
        for callback in config.trainer.callbacks or []:
            made = locate(callback.class_path)
            if isinstance(made, type):
                given = callback.get("init_args")
                check_used(made, {} if given is None else vars(given), self.model, validates, f"{made.__name__}: ")

    def before_validate(self) -> None:
        """Find out whether the checkpoint can be looked at."""
        path = self.config[self.subcommand].ckpt_path
        if path is not None:
            self._read_checkpoint(Path(path))

    before_test = before_validate

    def _read_checkpoint(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint of this problem."""
        if not path.is_file():
            raise UserError(f"--ckpt_path {path}: no such file.")
        check_checkpoint(path, f"--ckpt_path {path}", hand_over=True)
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            checkpoint["global_step"]
        except Exception as error:
            raise UserError(f"--ckpt_path {path}: not a readable checkpoint ({type(error).__name__}).") from error
        if isinstance(self.model, RegularizedClassifier):
            self.model.check_checkpoint(checkpoint)
            check_weights(checkpoint, self.model)
        return checkpoint

    def _continue_run(self, path: Path) -> bool:
        """Go on in the folder that the checkpoint lies in; False if the run has ended there."""
        checkpoint = self._read_checkpoint(path)
        if isinstance(self.model, RegularizedClassifier):
            check_resumable(checkpoint)
        self._start = int(checkpoint["global_step"])
        if 0 <= self.trainer.max_steps < self._start:
            raise UserError(
                f"--ckpt_path {path} is at iteration {self._start} and trainer.max_steps is "
                f"{self.trainer.max_steps}: there is nothing to do. Raise --trainer.max_steps."
            )
        logger, folder, last = find_run_logger(self.trainer), folder_of_checkpoint(path), self._start
        table = folder / "readings.csv"
        continues = table.is_file() or (folder / "hparams.yaml").is_file()
        if logger is not None and continues:
            last = check_rows(table, self._start, checkpoint.get("readings"))
        ending = ending_of(checkpoint, self.trainer, self.model)
        if ending is not None and last == self._start:
            self._again = folder, checkpoint, ending
            return False
        if self.trainer.max_steps == self._start:
            raise UserError(
                f"--ckpt_path {path} is at trainer.max_steps={self._start}, and {table} ends at iteration {last}. "
                "Continue from an earlier checkpoint, or raise --trainer.max_steps."
            )
        if logger is None:
            continue_elsewhere(self.trainer, folder, self._start, self._logger_options())
        elif table.is_file():
            logger.continue_run(folder, self._start)
        else:
            rank_zero_info(
                f"{folder} is no run folder, as it has no readings.csv: the run goes on in {logger.log_dir}."
            )
        return True

    def _logger_options(self) -> list[Any]:
        """Arguments of the loggers of the configuration, in order."""
        given = self.config.fit.trainer.logger
        loggers = given if isinstance(given, list) else [given]
        return [each.get("init_args") if isinstance(each, Namespace) else None for each in loggers]

    def fit(self, model: L.LightningModule, **kwargs: Any) -> None:
        """Fit, and report on the run folder even after an interrupt; of a run that has ended only report."""
        seed = self.config.fit.seed_everything
        if self._again is not None:
            folder, checkpoint, ending = self._again
            rank_zero_only(close_again)(folder, checkpoint, model, seed, ending)
            _check_failure(checkpoint.get("failure"))
            return
        logger = find_run_logger(self.trainer)
        with nullcontext() if logger is None else logger.locked():
            try:
                with ends_with_launcher():
                    self.trainer.fit(model, **kwargs)
            except BaseException:
                if self.trainer.global_step > self._start:
                    with suppress(UserError, OSError):  # What ended the fit is what the user has to hear.
                        close_run(self.trainer, seed)
                raise
            close_run(self.trainer, seed)
        _check_failure(getattr(model, "failure", None))


@rank_zero_only  # The launcher kills the first of several processes when another one fails.
def _check_failure(failure: Mapping[str, Any] | None) -> None:
    """Raise if training ended because something is wrong, after all has been reported."""
    if failure is not None and failure.get("is_error", False):
        raise UserError(f"training failed at iteration {failure['iteration']}: {failure['sentence']}")


def _validates(each: L.LightningModule | L.LightningDataModule | None) -> bool:
    """Whether a module or data module has a loader of validation data."""
    hook = getattr(type(each), "val_dataloader", None)
    return hook is not None and not hook.__module__.startswith("lightning.")


def _makes(class_path: str, kinds: tuple[type, ...]) -> bool:
    """Whether a class path of a configuration is of one of several kinds; it may name a function, too."""
    found = locate(class_path)
    return isinstance(found, type) and issubclass(found, kinds)


def run_training(args: list[str] | None) -> None:
    """Run ``fit``, ``validate`` or ``test``.

    Args:
        args: Words after the program's name; None takes those of the process.

    Raises:
        ValueError: In one sentence, for what cannot be run.
    """
    _quieten_lightning()
    texts: dict[str, Any] = {
        "description": _DESCRIPTION.format(
            configs=textwrap.fill(", ".join(shipped_configs()), 80, initial_indent="  ", subsequent_indent="  ")
        ),
        "epilog": _EPILOG,
        "formatter_class": HelpFormatter,
    }
    words = sys.argv[1:] if args is None else args
    kind = _of_one_command(words[0]) if words and words[0] in _PURPOSE else RunCLI
    parsers = {
        name: texts
        | {"usage": _USAGE.format(command=name), "description": f"{_PURPOSE[name]}\n\n{texts['description']}"}
        for name in kind.subcommands()
    }
    kind(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=SaveRunConfig,
        trainer_defaults={
            "max_epochs": -1,
            "log_every_n_steps": 1,
            "enable_model_summary": False,
            "logger": {"class_path": "nclightning.loggers.RunLogger"},
        },
        parser_kwargs=texts
        | {"usage": _USAGE.format(command="{fit,validate,test,measure,reproduce,plot,theory}")}
        | parsers,
        args=args,
    )


def _of_one_command(name: str) -> type[RunCLI]:
    """Leave out the parsers of the others, each of which takes as long to make as this one."""
    subcommands = {name: RunCLI.subcommands()[name]}
    return type(RunCLI.__name__, (RunCLI,), {"subcommands": staticmethod(lambda: subcommands)})


def _quieten_lightning() -> None:
    """Drop messages of Lightning that are about other products, or about what is so by design here."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith(("💡", "TPU available"))
    )
    for message in (
        r"Total length of `list` across ranks is zero",  # Readings cover the training set: a fit validates nothing.
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 against torch 2.13.
    ):
        warnings.filterwarnings("ignore", message=f".*{message}")
