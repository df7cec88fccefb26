"""The sum of a head's rows through the steps of an optimizer, and what these are to make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from nclightning.errors import UserError, UserTypeError
from nclightning.functional import GradientStep
from nclightning.optim.rules import Step, momentum_buffer, step_of

__all__ = ["RowSum", "StepFn", "place_of"]

StepFn = Callable[[Optimizer, dict[str, Any]], GradientStep]


class _Prediction:
    """What the steps since some time are to have made of a sum.

    Each step maps sum and momentum by the same four numbers for all features, so that only the product of these is
    followed, on the host: no step costs an operation on the device.
    """

    def __init__(self, total: Tensor, velocity: Tensor) -> None:
        self.total, self.velocity = total, velocity
        self.matrix = (1.0, 0.0), (0.0, 1.0)
        self.length = 0.0  # Of the steps, as decoupled decay has left them.

    def take(self, law: GradientStep) -> None:
        (a, b), (c, d) = law.matrix
        (e, f), (g, h) = self.matrix
        self.matrix = (a * e + b * g, a * f + b * h), (c * e + d * g, c * f + d * h)
        self.length = (1 - law.lr * law.decoupled_decay) * self.length + law.lr

    def value(self) -> Tensor:
        (a, b), _ = self.matrix
        # A momentum that is not there yet may have met numbers that are not finite.
        return a * self.total if b == 0 else a * self.total + b * self.velocity

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total.tolist(), "velocity": self.velocity.tolist(), "matrix": self.matrix}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        total, velocity = (torch.tensor(state[name], dtype=torch.float64) for name in ("total", "velocity"))
        if total.shape == self.total.shape == velocity.shape:
            self.total, self.velocity = total.to(self.total.device), velocity.to(self.total.device)
            self.matrix = tuple(tuple(row) for row in state["matrix"])  # type: ignore[assignment]


class RowSum:
    """Follows the sum over classes of one parameter, a weight ``(K, d)`` or a bias ``(K,)``.

    Args:
        parameter: The weight or bias.
        optimizer: That moves it.
        dim: Dimension of the classes.
        penalty: Of a term ``penalty / 2 * parameter.square().sum()`` in the loss.
        step_fn: Says what a step of the optimizer does; None for those that :func:`nclightning.optim.rules.step_of`
            knows.

    Attributes:
        is_exact: Whether the steps are known to be linear in the gradient.
        is_known: Whether they are known at all.
    """

    def __init__(
        self, parameter: nn.Parameter, optimizer: Optimizer, dim: int, penalty: float, step_fn: StepFn | None
    ) -> None:
        self._parameter, self._optimizer, self._dim, self._penalty = parameter, optimizer, dim, penalty
        self._step_fn = step_fn
        self._is_first, self._place, self._waits = True, (0, 0), False
        if step_fn is None:
            first = self._step()
            self.is_known, self.is_exact = first is not None, first is not None and first.is_linear
        else:
            self.is_known = self.is_exact = True  # It is called after steps, and may read what they leave.
        self._run, self._recent = self._start(), self._start()
        self._size = self._norm()
        self._handles: list[RemovableHandle] = []
        if self.is_known:
            self._handles = [
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            ]

    @property
    def title(self) -> str:
        """Name of the class of the optimizer."""
        return type(self._optimizer).__name__

    # Steps.

    def _group(self) -> dict[str, Any]:
        """Return the group of the parameter as it is now: schedulers write to it, and checkpoints replace it."""
        groups: list[dict[str, Any]] = self._optimizer.param_groups
        i, j = self._place
        if not (i < len(groups) and j < len(groups[i]["params"]) and groups[i]["params"][j] is self._parameter):
            found = place_of(self._optimizer, self._parameter)
            if found is None:
                raise UserError(
                    f"the optimizer does not move the head any more, of shape {tuple(self._parameter.shape)}: replace "
                    "layers between fits, and not within one."
                )
            self._place = i, _ = found
        return groups[i]

    def _step(self) -> Step | None:
        if self._step_fn is not None:
            law = self._step_fn(self._optimizer, self._group())
            if not isinstance(law, GradientStep):
                raise UserTypeError(
                    f"step_fn must return a nclightning.functional.GradientStep, it returned a {type(law).__name__}."
                )
            return Step(replace(law, is_first=self._is_first, penalty=law.penalty + self._penalty), True)
        return step_of(self._optimizer, self._group(), is_first=self._is_first, penalty=self._penalty)

    def _before(self, *_: Any) -> None:
        self._is_first, self._waits = momentum_buffer(self._optimizer, self._parameter) is None, True

    def _after(self, *_: Any) -> None:
        # A step of a class made from one of torch's may call that one's, which calls the hooks, too.
        waits, self._waits = self._waits, False
        if not waits or self._parameter.grad is None or _was_skipped(self._optimizer):
            return
        step = self._step()
        assert step is not None
        if (
            self._step_fn is not None
            and step.law.momentum
            and momentum_buffer(self._optimizer, self._parameter) is None
        ):
            raise UserError(
                f"step_fn returned momentum={step.law.momentum}, and {self.title} has no state 'momentum_buffer' of "
                "the head, which the law starts from: keep the buffer under that name, as torch.optim.SGD does."
            )
        self._run.take(step.law)
        self._recent.take(step.law)

    # Readings.

    def _sum(self, tensor: Tensor) -> Tensor:
        return tensor.detach().sum(dim=self._dim, dtype=torch.float64).flatten()

    def _norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self._parameter.detach(), dtype=torch.float64)
        return norm

    def _start(self) -> _Prediction:
        total, buffer = self._sum(self._parameter), momentum_buffer(self._optimizer, self._parameter)
        return _Prediction(total, torch.zeros_like(total) if buffer is None else self._sum(buffer))

    def read(self, norm: str, predicted: str, residual: str, forcing: str) -> dict[str, Tensor | float]:
        """Read the sum, and what the steps were to make of it. Stays on the device.

        Args:
            norm: Tag of the norm of the sum.
            predicted: Of the norm that was predicted from the start of the run.
            residual: Of the distance from the prediction.
            forcing: Of what adaptive steps add.

        Returns:
            By tag: norms; of exact laws the distance from the prediction since the last reading, relative to
            ``sqrt(K) |W|_F``; of adaptive steps what they add to the sum, for one unit of their length.
        """
        now, size = self._start(), self._norm()
        values: dict[str, Tensor | float] = {norm: torch.linalg.vector_norm(now.total)}
        difference = torch.linalg.vector_norm(now.total - self._recent.value())
        if self.is_exact:
            values[predicted] = torch.linalg.vector_norm(self._run.value())
            scale = torch.maximum(size, self._size) * self._parameter.shape[self._dim] ** 0.5
            values[residual] = torch.where(difference == 0, 0.0, difference / scale)
        elif self._recent.length:
            values[forcing] = difference / self._recent.length
        self._recent, self._size = now, size
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return self._run.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._run.load_state_dict(state)

    def remove(self) -> None:
        """Remove the hooks from the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def place_of(optimizer: Optimizer, parameter: Tensor) -> tuple[int, int] | None:
    """Return the number of the group of a parameter, and its place there; None if the optimizer does not move it."""
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if p is parameter:
                return i, j
    return None


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler has let a fused optimizer leave out a step; for others it does not call them."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found)
