"""The update rules of known optimizers, read from their parameter groups and state."""

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
    """The update of one parameter by an optimizer.

    Attributes:
        law: The update rule. For an adaptive optimizer it is the decoupled weight decay only.
        is_linear: Whether ``law`` is the whole update, which then is linear in the gradient.
    """

    law: GradientStep
    is_linear: bool


def step_of(
    optimizer: Optimizer, group: Mapping[str, Any], *, is_first: bool = False, penalty: float = 0.0
) -> Step | None:
    """Return the update that an optimizer applies to the parameters of a group.

    Args:
        optimizer: ``SGD``, ``Adam`` or ``AdamW`` of ``torch.optim``, or ``ArmijoGD``, ``HeavyBall`` or ``Nesterov`` of
            :mod:`nclightning.optim`.
        group: One of its ``param_groups``.
        is_first: Whether the parameter had no momentum buffer before the step.
        penalty: Penalty on the parameter in the loss, as for :class:`nclightning.functional.GradientStep`.

    Returns:
        The update, or None for another optimizer. A subclass of those above counts as another optimizer, because it
        may override ``step``. Learning rates that are tensors are moved to the host.
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
    """Return the momentum buffer that ``torch.optim.SGD`` keeps for a parameter, or None if there is none."""
    buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
    return buffer if isinstance(buffer, Tensor) else None


def weight_decays(optimizer: Optimizer) -> list[tuple[Tensor, float]]:
    """Return the trainable parameters of an optimizer, each with its coupled weight decay.

    Args:
        optimizer: Any optimizer.

    Returns:
        Pairs in the order of the parameter groups. The decay is 0 if it is decoupled, or if :func:`step_of` does not
        know the optimizer.
    """
    found = list[tuple[Tensor, float]]()
    for group in optimizer.param_groups:
        coupled = type(optimizer) in _SGD or (type(optimizer) is Adam and not _is_decoupled(Adam, group))
        decay = float(group["weight_decay"]) if coupled else 0.0
        found += [(p, decay) for p in group["params"] if p.requires_grad]
    return found


def curvature_scales(optimizer: Optimizer) -> list[Tensor | float] | None:
    r"""Return the diagonal scaling after which an optimizer is stable exactly for curvatures below 1.

    Let S be the diagonal matrix of these numbers. On a quadratic with Hessian A the optimizer is stable as long as the
    largest eigenvalue of :math:`S A S` is below 1. For SGD,
    :math:`S^2 = 1/` :attr:`nclightning.functional.GradientStep.largest_stable_curvature`. For Adam with its
    preconditioner :math:`P = (1 - \beta_1^t) (\sqrt{v / (1 - \beta_2^t)} + \epsilon)` held fixed,

    .. math:: S^2 = \frac{\eta (1 - \beta_1)}{(1 + \beta_1)(2 - \eta\delta)} P^{-1},

    whose first factor is 1 / (38/lr) for :math:`\beta_1 = 0.9` without weight decay. Cohen et al. (2021, 2022).

    Args:
        optimizer: As for :func:`step_of`.

    Returns:
        A number or tensor for each trainable parameter, in the order of :func:`weight_decays`. None if no such scaling
        is known: for other optimizers, before the first step of Adam or of a line search, while maximizing, and where
        parameter groups differ in momentum.
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
    """Return the scaling of Adam for one parameter; None before its first step."""
    state = optimizer.state.get(p, {})
    squares = state.get("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    beta, second = (float(each) for each in group["betas"])
    # Averaging gradients is heavy-ball momentum with the step (1 - beta) lr.
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
    """Return whether the weight decay is decoupled. Newer versions of torch write this to Adam's groups."""
    return bool(group.get("decoupled_weight_decay", kind is AdamW))
