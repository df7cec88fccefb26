"""Checks of arguments that models, data and commands share."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from nclightning.errors import UserError, UserTypeError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DtypeName",
    "check_cadences",
    "check_choices",
    "check_memory",
    "check_scales",
    "check_sizes",
    "name_lambda",
    "resolve_dtype",
    "resolve_lambdas",
]

DtypeName = Literal["float64", "float32"]


def check_sizes(**sizes: int) -> None:
    """Raise unless all sizes are positive and ``num_classes`` is at least 2.

    Args:
        **sizes: Values by argument name.

    Raises:
        ValueError: If one is not; the message names the argument.
    """
    for name, value in sizes.items():
        least = 2 if name == "num_classes" else 1
        if value < least:
            raise UserError(f"{name} must be at least {least}, got {value}.")


def check_cadences(**cadences: int | None) -> None:
    """Raise unless all cadences are None, or integers of at least 1.

    Args:
        **cadences: Values by argument name.

    Raises:
        TypeError: If one is no integer; the message names the argument.
        ValueError: If one is below 1.
    """
    for name, value in cadences.items():
        if value is None:
            continue
        if not hasattr(value, "__index__"):  # Integers of numpy have it, too.
            raise UserTypeError(f"{name} must be an integer, got {value!r}.")
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}.")


def check_memory(what: str, elements: int, dtype: torch.dtype) -> None:
    """Raise if an array is larger than the memory of the machine. If that is not known, nothing is checked.

    Args:
        what: Name of the array, for the message.
        elements: Least number of elements.
        dtype: The dtype of the elements.

    Raises:
        ValueError: With both sizes.
    """
    needed, there = elements * dtype.itemsize, _memory()
    if there is not None and needed > there:
        raise UserError(
            f"{what} needs at least {needed / 2**30:,.0f} GiB of memory, but this machine has "
            f"{there / 2**30:,.1f} GiB: reduce num_classes, samples_per_class or the dimensions."
        )


def _memory() -> int | None:
    """Return the memory of the machine, or the limit of its container, in bytes; None if it is not known."""
    try:
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, ValueError, OSError):  # Not available on every system.
        return None
    with suppress(OSError, ValueError):  # No container, or one without a limit.
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits)


def check_choices(name: str, chosen: tuple[str, ...], *allowed: str) -> None:
    """Raise unless at least one value was chosen, and only allowed ones.

    Args:
        name: Name of the argument.
        chosen: The chosen values.
        *allowed: The allowed values.

    Raises:
        ValueError: With the chosen and the allowed values.
    """
    if not chosen or set(chosen) - set(allowed):
        raise UserError(f"{name} must be among {', '.join(allowed)}, got {chosen}.")


def check_scales(**scales: float) -> None:
    """Raise unless all scales are finite and non-negative.

    Args:
        **scales: Values by argument name.

    Raises:
        ValueError: If one is not; the message names the argument.
    """
    for name, value in scales.items():
        if not (math.isfinite(value) and value >= 0):
            raise UserError(f"{name} must be finite and non-negative, got {value!r}.")


def resolve_dtype(name: DtypeName) -> torch.dtype:
    """Return the torch dtype with this name.

    Args:
        name: ``"float64"`` or ``"float32"``.

    Returns:
        The dtype.

    Raises:
        ValueError: If it is neither.
    """
    if name not in get_args(DtypeName):
        raise UserError(f"dtype must be 'float64' or 'float32', got {name!r}.")
    import torch  # noqa: PLC0415  # The check above works without importing torch.

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def name_lambda(arguments: Any) -> None:
    """Rename the paper's ``lambda`` to ``lambda_``, and let it override penalties from a configuration.

    Args:
        arguments: Arguments of a model with ``lambda_w``, ``lambda_h`` and ``lambda_``; changed in place. Penalties
            that are given together with ``lambda`` are kept.

    Raises:
        ValueError: If both names are used.
    """
    if "lambda" in arguments:
        if "lambda_" in arguments:
            raise UserError("lambda and lambda_ are one argument: give one of them.")
        arguments["lambda_"] = arguments.pop("lambda")
    if arguments.get("lambda_") is not None:
        for name in ("lambda_w", "lambda_h"):
            if name not in arguments:
                arguments[name] = None


def resolve_lambdas(
    lambda_w: float | None, lambda_h: float | None, lambda_: float | None, samples_per_class: int
) -> tuple[float, float]:
    """Return both penalties, computed from the paper's single lambda where they are not given.

    Args:
        lambda_w: Penalty on the head, or None for ``samples_per_class * lambda_``.
        lambda_h: Penalty on the features, or None for ``lambda_``.
        lambda_: The single lambda, or None.
        samples_per_class: Number of samples per class n.

    Returns:
        ``lambda_w`` and ``lambda_h``.

    Raises:
        ValueError: If one of them is not determined.
    """
    if lambda_ is not None:
        check_scales(**{"lambda": lambda_})
        lambda_w = samples_per_class * lambda_ if lambda_w is None else lambda_w
        lambda_h = lambda_ if lambda_h is None else lambda_h
    if lambda_w is None or lambda_h is None:
        missing = "lambda_w" if lambda_w is None else "lambda_h"
        raise UserError(f"{missing} is missing: give lambda_w and lambda_h, or the paper's single lambda.")
    return lambda_w, lambda_h
