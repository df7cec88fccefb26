"""From how far does momentum converge? Prints the table of docs/optimizers/momentum.md.

    python benchmarks/momentum_starts.py

Head and features start as normal entries of size 1. With a warm-up the step grows from a hundredth over 200 iterations.
The last columns start where ArmijoGD first came within that part of the optimum's norm; its median number of iterations
is in brackets. A run converges if its distance falls below 1e-8 of the optimum's norm within 3000 iterations. Three
minutes on one thread.
"""

import statistics

import torch

from nclightning import problems
from nclightning.optim import ArmijoGD, HeavyBall, Nesterov

ROWS = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
PROBLEMS = {
    "balanced MSE": problems.balanced_mse(3, 2, 4, 0.02, 0.01),
    "balanced CE": problems.balanced_ce(4, 2, 5, 0.02, 0.01),
    "MSE without bias": problems.mse_without_bias([6, 3, 1], 4, 0.02, 0.01),
    "unbalanced CE": problems.unbalanced_ce([9, 4, 1], 4, 0.01, 0.02),
    "label smoothing": problems.label_smoothing([2] * 4, 0.1, 5, 0.01, 0.01),
    "multi-label BCE": problems.multi_label_bce([[1, 0, 0], [0, 1, 1], [1, 1, 0]], [3, 2, 2], 4, 0.01, 0.01),
    "regression": problems.regression(ROWS, 4, 0.05, 0.01),
    "paper, CE, lambda 5e-3": problems.balanced_ce(10, 10, 20, 5e-2, 5e-3),
    "paper, MSE, lambda 5e-3": problems.balanced_mse(10, 10, 20, 5e-2, 5e-3),
    "paper, CE, lambda 5e-4": problems.balanced_ce(10, 10, 20, 5e-3, 5e-4),
}
PARTS = (0.5, 0.2, 0.1)
SEEDS = range(4)


class Run:
    """A point that an optimizer moves."""

    def __init__(self, problem, seed):
        generator = torch.Generator().manual_seed(seed)
        shapes = [(problem.num_classes, problem.feature_dim), (problem.num_samples, problem.feature_dim)]
        self.parameters = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
        if problem.has_bias:
            self.parameters.append(torch.zeros(problem.num_classes, dtype=torch.float64))
        self.parameters = [torch.nn.Parameter(p) for p in self.parameters]
        self.problem, self.labels = problem, problem.labels()

    def value(self):
        """Evaluate F with its gradient."""
        weight, features, *bias = self.parameters
        value = self.problem.value(weight, features, self.labels, bias[0] if bias else None)
        for p, gradient in zip(self.parameters, torch.autograd.grad(value, self.parameters), strict=True):
            p.grad = gradient
        return value.detach()

    def distance(self):
        """Measure the distance, in units of the optimum's norm."""
        weight, features, *bias = (p.detach() for p in self.parameters)
        if not all(torch.isfinite(p).all() for p in self.parameters):
            return float("inf")
        distance = self.problem.distance(weight, features, self.labels, bias[0] if bias else None, check_labels=False)
        return float(distance) / self.problem.optimum_norm

    def descend(self, optimizer, part, most, warmup=0):
        """Step until the distance is at most ``part``; return the iterations, None if it never is."""
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, 1.0, warmup) if warmup else None
        for iteration in range(1, most + 1):
            optimizer.step(self.value)
            if schedule is not None:
                schedule.step()
            if iteration % 5 == 0:
                distance = self.distance()
                if distance <= part:
                    return iteration
                if distance > 1e8:
                    return None
        return None


def main():
    """Print the table."""
    print(
        "| problem | L/mu | from the start | with a warm-up | " + " | ".join(f"from {part:g}" for part in PARTS) + " |"
    )
    print("|" + "---|" * (4 + len(PARTS)))
    for name, problem in PROBLEMS.items():
        cells = []
        for part, warmup in ((None, 0), (None, 200), *((part, 0) for part in PARTS)):
            counts, searched = {HeavyBall: 0, Nesterov: 0}, []
            for kind in counts:
                for seed in SEEDS:
                    run = Run(problem, seed)
                    if part is not None:
                        searched.append(run.descend(ArmijoGD(run.parameters), part, 20_000))
                    optimizer = kind(run.parameters, problem.mu, problem.smoothness)
                    counts[kind] += run.descend(optimizer, 1e-8, 3000, warmup) is not None
            after = f" ({statistics.median(searched):.0f})" if searched else ""
            cells.append(", ".join(str(count) for count in counts.values()) + after)
        print(f"| {name} | {problem.smoothness / problem.mu:.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
