"""Which law the sum of a head's rows follows in a run, or why it follows none that is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from nclightning.callbacks.row_sums import RowSum, StepFn, place_of
from nclightning.compat.twins import is_callback
from nclightning.errors import UserError
from nclightning.heads import HeadReader
from nclightning.quantities import BIAS_SUM, HEAD_SUM

__all__ = ["HeadLaw"]

_TAGS = {"weight": [each.tag() for each in HEAD_SUM], "bias": [each.tag() for each in BIAS_SUM]}


class HeadLaw:
    """Follows the sums of weight and bias of a head over the classes.

    Where no exact law is known, that is said once with the reason.

    Args:
        pl_module: The module in a fit.
        reader: Of its head.
        penalties: On weight and bias in the loss: of ``penalty / 2 * weight.square().sum()``.
        step_fn: As for :class:`nclightning.callbacks.row_sums.RowSum`.
        missing: Why the loss has no law, where that is known.
    """

    def __init__(
        self,
        pl_module: L.LightningModule,
        reader: HeadReader,
        penalties: tuple[float, float] = (0.0, 0.0),
        step_fn: StepFn | None = None,
        missing: str | None = None,
    ) -> None:
        self._reader, self._sums = reader, dict[str, RowSum]()
        self._module, self._was_inside = pl_module, _is_inside(pl_module, reader)
        optimizers = list(pl_module.trainer.optimizers)
        reason = missing or _why_no_parameter(pl_module, reader, optimizers) or _why_changed(pl_module, penalties)
        if reason is None:
            for name, penalty in zip(_TAGS, penalties, strict=True):
                parameter = getattr(reader.layer, name, None)
                optimizer = _mover(optimizers, parameter)
                if optimizer is not None and isinstance(parameter, nn.Parameter):
                    dim = 1 if reader.form == "transposed" and name == "weight" else 0
                    self._sums[name] = RowSum(parameter, optimizer, dim, penalty, step_fn)
            reason = _why_not_exact(self._sums["weight"])
        if reason is not None:
            rank_zero_info(f"OptimizerLaws has no exact law of the sum of the head's rows in this run: {reason}")

    @torch.no_grad()
    def read(self) -> dict[str, Tensor | float]:
        """Read the sums and what was predicted of them, by tag. Stays on the device.

        Raises:
            ValueError: If the head is no part of the module any more.
        """
        if self._was_inside and not _is_inside(self._module, self._reader):
            raise UserError(
                f"the head {self._reader.name!r} is no layer of the module any more: replace layers between fits, and "
                "not within one."
            )
        if not self._sums:
            total = self._reader.read().weight.sum(dim=0, dtype=torch.float64)
            return {_TAGS["weight"][0]: torch.linalg.vector_norm(total)}
        values: dict[str, Tensor | float] = {}
        for name, row_sum in self._sums.items():
            values |= row_sum.read(*_TAGS[name])
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {name: row_sum.state_dict() for name, row_sum in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it, as far as the head is the same."""
        for name, row_sum in self._sums.items():
            if name in state:
                row_sum.load_state_dict(state[name])

    def remove(self) -> None:
        """Leave no hook behind."""
        for row_sum in self._sums.values():
            row_sum.remove()


def _is_inside(pl_module: nn.Module, reader: HeadReader) -> bool:
    return any(child is reader.layer for child in pl_module.modules())


def _mover(optimizers: Sequence[Optimizer], parameter: Any) -> Optimizer | None:
    """Return the optimizer that trains a parameter; None if none does, or several do."""
    if not isinstance(parameter, Tensor) or not parameter.requires_grad:
        return None
    moving = [each for each in optimizers if place_of(each, parameter) is not None]
    return moving[0] if len(moving) == 1 else None


def _why_no_parameter(pl_module: nn.Module, reader: HeadReader, optimizers: Sequence[Optimizer]) -> str | None:
    """Say why the rows of a head are not those of a parameter that moves by the gradient of the logits alone."""
    name, weight = reader.name, getattr(reader.layer, "weight", None)
    if reader.normalizes:
        return f"the head {name!r} is a cosine head, whose logits are those of rows divided by their norms."
    if reader.layer is None or not isinstance(weight, nn.Parameter):
        return f"the weight of the head {name!r} is made of other parameters, and is none itself."
    if reader.form == "probed":
        return f"the head {name!r} is made of several parameters, as with an adapter."
    owners = [child for child in pl_module.modules() if any(p is weight for p in child.parameters(recurse=False))]
    if len(owners) > 1:
        return f"the weight of the head {name!r} is that of another layer, too, which adds gradients of its own."
    if _mover(optimizers, weight) is None:
        return f"the head {name!r} is not trained, or by several optimizers."
    return None


def _why_changed(pl_module: L.LightningModule, penalties: tuple[float, float]) -> str | None:
    """Say how the trainer changes gradients so that the law is another."""
    trainer = pl_module.trainer
    clips = bool(trainer.gradient_clip_val)
    if clips and trainer.gradient_clip_algorithm == "value":
        return "gradients are clipped entry by entry, after which their rows do not sum to zero."
    accumulates = trainer.accumulate_grad_batches > 1 or any(
        is_callback(each, "GradientAccumulationScheduler") for each in getattr(trainer, "callbacks", ())
    )
    if any(penalties) and (clips or accumulates):
        return (
            "gradient_clip_val and accumulated batches rescale the penalty in the loss from step to step: leave "
            "them out, or give the penalty to the optimizer as weight_decay."
        )
    return None


def _why_not_exact(weight: RowSum) -> str | None:
    if not weight.is_known:
        return (
            f"the steps of {weight.title} are not known. If they are linear in the gradient, pass step_fn=(optimizer, "
            "group) -> nclightning.functional.GradientStep(...)."
        )
    if not weight.is_exact:
        return (
            f"{weight.title} divides each entry of its step by a number of its own, so that rows of the step do not "
            f"sum to zero where those of the gradient do. {_TAGS['weight'][3]} is what they sum to."
        )
    return None
