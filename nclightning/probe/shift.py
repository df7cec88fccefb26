"""Whether labels of language models belong to their own position or to the one before."""

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
    """Tell whether the label at position t is what the features at t - 1 predict, as in causal language models.

    Nothing is assumed. If the model returns a loss for these labels, it is compared with the cross-entropy of the
    logits at the same and at the next label; if that decides nothing, with the loss of a label at the first position
    alone, which a model that shifts does not see. Without such a loss the labels are compared with the tokens.

    Args:
        module: The model.
        inputs: Of the batch, without labels.
        labels: ``(B, T)``.
        logits: ``(B, T, K)``, or None.
        seen: A run of the model without a loss.
        calls: Run the model with labels.
        given: Whether the user's ``batch_fn`` made the labels, which then may be shifted already.

    Returns:
        Whether features ``[:, :-1]`` belong to labels ``[:, 1:]``.

    Raises:
        ValueError: If labels are the tokens themselves and no loss tells to which features they belong.
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
            "features there or to those one position before, as in causal language models. Pass batch_fn=(batch) -> "
            "(inputs, labels) with each label at the position that predicts it: for a causal model "
            "torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)."
        )
    return False


def _with_labels(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Any]:
    return lambda labels: layer(*args, **{**kwargs, "labels": labels})


def _loss(module: nn.Module, call: Callable[[Tensor], Any], labels: Tensor) -> float | None:
    """Return the first scalar that a model returns for labels, if it takes them."""
    try:
        with frozen(module), eager():
            output = call(labels)
    except Exception:  # It takes no labels, or not these.
        return None
    return next((float(leaf) for _, leaf in float_leaves(output) if leaf.ndim == 0), None)


def _by_value(loss: float, logits: Tensor | None, labels: Tensor) -> bool | None:
    if logits is None or logits.ndim != 3 or logits.shape[:-1] != labels.shape:
        return None
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    aligned = float(cross_entropy(wide.flatten(0, 1), labels.flatten().long(), ignore_index=_IGNORED))
    shifted = float(cross_entropy(wide[:, :-1].flatten(0, 1), labels[:, 1:].flatten().long(), ignore_index=_IGNORED))
    bound = tolerance(logits) * max(abs(loss), 1e-3)
    near = abs(loss - aligned) <= bound, abs(loss - shifted) <= bound
    return near[1] if near[0] != near[1] else None


def _by_first_position(module: nn.Module, call: Callable[[Tensor], Any], labels: Tensor) -> bool | None:
    """Whether a label at the first position alone gives a loss of nothing."""
    alone = torch.full_like(labels, _IGNORED)
    alone[:, 0] = labels.clamp_min(0).amax(dim=1)
    loss, none = _loss(module, call, alone), _loss(module, call, torch.full_like(labels, _IGNORED))
    if loss is None or none is None:
        return None
    return loss == none or math.isnan(loss)


def _compare_with_tokens(inputs: Any, labels: Tensor) -> tuple[bool, bool]:
    """Whether labels are the tokens at their positions, and at the following ones."""
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
    # Beside tokens the labels may go into the model, too, for its loss.
    others = [each for each in alike if each.data_ptr() != labels.data_ptr()]
    for tokens in others or alike:
        if not bool(counted.any()):
            continue
        same = same or bool((tokens == labels)[counted].all())
        after = counted[:, :-1]
        following = following or (bool(after.any()) and bool((tokens[:, 1:] == labels[:, :-1])[after].all()))
    return same, following and not same
