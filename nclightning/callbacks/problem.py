"""Whether a run trains the problem whose optimum it is measured against, and how far it is from that."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn.functional import linear

from nclightning.callbacks.full_batch import as_full_batch
from nclightning.errors import UserError
from nclightning.functional import class_statistics
from nclightning.heads import Head
from nclightning.probe.collectors import merge_over_ranks
from nclightning.ranks import sum_over_ranks, world_size
from nclightning.theory import UFMProblem

__all__ = [
    "check_balance",
    "check_features",
    "check_optimizer",
    "check_value",
    "find_problem",
    "gap_and_distance",
]

# Elements of the features whose logits are formed at a time.
_ELEMENTS_AT_A_TIME = 2**17
_WITHOUT = "set OptimalityMonitor(theory=False), on the command line --optimality.theory false"


def find_problem(pl_module: L.LightningModule, theory: bool = True) -> UFMProblem | None:
    """Take a module's UFM.

    Args:
        pl_module: A module with an attribute ``problem``.
        theory: False asks for none.

    Returns:
        Its closed forms.

    Raises:
        ValueError: If there are none.
    """
    if not theory:
        return None
    try:
        problem = getattr(pl_module, "problem", None)
        if not isinstance(problem, UFMProblem):
            raise UserError(f"{type(pl_module).__name__} has no attribute 'problem'.")
    except UserError as error:
        raise UserError(
            f"OptimalityMonitor knows no optimum for this run: {error} To train without gap and distance, set "
            "OptimalityMonitor(theory=False), on the command line --optimality.theory false "
            "--optimality.stop_distance null --optimality.stop_at_floor false."
        ) from error
    return problem


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


def check_value(problem: UFMProblem, value: Tensor | float, gap: Tensor, dtype: torch.dtype) -> None:
    """Compare the objective that is trained with that of a problem. One transfer to the host.

    What no look at the module tells (a hook that changes features, dropout, a loss of one's own) shows here.

    Args:
        problem: Whose optimum is F*.
        value: Objective at the parameters.
        gap: F - F* there, from head and features.
        dtype: Of the parameters.

    Raises:
        ValueError: If the value is not F* and the gap.
    """
    trained, known = float(value), problem.optimal_value + float(gap)
    # Float32 objectives may be computed with the ten bits of TF32.
    tolerance = 1e-7 if dtype == torch.float64 else 1e-2
    if math.isfinite(trained) and math.isfinite(known) and abs(trained - known) > tolerance * max(abs(trained), known):
        raise UserError(
            f"the objective that is trained is {trained:.7g} where Problem (2) of the features that enter the head is "
            f"{known:.7g}, so that its optimum is not known (dropout, a hook that changes a tensor, a loss of your "
            f"own): {_WITHOUT}."
        )


def check_balance(problem: UFMProblem, labels: Tensor) -> None:
    """Raise unless the labels of all processes are balanced.

    Args:
        problem: Its sizes.
        labels: Those of this process. Transfers to the host.

    Raises:
        ValueError: If they are not, or features that several processes share have too few dimensions.
    """
    if world_size() == 1:
        problem.check_labels(labels)
        return
    invalid = ((labels < 0) | (labels >= problem.num_classes)).sum()
    counts = torch.bincount(labels.clamp(0, problem.num_classes - 1), minlength=problem.num_classes)
    if int(sum_over_ranks(invalid)) or bool((sum_over_ranks(counts) != problem.samples_per_class).any()):
        raise UserError(
            f"the labels of all processes together must hold each of the classes 0..{problem.num_classes - 1} exactly "
            f"{problem.samples_per_class} times: the closed forms are those of balanced data."
        )
    if problem.rank < problem.num_classes - 1:
        raise UserError(
            f"gap and distance of features shared by processes need feature_dim of at least {problem.num_classes - 1}, "
            f"got {problem.feature_dim}: set OptimalityMonitor(theory=False), or trainer.devices=1."
        )


def gap_and_distance(problem: UFMProblem, head: Head, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Read both off the class means and spreads of all processes, a part of the features at a time.

    Args:
        problem: Whose optimum it is.
        head: Not sharded.
        features: ``(B, d)`` of this process.
        labels: ``(B,)``, balanced over all processes.

    Returns:
        Float64 scalars on the device.
    """
    if problem.collapses and problem.rank < problem.num_classes - 1:
        point = (head.weight, features, labels, head.bias)
        return problem.optimality_gap(*point, check_labels=False), problem.distance(*point, check_labels=False)
    stats = merge_over_ranks(class_statistics(features, labels, problem.num_classes, scatter=False))
    rows = max(_ELEMENTS_AT_A_TIME // features.shape[1], 1)
    weight, bias = head.weight.double(), None if head.bias is None else head.bias.double()
    divergence = torch.stack(
        [
            problem.divergence(linear(part.double(), weight, bias), own).sum()
            for part, own in zip(torch.split(features, rows), torch.split(labels, rows), strict=True)
        ]
    ).sum()
    mean_divergence = sum_over_ranks(divergence) / problem.num_samples
    spread = stats.spreads.sum()
    gap = problem.gap_from_moments(weight, stats.means, spread, mean_divergence)
    return gap, problem.distance_from_moments(weight, stats.means, spread, bias)
