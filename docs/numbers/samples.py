"""The features and heads from which the pages of this folder take their figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

BALANCED = (100,) * 10


def etf(num_classes: int, dim: int, seed: int = 0) -> Tensor:
    """Return the rows of a simplex ETF of norm 1, ``(K, d)``, in a random orientation; K at most d + 1."""
    generator = torch.Generator().manual_seed(seed)
    # Coordinates in the K - 1 directions orthogonal to (1, ..., 1). Of an SVD they would depend on the linear algebra
    # library, and with them the figures of the pages.
    start = torch.cat([torch.ones(num_classes, 1), torch.eye(num_classes)[:, 1:]], dim=1).double()
    inside = torch.linalg.qr(start).Q[:, 1:]
    axes, _ = torch.linalg.qr(torch.randn(dim, num_classes - 1, generator=generator, dtype=torch.float64))
    rows = inside @ axes.T
    return rows / rows.norm(dim=1, keepdim=True)


def near_collapse(noise: float, counts: Sequence[int] = BALANCED, dim: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Return features at the points of a simplex ETF plus noise, and the head of the same ETF.

    Args:
        noise: Standard deviation of each feature within a class; 0 is exact collapse.
        counts: Samples of each class.
        dim: Number of features d.
        seed: Of the orientation and of the noise.

    Returns:
        Arguments of ``nclightning.measure``.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    frame = etf(len(counts), dim, seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    features = frame[labels] + noise * torch.randn(len(labels), dim, generator=generator, dtype=torch.float64)
    return {"features": features, "labels": labels, "weight": frame, "bias": torch.zeros(len(counts)).double()}


def at_random(counts: Sequence[int] = BALANCED, dim: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Return Gaussian features that know nothing of their labels, and a Gaussian head."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    sizes = (len(labels), len(counts))
    features, weight = (torch.randn(size, dim, generator=generator, dtype=torch.float64) for size in sizes)
    return {"features": features, "labels": labels, "weight": weight, "bias": torch.zeros(len(counts)).double()}


def network(seed: int = 0) -> tuple[nn.Sequential, list[tuple[Tensor, Tensor]]]:
    """Return a ReLU network as PyTorch initialises it, 32-128-64-10, and data of 10 Gaussian classes of 100 samples."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = [nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()]
        model = nn.Sequential(*body, nn.Linear(64, 10)).double()
        labels = torch.arange(10).repeat_interleave(100)
        inputs = torch.randn(10, 32).double()[labels] + 0.5 * torch.randn(1000, 32).double()
    return model, [(inputs, labels)]


def show(columns: Mapping[str, Mapping[str, float]], names: Iterable[str], digits: int = 3) -> None:
    """Print values, a row for each name; what is below 1e-12 is round-off and printed as 0."""
    wide = max(map(len, names := list(names)))
    print(" " * wide, *(f"{title:>14}" for title in columns))
    for name in names:
        values = (0.0 if abs(column[name]) < 1e-12 else column[name] for column in columns.values())
        print(f"{name:{wide}}", *(f"{value:14.{digits}g}" for value in values))
