"""A recorded run: its readings, its hyperparameters and its name in figures."""

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
    r"""A recorded run, as :func:`read_run` reads it from its folder.

    Attributes:
        folder: Path of the run folder.
        readings: The recorded values.
        summary: Last values and fitted rates.
        settings: The model's hyperparameters; empty if the folder has no ``hparams.yaml``.

    Example:
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from nclightning.figures import Readings, Run, summarize
        >>> readings = Readings(np.array([0.0, 10.0]), {"optimality/gap": np.array([1.0, 0.1])})
        >>> settings = dict(lambda_w=5e-3, lambda_h=5e-4, samples_per_class=10)
        >>> Run(Path("version_0"), readings, summarize(readings), settings).penalties
        '$\\lambda = 5 \\times 10^{-4}$'
    """

    folder: Path
    readings: Readings
    summary: RunSummary
    settings: dict[str, Any]

    @cached_property
    def loss(self) -> str:
        """``"mse"``, ``"ce"``, or another loss in words; an empty string if it is not recorded."""
        return loss_of(self.settings, self.problem)

    @property
    def name(self) -> str:
        """The folder's name, with the characters escaped that matplotlib would interpret."""
        return self.folder.resolve().name.lstrip("_").replace("$", r"\$")

    @property
    def penalties(self) -> str:
        """Lambda as the paper writes it, in mathtext; the folder's name if the penalties are not recorded.

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
        """Both penalties as a sort key, ``lambda_h`` first; infinite if they are not recorded."""
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
        """Return a hyperparameter; nan if it is absent or not a finite number, as it may be in a user's own run."""
        value = self.settings.get(name)
        return float(value) if isinstance(value, int | float) and abs(value) < sys.float_info.max else math.nan

    @property
    def sizes(self) -> str:
        """K, n and d as in the paper's captions, in mathtext."""
        if isinstance(self.problem, Problem):
            return sizes_in_mathtext(self.problem)
        return ", ".join(
            f"${symbol} = {self.settings[name]}$"
            for name, symbol in _SIZES.items()
            if isinstance(self.settings.get(name), int)
        )


def known_problem(settings: Mapping[str, Any]) -> UFMProblem | Problem | None:
    """Make the problem of an unconstrained feature model from the hyperparameters of its run.

    Args:
        settings: Hyperparameters by name.

    Returns:
        The problem; None if the hyperparameters are those of a network, whose features are not free, or describe no
        known problem. A loss from outside this package is known only if its module is already imported, because
        reading a run must not import anything.
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
    """Make the problem, unless that would import a module."""
    if module.partition(".")[0] != "nclightning" and module not in sys.modules:
        return None
    try:
        return Problem.from_description(description)
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError):
        return None


def _loss_path(description: Any) -> str:
    """Return the import path of the loss in a recorded description of a problem; an empty string if there is none."""
    try:
        path = description["init_args"]["loss"]["class_path"] if description["class_path"] == _CLASS else ""
    except (TypeError, KeyError, IndexError):
        return ""
    return path if isinstance(path, str) else ""


def loss_of(settings: Mapping[str, Any], problem: UFMProblem | Problem | None) -> str:
    """Name the loss of a run.

    Args:
        settings: Hyperparameters by name.
        problem: What :func:`known_problem` returns for them.

    Returns:
        ``"mse"`` or ``"ce"`` for hard labels, words such as ``"CE loss, label smoothing 0.1"`` otherwise, and an empty
        string if the settings do not name a loss.
    """
    if isinstance(problem, Problem):
        words = loss_in_words(problem)
        return next((name for name, title in LOSSES.items() if title == words), words)
    if path := _loss_path(settings.get("problem")):
        return f"{path.rpartition('.')[2]} loss"
    return str(settings.get("loss") or "")


def sizes_in_mathtext(problem: Problem) -> str:
    """Write the sizes of a problem for a caption. A bias without a penalty is mentioned as well.

    Args:
        problem: The problem.
    """
    sizes = [f"${symbol} = {size}$".replace(" to ", "$ to $") for symbol, size in sizes_in_words(problem).items()]
    return ", ".join(sizes if problem.lambda_b else [*sizes, bias_in_words(problem)])


def read_run(folder: str | Path, fit: Fit = fit_straight) -> Run:
    r"""Read a run folder.

    Args:
        folder: Folder with ``readings.csv``, and perhaps ``hparams.yaml`` with the hyperparameters.
        fit: Function that fits the rates, as for :func:`summarize`.

    Returns:
        The run.

    Raises:
        ValueError: If there are no readings, or if a file is damaged.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from nclightning.figures import read_run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "readings.csv").write_text("iteration,optimality/gap\n0,1.0\n10,0.1\n")
        ...     _ = Path(folder, "hparams.yaml").write_text("loss: mse\nlambda_w: 0.01\n")
        ...     run = read_run(folder)
        >>> run.loss, run.summary.iteration, run.summary.last
        ('mse', 10, {'optimality/gap': 0.1})
    """
    folder = Path(folder)
    readings, path = read_readings(folder), folder / "hparams.yaml"
    settings = _read_settings(path) if path.is_file() else {}
    return Run(folder, readings, summarize(readings, fit), settings)


class _Lenient(_LOADER):  # type: ignore[misc]
    """Reads plain values and Python's own containers. Other objects become None."""


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
        raise UserError(
            f"{path} is damaged: {problem}. Without the file, the run is drawn under the name of its folder."
        ) from error
    # A user's own hyperparameters may be anything.
    plain = settings.items() if isinstance(settings, dict) else ()
    return {name: value for name, value in plain if isinstance(name, str) and value is not None}


def scientific(value: float) -> str:
    """Write a number such as 5e-4 as mathtext.

    Args:
        value: A finite number.

    Returns:
        Up to four digits times a power of ten.
    """
    mantissa, exponent = f"{value:.3e}".split("e")
    return rf"{float(mantissa):g} \times 10^{{{int(exponent)}}}"
