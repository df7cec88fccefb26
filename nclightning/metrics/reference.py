r"""What features and head are measured against: a problem, or a loss whose problem follows from the samples seen.

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
# Numbers of K x K matrices: 128 MiB, 4096 classes.
_LARGEST_TABLE = 2**24
# An optimum that has no formula takes seconds for so many groups times outputs, and minutes for a hundred times more.
_MOST_NUMBERS = 2**14


class Penalties(NamedTuple):
    """Penalties of Problem (2).

    Attributes:
        lambda_w: On the head.
        lambda_h: On the features, on the sum over samples.
        lambda_b: On the bias, 0.0 for a free one.
    """

    lambda_w: float
    lambda_h: float
    lambda_b: float = 0.0

    @property
    def strength(self) -> float:
        """Root of the product of those on head and features."""
        return math.sqrt(self.lambda_w) * math.sqrt(self.lambda_h)


@dataclass(frozen=True, eq=False)
class Reference:
    """What features and head are measured against.

    Args:
        problem: A problem, whose groups must come exactly as often as its counts say; or the loss alone, ``"mse"``,
            ``"ce"``, ``"bce"`` or a :class:`nclightning.problems.Loss`, whose problem is that of the samples seen.
        lambda_w: With a loss: penalty on the head. None with ``lambda_h`` fits both.
        lambda_h: With a loss: penalty on the features, on the sum over all samples.
        lambda_b: With a loss: penalty on a bias that the head has; 0.0 takes it as free.
        targets: With a loss: ``(M, K)``, whose row m is the target of label m, such as smoothed labels. None takes
            hard labels; for a head with one output 0 and 1.
        exact: Whether gap and distance are read: True also where finding the optimum may take minutes, False not at
            all, None where there is a formula or M K is at most 16384, that of 128 classes.

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
                    raise UserError(f"{name} cannot go together with a problem, which says it: leave it out.")
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
        """Whether a problem was given, and not a loss."""
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
        """Targets of the groups for a head with so many outputs, ``(M, K)`` float64 on the host.

        Raises:
            ValueError: If they do not fit the head or the loss.
        """
        if isinstance(self.problem, Problem):
            return self.problem.targets
        if num_outputs == 1 and self.loss.shift_invariant:
            raise UserError(
                "head must have at least two outputs for cross-entropy, which one logit does not change: pass 'bce' "
                "for a yes or no."
            )
        if isinstance(self.targets, Tensor):
            table = self.targets
        elif num_outputs > 1:
            table = one_hot(num_outputs)
        elif self.name is not None:
            table = torch.tensor([[0.0], [1.0]], dtype=torch.float64, device="cpu")
        else:
            raise UserError(
                "targets must be given for a head with one output: a row for each label, such as targets=[[0.0], "
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
        """Raise unless a head can be measured against this.

        Args:
            head: Any, as for :class:`nclightning.metrics.NeuralCollapse`.

        Returns:
            Number of groups M, and d.

        Raises:
            ValueError: With the reason.
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
            raise UserError("head must have a bias, as the problem has one: its optimum has the bias 1/K.")
        if isinstance(self.problem, Problem) and self.problem.has_bias != has_bias:
            raise UserError(
                f"head must have {'a' if self.problem.has_bias else 'no'} bias, as the problem has bias="
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
        """Read a head as a loss of features.

        Args:
            head: As for :class:`nclightning.metrics.NeuralCollapse`.
            device: Of the features.

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
        """Make the problem of the samples seen.

        Args:
            counts: Samples of each group.
            head: The head.
            penalties: Given or fitted.

        Returns:
            A problem; the same one as before for the same arguments, so that its optimum is found once.

        Raises:
            ValueError: If a problem was given, and groups come in other numbers.
        """
        if isinstance(self.problem, Problem):
            known = self.problem.counts.tolist()
            if known != list(counts):
                different = next(m for m, (one, other) in enumerate(zip(known, counts, strict=True)) if one != other)
                raise UserError(
                    f"label {different} must come exactly {known[different]} times, as the problem's counts say, got "
                    f"{counts[different]} times: pass the loss and the penalties alone to measure against the problem "
                    "of the samples seen."
                )
            return self.problem
        if isinstance(self.problem, UFMProblem) and set(counts) != {self.problem.samples_per_class}:
            raise UserError(
                f"every class must come exactly {self.problem.samples_per_class} times, got between {min(counts)} and "
                f"{max(counts)}: pass {self.problem.loss!r} and the penalties alone to measure against the problem of "
                "the samples seen."
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
        """Whether the problem of the samples seen is one of the paper's two, whose optimum is known at once."""
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
        """Return the problem of the samples seen, or the same with closed forms at once for any number of classes.

        Raises:
            NoAnswer: If its optimum is not to be found, with the reason.
        """
        if self.exact is False:
            raise NoAnswer("optimum", "exact=False asks for the certified bound alone.")
        if self.has_closed_form(counts, head):
            sizes = problem.num_classes, counts[0], problem.feature_dim
            return UFMProblem(self.name, *sizes, problem.lambda_w, problem.lambda_h)  # type: ignore[arg-type]
        if self.exact is None and problem.targets.numel() > _MOST_NUMBERS and not _has_formula(problem):
            raise NoAnswer(
                "optimum",
                f"that of {problem.num_groups} targets with {problem.num_classes} outputs has no formula and takes "
                "minutes to find. Pass exact=True to have it found.",
            )
        return problem


def is_loss(value: object) -> bool:
    """Whether a value is the name of a loss, or a loss."""
    return isinstance(value, Loss) or (isinstance(value, str) and value in _LOSSES)


def _has_formula(problem: Problem) -> bool:
    present = problem.present
    counts = problem.counts[present].double()
    groups = Groups(problem.loss, problem.targets[present], counts, problem.strength, problem.lambda_b)
    return problem.loss.closed_form(groups) is not None


def check_linear(head: HeadSource) -> None:
    """Raise unless a head is linear in the features.

    Args:
        head: Any, as for :class:`nclightning.metrics.NeuralCollapse`.

    Raises:
        ValueError: With the reason.
    """
    if isinstance(head, nn.Module) and (type(head).forward not in _AFFINE or "forward" in vars(head)):
        raise UserError(
            f"head must be linear, got a {type(head).__name__} with a forward of its own: no optimum is known for it."
        )
    if isinstance(head, HeadReader) and head.form == "probed":
        raise UserError(
            f"head must be linear, got a {type(head.source).__name__} that makes its weight in a forward of its own: "
            "no optimum is known for it."
        )
    if isinstance(head, Head | HeadReader) and head.normalizes:
        raise UserError(f"head must be linear, got the cosine head {head.name!r}: no optimum is known for it.")
