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
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

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
Panels = Sequence[Any]
Quantities = Callable[[Problem, Solution], Mapping[str, Any]]
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


def cosines_of_classes(problem: Problem, point: Solution) -> dict[str, float]:
    """Cosines of class means where classes 0-4 are majorities and 5-9 minorities."""
    found = cosines(means(point))
    pairs = {"two majorities": found[0, 1], "majority, minority": found[0, 5], "two minorities": found[5, 6]}
    return {name: float(value) for name, value in pairs.items()}


def lengths_of_classes(problem: Problem, point: Solution) -> dict[str, float]:
    """Lengths of class means and of rows of the head, likewise."""
    features, head = means(point).norm(dim=1), point.weight.norm(dim=1)
    named = zip(("feature", "head's row"), (features, head), strict=True)
    return {f"{kind}, {name}": float(rows[i]) for name, rows in named for kind, i in (("majority", 0), ("minority", 5))}


def plane(rows: Tensor) -> Tensor:
    """Coordinates of rows of rank 2, the first of which points up and the second to the right."""
    up = normalize(rows[0], dim=0)
    right = normalize(rows[1] - (rows[1] @ up) * up, dim=0)
    return torch.stack([rows @ right, rows @ up], dim=1)


# Panels: what is to be drawn, and how it is found.


class Curves(NamedTuple):
    """Quantities of the optimum along a parameter of the problem.

    Attributes:
        make: The problem for a value of the parameter.
        quantities: What is drawn of a point, by name.
        at: Values for curves.
        runs_at: Values at which gradient descent is run.
        marks: Values that are marked, by name.
        axes: What :meth:`matplotlib.axes.Axes.set` takes.
    """

    make: Callable[[float], Problem]
    quantities: Quantities
    at: Sequence[float]
    runs_at: Sequence[float]
    marks: Mapping[str, float]
    axes: Mapping[str, Any]

    def data(self) -> Panel:
        """Return what is drawn."""
        curves = [self.theory(x) for x in self.at]
        runs = [self._rounded(x, trained) for x in self.runs_at]
        return {"at": list(self.at), "curves": curves, "runs_at": list(self.runs_at), "runs": runs} | self.frame()

    def frame(self) -> Panel:
        """Return what is drawn beside curves."""
        return {"marks": dict(self.marks), "axes": dict(self.axes)}

    def theory(self, x: float) -> dict[str, float]:
        """Return a point of each curve."""
        return self._rounded(x, optimum)

    def _rounded(self, x: float, find: Callable[[Problem], Solution]) -> dict[str, float]:
        problem = self.make(x)
        return {name: round(float(value), 6) for name, value in self.quantities(problem, find(problem)).items()}


class Points(NamedTuple):
    """Points in the plane, those of one name alike.

    Attributes:
        problem: The problem.
        points: What is drawn of an optimum, ``(M, 2)``.
        names: Of the points.
        axes: What :meth:`matplotlib.axes.Axes.set` takes.
    """

    problem: Problem
    points: Callable[[Solution], Tensor]
    names: Sequence[str]
    axes: Mapping[str, Any]

    def data(self) -> Panel:
        """Return what is drawn."""
        runs = rounded(self.points(trained(self.problem)))
        return {"points": self.theory(), "runs": runs, "names": list(self.names), "axes": dict(self.axes)}

    def theory(self) -> list[list[float]]:
        """Return the points of the optimum."""
        return rounded(self.points(optimum(self.problem)))


class Grid(NamedTuple):
    """A matrix.

    Attributes:
        values: Its entries.
        rows: Their names.
        columns: Their names.
        title: Of all.
        least: -1 for cosines, 0 for probabilities.
    """

    values: Tensor
    rows: Sequence[str]
    columns: Sequence[str]
    title: str
    least: int = -1

    def data(self) -> Panel:
        """Return what is drawn."""
        names = {"rows": list(self.rows), "columns": list(self.columns), "least": self.least}
        return {"grid": rounded(self.values), "axes": {"title": self.title}} | names


def rounded(values: Tensor) -> list[list[float]]:
    """Write a matrix as lists of few digits."""
    return [[round(float(x), 6) + 0.0 for x in row] for row in values]


