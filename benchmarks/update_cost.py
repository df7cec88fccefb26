"""Cost of an update of NeuralCollapse at small batches, beside metrics of torchmetrics with states of the same size.

    python benchmarks/update_cost.py

An update of a metric of torchmetrics costs some tens of microseconds before it computes anything. ``CosineSimilarity``
keeps the batches as they come, as NeuralCollapse does with the last samples; ``MulticlassConfusionMatrix`` and
``PearsonCorrCoef`` add to states of fixed size. One thread; all metrics take turns, update by update; medians of the
mean time of an update over a stretch of them, so that folding kept samples into the totals counts.
"""

import statistics
import time

import quiet
import torch
from torchmetrics.classification import MulticlassConfusionMatrix
from torchmetrics.regression import CosineSimilarity, PearsonCorrCoef

from nclightning.metrics import NeuralCollapse

BATCH, CLASSES, STRETCH, ROUNDS = 8, 10, 100, 15
DIMS = (64, 256, 512)


def contenders(dim):
    """Yield name, metric and the batch that it takes."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(BATCH, dim, generator=generator)
    labels = torch.arange(BATCH) % CLASSES
    side = round((CLASSES * dim) ** 0.5)  # So many classes have a matrix of K d counts.
    yield "NeuralCollapse", NeuralCollapse(CLASSES, dim), (features, labels)
    yield "NeuralCollapse, light", NeuralCollapse(CLASSES, dim, measures=("nc1_ratio",)), (features, labels)
    yield "CosineSimilarity", CosineSimilarity(), (features, features.flip(0))
    yield (
        "PearsonCorrCoef",
        PearsonCorrCoef(num_outputs=dim),
        (features, features.flip(0)),
    )
    yield (
        "MulticlassConfusionMatrix",
        MulticlassConfusionMatrix(side, validate_args=False),
        (labels, labels.flip(0)),
    )


def compare(dim):
    """Return microseconds per update by name."""
    metrics = list(contenders(dim))
    times = {name: [] for name, _, _ in metrics}
    for turn in range(ROUNDS + 1):
        for name, metric, batch in metrics if turn % 2 else metrics[::-1]:
            metric.reset()
            start = time.perf_counter()
            for _ in range(STRETCH):
                metric.update(*batch)
            if turn:
                times[name].append(1e6 * (time.perf_counter() - start) / STRETCH)
    return {name: statistics.median(each) for name, each in times.items()}


def lines():
    yield f"torch {torch.__version__}, one thread, batches of {BATCH}, K = {CLASSES}\n"
    found = {dim: compare(dim) for dim in DIMS}
    yield "| metric | " + " | ".join(f"d = {dim}, microseconds" for dim in DIMS) + " |"
    yield "|---|" + "---|" * len(DIMS)
    for name in found[DIMS[0]]:
        yield f"| {name} | " + " | ".join(f"{found[dim][name]:.0f}" for dim in DIMS) + " |"


if __name__ == "__main__":
    quiet.show(lines())
