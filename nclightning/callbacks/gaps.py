"""Gap and distance at an iterate from the samples of all processes, or the certified gap if they are not known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from threading import Timer
from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn.functional import linear

from nclightning.callbacks.problem import AnyProblem, check_balance
from nclightning.errors import UserError
from nclightning.functional import class_statistics
from nclightning.functional.linear import ELEMENTS_PER_STEP
from nclightning.heads import Head
from nclightning.objective import Objective
from nclightning.probe.collectors import merge_over_ranks
from nclightning.problems import NoAnswer, Problem
from nclightning.quantities import CERTIFIED_GAP, DISTANCE, GAP
from nclightning.ranks import sum_all_over_ranks, sum_over_ranks, world_size

__all__ = ["Gap", "Gaps", "said_if_slow"]

_PATIENCE = 2.0  # Seconds after which a message says what is being computed.


class Gap(NamedTuple):
    """Values at an iterate.

    Attributes:
        value: F of the features that enter the head, in float64.
        readings: Values to log, by tag.
    """

    value: Tensor
    readings: dict[str, Tensor]


class Gaps:
    """Computes the gap and distance of iterates from the optimum of a problem.

    Args:
        problem: The problem. Its optimum is computed here unless it is already known.

    Attributes:
        missing: Why gap and distance are not known; None if they are.
    """

    def __init__(self, problem: AnyProblem) -> None:
        self.problem = problem
        self.missing: NoAnswer | None = None
        try:
            _ = problem.dimension
        except NoAnswer as missing:
            self.missing = missing

    def check(self, labels: Tensor) -> None:
        """Raise unless the samples of all processes are those of the problem and their gap can be computed.

        Args:
            labels: The labels of this process. They are transferred to the host.

        Raises:
            ValueError: If the labels are not those of the problem, or if the gap needs the samples of one process.
        """
        check_balance(self.problem, labels)
        if world_size() > 1 and self._needs_all_samples:
            raise UserError(
                f"gap and distance need feature_dim of at least {self.problem.rank_in_words} where processes share the "
                f"features, got {self.problem.feature_dim}: set OptimalityMonitor(theory=False), or trainer.devices=1."
            )

    @cached_property
    def _needs_all_samples(self) -> bool:
        """Whether the gap is not a function of moments: d is less than the rank of the optimal logits."""
        return self.missing is None and self.problem.orbit(torch.device("cpu")).is_cut

    def read(self, head: Head, features: Tensor, labels: Tensor) -> Gap:
        """Compute gap and distance, or the certified gap, at an iterate.

        Args:
            head: The head, not sharded.
            features: ``(B, d)`` of this process.
            labels: ``(B,)`` of this process. The labels of all processes have the counts of the problem.

        Returns:
            Float64 scalars on the device.
        """
        if self.missing is not None:
            assert isinstance(self.problem, Problem)
            return _certified(self.problem, head, features, labels)
        gap, distance = self._gap_and_distance(head, features, labels)
        return Gap(self.problem.optimal_value + gap, {GAP.tag(): gap, DISTANCE.tag(): distance})

    def _gap_and_distance(self, head: Head, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        problem = self.problem
        if self._needs_all_samples:
            point = head.weight, features, labels, head.bias
            return problem.gap(*point, check_labels=False), problem.distance(*point, check_labels=False)
        stats = merge_over_ranks(class_statistics(features, labels, problem.num_groups, scatter=False, copy=False))
        divergence = torch.stack([problem.divergence(z, own).sum() for z, own in _logits(head, features, labels)]).sum()
        mean_divergence = sum_over_ranks(divergence) / problem.num_samples
        weight, bias, spread = *_double(head), stats.spreads.sum()
        gap = problem.gap_from_moments(weight, stats.means, spread, mean_divergence, bias)
        return gap, problem.distance_from_moments(weight, stats.means, spread, bias)


def _certified(problem: Problem, head: Head, features: Tensor, labels: Tensor) -> Gap:
    """Return F, and F minus the lower bound of F* that the residuals at this iterate certify."""
    stats = merge_over_ranks(class_statistics(features, labels, problem.num_groups, scatter=False, copy=False))
    targets = problem.targets.to(features.device)
    residuals, losses = torch.zeros_like(targets), []
    for logits, own in _logits(head, features, labels):
        rows = targets.index_select(0, own)
        losses.append(problem.loss.value(logits, rows).sum())
        residuals.index_add_(0, own, problem.loss.residual(logits, rows))
    loss = torch.stack(losses).sum()
    sum_all_over_ranks([residuals, loss])
    (weight, bias), counts = _double(head), stats.counts.unsqueeze(1)
    objective = Objective(problem.loss, problem.lambda_w, problem.lambda_h, problem.lambda_b or 0.0)
    features_square = (counts * stats.means.square()).sum() + stats.spreads.sum()
    squares = weight.square().sum(), features_square, None if bias is None else bias.square().sum()
    value = objective.combine(loss, problem.num_samples, *squares)
    means = residuals / counts.clamp(min=1)
    bound = problem.lower_bound_from_means(means, linear(stats.means, weight, bias))
    assert bound is not None
    return Gap(value, {CERTIFIED_GAP.tag(): value - bound})


def _logits(head: Head, features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits of a block of samples, and their labels."""
    weight, bias = _double(head)
    rows = max(ELEMENTS_PER_STEP // features.shape[1], 1)
    for part, own in zip(torch.split(features, rows), torch.split(labels, rows), strict=True):
        yield linear(part.double(), weight, bias), own


def _double(head: Head) -> tuple[Tensor, Tensor | None]:
    return head.weight.double(), None if head.bias is None else head.bias.double()


@contextmanager
def said_if_slow(what: str) -> Iterator[None]:
    """Report on the first process what is being computed, if it takes more than two seconds.

    Args:
        what: The message, one sentence.
    """
    timer = Timer(_PATIENCE, rank_zero_info, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
