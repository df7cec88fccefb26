"""Setting the constants mu and L of optimizers from the problem that a module trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from nclightning.errors import UserError
from nclightning.optim.momentum import MomentumFromCurvature

if TYPE_CHECKING:
    from nclightning.models.classifier import RegularizedClassifier

__all__ = ["tuned"]


def tuned(optimizer: Optimizer, module: RegularizedClassifier) -> Optimizer:
    """Set mu and L of an optimizer that needs them to those of a module's problem.

    Args:
        optimizer: Any optimizer. Only a :class:`MomentumFromCurvature` without constants is changed.
        module: The module that it trains.

    Returns:
        The optimizer.

    Raises:
        ValueError: If mu and L are not known.
    """
    if not isinstance(optimizer, MomentumFromCurvature) or optimizer.is_tuned:
        return optimizer
    name = type(optimizer).__name__
    repair = (
        f"give {name} mu and smoothness, such as nclightning.functional.extreme_eigenvalues measures near the optimum."
    )
    if not module.features_are_free:
        raise UserError(
            f"{name} without mu and smoothness uses those of the unconstrained feature model, but the curvature of a "
            f"network differs: {repair}"
        )
    try:
        problem = module.problem
        mu, smoothness = problem.mu, problem.smoothness
    except UserError as error:
        raise UserError(f"{name} takes mu and L from the problem, which has none: {error} Or {repair}") from error
    optimizer.tune(mu, smoothness)
    return optimizer
