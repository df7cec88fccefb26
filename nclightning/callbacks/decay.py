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
from nclightning.callbacks.search import step_taken
from nclightning.problems import NoAnswer

__all__ = ["PredictedDecay", "predicts"]


class PredictedDecay:
    """Follows the steps of a run: the product of ``(1 - t * mu)^2`` over them.

    Attributes:
        mu: Least nonzero eigenvalue of the Hessian at the optimal set; None if nothing can be predicted.
        value: The product.
        iteration: The last iterate whose step is in it.
    """

    def __init__(self) -> None:
        self.mu: float | None = None
        self.value, self.iteration = 1.0, 0

    def restart(self) -> None:
        """Begin at iterate 0."""
        self.value, self.iteration = 1.0, 0

    def prepare(self, pl_module: L.LightningModule, problem: AnyProblem | None) -> None:
        """See whether the decay of a module's run can be predicted, and say if only the spectrum is missing."""
        try:
            self.mu = problem.mu if problem is not None and _has_steps_of(pl_module, problem) else None
        except NoAnswer as missing:
            self.mu = None
            rank_zero_info(f"No decay of the gap is predicted: {missing.reason}")

    def follow(self, pl_module: L.LightningModule) -> None:
        """Take the step that was taken last."""
        self.iteration += 1
        if self.mu is not None:
            step = step_taken(pl_module)
            assert step is not None
            self.value *= (1 - step * self.mu) ** 2

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run goes on from."""
        return {"decay": self.value, "followed": self.iteration}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.value = state.get("decay", math.nan)  # Checkpoints of before it was logged have none.
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
    if step_taken(pl_module) is None or not module.features_are_free:
        return False
    with said_if_slow("Finding the eigenvalues of the Hessian at the optimum, once, for the predicted decay."):
        return module.count_free_parameters() == sum(entry.multiplicity for entry in problem.spectrum())
