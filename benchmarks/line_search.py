"""How many evaluations does ArmijoGD save on backtracking that doubles its step at every iteration? Prints a table.

    python benchmarks/line_search.py

The unconstrained feature model at the sizes and penalties of Figure 1, seeds 0-4, in float64, both from step 1 until
the distance to the optimal set is 1e-12. ArmijoGD has its default options. The opponent is told apart by its first
trial alone, twice the step before: c1, halving and the slope test below the round-off are the same, and it too
evaluates value and gradient at each trial and carries the accepted gradient on.
"""

import math
import statistics
from typing import NamedTuple

import torch

from nclightning.objective import Objective
from nclightning.optim import ArmijoGD
from nclightning.theory import UFMProblem

LOSSES, LAMBDAS, SEEDS = ("ce", "mse"), (5e-3, 2e-3, 1e-3, 5e-4, 2e-4), range(5)
DISTANCE, MAX_ITERATIONS = 1e-12, 200_000
C1, SHRINK, NOISE, MAX_TRIALS = 0.3, 0.5, 64 * torch.finfo(torch.float64).eps, 60  # The opponent's.
HEADER = "| loss | lambda | evaluations: median | least | most | iterations: most | ours | opponent's | not reached |"


class Run(NamedTuple):
    evaluations: int
    iterations: int
    reached: bool


class Row(NamedTuple):
    """One setting, a run per seed and side."""

    loss: str
    lam: float
    ours: list[Run]
    opponent: list[Run]

    @property
    def evaluations(self):
        """Ratios, ours by the opponent's; a run that did not arrive counts with what it spent."""
        return [a.evaluations / b.evaluations for a, b in zip(self.ours, self.opponent, strict=True)]

    @property
    def iterations(self):
        return [a.iterations / b.iterations for a, b in zip(self.ours, self.opponent, strict=True)]

    @property
    def failures(self):
        return sum(not run.reached for run in self.ours + self.opponent)


class Model:
    """The UFM as a function of one vector, with its gradient in closed form: autograd costs three times as much."""

    def __init__(self, loss, lam):
        self.problem = UFMProblem(loss, 10, 10, 20, lambda_w=10 * lam, lambda_h=lam)
        self.labels = self.problem.labels()
        self.one_hot = torch.nn.functional.one_hot(self.labels).double()
        each = torch.tensor([10 * lam, lam, 0.0], dtype=torch.float64)
        self.penalties = each.repeat_interleave(torch.tensor([200, 2000, 10]))

    def start(self, seed):
        """Draw head and features as ``UFM`` does."""
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn(rows, 20, dtype=torch.float64, generator=generator).flatten() for rows in (10, 100)]
        return torch.cat([*parts, torch.zeros(10, dtype=torch.float64)])

    def split(self, x):
        """Return head, features and bias; CE has no bias, and its part of the vector stays zero."""
        weight, features, bias = x.split((200, 2000, 10))
        return weight.view(10, 20), features.view(100, 20), bias if self.problem.loss == "mse" else None

    def evaluate(self, x):
        weight, features, bias = self.split(x)
        if bias is None:
            log_p = torch.log_softmax(features @ weight.T, dim=1)
            value, residual = -torch.dot(log_p.view(-1), self.one_hot.view(-1)) / 100, log_p.exp_() - self.one_hot
            slope = torch.zeros(10, dtype=x.dtype)
        else:
            residual = torch.addmm(bias, features, weight.T) - self.one_hot
            value, slope = torch.dot(residual.view(-1), residual.view(-1)) / 200, residual.sum(0) / 100
        decay = self.penalties * x
        gradient = torch.cat([(residual.T @ features).view(-1) / 100, (residual @ weight).view(-1) / 100, slope])
        return value + torch.dot(decay, x) / 2, gradient.add_(decay)

    def distance(self, x):
        weight, features, bias = self.split(x)
        return float(self.problem.distance(weight, features, self.labels, bias, check_labels=False))

    def check(self, x):
        """Raise unless value and gradient are those of the objective."""
        leaf = x.clone().requires_grad_()
        weight, features, bias = self.split(leaf)
        objective = Objective(self.problem.loss, self.problem.lambda_w, self.problem.lambda_h)
        expected = objective(weight, features, self.labels, bias)
        expected.backward()
        torch.testing.assert_close(self.evaluate(x), (expected.detach(), leaf.grad), rtol=1e-12, atol=1e-14)


