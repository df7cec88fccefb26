"""The decay of the gap that theory predicts for the steps of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from nclightning.callbacks.full_batch import as_full_batch
from nclightning.callbacks.gaps import said_if_slow
from nclightning.callbacks.problem import AnyProblem
from nclightning.callbacks.search import FixedStep, step_found, step_set
from nclightning.problems import NoAnswer, Rates
from nclightning.problems.rates import decay_exponent

__all__ = ["PredictedDecay", "predicts"]

_CLEARLY = 1e-6  # Between exponents: at the best constants both ends of the spectrum are equally slow up to rounding.


class PredictedDecay:
    """Follows the steps of a run: what they make of the gap along the slowest mode.

    Of a deviation e and the momentum buffer v, which starts at zero, a step makes others by a matrix that depends on
    step, momentum and eigenvalue. The decay is the square of what the product of the matrices makes of e = 1, without
    momentum the product of ``(1 - t * mu)^2``. The slowest mode oscillates under a momentum that is larger than the
    best; what the product makes of v alone, a quarter of a period behind, is added, so that the decay does not.

    Attributes:
        rates: Ends of the spectrum at the optimal set; None if nothing can be predicted.
        iteration: The last iterate whose step is in it.
    """

    def __init__(self) -> None:
        self.rates: Rates | None = None
        self.restart()

    def restart(self) -> None:
        """Begin at iterate 0."""
        self._deviation, self._buffer = (1.0, 0.0), (0.0, 1.0)  # Each after unit deviation, and after unit buffer.
        self._next: FixedStep | None = None
        self.iteration = 0

    @property
    def value(self) -> float:
        """The decay since iterate 0."""
        first, second = self._deviation
        return first * first + second * second

    def prepare(self, pl_module: L.LightningModule, problem: AnyProblem | None) -> None:
        """See whether the decay of a module's run can be predicted, and say if only the spectrum is missing."""
        self._next = step_set(pl_module)
        try:
            self.rates = problem.rates if problem is not None and _has_steps_of(pl_module, problem) else None
        except NoAnswer as missing:
            self.rates = None
            rank_zero_info(f"No decay of the gap is predicted: {missing.reason}")

    def follow(self, pl_module: L.LightningModule) -> None:
        """Take the step that was taken last."""
        self.iteration += 1
        found, taken = step_found(pl_module), self._next
        # Schedulers have been stepped already: what is set now is for the step to come.
        self._next = step_set(pl_module)
        if self.rates is None:
            return
        if found is not None:
            # Which step a search finds next is not known, and one that mode L grows by is followed by shorter ones.
            self._apply(FixedStep(found), self.rates.mu)
        elif taken is not None:
            self._apply(taken, self._slower_end(taken))
        else:
            self._deviation = (math.nan, math.nan)  # The options of the optimizer have been changed to others.

    def _slower_end(self, step: FixedStep) -> float:
        assert self.rates is not None
        slow, fast = (
            decay_exponent(step.size * end, step.momentum, step.nesterov)
            for end in (self.rates.mu, self.rates.smoothness)
        )
        return self.rates.smoothness if fast < slow - _CLEARLY else self.rates.mu

    def _apply(self, step: FixedStep, eigenvalue: float) -> None:
        """Multiply by the matrix of a step."""
        assert self.rates is not None
        # The unit of the buffer makes both columns about as large, for steps of about 1/L.
        unit = math.sqrt(eigenvalue) * math.sqrt(self.rates.smoothness)
        columns = []
        for e, v in zip(self._deviation, self._buffer, strict=True):
            new = step.momentum * v + (eigenvalue / unit * e if unit else 0.0)
            slope = eigenvalue * e + step.momentum * unit * new if step.nesterov else unit * new
            columns.append((e - step.size * slope, new))
        self._deviation, self._buffer = zip(*columns, strict=True)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {"decay": self.value, "modes": [*self._deviation, *self._buffer], "followed": self.iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        # Checkpoints of before it was logged have none, those of before momentum counted only the decay.
        alone = [math.sqrt(state.get("decay", math.nan)), 0.0, 0.0, 0.0]
        first, second, third, fourth = state.get("modes", alone)
        self._deviation, self._buffer = (first, second), (third, fourth)
        self.iteration = state.get("followed", 0)


def predicts(pl_module: L.LightningModule, problem: AnyProblem | None) -> bool:
    """Say whether the decay of a run can be predicted.

    Args:
        pl_module: A full-batch module in a fit.
        problem: Its problem, None if that is not known.

    Returns:
        Whether its parameters are those of the problem, whose spectrum is known, and its steps are known.
    """
    try:
        return problem is not None and _has_steps_of(pl_module, problem)
    except NoAnswer:
        return False


def _has_steps_of(pl_module: L.LightningModule, problem: AnyProblem) -> bool:
    """Whether the run descends on the problem; raises ``NoAnswer`` if it does and the spectrum is not known."""
    module = as_full_batch(pl_module)
    if (step_found(pl_module) is None and step_set(pl_module) is None) or not module.features_are_free:
        return False
    with said_if_slow("Finding the eigenvalues of the Hessian at the optimum, once, for the predicted decay."):
        return module.count_free_parameters() == sum(entry.multiplicity for entry in problem.spectrum())
