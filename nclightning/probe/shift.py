"""Detection of shifted labels, as in causal language models: a label belongs to the features one position before."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nclightning.errors import UserError
from nclightning.heads import tolerance
from nclightning.probe.observation import Observation, float_leaves
from nclightning.probe.sweep import eager, frozen

__all__ = ["is_shifted"]

_IGNORED = -100


def is_shifted(
    module: nn.Module,
    inputs: Any,
    labels: Tensor,
    logits: Tensor | None,
    seen: Observation,
    calls: Sequence[Callable[[Tensor], Any]] = (),
    given: bool = False,
) -> bool:
    """Return whether the features at position t - 1 predict the label at position t, as in causal language models.

    This is decided by what the model does. If it returns a loss for these labels, the loss is compared with the
    cross-entropy of the logits with the labels at the same position, and at the next one. If both or neither agree, the
    model gets a label at the first position only: a model that shifts labels ignores it. If the model returns no loss,
    the labels are compared with the tokens.

    Args:
        module: The model.
        inputs: Inputs of the batch, without labels.
        labels: ``(B, T)``.
        logits: ``(B, T, K)``, or None.
        seen: A run of the model without labels.
        calls: Functions that run the model with labels.
        given: Whether the user's ``batch_fn`` made the labels. Labels that are the next tokens are then already
            shifted.

    Returns:
        Whether features ``[:, :-1]`` belong to labels ``[:, 1:]``.

    Raises:
        ValueError: If it cannot be decided.
    """
    same, following = _compare_with_tokens(inputs, labels)
    if given and following:
        return False
    calls = [*calls, *(_with_labels(*each) for each in reversed(seen.with_labels))]
    losses_exist = False
    for call in calls:
        loss = _loss(module, call, labels)
        if loss is None:
            continue
        losses_exist = True
        decided = _by_value(loss, logits, labels)
        decided = _by_first_position(module, call, labels) if decided is None else decided
        if decided is not None:
            return decided
    if same or (losses_exist and not following):
        reason = "labels are the tokens of the input themselves" if same else "labels and input have positions"
        raise UserError(
            f"{reason}, and no loss of {type(module).__name__} shows whether the label at a position belongs to the "
            "features at this position or at the one before, as in causal language models. Pass batch_fn=(batch) -> "
            "(inputs, labels) with each label at the position that predicts it: for a causal model "
            "torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)."
        )
    return False


def _with_labels(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Any]:
    return lambda labels: layer(*args, **{**kwargs, "labels": labels})


def _loss(module: nn.Module, call: Callable[[Tensor], Any], labels: Tensor) -> float | None:
    """Return the first scalar that a model returns when it gets labels; None if there is none."""
    try:
        with frozen(module), eager():
            output = call(labels)
    except Exception:  # The model does not accept these labels.
        return None
    return next((float(leaf) for _, leaf in float_leaves(output) if leaf.ndim == 0), None)


def _by_value(loss: float, logits: Tensor | None, labels: Tensor) -> bool | None:
    """Return whether the loss is that of shifted labels; None if it agrees with both or neither."""
    if logits is None or logits.ndim != 3 or logits.shape[:-1] != labels.shape:
        return None
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    aligned = float(cross_entropy(wide.flatten(0, 1), labels.flatten().long(), ignore_index=_IGNORED))
    shifted = float(cross_entropy(wide[:, :-1].flatten(0, 1), labels[:, 1:].flatten().long(), ignore_index=_IGNORED))
    bound = tolerance(logits) * max(abs(loss), 1e-3)
    near = abs(loss - aligned) <= bound, abs(loss - shifted) <= bound
    return near[1] if near[0] != near[1] else None


def _by_first_position(module: nn.Module, call: Callable[[Tensor], Any], labels: Tensor) -> bool | None:
    """Return whether a label at the first position only gives the same loss as no label; None without a loss."""
    alone = torch.full_like(labels, _IGNORED)
    alone[:, 0] = labels.clamp_min(0).amax(dim=1)
    loss, none = _loss(module, call, alone), _loss(module, call, torch.full_like(labels, _IGNORED))
    if loss is None or none is None:
        return None
    return loss == none or math.isnan(loss)


def _compare_with_tokens(inputs: Any, labels: Tensor) -> tuple[bool, bool]:
    """Return whether labels equal the tokens at their positions, and whether they equal the next tokens."""
    values = (
        inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple | list) else [inputs]
    )
    same = following = False
    counted = labels >= 0
    alike = [
        each
        for each in values
        if isinstance(each, Tensor) and each.shape == labels.shape and not each.is_floating_point()
    ]
    # The inputs may contain the labels themselves, for the model's loss.
    others = [each for each in alike if each.data_ptr() != labels.data_ptr()]
    for tokens in others or alike:
        if not bool(counted.any()):
            continue
        same = same or bool((tokens == labels)[counted].all())
        after = counted[:, :-1]
        following = following or (bool(after.any()) and bool((tokens[:, 1:] == labels[:, :-1])[after].all()))
    return same, following and not same
