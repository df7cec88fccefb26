"""The training objective, Problem (2) of the paper: the only place that scales a loss or a penalty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear, log_softmax

from nclightning.errors import UserError

__all__ = ["LossName", "Objective", "square_norm"]

LossName = Literal["mse", "ce"]
Scalar = TypeVar("Scalar", float, Tensor)


@dataclass(frozen=True)
class Objective:
    r"""Regularised empirical risk of a linear head on features.

    .. math::
        F = \frac1N \sum_i L(W^\top h_i + b, y_i)
            + \frac{\lambda_W}2 \|W\|_F^2 + \frac{\lambda_H}2 \|H\|_F^2 + \frac{\lambda_b}2 \|b\|^2

    with :math:`L = \frac12\|z - e_y\|^2` (``"mse"``) or :math:`-\log \mathrm{softmax}(z)_y` (``"ce"``).
    The feature penalty is a **sum** over all N samples while the loss is a mean. The value has the dtype of the
    inputs. Paper: Eq. (2), (5), (8).

    Args:
        loss: ``"mse"`` or ``"ce"``.
        lambda_w: Penalty on the head's weight, non-negative.
        lambda_h: Penalty on the features, non-negative.
        lambda_b: Penalty on the head's bias, non-negative. The paper's results need 0.

    Raises:
        ValueError: If the loss is unknown or a penalty is negative or not finite.
    """

    loss: LossName
    lambda_w: float
    lambda_h: float
    lambda_b: float = 0.0

    def __post_init__(self) -> None:
        if self.loss not in get_args(LossName):
            raise UserError(f"loss must be 'mse' or 'ce', got {self.loss!r}.")
        for name in ("lambda_w", "lambda_h", "lambda_b"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} must be finite and non-negative, got {value!r}.")

    def __call__(self, weight: Tensor, features: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
        """Evaluate F on all samples.

        Args:
            weight: Head weight ``(K, d)``.
            features: One row per sample, ``(N, d)``.
            labels: Class indices ``(N,)``, int64, in any order.
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
        """Evaluate F where the head has been applied already, so that hooks on the head have fired.

        Args:
            logits: Head output ``(B, K)``.
            weight: Head weight ``(K, d)``.
            features: Head input ``(B, d)``.
            labels: Class indices ``(B,)``.
            bias: Head bias ``(K,)`` or None.
            num_samples: N, if the batch is a part of the training set: the feature penalty of the batch is then
                multiplied by ``N / B``, its unbiased estimate. None means that the batch is the training set.

        Returns:
            Scalar of the inputs' dtype.
        """
        value = self._mean_loss(logits, labels)
        value = value + (0.5 * self.lambda_w) * weight.square().sum()
        share = 1.0 if num_samples is None else num_samples / len(features)
        value = value + (0.5 * self.lambda_h * share) * features.square().sum()
        if bias is not None and self.lambda_b:
            value = value + (0.5 * self.lambda_b) * bias.square().sum()
        return value

    def residual_(self, logits: Tensor, labels: Tensor) -> Tensor:
        r"""Replace logits by the derivative of the summed loss, :math:`z_i - e_{y_i}` or softmax minus that, in place.

        Args:
            logits: ``(B, K)``, overwritten.
            labels: Class indices ``(B,)``.

        Returns:
            Sum of the losses, float64 scalar.
        """
        index = labels.unsqueeze(1)
        if self.loss == "mse":
            return square_norm(logits.scatter_(1, index, -1.0, reduce="add")).mul_(0.5)
        log_probability = log_softmax(logits, dim=1)
        losses = log_probability.gather(1, index).sum(dtype=torch.float64).neg_()
        torch.exp(log_probability, out=logits).scatter_(1, index, -1.0, reduce="add")
        return losses

    def combine(self, losses: Scalar, num_samples: int, weight_square: Scalar, features_square: Scalar) -> Scalar:
        """Put F together from sums, for a free bias.

        Args:
            losses: Sum of the losses of all samples.
            num_samples: N.
            weight_square: Squared norm of the head's weight.
            features_square: Squared norm of all features.

        Returns:
            F.
        """
        return losses / num_samples + 0.5 * (self.lambda_w * weight_square + self.lambda_h * features_square)

    def add_penalty_gradient_(self, gradient: Tensor, weight: Tensor) -> Tensor:
        """Add the gradient of the head's penalty, in place.

        Args:
            gradient: ``(K, d)``, overwritten.
            weight: Head ``(K, d)``.

        Returns:
            ``gradient``.
        """
        return gradient.add_(weight, alpha=self.lambda_w)

    def penalty_gradient(self, features: Tensor, out: Tensor) -> Tensor:
        """Compute the gradient of the penalty on all features.

        Args:
            features: ``(B, d)``.
            out: Takes the gradient.

        Returns:
            ``out``.
        """
        return torch.mul(features, self.lambda_h, out=out)

    def _mean_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        # scatter and gather raise on a label outside 0..K-1; torch's own losses would skip -100 without a word.
        index = labels.unsqueeze(1)
        if self.loss == "mse":
            residual = logits.scatter_add(1, index, logits.new_full((1, 1), -1.0).expand_as(index))
            return residual.square().sum() / (2 * len(logits))
        return -log_softmax(logits, dim=1).gather(1, index).mean()


def square_norm(tensor: Tensor) -> Tensor:
    """Squared Euclidean norm, accumulated in float64 for every dtype; scalar."""
    flat = tensor.reshape(-1).double()
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