# The pictures.


def along_strength(problem: Problem, quantities: Quantities, title: str, marks: Mapping[str, float]) -> Curves:
    """Follow quantities as both penalties grow in their ratio."""
    at, runs_at = [round(0.05 + 0.13 * i, 2) for i in range(36)], (0.4, 1.0, 1.8, 3.0, 4.4)
    return Curves(lambda x: scaled(problem, x), quantities, at, runs_at, marks, {"xlabel": STRENGTH, "title": title})


def roots_of_counts(problem: Problem) -> dict[str, float]:
    """Mark where the strength is the root of a count."""
    return {rf"$\sqrt{{{n}}}$": math.sqrt(n) for n in sorted(set(problem.counts.tolist()))}


def angles_and_lengths(problem: Problem) -> Panels:
    """Show how minorities merge, and how they vanish."""
    shown = (cosines_of_classes, "cosines of class means"), (lengths_of_classes, "lengths")
    return [along_strength(problem, *each, roots_of_counts(problem)) for each in shown]


def mse_without_bias(problem: Problem) -> Panels:
    """Singular values, and lengths."""

    def singular(_: Problem, point: Solution) -> dict[str, Any]:
        values = torch.linalg.svdvals(point.features @ point.weight.T)
        return {"majority": values[0], "minority": values[5]}

    shown = (singular, r"singular values of $HW^\top$"), (lengths_of_classes, "lengths")
    return [along_strength(problem, *each, roots_of_counts(problem)) for each in shown]


def mse_with_penalized_bias(problem: Problem) -> Panels:
    """From the orthogonal frame to the simplex ETF."""
    Kq = problem.num_classes * math.sqrt(int(problem.counts[0])) * problem.strength
    at, marks = np.logspace(-2, 1, 37).round(4).tolist(), {r"$Kq/(1-Kq)$": Kq / (1 - Kq)}

    def angle(_: Problem, point: Solution) -> dict[str, Any]:
        return {"two classes": cosines(means(point))[0, 1]}

    def bias(_: Problem, point: Solution) -> dict[str, Any]:
        return {"each entry": _bias(point).mean()}

    return [
        Curves(
            lambda x: problem.replace(bias=x), quantities, at, (0.03, 0.3, 1.0, 4.0), marks,
            {"xscale": "log", "xlabel": r"$\lambda_b$", "title": title},
        )
        for quantities, title in ((angle, "cosine of class means"), (bias, "bias"))
    ]  # fmt: skip


def weighted_ce(problem: Problem) -> Panels:
    """Majorities merge first; and between no weights and inverse ones."""
    counts = problem.counts.double()
    mark = {r"$w\sqrt{18}$": float(problem.loss.class_weights[0] * counts[0].sqrt())}

    def powers(exponent: float) -> Problem:
        return of.weighted_ce(problem.counts, (counts**-exponent).tolist(), *_rest(problem))

    return [
        along_strength(problem, cosines_of_classes, "cosines of class means", mark),
        Curves(
            powers, cosines_of_classes, [i / 10 for i in range(16)], (0.0, 0.5, 1.0, 1.5), {},
            {"xlabel": r"exponent $\gamma$ of the weights $n_k^{-\gamma}$", "title": "cosines of class means"},
        ),
    ]  # fmt: skip


def logit_adjusted_ce(problem: Problem) -> Panels:
    """Penalties, and the temperature."""

    def adjusted(temperature: float) -> Problem:
        return of.logit_adjusted_ce(problem.counts, *_rest(problem), temperature=temperature)

    return [
        along_strength(problem, cosines_of_classes, "cosines of class means", roots_of_counts(problem)),
        Curves(
            adjusted, cosines_of_classes, [i / 10 for i in range(21)], (0.0, 0.5, 1.0, 2.0), {},
            {"xlabel": r"temperature $\tau$", "title": "cosines of class means"},
        ),
    ]  # fmt: skip


