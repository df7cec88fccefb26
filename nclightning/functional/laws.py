"""Laws of the steps of optimizers: sums over the rows of a head, balance of two factors, and stable curvature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.functional.linear import power_of_two

__all__ = ["GradientStep", "balance_deviation", "balance_residual", "predict_row_sum"]

Matrix = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class GradientStep:
    r"""Hyperparameters of one step of gradient descent, as ``torch.optim.SGD`` takes it.

    .. math::
        g = \pm\nabla F(x) + \lambda x, \quad v_+ = \beta v + (1 - \tau) g, \quad
        x_+ = (1 - \eta\delta) x - \eta \cdot
        \begin{cases} g + \beta v_+ & \text{Nesterov} \\ v_+ & \text{else} \end{cases}

    The first step has :math:`v_+ = g`; with :math:`\beta = 0` it is :math:`x_+ = (1 - \eta\delta) x - \eta g`.

    Args:
        lr: The step :math:`\eta`.
        momentum: :math:`\beta`.
        dampening: :math:`\tau`.
        nesterov: Whether the momentum is Nesterov's.
        decay: Coupled weight decay :math:`\lambda`, which the optimizer adds to the gradient.
        decoupled_decay: Decoupled weight decay :math:`\delta`, as that of AdamW.
        penalty: :math:`\rho` of a term :math:`\tfrac\rho2 \|x\|^2` in the loss F.
        maximize: Whether the step ascends, with the minus sign before the gradient.
        is_first: Whether there is no momentum buffer yet.

    Example:
        >>> GradientStep(lr=0.1, decay=0.5).next_row_sum(torch.tensor([2.0]))[0]
        tensor([1.9000])
        >>> GradientStep(lr=0.1).largest_stable_curvature
        20.0
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    decay: float = 0.0
    decoupled_decay: float = 0.0
    penalty: float = 0.0
    maximize: bool = False
    is_first: bool = False

    @property
    def matrix(self) -> Matrix:
        r"""The step as a map of :math:`(u, v)`, the sums of rows of weight and momentum buffer.

        The sum of the gradient's rows is :math:`\rho u` for each loss that does not change when one number is added to
        all logits of a sample. That leaves

        .. math:: g = (\lambda \pm \rho) u.
        """
        pull = self.decay + (-self.penalty if self.maximize else self.penalty)
        keep = 1 - self.lr * self.decoupled_decay
        if not self.momentum:
            return (keep - self.lr * pull, 0.0), (0.0, 1.0)  # torch keeps a buffer of earlier steps.
        fresh = pull if self.is_first else (1 - self.dampening) * pull
        old = 0.0 if self.is_first else self.momentum
        step = (pull + self.momentum * fresh, self.momentum * old) if self.nesterov else (fresh, old)
        return (keep - self.lr * step[0], -self.lr * step[1]), (fresh, old)

    def next_row_sum(self, total: Tensor, velocity: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict the sum of rows after the step.

        Args:
            total: Sum of the rows of the weight before it, any shape.
            velocity: Sum of the rows of the momentum buffer before it; None is zero.

        Returns:
            Both sums after it, of the shape and dtype of ``total``. A step without momentum leaves the second.
        """
        return _apply(self.matrix, total, torch.zeros_like(total) if velocity is None else velocity)

    @property
    def largest_stable_curvature(self) -> float:
        r"""The curvature of a quadratic beyond which this step, repeated, diverges.

        .. math::
            \frac{(1 + \beta)(1 + \alpha)}{(1 - \tau)\eta} \quad\text{and for Nesterov's}\quad
            \frac{(1 + \beta)(1 + \alpha)}{(1 + \beta + \beta(1 - \tau))\eta}

        with :math:`\alpha = 1 - \eta\delta`: 2/lr of gradient descent, (2 + 2 momentum)/lr of heavy ball. Coupled decay
        and a penalty are part of the curvature. Infinite for a step of 0. Cohen et al. (2021).

        Raises:
            ValueError: For a step that ascends.
        """
        if self.maximize:
            raise UserError("maximize=True ascends: no curvature bounds its steps.")
        if self.lr == 0:
            return math.inf
        beta, fresh = self.momentum, 1 - self.dampening
        if not beta:
            fresh = 1.0
        share = 1 + beta + beta * fresh if self.nesterov and beta else fresh
        return (1 + beta) * (2 - self.lr * self.decoupled_decay) / (share * self.lr)


def _apply(matrix: Matrix, total: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
    (a, b), (c, d) = matrix
    return a * total + b * velocity, c * total + d * velocity


def predict_row_sum(total: Tensor, steps: Sequence[GradientStep], velocity: Tensor | None = None) -> Tensor:
    r"""Predict the sum of the rows of a head, :math:`W^\top 1` (NC0), after steps of gradient descent.

    Exact for losses whose gradient in the logits sums to zero over the classes, as that of cross-entropy with hard,
    smoothed or mixed labels, weights of classes or logit adjustment: whatever features, batches and the rest of the
    network are. Not for squared error or binary cross-entropy.

    Args:
        total: Sum of the rows of the weight ``(K, d)`` before the first step, ``(d,)``; or of a bias, a scalar.
        steps: In their order.
        velocity: Sum of the rows of the momentum buffer before the first step; None if there is none.

    Returns:
        Sum of the rows after the last step, of the shape and dtype of ``total``.

    Example:
        >>> predict_row_sum(torch.tensor([1.0]), [GradientStep(lr=0.5, decay=0.2)] * 2)
        tensor([0.8100])
    """
    velocity = torch.zeros_like(total) if velocity is None else velocity
    for step in steps:
        total, velocity = step.next_row_sum(total, velocity)
    return total


def balance_deviation(
    outgoing: Tensor, incoming: Tensor, outgoing_decay: float = 1.0, incoming_decay: float = 1.0
) -> Tensor:
    r"""Measure how far two factors of a product are from balance.

    .. math::
        \frac{\|\lambda_W W^\top W - \lambda_H H^\top H\|_F}
        {\|\lambda_W W^\top W\|_F + \|\lambda_H H^\top H\|_F}

    Zero at each stationary point of a loss of :math:`H W^\top` with these penalties, such as the unconstrained
    feature model, and of two linear layers next to each other. Under gradient flow without penalties the difference
    with both :math:`\lambda` equal to 1 does not change (Arora et al., 2018).

    Args:
        outgoing: W, the head ``(K, d)`` or the later layer.
        incoming: H, all features ``(N, d)``, or the transposed weight of the layer before.
        outgoing_decay: Penalty on W: of :math:`\tfrac{\lambda_W}2 \|W\|_F^2`.
        incoming_decay: Penalty on H.

    Returns:
        Scalar in [0, 1] in the dtype of ``outgoing``; ``nan`` if both terms are zero.

    Raises:
        ValueError: If the two do not have the same number of columns, or a penalty is negative.
    """
    _check_factors(outgoing, incoming)
    if not (outgoing_decay >= 0 and incoming_decay >= 0):
        raise UserError(
            f"outgoing_decay and incoming_decay must be non-negative, got {outgoing_decay} and {incoming_decay}."
        )
    left, right = math.sqrt(outgoing_decay) * outgoing, math.sqrt(incoming_decay) * incoming
    unit = _unit(left, right)
    left, right = (left / unit).T @ (left / unit), (right / unit).T @ (right / unit)
    size = torch.linalg.matrix_norm(left) + torch.linalg.matrix_norm(right)
    deviation: Tensor = torch.linalg.matrix_norm(left - right) / size
    return deviation


def balance_residual(
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    lr: float,
    outgoing_decay: float = 0.0,
    incoming_decay: float = 0.0,
) -> Tensor:
    r"""Measure how far a step of gradient descent is from the law by which it changes the balance of two factors.

    .. math::
        W^\top \Delta W - \Delta H^\top H = -\eta (\lambda_W W^\top W - \lambda_H H^\top H)

    holds exactly, whatever the loss of :math:`H W^\top` is. For :math:`D = W^\top W - H^\top H` it says

    .. math::
        D_+ = D - 2 \eta (\lambda_W W^\top W - \lambda_H H^\top H)
        + \Delta W^\top \Delta W - \Delta H^\top \Delta H,

    of which the last two terms are of second order in the step: gradient flow does not have them.

    Args:
        before: W and H, as for :func:`balance_deviation`.
        after: The same after one step with the same ``lr`` for both, without momentum.
        lr: The step :math:`\eta`.
        outgoing_decay: Penalty on W in what is descended on, in the loss or by coupled weight decay.
        incoming_decay: Penalty on H.

    Returns:
        Norm of the difference of both sides over :math:`\|W\|_F^2 + \|H\|_F^2`, the larger of before and after; a few
        roundings of the dtype where the law holds. ``nan`` if all are zero.

    Raises:
        ValueError: If shapes do not fit.
    """
    _check_factors(*before)
    if (before[0].shape, before[1].shape) != (after[0].shape, after[1].shape):
        raise UserError(
            f"before and after must have the same shapes, got {[tuple(each.shape) for each in (*before, *after)]}."
        )
    unit = _unit(*before, *after)
    outgoing, incoming, outgoing_after, incoming_after = (each / unit for each in (*before, *after))
    change, incoming_change = outgoing_after - outgoing, incoming_after - incoming
    left = outgoing.T @ change - incoming_change.T @ incoming
    right = outgoing_decay * (outgoing.T @ outgoing) - incoming_decay * (incoming.T @ incoming)
    squares = [each.square().sum() for each in (outgoing, incoming, outgoing_after, incoming_after)]
    size = torch.maximum(squares[0] + squares[1], squares[2] + squares[3])
    residual: Tensor = torch.linalg.matrix_norm(left + lr * right) / size
    return residual


def _unit(*tensors: Tensor) -> Tensor:
    """Power of two up to the largest entry of all, by which squares neither over- nor underflow."""
    return power_of_two(torch.stack([torch.linalg.vector_norm(each, ord=math.inf) for each in tensors]))


def _check_factors(outgoing: Tensor, incoming: Tensor) -> None:
    if outgoing.ndim != 2 or incoming.ndim != 2 or outgoing.shape[1] != incoming.shape[1] or not outgoing.numel():
        raise UserError(
            "outgoing and incoming must be (K, d) and (N, d), got "
            f"{tuple(outgoing.shape)} and {tuple(incoming.shape)}: transpose the weight of a layer before the other."
        )
