"""A loss of your own: the squared hinge of each class against the rest.

    python examples/problems/squared_hinge.py

`value` alone would do: gradient, Hessian and certified bound follow from it. The divergence is given besides, because
that of the squared hinge can be written without a difference of nearly equal numbers, and then the gap is right to
many digits however close to the optimum.
"""

import torch
from torch import Tensor

from nclightning.problems import Loss, Problem, assert_problem_contract


class SquaredHinge(Loss):
    """Half the squared distance from the margin, for targets of +1 and -1."""

    def value(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (1 - targets * logits).clamp(min=0).square().sum(dim=1) / 2

    def divergence(self, logits: Tensor, reference: Tensor, targets: Tensor) -> Tensor:
        now, before = 1 - targets * logits, 1 - targets * reference
        # Both within the margin; the reference alone; the reference beyond it.
        inside = torch.where(now > 0, (logits - reference).square() / 2, before * (before / 2 - now))
        return torch.where(before > 0, inside, now.clamp(min=0).square() / 2).sum(dim=1)


def one_against_rest(
    counts: list[int], feature_dim: int, lambda_w: float, lambda_h: float, bias: str | float = "none"
) -> Problem:
    """Each class against the rest."""
    targets = 2 * torch.eye(len(counts)) - 1
    return Problem(SquaredHinge(), targets, counts, feature_dim, lambda_w, lambda_h, bias)


if __name__ == "__main__":
    problem = one_against_rest([6, 3, 1], feature_dim=4, lambda_w=0.01, lambda_h=0.02)
    assert_problem_contract(problem)
    print(f"F* = {problem.optimal_value:.6f}, certified to {problem.optimum.duality_gap:.0e}")
    rates = problem.rates
    print(f"Descent converges with a factor of {rates.contraction():.4f} at a step of {rates.best_step:.3f}")
