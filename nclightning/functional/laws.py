"""Laws that optimizer steps obey: the sum of the head's rows, the balance of two factors, and stable curvature."""

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
        decoupled_decay: Decoupled weight decay :math:`\delta`, as in AdamW.
        penalty: Coefficient :math:`\rho` of a term :math:`\tfrac\rho2 \|x\|^2` in the loss F.
        maximize: Whether the step ascends: the sign of the gradient is then minus.
        is_first: Whether this is the first step, before there is a momentum buffer.

    Example:
        >>> import torch
        >>> from nclightning.functional import GradientStep
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
        r"""The step as a linear map of :math:`(u, v)`, the sums of the rows of weight and momentum buffer.

        If the loss does not change when the same number is added to all logits of a sample, only decay and penalty
        contribute to the sum of the gradient's rows:

        .. math:: g = (\lambda \pm \rho) u.
        """
        pull = self.decay + (-self.penalty if self.maximize else self.penalty)
        keep = 1 - self.lr * self.decoupled_decay
        if not self.momentum:
            return (keep - self.lr * pull, 0.0), (0.0, 1.0)  # torch leaves the buffer of earlier steps unchanged.
        fresh = pull if self.is_first else (1 - self.dampening) * pull
        old = 0.0 if self.is_first else self.momentum
        step = (pull + self.momentum * fresh, self.momentum * old) if self.nesterov else (fresh, old)
        return (keep - self.lr * step[0], -self.lr * step[1]), (fresh, old)

    def next_row_sum(self, total: Tensor, velocity: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict the sum of rows after the step.

        Args:
            total: Sum of the rows of the weight before the step, any shape.
            velocity: Sum of the rows of the momentum buffer before the step; None is zero.

        Returns:
            Both sums after the step, of the shape and dtype of ``total``. A step without momentum does not change the
            second one.
        """
        return _apply(self.matrix, total, torch.zeros_like(total) if velocity is None else velocity)

    @property
    def largest_stable_curvature(self) -> float:
        r"""The curvature of a quadratic beyond which this step, repeated, diverges.

        .. math::
            \frac{(1 + \beta)(1 + \alpha)}{(1 - \tau)\eta} \quad\text{and for Nesterov's}\quad
            \frac{(1 + \beta)(1 + \alpha)}{(1 + \beta + \beta(1 - \tau))\eta}

        with :math:`\alpha = 1 - \eta\delta`. For gradient descent it is 2/lr, for heavy ball (2 + 2 momentum)/lr.
        Coupled decay and a penalty are part of the curvature. It is infinite for ``lr=0``. Cohen et al. (2021).

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
    """Apply the matrix of a step to the two sums of rows."""
    (a, b), (c, d) = matrix
    return a * total + b * velocity, c * total + d * velocity


def predict_row_sum(total: Tensor, steps: Sequence[GradientStep], velocity: Tensor | None = None) -> Tensor:
    r"""Predict the sum of the rows of a head, :math:`W^\top 1` (NC0), after steps of gradient descent.

    The prediction is exact for losses whose gradient in the logits sums to zero over the classes, whatever the
    features, the batches and the rest of the network are. Cross-entropy is such a loss, also with smoothed or mixed
    labels, class weights or logit adjustment. Squared error and binary cross-entropy are not.

    Args:
        total: Sum of the rows of the weight before the first step, ``(d,)``; or the sum of a bias, a scalar.
        steps: The steps, in order.
        velocity: Sum of the rows of the momentum buffer before the first step; None if there is none.

    Returns:
        Sum of the rows after the last step, of the shape and dtype of ``total``.

    Example:
        >>> import torch
        >>> from nclightning.functional import GradientStep, predict_row_sum
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

    It is zero at each stationary point of a loss of :math:`H W^\top` with these penalties: of the unconstrained feature
    model, and of two consecutive linear layers. Under gradient flow without penalties,
    :math:`W^\top W - H^\top H` does not change (Arora et al., 2018).

    Args:
        outgoing: W, the head ``(K, d)`` or the later layer.
        incoming: H, all features ``(N, d)``, or the transposed weight of the earlier layer.
        outgoing_decay: :math:`\lambda_W`, for a penalty :math:`\tfrac{\lambda_W}2 \|W\|_F^2`.
        incoming_decay: :math:`\lambda_H`.

    Returns:
        Scalar in [0, 1] in the dtype of ``outgoing``, dimensionless; ``nan`` if both terms are zero.

    Raises:
        ValueError: If the two do not have the same number of columns, or a penalty is negative.

    Example:
        >>> import torch
        >>> from nclightning.functional import balance_deviation
        >>> weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> balance_deviation(weight, weight), balance_deviation(weight, torch.zeros(5, 2))
        (tensor(0.), tensor(1.))
    """
    _check_factors(outgoing, incoming)
    if not (outgoing_decay >= 0 and incoming_decay >= 0):
        raise UserError(
            f"outgoing_decay and incoming_decay must be non-negative, got {outgoing_decay} and {incoming_decay}."
        )
    left, right = math.sqrt(outgoing_decay) * outgoing, math.sqrt(incoming_decay) * incoming
    unit = _common_power_of_two(left, right)
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
    r"""Measure by how much a step of gradient descent violates the law of balance of two factors.

    Whatever the loss of :math:`H W^\top` is, a step obeys exactly

    .. math::
        W^\top \Delta W - \Delta H^\top H = -\eta (\lambda_W W^\top W - \lambda_H H^\top H).

    For :math:`D = W^\top W - H^\top H` this gives

    .. math::
        D_+ = D - 2 \eta (\lambda_W W^\top W - \lambda_H H^\top H)
        + \Delta W^\top \Delta W - \Delta H^\top \Delta H,

    where the last two terms are of second order in the step. Gradient flow does not have them.

    Args:
        before: W and H, as for :func:`balance_deviation`.
        after: W and H after one step with the same ``lr`` for both, without momentum.
        lr: The step :math:`\eta`.
        outgoing_decay: :math:`\lambda_W`, as a penalty in the loss or as coupled weight decay.
        incoming_decay: :math:`\lambda_H`.

    Returns:
        Frobenius norm of the difference of both sides, divided by the larger of :math:`\|W\|_F^2 + \|H\|_F^2` before
        and after the step. Dimensionless; a few roundings of the dtype if the law is obeyed, ``nan`` if all are zero.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> from nclightning.functional import balance_residual
        >>> weight = torch.eye(2, dtype=torch.float64, requires_grad=True)
        >>> features = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
        >>> loss = (features @ weight.T).pow(4).sum()  # any function of the product
        >>> before, gradients = (weight, features), torch.autograd.grad(loss, (weight, features))
        >>> after = tuple(x.detach() - 0.1 * gradient for x, gradient in zip(before, gradients))
        >>> bool(balance_residual((weight.detach(), features.detach()), after, lr=0.1) < 1e-14)
        True
    """
    _check_factors(*before)
    if (before[0].shape, before[1].shape) != (after[0].shape, after[1].shape):
        raise UserError(
            f"before and after must have the same shapes, got {[tuple(each.shape) for each in (*before, *after)]}."
        )
    unit = _common_power_of_two(*before, *after)
    outgoing, incoming, outgoing_after, incoming_after = (each / unit for each in (*before, *after))
    change, incoming_change = outgoing_after - outgoing, incoming_after - incoming
    left = outgoing.T @ change - incoming_change.T @ incoming
    right = outgoing_decay * (outgoing.T @ outgoing) - incoming_decay * (incoming.T @ incoming)
    squares = [each.square().sum() for each in (outgoing, incoming, outgoing_after, incoming_after)]
    size = torch.maximum(squares[0] + squares[1], squares[2] + squares[3])
    residual: Tensor = torch.linalg.matrix_norm(left + lr * right) / size
    return residual


def _common_power_of_two(*tensors: Tensor) -> Tensor:
    """Largest power of two that is at most the largest entry of all tensors: a unit that keeps squares in range."""
    return power_of_two(torch.stack([torch.linalg.vector_norm(each, ord=math.inf) for each in tensors]))


def _check_factors(outgoing: Tensor, incoming: Tensor) -> None:
    """Raise an error unless both factors are matrices with the same number of columns."""
    if outgoing.ndim != 2 or incoming.ndim != 2 or outgoing.shape[1] != incoming.shape[1] or not outgoing.numel():
        raise UserError(
            "outgoing and incoming must be (K, d) and (N, d), got "
            f"{tuple(outgoing.shape)} and {tuple(incoming.shape)}: transpose the weight of a layer before the other."
        )
