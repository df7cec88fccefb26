"""Gap and distance of a module that is not full-batch, from one pass over its training set."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from nclightning.probe.host import Host
from nclightning.probe.optimality import OptimalityGatherer
from nclightning.probe.reader import PairReader
from nclightning.probe.sets import DataSet, Gather, gather_alone

__all__ = ["sweep_optimality"]


def sweep_optimality(
    host: Host,
    reader: PairReader,
    data: DataSet,
    loss: Literal["mse", "ce"],
    penalties: tuple[float, float] | None,
    gather: Gather = gather_alone,
) -> dict[str, Tensor]:
    """Sweep the training set once.

    Args:
        host: Of the module.
        reader: That found its head.
        data: The training set.
        loss: Of the problem.
        penalties: On head and features; None fits both.
        gather: Makes the pass, which others may share.

    Returns:
        Values by tag; nan where no penalties make the scales of the features optimal.
    """
    values = gather(host, data, lambda: OptimalityGatherer(reader, loss, penalties)).collector.read()
    return {f"optimality/{name}": value for name, value in values.items()}
