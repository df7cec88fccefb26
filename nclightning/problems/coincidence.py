"""Groups whose feature is zero at the optimum, and groups that share one feature there (minority collapse)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nclightning.problems.problem import Problem

__all__ = ["Coincidences", "coinciding_groups"]

# Tolerance relative to the largest feature. Singular values of the logits below 1e-10 of the largest one are dropped.
# Features scale with their square roots, so that those that differ from zero do by at least about 1e-5. The relative
# error of the numerical solution is below 1e-9.
_RELATIVE_TOLERANCE = 1e-7


class Coincidences(NamedTuple):
    """Indices of groups, ascending.

    Attributes:
        vanished: Groups whose feature is zero, so that their logits equal the bias.
        shared: Groups with different targets that share one feature: one tuple for each shared feature.
    """

    vanished: tuple[int, ...]
    shared: tuple[tuple[int, ...], ...]


def coinciding_groups(problem: Problem) -> Coincidences:
    """Find the groups whose feature is zero, or equal to that of another group, at every optimum.

    Args:
        problem: The problem. Groups without samples are left out.

    Returns:
        The groups. If the optimum is zero, all groups are listed as vanished and none as sharing a feature. If there
        are fewer features than the rank of the optimum, optima differ, and no group is listed.

    Raises:
        NoAnswer: If the optimum is not known.

    Example:
        >>> from nclightning.problems import unbalanced_ce
        >>> from nclightning.problems.coincidence import coinciding_groups
        >>> coinciding_groups(unbalanced_ce([100, 100, 2, 2], feature_dim=3, lambda_w=0.01, lambda_h=0.01)).shared
        ((2, 3),)
    """
    features, index = problem.optimal_set.feature_factor, torch.nonzero(problem.present).flatten()
    if not features.shape[1]:
        return Coincidences(tuple(index.tolist()), ())
    if problem.feature_dim < features.shape[1]:  # Different optima keep different directions.
        return Coincidences((), ())
    norms = features.norm(dim=1)
    scale = float(norms.max())
    zero = norms <= _RELATIVE_TOLERANCE * scale
    kept = torch.nonzero(~zero).flatten()
    targets = problem.targets[index[kept]]
    shared = [
        tuple(index[kept[same]].tolist())
        for same in _equal_rows(features[kept], _RELATIVE_TOLERANCE * scale)
        if not bool((targets[same] == targets[same[0]]).all())
    ]
    return Coincidences(tuple(index[zero].tolist()), tuple(sorted(shared)))


def _equal_rows(rows: Tensor, tolerance: float) -> Iterator[Tensor]:
    """Yield the indices of each set of two or more equal rows.

    Equal rows have equal components along any axis. Therefore the rows are sorted by their components along one axis,
    split at each gap, and compared only within the parts.
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
