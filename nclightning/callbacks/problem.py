"""Whether a run trains the problem whose optimum it is measured against, and how far it is from that."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import lightning as L
import torch
from torch import Tensor

from nclightning.callbacks.full_batch import as_full_batch
from nclightning.errors import UserError
from nclightning.problems import Problem
from nclightning.problems.checks import rows_are_classes
from nclightning.ranks import sum_over_ranks, world_size
from nclightning.theory import UFMProblem

__all__ = [
    "AnyProblem",
    "check_balance",
    "check_features",
    "check_optimizer",
    "check_value",
    "find_problem",
    "num_groups_of",
]

AnyProblem = UFMProblem | Problem

_WITHOUT = "set OptimalityMonitor(theory=False), on the command line --optimality.theory false"


# The last problem of each module: one that makes its problem anew each time would have its optimum found each time.
_last_problem: WeakKeyDictionary[L.LightningModule, Problem] = WeakKeyDictionary()


def find_problem(pl_module: L.LightningModule, theory: bool = True) -> AnyProblem | None:
    """Take the problem that a module trains.

    Args:
        pl_module: A module with an attribute ``problem``.
        theory: False asks for none.

    Returns:
        The problem; of equal ones always the same.

    Raises:
        ValueError: If there is none.
    """
    if not theory:
        return None
    try:
        problem = getattr(pl_module, "problem", None)
        if not isinstance(problem, AnyProblem):
            raise UserError(f"{type(pl_module).__name__} has no attribute 'problem'.")
    except UserError as error:
        raise UserError(
            f"OptimalityMonitor knows no optimum for this run: {error} To train without gap and distance, set "
            "OptimalityMonitor(theory=False), on the command line --optimality.theory false "
            "--optimality.stop_distance null --optimality.stop_at_floor false."
        ) from error
    if isinstance(problem, Problem):
        last = _last_problem.get(pl_module)
        problem = last if last is not None and _are_equal(last, problem) else problem
        _last_problem[pl_module] = problem
    return problem


def _are_equal(problem: Problem, other: Problem) -> bool:
    if problem is other:
        return True
    try:
        return problem.describe() == other.describe()
    except UserError:  # A loss that does not say its arguments.
        return False


def num_groups_of(pl_module: L.LightningModule) -> int | None:
    """Count the groups that the labels of a full-batch module say; None where they say classes of its head."""
    targets = getattr(getattr(pl_module, "objective", None), "targets", None)
    if targets is None:
        try:
            targets = getattr(getattr(pl_module, "problem", None), "targets", None)
        except UserError:  # What it trains is not known.
            return None
    return None if targets is None or rows_are_classes(targets) else len(targets)


def check_optimizer(pl_module: L.LightningModule) -> None:
    """Refuse an optimizer that leaves a part of free features and their head alone, or has a penalty of its own.

    Args:
        pl_module: A full-batch module at the start of a fit.

    Raises:
        ValueError: Naming the option.
    """
    if not as_full_batch(pl_module).features_are_free:
        return  # The minimum is a lower bound of whatever a network can reach.
    optimizer: Any = pl_module.optimizers(use_pl_optimizer=False)
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    still = [name for name, p in pl_module.named_parameters() if id(p) not in moved]
    if still:
        raise UserError(
            f"the optimizer does not move {', '.join(still)}, and the known optimum is that over head and features: "
            f"give it all parameters, or {_WITHOUT}."
        )
    decay = next((float(group["weight_decay"]) for group in optimizer.param_groups if group.get("weight_decay")), 0.0)
    if decay:
        raise UserError(
            f"the optimizer has weight_decay={decay:g}, a penalty beside lambda_w and lambda_h whose optimum is "
            f"another: set weight_decay=0, or {_WITHOUT}."
        )


def check_features(pl_module: L.LightningModule, inputs: Tensor) -> None:
    """Compare what enters the head with free features, which a hook may change. One transfer to the host.

    Args:
        pl_module: A full-batch module.
        inputs: All samples of this process, in any order.

    Raises:
        ValueError: If its features are free, and other ones enter the head.
    """
    if not as_full_batch(pl_module).features_are_free:
        return
    with torch.no_grad():
        features = as_full_batch(pl_module).features_of(inputs)
    norms = [
        torch.linalg.vector_norm(p, dtype=torch.float64) for p in pl_module.parameters() if p.shape == features.shape
    ]
    seen = torch.linalg.vector_norm(features, dtype=torch.float64)
    if not any(torch.isclose(norm, seen, rtol=1e-6, atol=0, equal_nan=True) for norm in norms):
        raise UserError(
            "what enters the head is not the table of free features (a hook changes it), so that the optimum is not "
            f"known: remove the hook, or {_WITHOUT}."
        )


def check_value(value: Tensor | float, known: Tensor, dtype: torch.dtype) -> None:
    """Compare the objective that is trained with that of a problem. One transfer to the host.

    What no look at the module tells (a hook that changes features, dropout, a loss of one's own) shows here.

    Args:
        value: Objective at the parameters.
        known: That of the problem, from head and features.
        dtype: Of the parameters.

    Raises:
        ValueError: If they differ.
    """
    trained, expected = float(value), float(known)
    # Float32 objectives may be computed with the ten bits of TF32.
    tolerance = 1e-7 if dtype == torch.float64 else 1e-2
    off = abs(trained - expected)
    if math.isfinite(trained) and math.isfinite(expected) and off > tolerance * max(abs(trained), abs(expected)):
        raise UserError(
            f"the objective that is trained is {trained:.7g} where Problem (2) of the features that enter the head is "
            f"{expected:.7g}, so that its optimum is not known (dropout, a hook that changes a tensor, a loss of your "
            f"own): {_WITHOUT}."
        )


def check_balance(problem: AnyProblem, labels: Tensor) -> None:
    """Raise unless each label occurs as often, over all processes, as the problem says.

    Args:
        problem: The problem.
        labels: Those of this process. Transfers to the host.

    Raises:
        ValueError: If one does not.
    """
    if world_size() > 1:
        groups = problem.num_groups
        is_label = (labels >= 0) & (labels < groups)
        counts = sum_over_ranks(torch.bincount(torch.where(is_label, labels, groups), minlength=groups + 1))
        everybody = torch.arange(groups + 1, device=labels.device, dtype=labels.dtype)
        labels = everybody.repeat_interleave(counts)
    problem.check_labels(labels)
