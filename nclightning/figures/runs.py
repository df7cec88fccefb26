"""A recorded run: its readings, what was set, and what to call it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from nclightning.configurations import check_yaml, read_text, yaml_problem
from nclightning.errors import UserError
from nclightning.figures.rates import fit_straight
from nclightning.figures.readings import Readings, read_readings
from nclightning.figures.summary import Fit, RunSummary, summarize
from nclightning.problems import Problem
from nclightning.problems.wording import bias_in_words, loss_in_words, sizes_in_words
from nclightning.theory import UFMProblem

__all__ = ["LOSSES", "Run", "known_problem", "loss_of", "read_run", "scientific", "sizes_in_mathtext"]

LOSSES = {"mse": "MSE loss", "ce": "CE loss"}
# Symbols of the paper by hyperparameter, in the order of its captions.
_SIZES = {
    "num_classes": "K",
    "samples_per_class": "n",
    "input_dim": "D",
    "hidden_dim": "m",
    "feature_dim": "d",
}
_CLASS = "nclightning.problems.Problem"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MOST_BYTES = 2**25  # A problem may have a long table of targets.
_OF_NETWORKS = ("input_dim", "hidden_dim")


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        folder: Where it lies.
        readings: The recorded values.
        summary: Last values and fitted rates.
        settings: The model's hyperparameters; empty where the folder has no ``hparams.yaml``.
    """

    folder: Path
    readings: Readings
    summary: RunSummary
    settings: dict[str, Any]

    @cached_property
    def loss(self) -> str:
        """``"mse"``, ``"ce"``, another in words, or an empty string where the run does not say."""
        return loss_of(self.settings, self.problem)

    @property
    def name(self) -> str:
        """The folder's name, without the signs that mean something to matplotlib."""
        return self.folder.resolve().name.lstrip("_").replace("$", r"\$")

    @property
    def penalties(self) -> str:
        """Lambda as the paper writes it, in mathtext; the folder's name where the run does not say.

        One number where ``lambda_w = n * lambda_h``, two otherwise.
        """
        lambda_w, lambda_h = self._number("lambda_w"), self._number("lambda_h")
        if math.isnan(lambda_w) or math.isnan(lambda_h):
            return self.name
        if self.single_lambda:
            return rf"$\lambda = {scientific(lambda_h)}$"
        of_bias = self.problem.lambda_b if isinstance(self.problem, Problem) else None
        third = rf",\ \lambda_b = {scientific(of_bias)}" if of_bias else ""
        return rf"$\lambda_W = {scientific(lambda_w)},\ \lambda_H = {scientific(lambda_h)}{third}$"

    @property
    def strength(self) -> tuple[float, float]:
        """Both penalties, to order runs by; infinite where the run does not say."""
        values = (self._number(name) for name in ("lambda_h", "lambda_w"))
        lambda_h, lambda_w = (math.inf if math.isnan(value) else value for value in values)
        return lambda_h, lambda_w

    @cached_property
    def problem(self) -> UFMProblem | Problem | None:
        """The unconstrained feature model that was trained; None for anything else."""
        return known_problem(self.settings)

    @property
    def single_lambda(self) -> bool:
        """Whether ``lambda_w = n * lambda_h``, the paper's single lambda."""
        lambda_w, lambda_h, n = map(self._number, ("lambda_w", "lambda_h", "samples_per_class"))
        return lambda_w > 0 and math.isclose(lambda_w, n * lambda_h, rel_tol=1e-9)

    def _number(self, name: str) -> float:
        """A setting; nan where it is none, or no number, as in somebody's own run."""
        value = self.settings.get(name)
        return float(value) if isinstance(value, int | float) and abs(value) < sys.float_info.max else math.nan

    @property
    def sizes(self) -> str:
        """Sizes as the paper's captions give them, in mathtext."""
        if isinstance(self.problem, Problem):
            return sizes_in_mathtext(self.problem)
        return ", ".join(
            f"${symbol} = {self.settings[name]}$"
            for name, symbol in _SIZES.items()
            if isinstance(self.settings.get(name), int)
        )


