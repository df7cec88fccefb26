"""Draws the pictures of docs/problems/: what the theory says of each problem, and what runs of gradient descent reach.

    python docs/members.py [NAME ...]

Each picture holds the data it was drawn from in its metadata; ``tests/problems/test_members.py`` compares them with the
code. Curves are optima that the problem knows; crosses are where :class:`nclightning.models.UFM` has been trained to.
"""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn.functional import normalize

from nclightning import problems as of
from nclightning.callbacks import OptimalityMonitor
from nclightning.configurations import shipped_configs
from nclightning.data import IndexDataModule
from nclightning.models import UFM
from nclightning.optim import ArmijoGD
from nclightning.problems import Problem, Solution

IMAGES = Path(__file__).resolve().parent / "images" / "problems"
Panel = dict[str, Any]
Quantities = Callable[[Solution], Mapping[str, float]]
STRENGTH = r"$N\sqrt{\lambda_w\lambda_h}$"
VANISHED = 1e-6  # A vector this short has no direction.


def shipped(name: str) -> Problem:
    """Return the problem of a shipped configuration."""
    config = yaml.safe_load(shipped_configs()[f"ufm_{name}"].read_text())
    return Problem.from_description(config["model"]["init_args"]["problem"])


def scaled(problem: Problem, strength: float) -> Problem:
    """Return a problem with both penalties scaled so that N sqrt(lambda_w lambda_h) is a given number."""
    factor = strength / (problem.num_samples * problem.strength)
    return problem.replace(lambda_w=problem.lambda_w * factor, lambda_h=problem.lambda_h * factor)


def optimum(problem: Problem) -> Solution:
    """Return an optimum that the problem knows."""
    return problem.random_optimum(torch.Generator().manual_seed(0))


def trained(problem: Problem) -> Solution:
    """Return where gradient descent comes to, from the initial point of seed 0."""
    return _trained(json.dumps(problem.describe()))


@cache
def _trained(description: str) -> Solution:
    problem = Problem.from_description(json.loads(description))
    torch.manual_seed(0)
    model = UFM(problem=problem, optimizer=lambda params: ArmijoGD(params, patience=1))
    monitor = OptimalityMonitor(every_n_iterations=20, stop_distance=1e-7)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_epochs=-1, max_steps=20_000, callbacks=[monitor], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=IndexDataModule())
    bias = None if model.head.bias is None else model.head.bias.detach()
    return Solution(model.head.weight.detach(), model.features.detach(), problem.labels(), bias)


# What is drawn of a point.


def means(point: Solution) -> Tensor:
    """Mean feature of each group ``(M, d)``."""
    return torch.stack([point.features[point.labels == m].mean(dim=0) for m in range(int(point.labels.max()) + 1)])


def cosines(rows: Tensor) -> Tensor:
    """Cosines of each row with each; ``nan`` for rows that have vanished."""
    rows = torch.where(rows.norm(dim=1, keepdim=True) > VANISHED, rows, torch.nan)
    return normalize(rows) @ normalize(rows).T


def cosines_of_classes(point: Solution) -> dict[str, float]:
    """Cosines of class means where classes 0-4 are majorities and 5-9 minorities."""
    found = cosines(means(point))
    pairs = {"two majorities": found[0, 1], "majority, minority": found[0, 5], "two minorities": found[5, 6]}
    return {name: float(value) for name, value in pairs.items()}


def lengths_of_classes(point: Solution) -> dict[str, float]:
    """Lengths of class means and of rows of the head, likewise."""
    features, head = means(point).norm(dim=1), point.weight.norm(dim=1)
    named = zip(("feature", "head's row"), (features, head), strict=True)
    return {f"{kind}, {name}": float(rows[i]) for name, rows in named for kind, i in (("majority", 0), ("minority", 5))}


def plane(rows: Tensor) -> Tensor:
    """Coordinates of rows of rank 2, the first of which points up and the second to the right."""
    up = normalize(rows[0], dim=0)
    right = normalize(rows[1] - (rows[1] @ up) * up, dim=0)
    return torch.stack([rows @ right, rows @ up], dim=1)


# Panels, as plain data.


def curves(
    make: Callable[[float], Problem],
    quantities: Quantities,
    at: Iterable[float],
    runs_at: Iterable[float],
    marks: Mapping[str, float] | None = None,
    **axes: Any,
) -> Panel:
    """Follow quantities of the optimum along a parameter of the problem.

    Args:
        make: The problem for a value of the parameter.
        quantities: What is drawn of a point, by name.
        at: Values for curves.
        runs_at: Values at which gradient descent is run.
        marks: Values that are marked, by name.
        **axes: What :meth:`matplotlib.axes.Axes.set` takes.

    Returns:
        With ``"runs"`` yet to be made, by :func:`with_runs`.
    """
    at = [float(x) for x in at]
    values = [quantities(optimum(make(x))) for x in at]
    drawn = {name: [round(each[name], 6) for each in values] for name in values[0]}
    return {"x": at, "curves": drawn, "marks": dict(marks or {}), "axes": axes, "runs": (make, quantities, runs_at)}


