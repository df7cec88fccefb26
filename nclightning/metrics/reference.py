r"""The reference of the optimality measures: a problem, or a loss whose problem follows from the samples.

Letters: M groups of samples with the same target (the classes, for hard labels), K outputs, d features, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nclightning.errors import UserError
from nclightning.functional import HeadLoss
from nclightning.heads import Head, HeadReader, HeadSource, read_head, weight_shape
from nclightning.objective import LOSSES
from nclightning.problems import BinaryCrossEntropy, Loss, NoAnswer, Problem
from nclightning.problems.checks import check_table
from nclightning.problems.frames import one_hot
from nclightning.problems.groups import Groups
from nclightning.theory import UFMProblem

__all__ = ["LossLike", "Penalties", "Reference", "check_linear", "is_loss"]

LossLike = Literal["mse", "ce", "bce"] | Loss

_LOSSES: Mapping[str, Loss] = {**LOSSES, "bce": BinaryCrossEntropy()}
_AFFINE = tuple(layer.forward for layer in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
# Largest number of elements of a K x K matrix: 128 MiB, 4096 classes.
_LARGEST_TABLE = 2**24
# Largest M K for which an optimum without a formula is computed by default. It takes seconds; for a hundred times more
# it takes minutes.
_MOST_NUMBERS = 2**14


class Penalties(NamedTuple):
    """Penalties of Problem (2).

    Attributes:
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features, on the sum over samples.
        lambda_b: Penalty on the bias; 0.0 for a free bias.
    """

    lambda_w: float
    lambda_h: float
    lambda_b: float = 0.0

    @property
    def strength(self) -> float:
        """Square root of the product of the penalties on head and features."""
        return math.sqrt(self.lambda_w) * math.sqrt(self.lambda_h)


@dataclass(frozen=True, eq=False)
class Reference:
    """The problem to whose optimum features and head are compared.

    Args:
        problem: A problem, whose counts must be those of the labels; or a loss, ``"mse"``, ``"ce"``, ``"bce"`` or a
            :class:`nclightning.problems.Loss`, whose problem is that of the given samples.
        lambda_w: With a loss: penalty on the head. None for both penalties fits them.
        lambda_h: With a loss: penalty on the features, on the sum over all samples.
        lambda_b: With a loss: penalty on the bias of the head; 0.0 means that the bias is free.
        targets: With a loss: ``(M, K)``; row m is the target of label m, such as a smoothed label. None means hard
            labels, and 0 and 1 for a head with one output.
        exact: Whether to compute gap and distance: True in any case, even if it may take minutes to find the optimum;
            False never; None if the optimum has a formula or M K is at most 16384, that is, up to 128 classes.

    Raises:
        ValueError: If an argument is out of range.
    """

    problem: UFMProblem | Problem | LossLike
    lambda_w: float | None = None
    lambda_h: float | None = None
    lambda_b: float = 0.0
    targets: Tensor | Sequence[Sequence[float]] | None = None
    exact: bool | None = None
    _last: dict[Any, Problem] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.problem, UFMProblem | Problem) and not is_loss(self.problem):
            raise UserError(
                "problem must be a UFMProblem, a Problem, a Loss such as CrossEntropy(), 'mse', 'ce' or 'bce', got "
                f"{self.problem!r}."
            )
        if self.is_problem:
            for name in ("lambda_w", "lambda_h", "lambda_b", "targets"):
                given = getattr(self, name)
                if given is not None and (isinstance(given, Tensor) or given != 0):
                    raise UserError(f"{name} cannot be given together with a problem, which has its own: leave it out.")
        for name in ("lambda_w", "lambda_h"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be None or positive and finite, got {value!r}: the optimum needs both.")
        if not 0 <= self.lambda_b < math.inf:
            raise UserError(f"lambda_b must be 0 or positive and finite, got {self.lambda_b!r}.")
        if (self.lambda_w is None) != (self.lambda_h is None):
            alone, missing = ("lambda_w", "lambda_h") if self.lambda_h is None else ("lambda_h", "lambda_w")
            raise UserError(f"{alone} was given without {missing}: give both, or neither to have both fitted.")
        if self.targets is not None:
            object.__setattr__(self, "targets", check_table(self.targets, self.loss))

    @property
    def is_problem(self) -> bool:
        """Whether a problem was given rather than a loss."""
        return isinstance(self.problem, UFMProblem | Problem)

    @property
    def loss(self) -> Loss:
        """The loss."""
        if isinstance(self.problem, Problem):
            return self.problem.loss
        return _LOSSES[self.name] if self.name is not None else self.problem  # type: ignore[return-value]

    @property
    def name(self) -> str | None:
        """Name of the loss; None if it was given as an object."""
        if isinstance(self.problem, UFMProblem):
            return self.problem.loss
        return self.problem if isinstance(self.problem, str) else None

    def table(self, num_outputs: int) -> Tensor:
        """Return the targets of the groups, ``(M, K)`` float64 on the host.

        Args:
            num_outputs: Number of outputs of the head, K.

        Raises:
            ValueError: If the targets do not fit the head or the loss.
        """
        if isinstance(self.problem, Problem):
            return self.problem.targets
        if num_outputs == 1 and self.loss.shift_invariant:
            raise UserError(
                "head must have at least two outputs for cross-entropy, which is constant for one logit: pass 'bce' "
                "for two classes with one output."
            )
        if isinstance(self.targets, Tensor):
            table = self.targets
        elif num_outputs > 1:
            table = one_hot(num_outputs)
        elif self.name is not None:
            table = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device="cpu")
        else:
            raise UserError(
                "targets must be given for a head with one output: one row for each label, such as targets=[[0.0], "
                "[1.0]]."
            )
        if table.shape[1] != num_outputs:
            raise UserError(
                f"targets must have a column for each of the {num_outputs} outputs of the head, got the shape "
                f"{tuple(table.shape)}."
            )
        self.loss.check_targets(table)
        return table

    def check_head(self, head: HeadSource) -> tuple[int, int]:
        """Raise an error unless the head fits the problem.

        Args:
            head: The head, as for :class:`nclightning.metrics.NeuralCollapse`.

        Returns:
            Number of groups M, and d.

        Raises:
            ValueError: If the head does not fit.
        """
        check_linear(head)
        num_outputs, dim = weight_shape(head)
        if self.is_problem:
            known = self.problem
            assert isinstance(known, UFMProblem | Problem)
            if (known.num_classes, known.feature_dim) != (num_outputs, dim):
                raise UserError(
                    f"head must have a weight of shape {(known.num_classes, known.feature_dim)} for this problem, got "
                    f"{(num_outputs, dim)}."
                )
        has_bias = read_head(head).bias is not None
        if isinstance(self.problem, UFMProblem) and self.problem.loss == "mse" and not has_bias:
            raise UserError("head must have a bias, since the problem has one: the bias is 1/K at its optimum.")
        if isinstance(self.problem, Problem) and self.problem.has_bias != has_bias:
            raise UserError(
                f"head must have {'a' if self.problem.has_bias else 'no'} bias, since the problem has bias="
                f"{self.problem.bias!r}: make the problem with bias={'none' if not has_bias else 'free'!r}."
            )
        table = self.table(num_outputs)
        if table.numel() > _LARGEST_TABLE and dim < num_outputs - 1:
            raise UserError(
                f"a head with {num_outputs} outputs and {dim} inputs has no known optimum, and the certified bound "
                f"would need {len(table)} x {num_outputs} numbers: at most {_LARGEST_TABLE} are kept."
            )
        return len(table), dim

    def head_loss(self, head: HeadSource, device: torch.device) -> HeadLoss:
        """Combine the loss, the targets and the current values of the head.

        Args:
            head: The head, as for :class:`nclightning.metrics.NeuralCollapse`.
            device: Device of the features.

        Returns:
            Loss, targets and head, float64.
        """
        now = read_head(head)
        bias = None if now.bias is None else now.bias.detach().to(device, torch.float64)
        weight = now.weight.detach().to(device, torch.float64)
        return HeadLoss(self.loss, self.table(len(weight)).to(device), weight, bias)

    @property
    def given(self) -> Penalties | None:
        """Penalties that were given; None if they are to be fitted."""
        if isinstance(self.problem, UFMProblem | Problem):
            lambda_b = self.problem.lambda_b if isinstance(self.problem, Problem) else None
            return Penalties(self.problem.lambda_w, self.problem.lambda_h, lambda_b or 0.0)
        if self.lambda_w is None or self.lambda_h is None:
            return None
        return Penalties(self.lambda_w, self.lambda_h, self.lambda_b)

    def problem_of(self, counts: Sequence[int], head: HeadLoss, penalties: Penalties) -> Problem:
        """Make the problem of the given samples.

        Args:
            counts: Number of samples of each group.
            head: The head.
            penalties: Given or fitted penalties.

        Returns:
            The problem. It is the same object as before for the same arguments, so that its optimum is found once.

        Raises:
            ValueError: If a problem was given and its counts differ.
        """
        if isinstance(self.problem, Problem):
            known = self.problem.counts.tolist()
            if known != list(counts):
                different = next(m for m, (one, other) in enumerate(zip(known, counts, strict=True)) if one != other)
                raise UserError(
                    f"label {different} must occur exactly {known[different]} times, as the problem's counts say, got "
                    f"{counts[different]} times: pass the loss and the penalties instead of the problem to take the "
                    "counts from the samples."
                )
            return self.problem
        if isinstance(self.problem, UFMProblem) and set(counts) != {self.problem.samples_per_class}:
            raise UserError(
                f"every class must occur exactly {self.problem.samples_per_class} times, got between {min(counts)} and "
                f"{max(counts)}: pass {self.problem.loss!r} and the penalties instead of the problem to take the "
                "counts from the samples."
            )
        num_outputs, dim = head.weight.shape
        key = tuple(counts), num_outputs, dim, penalties, head.bias is None
        if key not in self._last:
            targets = None if self.targets is None and num_outputs > 1 else self.table(num_outputs)
            bias: Literal["none", "free"] | float = "none" if head.bias is None else penalties.lambda_b or "free"
            self._last.clear()
            self._last[key] = Problem(
                self.loss, targets, list(counts), dim, penalties.lambda_w, penalties.lambda_h, bias
            )
        return self._last[key]

    def has_closed_form(self, counts: Sequence[int], head: HeadLoss) -> bool:
        """Whether the problem of the given samples is one of the paper's two, whose optimum has a closed form."""
        num_outputs, dim = head.weight.shape
        return (
            self.name in ("mse", "ce")
            and self.targets is None
            and 2 <= num_outputs <= dim + 1
            and not self.lambda_b
            and (self.name == "ce" or head.bias is not None)
            and len(set(counts)) == 1
        )

    def to_solve(self, problem: Problem, counts: Sequence[int], head: HeadLoss) -> UFMProblem | Problem:
        """Return a problem with an optimum: the problem itself, or the same one as a :class:`UFMProblem` if it can be.

        Raises:
            NoAnswer: If the optimum should not be computed, with the reason.
        """
        if self.exact is False:
            raise NoAnswer("optimum", "exact=False requests the certified bound only.")
        if self.has_closed_form(counts, head):
            sizes = problem.num_classes, counts[0], problem.feature_dim
            return UFMProblem(self.name, *sizes, problem.lambda_w, problem.lambda_h)  # type: ignore[arg-type]
        if self.exact is None and problem.targets.numel() > _MOST_NUMBERS and not _has_formula(problem):
            raise NoAnswer(
                "optimum",
                f"that for {problem.num_groups} targets with {problem.num_classes} outputs has no formula, and takes "
                "minutes to find. Pass exact=True to compute it.",
            )
        return problem


