"""Which metrics of a ``torchmetrics.MetricCollection`` may share their states."""

from __future__ import annotations

import uuid
from typing import Any

from torchmetrics import Metric

from nclightning.metrics.base import APART

__all__ = ["stand_apart"]


def stand_apart(metric: Metric, *parameters: Any) -> None:
    """Keep a metric out of the compute groups of metrics that are updated in another way.

    A collection updates only one of those metrics whose states have equal names and, after the first batch, nearly
    equal values. Metrics whose parameters differ may agree on that batch, and on no other. A state without content,
    whose name differs, tells them apart.

    Args:
        metric: Gets the state; copies of it have the same.
        *parameters: All that an update depends on and that the states do not show. Metrics with equal ones may share
            states. None says that no other metric is alike, for what has no value to compare, such as a head that is
            trained.
    """
    key = "_".join(map(str, parameters)) or uuid.uuid4().hex
    metric.add_state(f"{APART}{key}", default=[], dist_reduce_fx=None)