def grid(values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str, signed: bool = True) -> Panel:
    """Show a matrix."""
    return {
        "grid": [[round(float(x), 6) + 0.0 for x in row] for row in values],
        "rows": list(rows), "columns": list(columns), "axes": {"title": title}, "signed": signed,
    }  # fmt: skip


def scatter(problem: Problem, points: Callable[[Solution], Tensor], names: Sequence[str], **axes: Any) -> Panel:
    """Show points in the plane, those of one name alike."""
    found = [[round(float(x), 6) + 0.0 for x in row] for row in points(optimum(problem))]
    return {"points": found, "names": list(names), "axes": axes, "runs": (problem, points)}


def with_runs(panel: Panel) -> Panel:
    """Train what a panel shows."""
    if "runs" not in panel:
        return panel
    if "curves" in panel:
        make, quantities, at = panel["runs"]
        values = {float(x): quantities(trained(make(x))) for x in at}
        runs: Any = {name: [[x, round(each[name], 6)] for x, each in values.items()] for name in panel["curves"]}
    else:
        problem, points = panel["runs"]
        runs = [[round(float(x), 6) + 0.0 for x in row] for row in points(trained(problem))]
    return panel | {"runs": runs}


def without_runs(panel: Panel) -> Panel:
    """Leave out what was trained."""
    return {name: value for name, value in panel.items() if name != "runs"}


# The pictures.


def along_strength(name: str, top: float, marks: Mapping[str, float]) -> list[Panel]:
    """Show angles and lengths of unbalanced classes as both penalties grow."""
    problem, at = shipped(name), np.linspace(0.05, top, 40)
    runs_at = [x * top for x in (0.1, 0.22, 0.3, 0.42, 0.7)]
    return [
        curves(lambda x: scaled(problem, x), quantities, at, runs_at, marks, xlabel=STRENGTH, title=title)
        for quantities, title in ((cosines_of_classes, "cosines of class means"), (lengths_of_classes, "lengths"))
    ]


def roots_of_counts(problem: Problem) -> dict[str, float]:
    """Mark where the strength is the root of a count."""
    return {rf"$\sqrt{{{n}}}$": math.sqrt(n) for n in sorted(set(problem.counts.tolist()))}


def mse_without_bias() -> list[Panel]:
    """Singular values, and lengths."""
    problem = shipped("mse_without_bias")

    def singular(point: Solution) -> dict[str, float]:
        logits = point.features @ point.weight.T
        values = torch.linalg.svdvals(logits)
        return {"majority": float(values[0]), "minority": float(values[5])}

    return [
        curves(
            lambda x: scaled(problem, x), quantities, np.linspace(0.05, 4.6, 40), (0.4, 1.0, 1.8, 3.0, 4.4),
            roots_of_counts(problem), xlabel=STRENGTH, title=title,
        )
        for quantities, title in ((singular, r"singular values of $HW^\top$"), (lengths_of_classes, "lengths"))
    ]  # fmt: skip


def mse_with_penalized_bias() -> list[Panel]:
    """From the orthogonal frame to the simplex ETF."""
    problem = shipped("mse_with_penalized_bias")
    K, q = problem.num_classes, math.sqrt(int(problem.counts[0])) * problem.strength

    def angle(point: Solution) -> dict[str, float]:
        return {"two classes": float(cosines(means(point))[0, 1])}

    def bias(point: Solution) -> dict[str, float]:
        assert point.bias is not None
        return {"each entry": float(point.bias.mean())}

    return [
        curves(
            lambda x: problem.replace(bias=x), quantities, np.logspace(-2, 1, 37), (0.03, 0.3, 1.0, 4.0),
            {r"$Kq/(1-Kq)$": K * q / (1 - K * q)}, xlabel=r"$\lambda_b$", xscale="log", title=title,
        )
        for quantities, title in ((angle, "cosine of class means"), (bias, "bias"))
    ]  # fmt: skip


def unbalanced_mse() -> list[Panel]:
    """Minorities merge, then vanish."""
    return along_strength("unbalanced_mse", 4.6, roots_of_counts(shipped("unbalanced_mse")))


def unbalanced_ce() -> list[Panel]:
    """The same of cross-entropy."""
    return along_strength("unbalanced_ce", 4.6, roots_of_counts(shipped("unbalanced_ce")))


