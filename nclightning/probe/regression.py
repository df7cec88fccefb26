"""Neural regression collapse in an evaluation pass, where features are paired with real targets instead of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.regression import as_targets
from nclightning.metrics import RegressionCollapse
from nclightning.probe.detection import HeadArgument
from nclightning.probe.evaluation import Gatherer
from nclightning.probe.host import Host
from nclightning.probe.reader import BatchFn, ForwardFn, PairReader

__all__ = ["RegressionGatherer", "TargetReader"]


class TargetReader(PairReader):
    """A :class:`PairReader` for real targets instead of labels.

    Args:
        head: Dotted name of the head, the module, or a function ``(model) -> (weight, bias)``; None to detect it.
        batch_fn: Function that splits a batch into input and targets. None looks for targets where a
            :class:`PairReader` looks for labels.
        forward_fn: Function that runs the model on the input of a batch; None calls the model.
    """

    def __init__(
        self, head: HeadArgument = None, batch_fn: BatchFn | None = None, forward_fn: ForwardFn | None = None
    ) -> None:
        super().__init__(head, batch_fn=batch_fn, forward_fn=forward_fn, agreement="values")

    def check_batch(self, host: Host, batch: Any, *, labelled: bool = True) -> None:
        """Examine the first batch of a model: find the head, and check that targets pair with features.

        Args:
            host: The host of the model.
            batch: The batch as a step gets it.
            labelled: Whether its targets have a meaning.

        Raises:
            ValueError: As for :meth:`PairReader.check_batch`; and if there is not one row of targets per row of
                features.
            TypeError: If targets are not real numbers.
        """
        if self.has_examined(host.module):
            return
        super().check_batch(host, batch, labelled=labelled)
        if labelled:
            self.pair(torch.empty(self.findings.found.shape, device="meta"), self.split(batch)[1])

    def pair(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Reshape features and targets to rows.

        Args:
            features: ``(B, d)`` with targets ``(B, K)``, or ``(B,)`` if K = 1. Both may have further dimensions after
                the first.
            labels: The targets.

        Returns:
            Features ``(N, d)`` and targets ``(N, K)``.

        Raises:
            ValueError: If there is not one row of targets per row of features.
            TypeError: If targets are not real numbers.
        """
        num_targets, places = self.findings.found.reader.out_features, features.shape[:-1]
        flat = labels.unsqueeze(-1) if num_targets == 1 and labels.shape == places else labels
        if len(places) > 1 and flat.shape[:-1] == places:
            flat = flat.flatten(0, -2)
        rows = as_targets(flat, num_targets)
        if len(rows) != places.numel():
            raise UserError(
                f"there must be one row of targets per row of features, got features of shape {tuple(features.shape)} "
                f"and targets of shape {tuple(labels.shape)}: pass batch_fn=(batch) -> (inputs, targets) with targets "
                f"of shape {(*places, num_targets)}."
            )
        return features.reshape(-1, features.shape[-1]), rows


class RegressionGatherer:
    """Collects the statistics of features and targets in an evaluation pass.

    Args:
        reader: Reader of features and targets.
    """

    labelled = True

    def __init__(self, reader: TargetReader) -> None:
        self.reader: PairReader = reader
        self._metric: RegressionCollapse | None = None

    def begin(self, host: Host, others: Sequence[Gatherer]) -> None:
        """Construct the metric for the head."""
        head = self.reader.head_snapshot(host.module)
        self._metric = RegressionCollapse(head).to(head.device)

    def add(self, features: dict[str, Tensor], labels: Tensor) -> None:
        """Add features and targets."""
        assert self._metric is not None
        self._metric.update(features[""], labels, copy=False)

    def read(self) -> dict[str, Tensor]:
        """Evaluate the measures over all processes, which must all call it."""
        assert self._metric is not None
        return self._metric.compute()
