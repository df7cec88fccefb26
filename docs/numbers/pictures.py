"""Draws the pictures of the pages in this folder.

``python docs/numbers/pictures.py`` draws all of them, ``python docs/numbers/pictures.py nc1 nc2`` some.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from samples import at_random, etf, near_collapse
from torch import Tensor, nn

from nclightning import functional as F
from nclightning import measure
from nclightning.functional import GradientStep, predict_row_sum
from nclightning.problems import regression, unbalanced_ce

IMAGES = Path(__file__).resolve().parent / "images"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
PICTURES: dict[str, Callable[[], Figure]] = {}


def picture(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Add a picture by the name of its function."""
    PICTURES[draw.__name__] = draw
    return draw


def panels(count: int, width: float = 3.1, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many panels side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0].tolist()
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.tick_params(labelsize=8, which="both")
    return figure, axes


def plane(axis: Axes, title: str) -> None:
    """Make a panel a plane of features."""
    axis.set(aspect="equal", xticks=[], yticks=[], xlim=(-2, 2), ylim=(-2, 2))
    axis.spines[:].set_visible(True)
    axis.set_title(title, fontsize=9)


def clouds(noise: float, frame: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return 40 samples of each class around the rows of a frame in the plane."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(frame)).repeat_interleave(40)
    return frame[labels] + noise * torch.randn(len(labels), 2, generator=generator, dtype=torch.float64), labels


@picture
def nc1() -> Figure:
    """Three classes in the plane with less and less spread."""
    figure, axes = panels(3)
    frame = etf(3, 2)
    for axis, noise in zip(axes, (0.4, 0.15, 0.02), strict=True):
        features, labels = clouds(noise, frame)
        for k in range(3):
            axis.scatter(*features[labels == k].T, s=8, color=COLORS[k], lw=0)
            axis.plot(*features[labels == k].mean(0), "+", color="black", ms=9)
        found = measure(features=features, labels=labels, measures=("nc1",))
        plane(axis, f"NC1 = {found['nc1']:.2g}")
    return figure


@picture
def nc2() -> Figure:
    """Cosines of random means and of an ETF, and how far random rows are from one."""
    figure, axes = panels(3)
    for axis, title, rows in (
        (axes[0], "random, d = 64", at_random()["weight"]),
        (axes[1], "simplex ETF: -1/(K - 1) = -0.11", near_collapse(0.0)["weight"]),
    ):
        unit = rows / rows.norm(dim=1, keepdim=True)
        shown = axis.imshow(unit @ unit.T, vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)
    figure.colorbar(shown, ax=axes[1], shrink=0.8, label="cosine").ax.tick_params(labelsize=8)
    generator = torch.Generator().manual_seed(0)
    dims = [2**j for j in range(4, 13)]
    rows = [torch.randn(10, dim, generator=generator, dtype=torch.float64) for dim in dims]
    for centred, dashes, color in ((False, "-", COLORS[0]), (True, "--", COLORS[1])):
        name = "nc2_centred" if centred else "nc2"
        axes[2].loglog(dims, [F.etf_deviation(r, centred=centred) for r in rows], dashes, color=color, label=name)
    axes[2].axhline(math.sqrt(2 - 2 * math.sqrt(0.9)), color="0.6", lw=0.8)
    axes[2].text(16, 0.27, "orthonormal rows", fontsize=8, color="0.4")
    axes[2].set_xlabel("d, of 10 random rows", fontsize=9)
    axes[2].legend(frameon=False, fontsize=8)
    return figure


@picture
def many_classes() -> Figure:
    """The floor of NC2 and random rows."""
    figure, (axis,) = panels(1, 5.5, 3.4)
    generator = torch.Generator().manual_seed(0)
    for color, dim in zip(COLORS, (8, 32, 128), strict=False):
        sizes = sorted({*(2**j for j in range(2, 11)), dim + 1, dim + 2})
        floors = [math.sqrt(max(2 - 2 * math.sqrt(dim / (size - 1)), 0)) for size in sizes]
        random = [F.etf_deviation(torch.randn(size, dim, generator=generator)) for size in sizes]
        axis.semilogx(sizes, floors, color=color, label=f"d = {dim}: floor")
        axis.semilogx(sizes, random, "o", ms=3, color=color, label="random rows")
    axis.set_xlabel("number of classes K", fontsize=9)
    axis.set_ylabel("nc2", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    return figure


@picture
def nc3() -> Figure:
    """Means and rows: not dual, dual, dual and no ETF."""
    figure, axes = panels(3)
    frame, turn = etf(3, 2), torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    stretch = torch.diag(torch.tensor([1.5, 0.5], dtype=torch.float64))
    labels = torch.arange(3)
    for axis, title, means, weight in (
        (axes[0], "turned", frame, frame @ turn),
        (axes[1], "dual", frame, frame),
        (axes[2], "dual, no ETF", frame @ stretch, frame @ stretch),
    ):
        for k in range(3):
            axis.plot(*(1.5 * means[k]), "o", color=COLORS[k], ms=8)
            axis.annotate(
                "", weight[k].tolist(), (0, 0), arrowprops={"arrowstyle": "->", "color": COLORS[k], "lw": 1.6}
            )
        found = measure(features=means, labels=labels, weight=weight, measures=("nc3", "nc3_difference"))
        values = (0 if found[name] < 1e-12 else found[name] for name in ("nc3", "nc3_difference"))
        plane(axis, "{}\nnc3 = {:.2g}, nc3_difference = {:.2g}".format(title, *values))
    return figure


@picture
def decisions() -> Figure:
    """Regions of the head and of the nearest class mean."""
    figure, axes = panels(2)
    grid = torch.stack(torch.meshgrid(*2 * [torch.linspace(-2, 2, 300).double()], indexing="xy"), dim=-1).view(-1, 2)
    frame = etf(3, 2)
    head = torch.randn(3, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for axis, noise, weight, title in ((axes[0], 0.4, head, "random head"), (axes[1], 0.1, frame, "near collapse")):
        features, labels = clouds(noise, frame)
        stats = F.class_statistics(features, labels, 3)
        nearest, own = F.nearest_class_centre(grid, stats), (grid @ weight.T).argmax(dim=1)
        differs = (nearest != own).double().view(300, 300)
        axis.contourf(differs, levels=[0.5, 1.5], extent=(-2, 2, -2, 2), colors=["0.85"])
        for k in range(3):
            axis.scatter(*features[labels == k].T, s=8, color=COLORS[k], lw=0)
            axis.plot(*stats.means[k], "+", color="black", ms=9)
        mismatch = F.ncc_mismatch(features, (features @ weight.T).argmax(dim=1), stats)
        plane(axis, f"{title}, ncc_mismatch = {mismatch:.2f}\ngrey: the two decisions differ")
    return figure


@picture
def distance() -> Figure:
    """What is linear in the distance from collapse, and what is quadratic."""
    figure, (axis,) = panels(1, 5.5, 3.4)
    noises = [10.0**j for j in range(-8, 1)]
    names = ("nc1", "nc3_difference", "nc2_means", "nc3", "nc_distance")
    found = [measure(**near_collapse(noise), measures=names) for noise in noises]
    for color, dashes, name in zip(COLORS, ("-", "--", "-", "--", ":"), names, strict=False):
        axis.loglog(noises, [each[name] for each in found], dashes, color=color, label=name)
    axis.set_xlabel("noise in each feature", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    return figure


@picture
def optimality() -> Figure:
    """Gap, certified gap and distance around an optimum."""
    figure, (axis,) = panels(1, 5.5, 3.4)
    problem = unbalanced_ce([40, 20, 10, 5], feature_dim=8, lambda_w=5e-3, lambda_h=1e-3)
    generator = torch.Generator().manual_seed(0)
    weight, features, labels, _ = problem.random_optimum(generator)
    noise = [torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in (weight, features)]
    sizes = [10.0 ** (j / 2) for j in range(-14, 1)]
    points = [(weight + size * noise[0], features + size * noise[1], labels) for size in sizes]
    certified = [float(problem.value(*p)) - problem.certified_lower_bound(*p) for p in points]
    axis.loglog(sizes, [problem.distance(*p) for p in points], color=COLORS[0], label="distance")
    axis.loglog(sizes, certified, "--", color=COLORS[1], label="certified gap")
    axis.loglog(sizes, [problem.gap(*p) for p in points], color=COLORS[2], label="gap")
    axis.set_xlabel("size of the perturbation of an optimum", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    return figure


@picture
def regression_picture() -> Figure:
    """Singular values of features."""
    figure, (axis,) = panels(1, 5.5, 3.2)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(200, 3, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.5])
    _, features, _, _ = regression(targets.tolist(), 16, 1e-2, 1e-2).random_optimum(generator)
    noise = torch.randn(features.shape, generator=generator, dtype=torch.float64)
    scale = features.square().mean().sqrt()
    for color, marker, name, rows in (
        (COLORS[0], "o", "noise 0.01 around the optimum", features + 0.01 * scale * noise),
        (COLORS[1], "s", "random", scale * noise),
    ):
        sizes = torch.linalg.svdvals(rows - rows.mean(0))
        axis.semilogy(range(1, 17), sizes, marker, ms=4, color=color, label=name)
    axis.axvline(3.5, color="0.6", lw=0.8)
    axis.text(3.7, float(sizes[0]) * 1.6, "rank of the targets", fontsize=8, color="0.4")
    axis.set_xlabel("index", fontsize=9)
    axis.set_ylabel("singular value of the features", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    return figure


@picture
def laws() -> Figure:
    """NC0 along SGD and AdamW."""
    figure, (axis,) = panels(1, 5.5, 3.2)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 16, generator=generator, dtype=torch.float64)
    labels, start = torch.arange(60) % 4, torch.randn(4, 16, generator=generator, dtype=torch.float64)
    for color, kind in zip(COLORS, (torch.optim.SGD, torch.optim.AdamW), strict=False):
        head = nn.Linear(16, 4, bias=False).double()
        head.weight.data.copy_(start)
        optimizer, values = kind(head.parameters(), lr=0.05, weight_decay=0.2), []
        for _ in range(800):
            values.append(float(F.head_sum(head.weight.detach())))
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features), labels).backward()
            optimizer.step()
        axis.semilogy(values, color=color, label=kind.__name__)
    steps = [GradientStep(0.05, decay=0.2, is_first=i == 0) for i in range(800)]
    law = [float(predict_row_sum(start.sum(dim=0), steps[:i]).norm()) for i in range(0, 800, 50)]
    axis.semilogy(range(0, 800, 50), law, "o", ms=4, mfc="none", color="black", label="law of SGD")
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel("nc0", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
    return figure


@picture
def pitfalls() -> Figure:
    """Few samples and few digits."""
    figure, axes = panels(2, 4.0, 3.2)
    counts = (2, 3, 5, 10, 20, 50, 100, 300)
    for color, noise in zip(COLORS, (0.3, 0.1, 0.03), strict=False):
        values = [measure(**near_collapse(noise, (n,) * 10), measures=("nc1",))["nc1"] for n in counts]
        axes[0].loglog(counts, values, "o-", ms=3, color=color, label=f"noise {noise}")
        axes[0].axhline(noise**2 * 8.1, color=color, lw=0.8, ls=":")
    axes[0].set_xlabel("samples per class; dotted: infinitely many", fontsize=9)
    axes[0].set_ylabel("nc1", fontsize=9)
    noises = [10.0**j for j in range(-12, 1)]
    for color, dtype in zip(COLORS, (torch.bfloat16, torch.float32, torch.float64), strict=False):
        found = []
        for noise in noises:
            arguments = near_collapse(noise)
            arguments |= {"features": (arguments["features"] + 1).to(dtype)}
            found.append(measure(**arguments, measures=("nc1",))["nc1"] or math.nan)
        axes[1].loglog(noises, found, "o-", ms=3, color=color, label=str(dtype)[6:])
    axes[1].set_xlabel("noise, offset 1; left of each curve: exactly 0", fontsize=9)
    axes[0].set_ylim(2e-4, None)
    axes[0].legend(frameon=False, fontsize=8, loc="lower right")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def main(names: list[str]) -> None:
    """Draw pictures."""
    IMAGES.mkdir(exist_ok=True)
    for name in names or PICTURES:
        PICTURES[name]().savefig(IMAGES / f"{name.removesuffix('_picture')}.png", dpi=130, facecolor="white")


if __name__ == "__main__":
    main(sys.argv[1:])
