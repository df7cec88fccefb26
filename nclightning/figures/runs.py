"""A recorded run: its readings, what was set, and what to call it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nclightning.figures.rates import fit_straight
from nclightning.figures.readings import Readings, read_readings
from nclightning.figures.summary import Fit, RunSummary, summarize

__all__ = ["LOSSES", "Run", "read_run"]

LOSSES = {"mse": "MSE loss", "ce": "CE loss"}
# Symbols of the paper by hyperparameter, in the order of its captions.
_SIZES = {
    "num_classes": "K",
    "samples_per_class": "n",
    "input_dim": "D",
    "hidden_dim": "m",
    "feature_dim": "d",
}


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

    @property
    def loss(self) -> str:
        """``"mse"``, ``"ce"``, or an empty string where the run does not say."""
        return str(self.settings.get("loss", ""))

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
            return rf"$\lambda = {_scientific(lambda_h)}$"
        return rf"$\lambda_W = {_scientific(lambda_w)},\ \lambda_H = {_scientific(lambda_h)}$"

    @property
    def single_lambda(self) -> bool:
        """Whether ``lambda_w = n * lambda_h``, the paper's single lambda."""
        lambda_w, lambda_h, n = map(self._number, ("lambda_w", "lambda_h", "samples_per_class"))
        return lambda_w > 0 and math.isclose(lambda_w, n * lambda_h, rel_tol=1e-9)

    def _number(self, name: str) -> float:
        """A setting; nan where it is none, or no number, as in somebody's own run."""
        value = self.settings.get(name)
        return float(value) if isinstance(value, int | float) else math.nan

    @property
    def sizes(self) -> str:
        """Sizes as the paper's captions give them, in mathtext."""
        return ", ".join(
            f"${symbol} = {self.settings[name]}$"
            for name, symbol in _SIZES.items()
            if isinstance(self.settings.get(name), int)
        )


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


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError:  # Somebody's own hyperparameters may be Python objects.
        return {}
    return settings if isinstance(settings, dict) else {}


def _scientific(value: float) -> str:
    """Write 5e-4 as mathtext."""
    mantissa, exponent = f"{value:.3e}".split("e")
    return rf"{float(mantissa):g} \times 10^{{{int(exponent)}}}"
