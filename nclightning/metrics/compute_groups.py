"""Which metrics of a ``torchmetrics.MetricCollection`` may share their states."""

from __future__ import annotations

import uuid
from typing import Any

from torchmetrics import Metric

from nclightning.metrics.base import SEPARATE

__all__ = ["separate_compute_group"]


def separate_compute_group(metric: Metric, *parameters: Any) -> None:
    """Keep a metric out of the compute groups of metrics whose updates differ from its own.

    A ``MetricCollection`` forms compute groups of metrics whose states have the same names and, after the first batch,
    nearly the same values. It then updates only one metric of each group. Metrics with different parameters may agree
    on the first batch by chance and differ later. An empty state with a name made from the parameters prevents
    this.

    Args:
        metric: The metric to which the state is added. Copies of the metric get the same state.
        *parameters: Everything that affects an update and is not visible in the states. Metrics with equal parameters
            may share states. Without parameters the metric shares states only with its copies. Use this for updates
            that depend on something that cannot be compared, such as a head that is being trained.
    """
    key = "_".join(map(str, parameters)) or uuid.uuid4().hex
    metric.add_state(f"{SEPARATE}{key}", default=[], dist_reduce_fx=None)
