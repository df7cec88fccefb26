"""The optimal set of exchangeable classes with optimal logits ``s (e_k - 1/K)``, described by a few numbers.

No tensor of size K x K is formed, and the numbers are Python floats, which need no device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from nclightning.problems.frames import Centred, OwnAndOther
from nclightning.problems.orbit import Orbit

if TYPE_CHECKING:
    from nclightning.problems.groups import Groups
    from nclightning.problems.loss import Loss
    from nclightning.problems.optimum import Optimum

__all__ = ["find_simplex_orbit", "has_exchangeable_classes", "simplex_orbit"]


def simplex_orbit(
    loss: Loss,
    targets: OwnAndOther,
    *,
    num_classes: int,
    samples_per_class: float,
    feature_dim: int,
    lambda_w: float,
    lambda_h: float,
    lambda_b: float,
    logit_scale: float,
    fraction: float,
    bias: float | None,
    shift_is_free: bool,
) -> Orbit:
    """Describe the optimal set.

    Args:
        loss: The loss.
        targets: Targets of the classes.
        num_classes: K.
        samples_per_class: n.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        lambda_b: Penalty on the bias; 0.0 without a penalty or without a bias.
        logit_scale: s; 0.0 where zero is optimal.
        fraction: Multiplier of the centred directions divided by the strength; 1.0 where s is positive.
        bias: The value of each entry of the optimal bias; None without a bias.
        shift_is_free: Whether the bias is determined only up to a shift of all its entries.

    Returns:
        The optimal set, for points on any device.
    """
    centred = Centred(num_classes)
    directions, shift = (centred, centred), -logit_scale / num_classes + (bias or 0.0)
    singular, ratio = math.sqrt(samples_per_class) * logit_scale, math.sqrt(lambda_h / lambda_w)
    return Orbit(
        loss=loss,
        targets=targets,
        logits=OwnAndOther(logit_scale + shift, shift),
        num_groups=num_classes,
        counts=samples_per_class,
        feature_dim=feature_dim,
        lambda_w=lambda_w,
        lambda_h=lambda_h,
        lambda_b=lambda_b,
        active=directions if logit_scale else None,
        head_scale=math.sqrt(singular * ratio),
        feature_scale=math.sqrt(singular / ratio),
        bias=bias,
        shift_is_free=shift_is_free,
        coupled=directions,
        fractions=fraction,
        is_cut=logit_scale > 0 and feature_dim < num_classes - 1,
    )


def has_exchangeable_classes(groups: Groups) -> bool:
    """Whether all classes can be permuted, together with their targets and samples, without changing the problem."""
    targets = groups.targets
    if targets.shape[0] != targets.shape[1] or len(targets) < 2 or not groups.loss.exchangeable:
        return False
    pattern = torch.full_like(targets, float(targets[0, 1])).fill_diagonal_(float(targets[0, 0]))
    return torch.equal(targets, pattern) and bool((groups.counts == groups.counts[0]).all())


def find_simplex_orbit(optimum: Optimum, feature_dim: int, lambda_w: float, lambda_h: float) -> Orbit | None:
    """Describe the optimal set by numbers if all classes are exchangeable and the optimal logits have zero mean.

    Args:
        optimum: Any optimum with its full rank.
        feature_dim: d.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.

    Returns:
        The optimal set; None for any other optimum.
    """
    groups, bias = optimum.groups, optimum.factors.bias
    # If the loss ignores the mean logit, or a free bias replaces it, both it and its multiplier are zero.
    is_free = groups.lambda_b == 0 or groups.loss.shift_invariant
    if not is_free or optimum.rank not in (0, len(groups.targets) - 1) or not has_exchangeable_classes(groups):
        return None
    K, count = len(groups.targets), float(groups.counts[0])
    residual = groups.loss.residual(optimum.logits[:1], groups.targets[:1])[0]
    own, other = float(residual[0]), float(residual[1:].mean())
    if own >= other:  # The logit of the own class would be the smallest.
        return None
    fraction = 1.0 if optimum.rank else min(1.0, (other - own) / (K * math.sqrt(count) * groups.strength))
    return simplex_orbit(
        groups.loss,
        OwnAndOther(float(groups.targets[0, 0]), float(groups.targets[0, 1])),
        num_classes=K,
        samples_per_class=count,
        feature_dim=feature_dim,
        lambda_w=lambda_w,
        lambda_h=lambda_h,
        lambda_b=groups.lambda_b or 0.0,
        logit_scale=float(optimum.factors.singular.mean()) / math.sqrt(count) if optimum.rank else 0.0,
        fraction=fraction,
        bias=None if bias is None else float(bias.mean()),
        shift_is_free=groups.shift_is_free,
    )