def weighted_ce() -> list[Panel]:
    """Majorities merge first; and between no weights and inverse ones."""
    problem = shipped("weighted_ce")
    counts = problem.counts.double()
    weight = problem.loss.class_weights[0] * counts[0].sqrt()

    def power(exponent: float) -> Problem:
        return of.weighted_ce(counts.long(), (counts**-exponent).tolist(), *_rest(problem))

    return [
        along_strength("weighted_ce", 4.6, {r"$w\sqrt{18}$": float(weight)})[0],
        curves(
            power, cosines_of_classes, np.linspace(0, 1.5, 16), (0.0, 0.5, 1.0, 1.5),
            xlabel=r"exponent $\gamma$ of the weights $n_k^{-\gamma}$", title="cosines of class means",
        ),
    ]  # fmt: skip


def logit_adjusted_ce() -> list[Panel]:
    """Penalties, and the temperature."""
    problem = shipped("logit_adjusted_ce")

    def adjusted(temperature: float) -> Problem:
        return of.logit_adjusted_ce(problem.counts, *_rest(problem), temperature=temperature)

    return [
        along_strength("logit_adjusted_ce", 4.6, roots_of_counts(problem))[0],
        curves(
            adjusted, cosines_of_classes, np.linspace(0, 2, 21), (0.0, 0.5, 1.0, 2.0), xlabel=r"temperature $\tau$",
            title="cosines of class means",
        ),
    ]  # fmt: skip


def label_smoothing() -> list[Panel]:
    """Scale of the logits, and conditioning."""
    problem = shipped("label_smoothing")

    def smoothed(amount: float) -> Problem:
        return of.label_smoothing(problem.counts, amount, *_rest(problem))

    def scale(point: Solution) -> dict[str, float]:
        logits = point.features[:1] @ point.weight.T
        return {"own class minus another": float(logits[0, 0] - logits[0, 1])}

    at = np.linspace(0, 0.6, 25)
    panel = curves(smoothed, scale, at, (0.0, 0.1, 0.3, 0.6), xlabel=r"smoothing $\delta$", title="logits")
    rates = [smoothed(x).rates for x in at]
    speed = {"L / mu": [round(each.smoothness / each.mu, 6) for each in rates]}
    axes = {"xlabel": r"smoothing $\delta$", "title": "condition number at the optimum"}
    return [panel, {"x": at.tolist(), "curves": speed, "marks": {}, "axes": axes}]


def soft_labels() -> list[Panel]:
    """Targets, predictions, angles."""
    problem = shipped("soft_labels")
    names, classes = _numbers(problem.num_groups), _numbers(problem.num_classes)
    probabilities = torch.softmax(problem.optimum.logits, dim=1)
    return [
        grid(problem.targets, names, classes, "targets", signed=False),
        grid(probabilities, names, classes, "predictions at the optimum", signed=False),
        grid(cosines(means(optimum(problem))), names, names, "cosines of group means"),
    ]


def mixup() -> list[Panel]:
    """Three classes in the plane, mixed half and half and in more shares."""
    pictures = []
    for shares, title in (((0.5,), "mixed half and half"), ((0.5, 0.6, 0.7, 0.8, 0.9), "mixed in nine shares")):
        problem = of.mixup(3, 10, 2, 4, lambda_w=2e-2, lambda_h=5e-3, shares=shares)
        names = ["pure"] * 3 + ["mixed"] * (problem.num_groups - 3)
        pictures.append(scatter(problem, lambda point: plane(means(point)), names, title=title, aspect="equal"))
    return pictures


def multi_label_bce() -> list[Panel]:
    """Angles of groups and of labels."""
    problem = shipped("multi_label_bce")
    groups = ["+".join(str(k + 1) for k in row.nonzero().flatten().tolist()) or "none" for row in problem.targets]
    point, labels = optimum(problem), _numbers(problem.num_classes)
    return [
        grid(cosines(means(point)), groups, groups, "cosines of group means"),
        grid(cosines(point.weight), labels, labels, "cosines of the head's rows"),
    ]


