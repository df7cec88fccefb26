"""Optimizers whose constants are those of the problem that a module trains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.optim import Optimizer

from nclightning.errors import UserError
from nclightning.optim.momentum import MomentumFromCurvature

if TYPE_CHECKING:
    from nclightning.models.classifier import RegularizedClassifier

__all__ = ["tuned"]


def tuned(optimizer: Optimizer, module: RegularizedClassifier) -> Optimizer:
    """Give an optimizer that waits for mu and L those of the problem of a module.

    Args:
        optimizer: Any; what is no :class:`MomentumFromCurvature`, or has its constants, comes back as it is.
        module: What it trains.

    Returns:
        The optimizer.

    Raises:
        ValueError: If mu and L of what is trained are not known.
    """
    if not isinstance(optimizer, MomentumFromCurvature) or optimizer.is_tuned:
        return optimizer
    name = type(optimizer).__name__
    repair = (
        f"give {name} mu and smoothness, such as nclightning.functional.extreme_eigenvalues measures near the optimum."
    )
    if not module.features_are_free:
        raise UserError(
            f"{name} without mu and smoothness takes those of the unconstrained feature model, and the curvature of a "
            f"network is another: {repair}"
        )
    try:
        problem = module.problem
        mu, smoothness = problem.mu, problem.smoothness
    except UserError as error:
        raise UserError(f"{name} takes mu and L from the problem, which has none: {error} Or {repair}") from error
    optimizer.tune(mu, smoothness)
    return optimizer
