"""The optimal set for a given number of features, which may be below the rank of the optimal logits."""

from __future__ import annotations

from nclightning.problems.no_answer import NoAnswer
from nclightning.problems.optimal_set import OptimalSet
from nclightning.problems.optimum import Optimum

__all__ = ["find_optimal_set", "optimum_for"]

# Singular values with a smaller relative difference are taken for equal.
_EQUAL = 1e-10


def optimum_for(optimum: Optimum, feature_dim: int) -> Optimum:
    """Return the optimum among logits of rank at most ``feature_dim``.

    Raises:
        NoAnswer: If the rank of the optimum is higher, and no theorem is known for this loss.
    """
    if feature_dim >= optimum.rank:
        return optimum
    if not optimum.groups.loss.has_low_rank_optimum(optimum.groups):
        raise NoAnswer(
            "optimum",
            f"feature_dim={feature_dim} is below the rank {optimum.rank} of the optimal logits, and no optimum of a "
            "lower rank is known for this loss. Raise feature_dim, or use certified_lower_bound, which needs none.",
        )
    return optimum.cut(feature_dim)


def find_optimal_set(optimum: Optimum, feature_dim: int, lambda_w: float, lambda_h: float) -> OptimalSet:
    """Return the optimal set.

    If several singular values equal the last one that fits, any choice among their directions is optimal, and the
    optimal set contains all choices.

    Raises:
        NoAnswer: If the optimal set is not known; also if it has such a choice in addition to larger singular values.
    """
    kept = optimum_for(optimum, feature_dim)
    if feature_dim >= optimum.rank:
        return OptimalSet(optimum, feature_dim, lambda_w, lambda_h)
    singular = optimum.factors.singular
    last = float(singular[feature_dim - 1])
    equal = (singular - last).abs() <= _EQUAL * last
    if not bool(equal[feature_dim]):
        return OptimalSet(kept, feature_dim, lambda_w, lambda_h, is_cut=True)
    if not bool(equal[0]):
        raise NoAnswer(
            "distance",
            f"feature_dim={feature_dim} keeps some of several equal singular values in addition to larger ones; the "
            "nearest member of such an optimal set has no formula. Change feature_dim.",
        )
    return OptimalSet(optimum.cut(int(equal.sum())), feature_dim, lambda_w, lambda_h, is_cut=True)
