"""Measurement of a loaded model on the data sets of its stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nclightning.errors import UserError
from nclightning.functional.statistics import BetweenWeights, GlobalMean
from nclightning.probe.collectors import Measuring
from nclightning.probe.host import Host
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import DataSet, SetReader
from nclightning.quantities import NC, tagged

__all__ = ["ModelOptions", "chosen_device", "measure_sets", "to_floats"]


@dataclass(frozen=True)
class ModelOptions:
    """Options of the command line for measuring models.

    Attributes:
        measures: As for :func:`nclightning.measure`; so are the options up to ``between_weights``.
        head: Name of the last layer; None to detect it.
        layers: Names of further layers.
        layer_pooling: ``"mean"`` or ``"flatten"``.
        ignore_index: Label of samples to leave out.
        global_mean: Global mean in NC1, which matters on unbalanced data.
        between_weights: Weights of the classes in NC1, which matter on unbalanced data.
        stages: The stages to measure.
        limit: Largest number of batches per data set; None for no limit.
        device: Name of a torch device; ``"auto"`` chooses a GPU if there is one, else the CPU.
        seed: Random seed that is set before model and data are constructed.
        weights_only: As for ``torch.load``.
        state_dict: Name of the checkpoint's entry with the weights.
    """

    measures: tuple[str, ...] | None = None
    head: str | None = None
    layers: tuple[str, ...] = ()
    layer_pooling: Literal["mean", "flatten"] = "mean"
    ignore_index: int | None = -100
    global_mean: GlobalMean = "class"
    between_weights: BetweenWeights = "uniform"
    stages: tuple[str, ...] = ("train", "val")
    limit: int | None = None
    device: str = "auto"
    seed: int = 0
    weights_only: bool = True
    state_dict: str = "state_dict"

    def measuring(self) -> Measuring:
        """Return the chosen measures with their options."""
        return Measuring(
            self.measures, self.ignore_index, global_mean=self.global_mean, between_weights=self.between_weights
        )

    def reader(self) -> PairReader:
        """Return a reader of features and labels."""
        return PairReader(self.head, self.layers, self.layer_pooling, ignore_index=self.ignore_index)

    def limited(self, data: DataSet) -> DataSet:
        """Return the data set with at most ``limit`` batches."""
        limits = [each for each in (data.limit, self.limit) if each is not None]
        return DataSet(data.loader, min(limits, default=None))


def chosen_device(name: str) -> torch.device:
    """Return the device that the user chose.

    Raises:
        ValueError: If torch does not know it, or it is not available here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def measure_sets(
    host: Host, sets: Mapping[str, Sequence[tuple[str, DataSet]]], options: ModelOptions
) -> dict[str, float]:
    """Measure a model on its data sets. NC4 compares with the class means of the training set.

    Args:
        host: The host of the model.
        sets: For each stage, the loaders with their names. The name of a single loader is empty.
        options: Options of the user.

    Returns:
        Values by tag, as :class:`nclightning.callbacks.NeuralCollapseMonitor` logs them.

    Raises:
        ValueError: If there is nothing to measure.
    """
    named = {
        f"{stage}/{name}" if name else stage: options.limited(data)
        for stage, each in sets.items()
        for name, data in each
    }
    wanted = {name: data for name, data in named.items() if name.partition("/")[0] in options.stages}
    if not wanted:
        raise UserError(
            f"the data have no loader for --stages {' '.join(options.stages)}, only for {', '.join(sets) or 'nothing'}."
        )
    measuring = options.measuring()
    training = "train" in options.stages
    trained = {name: data for name, data in named.items() if name.partition("/")[0] == "train"}
    if not training and not measuring.decision_measures:
        trained = {}
    if measuring.decision_measures and not trained:
        raise UserError(
            f"{', '.join(measuring.decision_measures)} compare with the class means of the training set, and the data "
            "have no training loader: leave them out of --measures."
        )
    others = {name: data for name, data in wanted.items() if name not in trained}
    measured = SetReader(options.reader(), measuring).read(host, trained, others, (), training)
    return to_floats(tagged(measured.values, NC))


def to_floats(values: Mapping[str, Any]) -> dict[str, float]:
    """Convert values to floats with a single transfer to the host."""
    numbers = torch.stack([torch.as_tensor(each).double() for each in values.values()]).tolist() if values else []
    return dict(zip(values, numbers, strict=True))
