"""Sizes and objective of a model, given one by one or by a problem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from nclightning.arguments import check_sizes, resolve_lambdas
from nclightning.errors import UserError
from nclightning.objective import Objective
from nclightning.problems import Problem

__all__ = ["Settings"]

_SIZES = ("num_classes", "samples_per_class", "feature_dim", "loss")


class Settings(NamedTuple):
    """Sizes and objective of an unconstrained feature model.

    Attributes:
        num_classes: K.
        num_samples: N.
        feature_dim: d.
        has_bias: Whether the head has a bias.
        objective: Loss and penalties.
        problem: The problem that was given instead of sizes and penalties; None for one of the paper's two problems.
    """

    num_classes: int
    num_samples: int
    feature_dim: int
    has_bias: bool
    objective: Objective
    problem: Problem | None

    @classmethod
    def of_the_paper(cls, given: Mapping[str, Any]) -> Settings:
        """Make the settings of balanced MSE with a free bias, or of balanced cross-entropy without one.

        Args:
            given: Sizes, loss and penalties by name.

        Raises:
            ValueError: If one is missing or out of range.
        """
        missing = [name for name in _SIZES if given[name] is None]
        if missing:
            raise UserError(f"{missing[0]} is missing: give {', '.join(_SIZES)} and the penalties, or a problem.")
        K, n, d, loss = (given[name] for name in _SIZES)
        check_sizes(num_classes=K, samples_per_class=n, feature_dim=d)
        penalties = resolve_lambdas(given["lambda_w"], given["lambda_h"], given["lambda_"], n)
        return cls(K, K * n, d, loss == "mse", Objective(loss, *penalties), None)

    @classmethod
    def of_problem(cls, problem: Problem | Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
        """Make the settings of a problem.

        Args:
            problem: The problem, or its description.
            given: Sizes, loss and penalties by name that were given in addition. They must agree with the problem.

        Raises:
            ValueError: If one of them differs.
        """
        if isinstance(problem, Mapping):
            problem = Problem.from_description(problem)
        if not isinstance(problem, Problem):
            raise UserError(f"problem must be a nclightning.problems.Problem, got {type(problem).__name__}.")
        own = _own(problem)
        for name, value in given.items():
            if value is not None and value != own.get(name):
                raise UserError(
                    f"{name}={value!r} was given together with a problem"
                    + (f" that has {own[name]!r}" if own.get(name) is not None else "")
                    + f": leave out {name.rstrip('_')}, which the problem sets."
                )
        objective = Objective(
            problem.loss,
            problem.lambda_w,
            problem.lambda_h,
            problem.lambda_b or 0.0,
            None if problem.has_hard_labels else problem.targets,
        )
        return cls(problem.num_classes, problem.num_samples, problem.feature_dim, problem.has_bias, objective, problem)

    def hyperparameters(self) -> dict[str, Any]:
        """Return the hyperparameters for a checkpoint: all values resolved, and plain."""
        if self.problem is not None:
            return _own(self.problem) | {"lambda_": None, "problem": self.problem.describe()}
        return {"lambda_w": self.objective.lambda_w, "lambda_h": self.objective.lambda_h, "lambda_": None}


def _own(problem: Problem) -> dict[str, Any]:
    """Return the hyperparameters that follow from a problem."""
    counts = problem.counts.tolist()
    return {
        "num_classes": problem.num_classes,
        "samples_per_class": counts[0] if problem.groups_are_classes and len(set(counts)) == 1 else None,
        "feature_dim": problem.feature_dim,
        "loss": None,
        "lambda_w": problem.lambda_w,
        "lambda_h": problem.lambda_h,
    }
