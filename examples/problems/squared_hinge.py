"""A loss of your own: the squared hinge of each class against the rest.

    python examples/problems/squared_hinge.py

`value` alone would do: gradient, Hessian and certified bound follow from it. The divergence is given besides: here it
can be written without a difference of nearly equal numbers, so that the gap is right to many digits at the optimum.
"""

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from nclightning.data import IndexDataModule
from nclightning.models import UFM
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
    targets = 2 * torch.eye(len(counts)) - 1
    return Problem(SquaredHinge(), targets, counts, feature_dim, lambda_w, lambda_h, bias)


def main() -> tuple[float, float]:
    """Train it as any other problem, and return its gap and the gap that the last iterate certifies by itself."""
    problem = one_against_rest([6, 3, 1], feature_dim=4, lambda_w=0.01, lambda_h=0.02)
    assert_problem_contract(problem)
    print(f"F* = {problem.optimal_value:.6f}, certified to {problem.optimum.duality_gap:.0e}")
    torch.manual_seed(0)
    model = UFM(problem=problem)
    monitors = [OptimalityMonitor(every_n_iterations=5, stop_distance=1e-12), NeuralCollapseMonitor()]
    logger = TensorBoardLogger("lightning_logs", "squared_hinge")
    trainer = L.Trainer(max_epochs=-1, max_steps=5000, accelerator="cpu", logger=logger, callbacks=monitors)
    trainer.fit(model, datamodule=IndexDataModule())
    with torch.no_grad():
        point = model.head.weight, model.features, problem.labels(), model.head.bias
        return float(problem.gap(*point)), float(problem.value(*point)) - problem.certified_lower_bound(*point)


if __name__ == "__main__":
    gap, certified = main()
    print(f"gap {gap:.1e}, certified without the optimum {certified:.1e}; curves: tensorboard --logdir lightning_logs")