def label_smoothing(problem: Problem) -> Panels:
    """Scale of the logits, and conditioning."""

    def smoothed(amount: float) -> Problem:
        return of.label_smoothing(problem.counts, amount, *_rest(problem))

    def scale(_: Problem, point: Solution) -> dict[str, Any]:
        own, another = (point.features[:1] @ point.weight.T)[0, :2]
        return {"own class minus another": own - another}

    def conditioning(problem: Problem, _: Solution) -> dict[str, Any]:
        return {"L / mu": problem.rates.smoothness / problem.rates.mu}

    at = [i / 40 for i in range(25)]
    return [
        Curves(smoothed, quantities, at, runs_at, {}, {"xlabel": r"smoothing $\delta$", "title": title})
        for quantities, runs_at, title in (
            (scale, (0.0, 0.1, 0.3, 0.6), "logits"),
            (conditioning, (), "condition number at the optimum"),
        )
    ]


def soft_labels(problem: Problem) -> Panels:
    """Targets, predictions, angles."""
    names, classes = _numbers(problem.num_groups), _numbers(problem.num_classes)
    probabilities = torch.softmax(problem.optimum.logits, dim=1)
    return [
        Grid(problem.targets, names, classes, "targets", least=0),
        Grid(probabilities, names, classes, "predictions at the optimum", least=0),
        Grid(cosines(means(optimum(problem))), names, names, "cosines of group means"),
    ]


def mixup(problem: Problem) -> Panels:
    """Three classes in the plane, mixed half and half and in more shares."""
    panels = []
    for shares, title in (((0.5,), "mixed half and half"), ((0.5, 0.6, 0.7, 0.8, 0.9), "mixed in nine shares")):
        three = of.mixup(3, 10, 2, 4, problem.lambda_w, problem.lambda_h, shares=shares)
        names = ["pure"] * 3 + ["mixed"] * (three.num_groups - 3)
        panels.append(Points(three, lambda point: plane(means(point)), names, {"title": title, "aspect": "equal"}))
    return panels


def multi_label_bce(problem: Problem) -> Panels:
    """Angles of groups and of labels."""
    groups = ["+".join(str(k + 1) for k in row.nonzero().flatten().tolist()) or "none" for row in problem.targets]
    point, labels = optimum(problem), _numbers(problem.num_classes)
    return [
        Grid(cosines(means(point)), groups, groups, "cosines of group means"),
        Grid(cosines(point.weight), labels, labels, "cosines of the head's rows"),
    ]


def regression(problem: Problem) -> Panels:
    """Eigenvalues of the head's Gram matrix, and predictions."""
    root, ratio = math.sqrt(problem.num_samples), math.sqrt(problem.lambda_w / problem.lambda_h)
    spread = torch.linalg.svdvals(problem.targets - problem.targets.mean(dim=0)) / root
    at = [round(0.02 + 0.04 * i, 2) for i in range(37)]
    marks = {f"$\\sigma_{j + 1}$": float(s) for j, s in enumerate(spread)}

    def strong(x: float) -> Problem:
        return scaled(problem, x * root)

    def eigenvalues(_: Problem, point: Solution) -> dict[str, Any]:
        values = torch.linalg.svdvals(point.weight).square() * ratio / root
        return {f"direction {j + 1}": value for j, value in enumerate(values)}

    title = r"eigenvalues of $WW^\top\sqrt{\lambda_w/(N\lambda_h)}$"

    def predictions(point: Solution) -> Tensor:
        logits = point.features @ point.weight.T + _bias(point)
        return torch.stack([problem.targets.T.flatten(), logits.T.flatten()], dim=1)

    return [
        Curves(
            strong, eigenvalues, at, (0.1, 0.25, 0.5, 1.0), marks,
            {"xlabel": r"$\sqrt{N\lambda_w\lambda_h}$", "title": title},
        ),
        Points(
            strong(0.25), predictions, [f"target {k + 1}" for k in range(3) for _ in range(problem.num_samples)],
            {"xlabel": r"target", "title": r"predictions where $\sqrt{N\lambda_w\lambda_h}$ is 0.25"},
        ),
    ]  # fmt: skip


def _bias(point: Solution) -> Tensor:
    assert point.bias is not None
    return point.bias


def _rest(problem: Problem) -> tuple[int, float, float]:
    return problem.feature_dim, problem.lambda_w, problem.lambda_h