def known_problem(settings: Mapping[str, Any]) -> UFMProblem | Problem | None:
    """Find the problem that the hyperparameters of a run of the unconstrained feature model say.

    Args:
        settings: Hyperparameters by name.

    Returns:
        None where they are those of a network, whose features are not free, or say no problem that is known here. A
        loss outside of this package counts only if its module is loaded: to read a run imports nothing.
    """
    if path := _loss_path(settings.get("problem")):
        return _described(settings["problem"], path.rpartition(".")[0])
    names = tuple(field.name for field in fields(UFMProblem))
    if any(settings.get(name) is None for name in names) or any(name in settings for name in _OF_NETWORKS):
        return None
    try:
        return UFMProblem(*(settings[name] for name in names))
    except (TypeError, ValueError, OverflowError):  # Settings may hold anything.
        return None


def _described(description: Mapping[str, Any], module: str) -> Problem | None:
    """Make it if that runs no code that is not loaded."""
    if module.partition(".")[0] != "nclightning" and module not in sys.modules:
        return None
    try:
        return Problem.from_description(description)
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError):
        return None


def _loss_path(description: Any) -> str:
    """Where a description of a problem, as a run keeps it, has the class of its loss; else empty."""
    try:
        path = description["init_args"]["loss"]["class_path"] if description["class_path"] == _CLASS else ""
    except (TypeError, KeyError, IndexError):
        return ""
    return path if isinstance(path, str) else ""


def loss_of(settings: Mapping[str, Any], problem: UFMProblem | Problem | None) -> str:
    """Name the loss of a run.

    Args:
        settings: Hyperparameters by name.
        problem: Of :func:`known_problem`.

    Returns:
        ``"mse"`` or ``"ce"`` for hard labels, such as ``"CE loss, label smoothing 0.1"`` for others, empty where the
        settings do not say.
    """
    if isinstance(problem, Problem):
        words = loss_in_words(problem)
        return next((name for name, title in LOSSES.items() if title == words), words)
    if path := _loss_path(settings.get("problem")):
        return f"{path.rpartition('.')[2]} loss"
    return str(settings.get("loss") or "")


def sizes_in_mathtext(problem: Problem) -> str:
    """Write the sizes of a problem, and its bias unless that has a penalty, as a caption has them.

    Args:
        problem: Any.
    """
    sizes = [f"${symbol} = {size}$".replace(" to ", "$ to $") for symbol, size in sizes_in_words(problem).items()]
    return ", ".join(sizes if problem.lambda_b else [*sizes, bias_in_words(problem)])


def read_run(folder: str | Path, fit: Fit = fit_straight) -> Run:
    """Read a run folder.

    Args:
        folder: With ``readings.csv``, and ``hparams.yaml`` for what was set.
        fit: See :func:`summarize`.

    Returns:
        The run.

    Raises:
        ValueError: If there are no readings.
    """
    folder = Path(folder)
    readings, path = read_readings(folder), folder / "hparams.yaml"
    settings = _read_settings(path) if path.is_file() else {}
    return Run(folder, readings, summarize(readings, fit), settings)


class _Lenient(_LOADER):  # type: ignore[misc]
    """Reads plain values, also those in Python's own containers; other objects are left out."""


def _left_out(loader: Any, suffix: str, node: yaml.Node) -> Any:
    if suffix == "tuple" and isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return None


_Lenient.add_multi_constructor("tag:yaml.org,2002:python/", _left_out)
_Lenient.add_multi_constructor("!", _left_out)


def _read_settings(path: Path) -> dict[str, Any]:
    text = read_text(path, str(path), _MOST_BYTES)
    try:
        check_yaml(text, any_tag=True)
        settings = yaml.load(text, Loader=_Lenient)
    except (yaml.YAMLError, ValueError) as error:
        problem = yaml_problem(error) if isinstance(error, yaml.YAMLError) else str(error).rstrip(".")
        raise UserError(f"{path} is damaged: {problem}. Without the file, the run is drawn unnamed.") from error
    # Somebody's own hyperparameters may be anything.
    plain = settings.items() if isinstance(settings, dict) else ()
    return {name: value for name, value in plain if isinstance(name, str) and value is not None}


def scientific(value: float) -> str:
    """Write a number such as 5e-4 as mathtext.

    Args:
        value: Finite.

    Returns:
        Up to four digits and a power of ten.
    """
    mantissa, exponent = f"{value:.3e}".split("e")
    return rf"{float(mantissa):g} \times 10^{{{int(exponent)}}}"
