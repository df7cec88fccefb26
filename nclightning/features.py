"""The pair that every reading is about: a linear head, and the features that enter it."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["capture_features", "find_head"]


def find_head(module: nn.Module, name: str | None = None) -> nn.Linear:
    """Find the linear head of a model.

    Args:
        module: Any module.
        name: Dotted name of the head. None takes the attribute ``head``, or the only ``nn.Linear`` there is.

    Returns:
        The head.

    Raises:
        ValueError: If there is no such ``nn.Linear``; the message lists those that exist.
    """
    linear = {path: child for path, child in module.named_modules() if isinstance(child, nn.Linear)}
    if name is None:
        name = "head" if "head" in linear or len(linear) != 1 else next(iter(linear))
    if name not in linear:
        existing = ", ".join(repr(path) for path in linear) or "none"
        raise ValueError(
            f"no nn.Linear named {name!r} in {type(module).__name__}; linear layers are: {existing}. "
            "Pass head='name of the last layer'."
        )
    return linear[name]


def capture_features(module: nn.Module, head: nn.Linear, inputs: Tensor) -> Tensor:
    """Run a module and return what entered its head, with its graph if gradients are enabled.

    Args:
        module: Called once with ``inputs``.
        head: A part of ``module``; its own hooks fire as usual.
        inputs: Model input.

    Returns:
        Features ``(N, d)``.

    Raises:
        ValueError: If the head was not called exactly once.
    """
    captured: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    try:
        module(inputs)
    finally:
        handle.remove()
    if len(captured) != 1:
        raise ValueError(
            f"the head of {type(module).__name__} ran {len(captured)} times in one forward, expected once."
        )
    return captured[0]
