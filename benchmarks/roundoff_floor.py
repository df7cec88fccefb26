"""How far does float32 training get, with the slope test of ArmijoGD and without it? Prints the figures of the README.

    python benchmarks/roundoff_floor.py

The shipped configurations in float32, 2000 iterations; the gap is evaluated in float64.
"""

import torch

from nclightning.models import UFM
from nclightning.optim import ArmijoGD

ITERATIONS = 2000


def final_gap(loss: str, noise: float | None) -> float:
    """Train in float32 and return the gap at the end."""
    torch.manual_seed(0)
    model = UFM(10, 10, 20, loss, lambda_=5e-3, dtype="float32")
    labels = model.problem.labels()
    batch = (torch.arange(len(labels)), labels)
    optimizer = ArmijoGD(model.parameters(), noise=noise)

    def closure():
        optimizer.zero_grad()
        value = model.evaluate_objective(batch)
        value.backward()
        return value

    for _ in range(ITERATIONS):
        optimizer.step(closure)
    return float(model.problem.optimality_gap(model.head.weight, model.features, labels, model.head.bias))


def main():
    """Print one row per loss."""
    print("| loss | gap with the slope test | gap of plain Armijo | ratio |")
    print("|---|---|---|---|")
    for loss in ("mse", "ce"):
        with_test, plain = final_gap(loss, None), final_gap(loss, 0.0)
        print(f"| {loss} | {with_test:.1e} | {plain:.1e} | {plain / with_test:.0e} |")


if __name__ == "__main__":
    main()
