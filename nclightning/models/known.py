"""Checks that a module trains exactly the problem whose minimum is known."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from nclightning.errors import UserError
from nclightning.models.backbones import FeatureTable
from nclightning.objective import Objective
from nclightning.sharding import is_sharded

if TYPE_CHECKING:
    from nclightning.models.classifier import RegularizedClassifier

__all__ = ["check_known", "features_are_free"]

_PACKAGE = __name__.rpartition(".")[0]
# Methods that determine the objective and the measured features. A subclass must not override them.
_METHODS = ("evaluate_objective", "forward", "features_of", "make_closure")


def features_are_free(module: RegularizedClassifier) -> bool:
    """Return whether the features are parameters that enter the head unchanged.

    Args:
        module: A classifier.

    Returns:
        True for the unconstrained feature model, False for a network.
    """
    table = module.backbone
    return type(table) is FeatureTable and "forward" not in vars(table) and _own(table, "features")


def check_known(module: RegularizedClassifier, unconstrained: bool) -> None:
    """Raise an error unless a module trains Problem (2) with a free linear head, as the closed forms assume.

    Args:
        module: A classifier.
        unconstrained: Whether its features must be free parameters. For a network, whose features are not free, the
            known minimum is a lower bound.

    Raises:
        ValueError: If it does not; the message says why, and how to repair it.
    """
    _check_objective(module)
    _check_head(module)
    unconstrained = unconstrained or any(isinstance(child, FeatureTable) for child in module.backbone.modules())
    if unconstrained:
        _check_features(module)


def _check_objective(module: RegularizedClassifier) -> None:
    """Raise an error unless objective and methods are those whose minimum is known."""
    name, objective = type(module).__name__, module.objective
    if module.penalty == "weights":
        raise UserError("penalty='weights' has no closed form: set penalty='features', as in Problem (2).")
    if type(objective) is not Objective:
        raise UserError(
            f"objective is a {type(objective).__name__}, whose minimum is not known: take "
            f"nclightning.objective.Objective, or override the property problem of {name}."
        )
    for method in _METHODS:
        definer = next(base for base in type(module).__mro__ if method in vars(base))
        # Sharding replaces methods on the instance, which is allowed. With several processes, and with torch.compile,
        # the instance has another forward, which is not used to evaluate F.
        patched = method in vars(module) and method != "forward" and not is_sharded(module)
        if patched or not definer.__module__.startswith(_PACKAGE + "."):
            raise UserError(
                f"{method} of {name} is not that of {_PACKAGE}, so that the minimum of its objective is not known: "
                f"override the property problem of {name}, too, if you know it."
            )


def _check_head(module: RegularizedClassifier) -> None:
    """Raise an error unless the head is a free, trainable linear layer."""
    head = module.head
    if getattr(type(head), "forward", None) is not nn.Linear.forward or "forward" in vars(head):
        raise UserError(
            f"head is a {type(head).__name__} with its own forward, and the known minimum is that of a linear head: "
            "use nn.Linear."
        )
    bias: Tensor | None = head.bias
    if not _own(head, "weight") or (bias is not None and not _own(head, "bias")):
        raise UserError(
            "head computes its weight or bias from other parameters (a parametrisation such as weight_norm), and the "
            "known minimum is that of a head that is free: remove the parametrisation."
        )
    _check_trainable("head.weight", head.weight)
    if bias is not None:
        _check_trainable("head.bias", bias)


def _check_features(module: RegularizedClassifier) -> None:
    """Raise an error unless the features are free, trainable parameters of the right size."""
    if not features_are_free(module):
        raise UserError(
            f"backbone is a {type(module.backbone).__name__} that changes the features of a FeatureTable, and the "
            "minimum of this is not known: for the unconstrained feature model, keep the FeatureTable that UFM makes."
        )
    table, head = module.backbone, module.head
    assert isinstance(table, FeatureTable)
    _check_trainable("backbone.features", table.features)
    if table.num_samples != module.num_samples or table.features.shape[1] != head.in_features:
        raise UserError(
            f"backbone has features of {table.num_samples} samples in {table.features.shape[1]} dimensions, and the "
            f"model num_samples={module.num_samples} and head.in_features={head.in_features}: make them the same."
        )


def _check_trainable(name: str, parameter: Tensor) -> None:
    """Raise an error unless a parameter is trained."""
    if not parameter.requires_grad:
        raise UserError(
            f"{name} is not trained (requires_grad=False), and the known minimum is that over head and features: set "
            "requires_grad=True."
        )


def _own(module: nn.Module, name: str) -> bool:
    """Whether a tensor of a module is a parameter, and not computed from other parameters."""
    return name in dict(module.named_parameters(recurse=False, remove_duplicate=False))
