"""Validation of the line search's options, which are the same in all parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nclightning.errors import UserError

__all__ = ["check_group", "check_options", "check_precision", "common_options", "largest_step", "vanishing_step"]

# Options of other optimizers that users may put in a parameter group. They would be ignored silently.
_FOREIGN_OPTIONS = ("betas", "dampening", "maximize", "momentum", "nesterov", "weight_decay")


def check_options(options: Mapping[str, Any], owner: str) -> None:
    """Raise unless each option is in its range.

    Args:
        options: The optimizer's options by name.
        owner: Name of the optimizer's class, for messages.

    Raises:
        ValueError: If one is not; the message names it.
    """
    rules: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
        ("initial_step", "positive and finite", lambda v: 0 < v < math.inf),
        ("shrink", "between 0 and 1", lambda v: 0 < v < 1),
        ("grow", "at least 1 and finite", lambda v: 1 <= v < math.inf),
        ("patience", "an integer of at least 1", lambda v: isinstance(v, int) and v >= 1),
        ("history", "an integer of at least 1", lambda v: isinstance(v, int) and v >= 1),
        ("max_products", "an integer of at least 1", lambda v: isinstance(v, int) and v >= 1),
        ("c1", "between 0 and 1/2", lambda v: 0 < v < 0.5),
        ("max_trials", "an integer of at least 1", lambda v: isinstance(v, int) and v >= 1),
        ("noise", "None or between 0 and 1", lambda v: v is None or 0 <= v < 1),
    )
    for name, expectation, is_valid in rules:
        if name not in options:
            continue
        value = options[name]
        number = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        if not (number and (value is None) <= (name == "noise") and is_valid(value)):
            raise UserError(f"{owner}({name}=...) must be {expectation}, got {value!r}.")


def common_options(groups: list[dict[str, Any]], names: Iterable[str], owner: str) -> tuple[dict[str, Any], float]:
    """Read the options, and the step that the next search tries first, from the parameter groups.

    Args:
        groups: The optimizer's parameter groups.
        names: Names of the options.
        owner: Name of the optimizer's class, for messages.

    Returns:
        The options by name, without a check of their ranges, and ``lr``.

    Raises:
        ValueError: If groups have different options, or ``lr`` is out of range.
    """
    options = {name: groups[0][name] for name in names}
    for group in groups[1:]:
        for name in (*options, "lr"):
            if group[name] is not groups[0][name] and group[name] != groups[0][name]:
                raise UserError(
                    f"parameter groups of {owner} share one search, but {name} is {groups[0][name]!r} in one and "
                    f"{group[name]!r} in another: set the same value in all groups."
                )
    first = groups[0]["lr"]
    try:
        size = float(first)
    except (TypeError, ValueError, RuntimeError):
        size = math.nan
    if not 0 < size < math.inf:
        raise UserError(
            f"lr of {owner}'s parameter groups must be positive and finite, got {first!r}: it is the step that the "
            "next search tries first. A scheduler has to keep it above zero."
        )
    return options, size


def check_group(group: Mapping[str, Any], names: Iterable[str], owner: str) -> None:
    """Raise unless a new parameter group has no options of its own, and real parameters, each once.

    Args:
        group: The group as the user gave it, with its parameters in a list.
        names: Names of the optimizer's options.
        owner: Name of the optimizer's class, for messages.

    Raises:
        ValueError: If it sets an option, or a parameter is complex or occurs twice.
    """
    own = sorted(set(group) & {*names, *_FOREIGN_OPTIONS})
    if own:
        others = set(own) <= set(_FOREIGN_OPTIONS)
        repair = f"{owner} has no such option; add penalties to the objective" if others else f"Pass it to {owner}(...)"
        raise UserError(
            f"parameter groups of {owner} share one search, so a group cannot set {', '.join(own)}. {repair} instead."
        )
    params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
    for p in params:
        if isinstance(p, Tensor) and p.is_complex():
            raise UserError(f"{owner} needs real parameters, got one of dtype {p.dtype}.")
    if len({id(p) for p in params}) < len(params):
        raise UserError(f"a parameter occurs twice in a group of {owner}: pass each one once.")


def check_precision(params: Iterable[Tensor], owner: str) -> None:
    """Raise if a parameter is of half precision, in which a difference of gradients is mostly rounding.

    Args:
        params: The parameters of the optimizer.
        owner: Name of the optimizer's class, for messages.

    Raises:
        ValueError: If a parameter is neither float32 nor float64.
    """
    for p in params:
        if p.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"{owner} needs parameters in float32 or float64, got one of dtype {p.dtype}, in which differences of "
                "gradients are mostly rounding: use ArmijoGD, or keep the parameters in float32 and let autocast "
                "compute in half precision."
            )


def largest_step(params: Iterable[Tensor]) -> float:
    """Return the largest number by which a gradient can be multiplied in the precision of the parameters."""
    narrow = any(p.dtype != torch.float64 for p in params)
    return torch.finfo(torch.float32 if narrow else torch.float64).max


def vanishing_step(params: Iterable[Tensor]) -> float:
    """Return a step length that tells a gradient of zero at a minimum from one on an objective without a minimum.

    A gradient reads as zero when its entries fall below the smallest number s of their dtype, or their squares below
    that of float64. On an objective that decreases for ever, such as exp(-x), the accepted steps are by then about
    1/s long. At a minimum where all derivatives up to the fifth vanish they are only about s^(-4/5) long. The length
    returned lies between the two.
    """
    infos = [torch.finfo(p.dtype) for p in params]
    smallest = max([1e-162, *(info.tiny * info.eps for info in infos)])
    return float(smallest**-0.85)
