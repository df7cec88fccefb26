"""Two processes against one: same iterates, half the features each. Prints a table.

    python benchmarks/distributed.py

Iterations of ArmijoGD in float64 from the same start, by ``strategy=ddp`` over gloo. The difference is that of the
final weights, the greatest over all entries. Time is that of a whole fit without readings, process start included.
"""

import tempfile
import time

import quiet
import torch

from nclightning.data import GaussianDataModule, IndexDataModule
from nclightning.models import UFM, TwoLayerMLP

SMALL = {"num_classes": 10, "samples_per_class": 10, "feature_dim": 20, "lambda_": 5e-3}
LARGE = {"num_classes": 100, "samples_per_class": 100, "feature_dim": 512, "lambda_w": 1e-3, "lambda_h": 1e-5}
CASES = {
    "UFM, K = 10, n = 10, d = 20": (UFM, SMALL, IndexDataModule, 200),
    "UFM, K = 100, n = 100, d = 512": (UFM, LARGE, IndexDataModule, 40),
    "network, K = 10, n = 10, d = 20": (TwoLayerMLP, SMALL, GaussianDataModule, 200),
}


def fit(make, sizes, data, max_steps, loss, devices):
    torch.manual_seed(0)
    model = make(**sizes, loss=loss)
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet.trainer(
            max_steps=max_steps,
            max_epochs=-1,
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            default_root_dir=folder,
        )
        start = time.perf_counter()
        trainer.fit(model, data())
        return model, time.perf_counter() - start


def lines():
    """Yield the lines of the table."""
    yield "| | loss | iterations | difference of the weights | one process | two |"
    yield "|---|---|---|---|---|---|"
    for name, (make, sizes, data, max_steps) in CASES.items():
        for loss in ("mse", "ce"):
            alone, seconds = fit(make, sizes, data, max_steps, loss, 1)
            together, other = fit(make, sizes, data, max_steps, loss, 2)
            pairs = zip(alone.parameters(), together.parameters(), strict=True)
            difference = max((p - q).detach().abs().max().item() for p, q in pairs)
            yield f"| {name} | {loss} | {max_steps} | {difference:.1e} | {seconds:.1f} s | {other:.1f} s |"


def main():
    """Print the table."""
    quiet.show(lines())


if __name__ == "__main__":
    main()
