"""Options of the line search: what they may be, and that all parameter groups have the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nclightning.errors import UserError

__all__ = ["check_group", "check_options", "check_precision", "common_options", "largest_step", "vanishing_step"]

# Options of other optimizers that a parameter group may carry from there; they would be ignored without a word.
_OF_OTHERS = ("betas", "dampening", "maximize", "momentum", "nesterov", "weight_decay")


def check_options(options: Mapping[str, Any], owner: str) -> None:
    """Raise unless each option is in its range.

    Args:
        options: Those that the optimizer has.
        owner: Its class, for messages.

    Raises:
        ValueError: Naming the option.
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
    for name, expectation, holds in rules:
        if name not in options:
            continue
        value = options[name]
        number = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        if not (number and (value is None) <= (name == "noise") and holds(value)):
            raise UserError(f"{owner}({name}=...) must be {expectation}, got {value!r}.")


def common_options(groups: list[dict[str, Any]], names: Iterable[str], owner: str) -> tuple[dict[str, Any], float]:
    """Read the options and the first trial of the next search.

    Args:
        groups: Parameter groups.
        names: Of the options.
        owner: Class of the optimizer, for messages.

    Returns:
        Options by name, unchecked, and ``lr``.

    Raises:
        ValueError: If groups differ, or ``lr`` is out of range.
    """
    options = {name: groups[0][name] for name in names}
    for group in groups[1:]:
        for name in (*options, "lr"):
            if group[name] is not groups[0][name] and group[name] != groups[0][name]:
                raise UserError(
                    f"parameter groups of {owner} share one search, but {name} is {groups[0][name]!r} in one and "
                    f"{group[name]!r} in another: write the same value to each."
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
    """Raise unless a new parameter group leaves the options to the optimizer and its parameters can be searched.

    Args:
        group: As the user gave it; parameters in a list.
        names: Of the options.
        owner: Class of the optimizer, for messages.

    Raises:
        ValueError: With the reason.
    """
    own = sorted(set(group) & {*names, *_OF_OTHERS})
    if own:
        others = set(own) <= set(_OF_OTHERS)
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
    """Raise unless differences of gradients have digits.

    Args:
        params: Of the optimizer.
        owner: Its class, for messages.

    Raises:
        ValueError: If a parameter is of half precision.
    """
    for p in params:
        if p.dtype not in (torch.float32, torch.float64):
            raise UserError(
                f"{owner} needs parameters in float32 or float64, got one of dtype {p.dtype}, in which differences of "
                "gradients are mostly rounding: take ArmijoGD, or keep the parameters in float32 and let autocast "
                "compute in half precision."
            )


def largest_step(params: Iterable[Tensor]) -> float:
    """Return the largest step by which gradients can be multiplied in the precision of the parameters."""
    narrow = any(p.dtype != torch.float64 for p in params)
    return torch.finfo(torch.float32 if narrow else torch.float64).max


def vanishing_step(params: Iterable[Tensor]) -> float:
    """Return a step that only an objective without a minimum can have had accepted when its gradient is zero.

    A gradient is taken for zero at about the smallest number s of its dtype, or where its square in float64 is. An
    objective that falls for ever, as exp(-x), has then been descended by steps of 1/s; one with a minimum where all
    derivatives up to the fifth vanish, by s^(-4/5).
    """
    infos = [torch.finfo(p.dtype) for p in params]
    smallest = max([1e-162, *(info.tiny * info.eps for info in infos)])
    return float(smallest**-0.85)
