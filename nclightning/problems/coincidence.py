"""Groups that vanish at the optimum, and groups that share one feature there."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nclightning.problems.problem import Problem

__all__ = ["Coincidences", "coinciding_groups"]

# In units of the largest feature. What is kept of a direction is at least 1e-10 of the largest singular value of the
# logits, which is 1e-5 in the features, and a solution is right to less than 1e-9.
_EQUAL = 1e-7


class Coincidences(NamedTuple):
    """Indices of groups, ascending.

    Attributes:
        vanished: Their features are zero, and so are their logits up to a bias.
        shared: Groups with different targets that share one feature: minority collapse. One tuple for each feature.
    """

    vanished: tuple[int, ...]
    shared: tuple[tuple[int, ...], ...]


def coinciding_groups(problem: Problem) -> Coincidences:
    """Find groups with a feature that is zero, or that others share, at every optimum.

    Args:
        problem: Its groups without samples are left out.

    Returns:
        The groups; none share a feature where the optimum is zero and all vanish.

    Raises:
        NoAnswer: If the optimum is not known.

    Example:
        >>> from nclightning.problems import unbalanced_ce
        >>> coinciding_groups(unbalanced_ce([100, 100, 2, 2], feature_dim=3, lambda_w=0.01, lambda_h=0.01)).shared
        ((2, 3),)
    """
    features, index = problem.optimal_set.feature_factor, torch.nonzero(problem.present).flatten()
    if not features.shape[1]:
        return Coincidences(tuple(index.tolist()), ())
    if problem.feature_dim < features.shape[1]:  # Each optimum keeps other directions of these.
        return Coincidences((), ())
    norms = features.norm(dim=1)
    scale = float(norms.max())
    zero = norms <= _EQUAL * scale
    kept = torch.nonzero(~zero).flatten()
    targets = problem.targets[index[kept]]
    shared = [
        tuple(index[kept[same]].tolist())
        for same in _equal(features[kept], _EQUAL * scale)
        if not bool((targets[same] == targets[same[0]]).all())
    ]
    return Coincidences(tuple(index[zero].tolist()), tuple(sorted(shared)))


def _equal(rows: Tensor, tolerance: float) -> Iterator[Tensor]:
    """Yield indices of rows that are equal to the first of them, where there are several.

    Equal rows have equal components along any axis: only neighbours in that order are compared.
    """
    axis = torch.linspace(1.0, 2.0, rows.shape[1], dtype=rows.dtype, device=rows.device)
    along, order = (rows @ (axis / axis.norm())).sort()
    ends = torch.nonzero(along.diff() > tolerance).flatten() + 1
    for block in torch.tensor_split(order, ends.tolist()):
        left = block.sort().values
        while len(left) > 1:
            same = (rows[left] - rows[left[0]]).norm(dim=1) <= tolerance
            if int(same.sum()) > 1:
                yield left[same]
            left = left[~same]