def _numbers(count: int) -> list[str]:
    return [str(i + 1) for i in range(count)]


# By the name of the problem, which the function gets as it is shipped.
PICTURES: dict[str, Callable[[Problem], Panels]] = {
    "mse_without_bias": mse_without_bias,
    "mse_with_penalized_bias": mse_with_penalized_bias,
    "unbalanced_mse": angles_and_lengths,
    "unbalanced_ce": angles_and_lengths,
    "label_smoothing": label_smoothing,
    "soft_labels": soft_labels,
    "mixup": mixup,
    "weighted_ce": weighted_ce,
    "logit_adjusted_ce": logit_adjusted_ce,
    "multi_label_bce": multi_label_bce,
    "regression": regression,
}


def draw(file: Path, panels: Sequence[Panel]) -> None:
    """Draw panels side by side, and save them with their data."""
    figure, every = plt.subplots(1, len(panels), figsize=(8, 3), layout="constrained")
    for axes, panel in zip(every, panels, strict=True):
        axes.set(**panel["axes"])
        axes.title.set_size(10)
        if "curves" in panel:
            _draw_curves(axes, panel)
        elif "points" in panel:
            _draw_points(axes, panel)
        else:
            _draw_grid(axes, panel)
    buffer, info = io.BytesIO(), PngInfo()
    figure.savefig(buffer, dpi=100)
    plt.close(figure)
    info.add_text("Description", json.dumps(panels))
    file.parent.mkdir(exist_ok=True)
    with Image.open(buffer) as image:  # With few colours it has a third of the bytes.
        few = image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
        few.save(file, optimize=True, pnginfo=info)


def _draw_curves(axes: Any, panel: Panel) -> None:
    for i, name in enumerate(panel["curves"][0]):
        axes.plot(panel["at"], [each[name] for each in panel["curves"]], color=f"C{i}", label=name)
        axes.plot(panel["runs_at"], [each[name] for each in panel["runs"]], "x", color=f"C{i}", ms=7, mew=1.6)
    for x in panel["marks"].values():
        axes.axvline(x, color="0.6", lw=0.8, ls="--")
    above = axes.secondary_xaxis("top")
    above.set_xticks([*panel["marks"].values()], [*panel["marks"]], fontsize=8)
    above.minorticks_off()
    axes.legend(fontsize=7)


def _draw_points(axes: Any, panel: Panel) -> None:
    for i, name in enumerate(dict.fromkeys(panel["names"])):
        known, runs = (
            [x for x, n in zip(panel[k], panel["names"], strict=True) if n == name] for k in ("points", "runs")
        )
        axes.plot(*zip(*known, strict=True), "o", color=f"C{i}", label=name, ms=6, mfc="none")
        axes.plot(*zip(*runs, strict=True), "x", color=f"C{i}", ms=4)
    axes.legend(fontsize=7)


def _draw_grid(axes: Any, panel: Panel) -> None:
    values = np.array(panel["grid"])
    axes.imshow(values, aspect="auto", cmap="RdBu_r" if panel["least"] else "Blues", vmin=panel["least"], vmax=1)
    for (i, j), value in np.ndenumerate(values):
        text, color = "-" if np.isnan(value) else f"{value:.2f}", "w" if abs(value) > 0.65 else "k"
        axes.text(j, i, text, ha="center", va="center", fontsize=6.5, color=color)
    axes.set_xticks(range(values.shape[1]), panel["columns"], fontsize=7)
    axes.set_yticks(range(values.shape[0]), panel["rows"], fontsize=7)


def panels_of(name: str) -> Panels:
    """Return the panels of a problem's picture."""
    return PICTURES[name](shipped(name))


def saved(name: str) -> list[Panel]:
    """Return the data that a picture shows."""
    with Image.open(IMAGES / f"{name}.png") as image:
        found: list[Panel] = json.loads(image.info["Description"])
    return found


def main(names: Sequence[str]) -> None:
    """Draw the pictures of these names, of all if there is none."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for name in names or PICTURES:
        draw(IMAGES / f"{name}.png", [panel.data() for panel in panels_of(name)])


if __name__ == "__main__":
    main(sys.argv[1:])