def is_loss(value: object) -> bool:
    """Whether a value is a loss or the name of one."""
    return isinstance(value, Loss) or (isinstance(value, str) and value in _LOSSES)


def _has_formula(problem: Problem) -> bool:
    """Whether the optimum of a problem has a formula."""
    present = problem.present
    counts = problem.counts[present].double()
    groups = Groups(problem.loss, problem.targets[present], counts, problem.strength, problem.lambda_b)
    return problem.loss.closed_form(groups) is not None


def check_linear(head: HeadSource) -> None:
    """Raise an error unless the head is linear in the features.

    Args:
        head: The head, as for :class:`nclightning.metrics.NeuralCollapse`.

    Raises:
        ValueError: If it is not linear.
    """
    if isinstance(head, nn.Module) and (type(head).forward not in _AFFINE or "forward" in vars(head)):
        raise UserError(
            f"head must be linear, got a {type(head).__name__} with its own forward: no optimum is known for it."
        )
    if isinstance(head, HeadReader) and head.form == "probed":
        raise UserError(
            f"head must be linear, got a {type(head.source).__name__} whose forward computes its weight: no optimum is "
            "known for it."
        )
    if isinstance(head, Head | HeadReader) and head.normalizes:
        raise UserError(f"head must be linear, got the cosine head {head.name!r}: no optimum is known for it.")