def with_armijo_gd(model, x, **options):
    """Iterate; after each step yield the point, the length of the step and all evaluations so far."""
    p = torch.nn.Parameter(x.clone())
    optimizer = ArmijoGD([p], **options)

    def closure():
        value, p.grad = model.evaluate(p.detach())
        return value

    while True:
        optimizer.step(closure)
        outcome = optimizer.outcome
        yield p.detach(), outcome.step_size * outcome.previous_grad_norm, optimizer.total_evaluations
        if not outcome.accepted:
            return


def growing_at_every_iteration(model, x):
    """Do the same by textbook backtracking, written apart from ArmijoGD."""
    value, gradient = model.evaluate(x)
    size, evaluations = SHRINK, 1
    while True:
        square, size = float(gradient @ gradient), size / SHRINK
        for _ in range(MAX_TRIALS):
            trial = x - size * gradient
            new_value, new_gradient = model.evaluate(trial)
            evaluations += 1
            change = float(new_value - value)
            if abs(change) <= NOISE * abs(float(value)):
                accepted = float(gradient @ new_gradient) >= -(1 - 2 * C1) * square
            else:
                accepted = change <= -C1 * size * square
            if accepted:
                break
            size *= SHRINK
        else:
            return
        x, value, gradient = trial, new_value, new_gradient
        yield x, size * math.sqrt(square), evaluations


def run(model, x, steps):
    """Count what it takes to come as near as DISTANCE.

    The distance changes by no more than the way that was gone: until that has used up what the last one measured was
    too far, there is no need to measure it.
    """
    ahead, evaluations, iterations = model.distance(x) - DISTANCE, 0, 0
    for x, moved, evaluations in steps:  # noqa: PLR1704 - where it ended is what counts.
        iterations += 1
        ahead -= moved
        if ahead <= 0:
            ahead = model.distance(x) - DISTANCE
            if ahead <= 0:
                return Run(evaluations, iterations, True)
        if iterations == MAX_ITERATIONS:
            break
    return Run(evaluations, iterations, False)


def compare(loss, lam, seeds=SEEDS, **options):
    """Run both sides from each seed; options are those of ArmijoGD."""
    model = Model(loss, lam)
    starts = [model.start(seed) for seed in seeds]
    model.check(starts[0])
    return Row(
        loss,
        lam,
        [run(model, x, with_armijo_gd(model, x, **options)) for x in starts],
        [run(model, x, growing_at_every_iteration(model, x)) for x in starts],
    )


def rows(losses=LOSSES, lambdas=LAMBDAS, seeds=SEEDS):
    """Yield one row per setting."""
    for loss in losses:
        for lam in lambdas:
            yield compare(loss, lam, seeds)


def line(name, group):
    """Format a line of the table for one setting or for many."""
    ratios = [ratio for row in group for ratio in row.evaluations]
    ours, opponent = (sum(r.evaluations for row in group for r in getattr(row, side)) for side in ("ours", "opponent"))
    return (
        f"| {name} | {statistics.median(ratios):.3f} | {min(ratios):.3f} | {max(ratios):.3f} | "
        f"{max(ratio for row in group for ratio in row.iterations):.3f} | {ours} | {opponent} | "
        f"{sum(row.failures for row in group)} |"
    )


def main():
    """Print one line per setting, and one for all."""
    torch.set_num_threads(1)
    print(HEADER + "\n|" + "---|" * (HEADER.count("|") - 1))
    done = []
    for row in rows():
        done.append(row)
        print(line(f"{row.loss} | {row.lam:g}", [row]), flush=True)
    print(line("both | all", done))


if __name__ == "__main__":
    main()