def regression() -> list[Panel]:
    """Eigenvalues of the head's Gram matrix, and predictions."""
    problem = shipped("regression")
    N, spread = problem.num_samples, torch.linalg.svdvals(problem.targets - problem.targets.mean(dim=0))
    marks = {rf"$\sigma_{j + 1}$": float(s) / math.sqrt(N) for j, s in enumerate(spread)}

    def strong(x: float) -> Problem:
        return scaled(problem, x * math.sqrt(N))

    def eigenvalues(point: Solution) -> dict[str, float]:
        values = torch.linalg.svdvals(point.weight).square() * math.sqrt(problem.lambda_w / problem.lambda_h / N)
        return {f"direction {j + 1}": float(value) for j, value in enumerate(values)}

    def predictions(point: Solution) -> Tensor:
        assert point.bias is not None
        logits = point.features @ point.weight.T + point.bias
        return torch.stack([problem.targets.T.flatten(), logits.T.flatten()], dim=1)

    names = [f"target {k + 1}" for k in range(3) for _ in range(N)]
    return [
        curves(
            strong, eigenvalues, np.linspace(0.02, 1.5, 38), (0.1, 0.3, 0.6, 1.0), marks,
            xlabel=r"$\sqrt{N\lambda_w\lambda_h}$", title=r"eigenvalues of $WW^\top\sqrt{\lambda_w/(N\lambda_h)}$",
        ),
        scatter(strong(0.3), predictions, names, xlabel="target", title="predictions, at 0.3"),
    ]  # fmt: skip


def _rest(problem: Problem) -> tuple[int, float, float]:
    return problem.feature_dim, problem.lambda_w, problem.lambda_h


def _numbers(count: int) -> list[str]:
    return [str(i + 1) for i in range(count)]


PICTURES: dict[str, Callable[[], list[Panel]]] = {
    each.__name__: each
    for each in (mse_without_bias, mse_with_penalized_bias, unbalanced_mse, unbalanced_ce, label_smoothing, soft_labels)
    + (mixup, weighted_ce, logit_adjusted_ce, multi_label_bce, regression)
}


def draw(file: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side, and save them with their data."""
    figure, every = plt.subplots(1, len(panels), figsize=(8, 3), layout="constrained")
    for axes, panel in zip(every, panels, strict=True):
        if "curves" in panel:
            _draw_curves(axes, panel)
        elif "points" in panel:
            _draw_points(axes, panel)
        else:
            _draw_grid(axes, panel)
        axes.set(**panel["axes"])
        axes.title.set_size(10)
    file.parent.mkdir(exist_ok=True)
    buffer, info = io.BytesIO(), PngInfo()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    info.add_text("Description", json.dumps(panels))
    with Image.open(buffer) as image:  # With few colours it has a third of the bytes.
        image.convert("P", palette=Image.Palette.ADAPTIVE, colors=64).save(file, optimize=True, pnginfo=info)


def _draw_curves(axes: Any, panel: Panel) -> None:
    for i, (name, values) in enumerate(panel["curves"].items()):
        axes.plot(panel["x"], values, color=f"C{i}", label=name)
        runs = panel.get("runs", {}).get(name, [])
        axes.plot(*zip(*runs, strict=True), "x", color=f"C{i}", ms=7, mew=1.6) if runs else None
    for x in panel["marks"].values():
        axes.axvline(x, color="0.6", lw=0.8, ls="--")
    above = axes.secondary_xaxis("top")
    above.set_xticks([*panel["marks"].values()], [*panel["marks"]], fontsize=8)
    above.minorticks_off()
    axes.legend(fontsize=7)


def _draw_points(axes: Any, panel: Panel) -> None:
    for i, name in enumerate(dict.fromkeys(panel["names"])):
        chosen = [j for j, each in enumerate(panel["names"]) if each == name]
        axes.plot(*zip(*(panel["points"][j] for j in chosen), strict=True), "o", color=f"C{i}", label=name, ms=6, mfc="none")
        axes.plot(*zip(*(panel["runs"][j] for j in chosen), strict=True), "x", color=f"C{i}", ms=4)
    axes.legend(fontsize=7)


def _draw_grid(axes: Any, panel: Panel) -> None:
    values = np.array(panel["grid"])
    colours = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1} if panel["signed"] else {"cmap": "Blues", "vmin": 0, "vmax": 1.4}
    axes.imshow(values, aspect="auto", **colours)
    for (i, j), value in np.ndenumerate(values):
        text, color = "-" if np.isnan(value) else f"{value:.2f}", "w" if abs(value) > 0.65 else "k"
        axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color=color)
    axes.set_xticks(range(values.shape[1]), panel["columns"], fontsize=7)
    axes.set_yticks(range(values.shape[0]), panel["rows"], fontsize=7)


def saved(name: str) -> list[Panel]:
    """Return the data that a picture shows."""
    with Image.open(IMAGES / f"{name}.png") as image:
        return json.loads(image.info["Description"])


def main(names: Sequence[str]) -> None:
    """Draw the pictures of these names, of all if there is none."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for name in names or PICTURES:
        draw(IMAGES / f"{name}.png", [with_runs(panel) for panel in PICTURES[name]()])


if __name__ == "__main__":
    main(sys.argv[1:])
