"""Whether a module trains the problem whose minimum is known, exactly as it stands."""

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
# What decides about the objective and about the features that are measured.
_METHODS = ("evaluate_objective", "forward", "features_of", "make_closure")


def features_are_free(module: RegularizedClassifier) -> bool:
    """Say whether the features are parameters, unchanged on their way to the head.

    Args:
        module: A classifier.

    Returns:
        True for the unconstrained feature model as it stands, False for a network.
    """
    table = module.backbone
    return type(table) is FeatureTable and "forward" not in vars(table) and _own(table, "features")


def check_known(module: RegularizedClassifier, unconstrained: bool) -> None:
    """Raise unless a module trains Problem (2) with a free linear head, as the closed forms have it.

    Args:
        module: A classifier.
        unconstrained: Whether its features are to be free parameters. Of a network, whose features are not, the known
            minimum is a lower bound.

    Raises:
        ValueError: With the reason and the repair.
    """
    _check_objective(module)
    _check_head(module)
    unconstrained = unconstrained or any(isinstance(child, FeatureTable) for child in module.backbone.modules())
    if unconstrained:
        _check_features(module)


def _check_objective(module: RegularizedClassifier) -> None:
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
        # Sharding wraps methods of the instance. A trainer of several processes, and torch.compile, put a forward there
        # that F does not call.
        patched = method in vars(module) and method != "forward" and not is_sharded(module)
        if patched or not definer.__module__.startswith(_PACKAGE + "."):
            raise UserError(
                f"{method} of {name} is not that of {_PACKAGE}, so that the minimum of what it trains is not known: "
                f"override the property problem of {name}, too, if you know it."
            )


def _check_head(module: RegularizedClassifier) -> None:
    head = module.head
    if getattr(type(head), "forward", None) is not nn.Linear.forward or "forward" in vars(head):
        raise UserError(
            f"head is a {type(head).__name__} with a forward of its own, and the known minimum is that of a linear "
            "head: take nn.Linear."
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
    if not features_are_free(module):
        raise UserError(
            f"backbone is a {type(module.backbone).__name__} that makes features from a table of free ones, whose "
            "minimum is not known: for the unconstrained feature model leave it the FeatureTable of UFM as it comes."
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
    if not parameter.requires_grad:
        raise UserError(
            f"{name} is not trained (requires_grad=False), and the known minimum is that over head and features: set "
            "requires_grad=True."
        )


def _own(module: nn.Module, name: str) -> bool:
    """Whether a tensor of a module is a parameter of its own, not computed from others."""
    return name in dict(module.named_parameters(recurse=False, remove_duplicate=False))
