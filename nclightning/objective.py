"""The training objective, Problem (2) of the paper: the only place that scales a loss or a penalty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from nclightning.errors import UserError
from nclightning.problems.checks import check_table
from nclightning.problems.cross_entropy import CrossEntropy
from nclightning.problems.loss import Loss, target_rows
from nclightning.problems.squared_error import SquaredError

__all__ = ["LOSSES", "LossName", "Objective", "Scalar", "dot", "square_norm", "wide"]

LossName = Literal["mse", "ce"]
Scalar = TypeVar("Scalar", float, Tensor)

LOSSES: dict[str, Loss] = {"mse": SquaredError(), "ce": CrossEntropy()}


@dataclass(frozen=True, eq=False)
class Objective:
    r"""Regularised empirical risk of a linear head on features.

    .. math::
        F = \frac1N \sum_i L(W^\top h_i + b, y_i)
            + \frac{\lambda_W}2 \|W\|_F^2 + \frac{\lambda_H}2 \|H\|_F^2 + \frac{\lambda_b}2 \|b\|^2

    with :math:`L = \frac12\|z - e_y\|^2` (``"mse"``), :math:`-\log \mathrm{softmax}(z)_y` (``"ce"``) or any other loss.
    The feature penalty is a **sum** over all N samples, while the loss is a mean. The value has the dtype of the
    inputs. Paper: Eq. (2), (5), (8).

    Args:
        loss: ``"mse"``, ``"ce"`` or a :class:`nclightning.problems.Loss`.
        lambda_w: Penalty on the head's weight, non-negative.
        lambda_h: Penalty on the features, non-negative.
        lambda_b: Penalty on the head's bias, non-negative. The paper's results need 0.
        targets: ``(M, K)``; row m is the target of all samples with label m. None for hard labels.

    Raises:
        ValueError: If the loss is unknown, a penalty is negative or not finite, or the loss is not defined for the
            targets.

    Example:
        >>> import torch
        >>> from nclightning.objective import Objective
        >>> from nclightning.problems import BinaryCrossEntropy
        >>> objective = Objective(BinaryCrossEntropy(), lambda_w=0.1, lambda_h=0.1, targets=[[1, 0, 1], [0, 0, 0]])
        >>> objective(torch.zeros(3, 2), torch.zeros(4, 2), labels=torch.tensor([0, 1, 1, 0]))
        tensor(2.0794)
    """

    loss: LossName | Loss
    lambda_w: float
    lambda_h: float
    lambda_b: float = 0.0
    targets: Tensor | Sequence[Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Loss) and self.loss not in get_args(LossName):
            raise UserError(f"loss must be 'mse' or 'ce' or a Loss such as CrossEntropy(), got {self.loss!r}.")
        for name in ("lambda_w", "lambda_h", "lambda_b"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be finite and non-negative, got {value!r}.")
        if self.targets is not None:
            object.__setattr__(self, "targets", check_table(self.targets, self.function))

    @property
    def function(self) -> Loss:
        """The loss, as an object."""
        return self.loss if isinstance(self.loss, Loss) else LOSSES[self.loss]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        assert isinstance(other, Objective)
        mine, theirs = self.targets, other.targets
        same = mine is theirs or (isinstance(mine, Tensor) and isinstance(theirs, Tensor) and torch.equal(mine, theirs))
        return self._numbers == other._numbers and same

    def __hash__(self) -> int:
        return hash(self._numbers)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_tables"}

    @property
    def _numbers(self) -> tuple[Any, ...]:
        return self.loss, self.lambda_w, self.lambda_h, self.lambda_b

    def __call__(self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        """Evaluate F on all samples.

        Args:
            weight: Head weight ``(K, d)``.
            features: One row per sample, ``(N, d)``.
            labels: Class indices, or rows of the targets, ``(N,)``, int64, in any order.
            bias: Head bias ``(K,)``, or None for a head without one.

        Returns:
            Scalar, differentiable in ``weight``, ``features`` and ``bias``.

        Raises:
            ValueError: If a shape does not fit.
        """
        _check_shapes(weight, features, labels, bias)
        return self.from_logits(linear(features, weight, bias), weight, features, labels, bias)

    def from_logits(
        self,
        logits: Tensor,
        weight: Tensor,
        features: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        num_samples: int | None = None,
    ) -> Tensor:
        """Evaluate F from logits that the head has computed, so that hooks on the head have run.

        Args:
            logits: Head output ``(B, K)``.
            weight: Head weight ``(K, d)``.
            features: Head input ``(B, d)``.
            labels: Class indices, or rows of the targets, ``(B,)``.
            bias: Head bias ``(K,)`` or None.
            num_samples: N, if the batch is a part of the training set. The feature penalty of the batch is then
                multiplied by ``N / B``, which makes it an unbiased estimate. None means that the batch is the whole
                training set.

        Returns:
            Scalar of the inputs' dtype.
        """
        value = self.function.mean(logits, self._table(logits), labels)
        value = value + (0.5 * self.lambda_w) * weight.square().sum()
        share = 1.0 if num_samples is None else num_samples / len(features)
        value = value + (0.5 * self.lambda_h * share) * features.square().sum()
        if bias is not None and self.lambda_b:
            value = value + (0.5 * self.lambda_b) * bias.square().sum()
        return value

    def residual_of(self, features: Tensor, head: Sequence[Tensor], labels: Tensor, residual: Tensor) -> list[Tensor]:
        """Compute the residual of samples, the gradient of each sample's loss in its logits, without autograd.

        Args:
            features: ``(B, d)``.
            head: Weight ``(K, d)`` and perhaps bias ``(K,)``.
            labels: Class indices, or rows of the targets, ``(B,)``.
            residual: Output tensor ``(B, K)``, which is overwritten.

        Returns:
            Sum of the losses and squared norm of the features, float64.
        """
        torch.mm(features, head[0].T, out=residual)
        for bias in head[1:]:
            residual.add_(bias)
        # Converting all float32 features to float64 would take 4% of an iteration.
        norms = features if features.dtype == torch.float64 else torch.linalg.vector_norm(features, dim=1)
        losses = self.function.sum_and_residual_(residual, self._table(residual), labels)
        return [losses, square_norm(norms)]

    def gradient_of(
        self,
        features: Tensor,
        head: Sequence[Tensor],
        residual: Tensor,
        num_samples: int,
        of_head: Sequence[Tensor],
        out: Tensor,
    ) -> Tensor:
        """Compute the gradient of F in the features of samples, and add their part of the gradient in the head.

        Args:
            features: ``(B, d)``.
            head: Weight and perhaps bias.
            residual: Residual of these samples.
            num_samples: N.
            of_head: Gradients of weight and bias. The part of these samples is added in place.
            out: Output tensor for the gradient in the features. It may be ``features`` itself.

        Returns:
            ``out``.
        """
        scale = 1 / num_samples
        of_head[0].addmm_(residual.T, features, alpha=scale)
        for gradient in of_head[1:]:
            gradient.add_(residual.sum(dim=0), alpha=scale)
        return torch.mul(features, self.lambda_h, out=out).addmm_(residual, head[0], alpha=scale)

    def add_penalty_gradients_(self, of_head: Sequence[Tensor], head: Sequence[Tensor]) -> None:
        """Add the gradients of the head's penalties, in place; arguments as of :meth:`gradient_of`."""
        for gradient, part, penalty in zip(of_head, head, (self.lambda_w, self.lambda_b), strict=False):
            if penalty:
                gradient.add_(part, alpha=penalty)

    def targets_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the target of each sample, in the shape and dtype of the logits."""
        return target_rows(logits, self._table(logits), labels)

    def combine(
        self,
        losses: Scalar,
        num_samples: int,
        weight_square: Scalar,
        features_square: Scalar,
        bias_square: Scalar | None = None,
    ) -> Scalar:
        """Compute F from sums over all samples.

        Args:
            losses: Sum of the losses of all samples.
            num_samples: N.
            weight_square: Squared norm of the head's weight.
            features_square: Squared norm of all features.
            bias_square: Squared norm of the head's bias; None without a bias.

        Returns:
            F.
        """
        value = losses / num_samples + 0.5 * (self.lambda_w * weight_square + self.lambda_h * features_square)
        return value if bias_square is None or not self.lambda_b else value + 0.5 * self.lambda_b * bias_square

    @cached_property
    def _tables(self) -> dict[tuple[int, torch.dtype, torch.device], Tensor | None]:
        return {}

    def _table(self, logits: Tensor) -> Tensor | None:
        """Return the targets in the dtype and on the device of logits; None for hard labels. They are made once."""
        key = logits.shape[1], logits.dtype, logits.device
        if key not in self._tables:
            # Tensors made in inference mode could not be used outside of it later.
            with torch.inference_mode(False):
                self._tables[key] = self._table_for(*key)
        return self._tables[key]

    def _table_for(self, num_classes: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        if not isinstance(self.targets, Tensor):
            if isinstance(self.loss, Loss):
                self.loss.check_targets(torch.eye(1, num_classes, dtype=torch.float64, device="cpu"))
            return None
        if self.targets.shape[1] != num_classes:
            raise UserError(
                f"targets must have a column for each of the {num_classes} outputs of the head, got the shape "
                f"{tuple(self.targets.shape)}."
            )
        return self.targets.to(device, dtype)


def wide(tensor: Tensor) -> Tensor:
    """Return all entries as a vector in float64."""
    flat = tensor if tensor.ndim == 1 else tensor.reshape(-1)
    return flat if flat.dtype == torch.float64 else flat.double()


def dot(left: Tensor, right: Tensor) -> Tensor:
    """Compute the inner product of two tensors, accumulated in float64 for every dtype; scalar."""
    return torch.dot(wide(left), wide(right))


def square_norm(tensor: Tensor) -> Tensor:
    """Compute the squared Euclidean norm, accumulated in float64 for every dtype; scalar."""
    flat = wide(tensor)
    return torch.dot(flat, flat)


def _check_shapes(weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if weight.ndim != 2 or features.ndim != 2 or weight.shape[1] != features.shape[1]:
        raise UserError(
            "weight must be (K, d) and features (N, d) with the same d, "
            f"got {tuple(weight.shape)} and {tuple(features.shape)}."
        )
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise UserError(
            f"labels must be int64 of shape ({len(features)},), got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"bias must have shape ({len(weight)},), got {tuple(bias.shape)}.")
