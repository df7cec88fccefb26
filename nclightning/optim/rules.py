"""What the steps of an optimizer do to parameters, read from its parameter groups and its state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from nclightning.functional import GradientStep
from nclightning.optim.armijo import ArmijoGD
from nclightning.optim.momentum import HeavyBall, Nesterov

__all__ = ["Step", "curvature_scales", "momentum_buffer", "step_of", "weight_decays"]

_SGD = (SGD, HeavyBall, Nesterov)  # The latter two set only the options of SGD.


class Step(NamedTuple):
    """A step of an optimizer as it acts on one parameter.

    Attributes:
        law: The step; of an adaptive optimizer its decoupled weight decay alone.
        is_linear: Whether that is all: whether the step is linear in the gradient.
    """

    law: GradientStep
    is_linear: bool


def step_of(
    optimizer: Optimizer, group: Mapping[str, Any], *, is_first: bool = False, penalty: float = 0.0
) -> Step | None:
    """Read the step that an optimizer takes, or has just taken, with the parameters of a group.

    Args:
        optimizer: ``SGD``, ``Adam`` or ``AdamW`` of ``torch.optim``, or ``ArmijoGD``, ``HeavyBall`` or ``Nesterov`` of
            :mod:`nclightning.optim`.
        group: Of its ``param_groups``.
        is_first: Whether the parameter had no momentum buffer before the step.
        penalty: On the parameter in the loss, as for :class:`nclightning.functional.GradientStep`.

    Returns:
        The step; None for another optimizer, also one derived from these, whose ``step`` may be another. Learning rates
        that are tensors are brought to the host.
    """
    kind = type(optimizer)
    if kind is ArmijoGD:
        outcome = optimizer.outcome  # type: ignore[attr-defined]
        return Step(GradientStep(0.0 if outcome is None else float(outcome.step_size), penalty=penalty), True)
    if kind in _SGD:
        given = {name: float(group[name]) for name in ("lr", "momentum", "dampening")}
        return Step(
            GradientStep(
                **given,
                nesterov=bool(group["nesterov"]),
                decay=float(group["weight_decay"]),
                penalty=penalty,
                maximize=bool(group["maximize"]),
                is_first=is_first,
            ),
            True,
        )
    if kind in (Adam, AdamW):
        decoupled = float(group["weight_decay"]) if _is_decoupled(kind, group) else 0.0
        return Step(GradientStep(float(group["lr"]), decoupled_decay=decoupled), False)
    return None


def momentum_buffer(optimizer: Optimizer, parameter: Tensor) -> Tensor | None:
    """Return the momentum buffer that ``torch.optim.SGD`` keeps of a parameter; None if there is none."""
    buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
    return buffer if isinstance(buffer, Tensor) else None


def weight_decays(optimizer: Optimizer) -> list[tuple[Tensor, float]]:
    """Return the trained parameters of an optimizer, each with the coupled weight decay that acts on it.

    Args:
        optimizer: Any.

    Returns:
        Parameters in the order of their groups; of decoupled decay, and of optimizers that :func:`step_of` does not
        know, 0.
    """
    found = list[tuple[Tensor, float]]()
    for group in optimizer.param_groups:
        coupled = type(optimizer) in _SGD or (type(optimizer) is Adam and not _is_decoupled(Adam, group))
        decay = float(group["weight_decay"]) if coupled else 0.0
        found += [(p, decay) for p in group["params"] if p.requires_grad]
    return found


def curvature_scales(optimizer: Optimizer) -> list[Tensor | float] | None:
    r"""Return what makes the curvature of the objective that of the optimizer, in units of the largest stable one.

    With the diagonal matrix S of these numbers, gradient descent on a quadratic with Hessian A by this optimizer is
    stable as long as the largest eigenvalue of :math:`S A S` is below 1. For SGD it is
    :math:`S^2 = 1/` :attr:`nclightning.functional.GradientStep.largest_stable_curvature`, and for Adam with its
    preconditioner held fixed :math:`P = (1 - \beta_1^t) (\sqrt{v / (1 - \beta_2^t)} + \epsilon)` it is

    .. math:: S^2 = \frac{\eta (1 - \beta_1)}{(1 + \beta_1)(2 - \eta\delta)} P^{-1},

    of which the first factor is 1 / (38/lr) for :math:`\beta_1 = 0.9`. Cohen et al. (2021, 2022).

    Args:
        optimizer: As for :func:`step_of`.

    Returns:
        A number or tensor for each trained parameter, in the order of :func:`weight_decays`; None for other optimizers,
        before the first step of Adam and of a line search, while ascending, and where groups differ in momentum, for
        which no such number is known.
    """
    groups = [group for group in optimizer.param_groups if any(p.requires_grad for p in group["params"])]
    if len({_momentum_of(group) for group in groups}) != 1:
        return None
    scales = list[Tensor | float]()
    for group in groups:
        found = step_of(optimizer, group)
        if found is None or found.law.maximize or group.get("maximize"):
            return None
        for p in group["params"]:
            if not p.requires_grad:
                continue
            scale = _scale(found.law) if found.is_linear else _scale_of_adam(optimizer, group, found.law, p)
            if scale is None:
                return None
            scales.append(scale)
    return scales


def _scale(law: GradientStep) -> float | None:
    most = law.largest_stable_curvature
    return 1 / math.sqrt(most) if 0 < most < math.inf else None


def _scale_of_adam(optimizer: Optimizer, group: Mapping[str, Any], law: GradientStep, p: Tensor) -> Tensor | None:
    state = optimizer.state.get(p, {})
    squares = state.get("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    beta, second = (float(each) for each in group["betas"])
    # An averaged gradient is that of heavy ball with the step (1 - beta) lr.
    averaged = GradientStep(law.lr, momentum=beta, dampening=beta, decoupled_decay=law.decoupled_decay)
    scale = _scale(averaged)
    if squares is None or scale is None:
        return None
    steps = float(state["step"])
    precondition = (1 - beta**steps) * ((squares.detach() / (1 - second**steps)).sqrt() + float(group["eps"]))
    found: Tensor = scale / precondition.sqrt()
    return found


def _momentum_of(group: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(group.get(name) for name in ("momentum", "dampening", "nesterov", "betas"))


def _is_decoupled(kind: type, group: Mapping[str, Any]) -> bool:
    """Whether the weight decay of Adam is that of AdamW; newer versions of torch tell by the group."""
    return bool(group.get("decoupled_weight_decay", kind is AdamW))
