"""Draws the pictures of docs/architecture.md from the code: who imports whom, and the walk of a batch in a real run.

    python docs/architecture.py

Each picture holds the data it was drawn from in its metadata; ``tests/test_architecture.py`` compares them with the
code.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import lightning as L
import matplotlib.pyplot as plt
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as MplPath
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset, default_collate

from nclightning.callbacks import NeuralCollapseMonitor
from nclightning.callbacks.either import EitherMonitor

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, IMAGES = ROOT / "nclightning", ROOT / "docs" / "images"
Graph = dict[str, list[str]]
Kind = Literal["sweep", "online", "validation"]
BASE = ("compat", "errors")  # What everybody may import.

# Who imports whom.


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, but for those that types alone need."""
    tree = ast.parse(path.read_text())
    tree.body = [
        each for each in tree.body if not isinstance(each, ast.If) or ast.unparse(each.test) != "TYPE_CHECKING"
    ]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "nclightning":
            found |= {f"nclightning.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


def import_graph(package: str = "nclightning") -> Graph:
    """Return which files and folders of a package import which others of it.

    Args:
        package: Dotted name, such as ``"nclightning.probe"``.
    """
    folder, graph = ROOT.joinpath(*package.split(".")), defaultdict[str, set[str]](set)
    for path in sorted(folder.rglob("*.py")):
        if path == folder / "__init__.py":
            continue
        unit = path.relative_to(folder).parts[0].removesuffix(".py")
        own = [each.removeprefix(f"{package}.") for each in imports(path) if each.startswith(f"{package}.")]
        others = {each.split(".")[0] for each in own}
        graph[unit] |= others - {unit}
    return {unit: sorted(others) for unit, others in sorted(graph.items())}


def without_shortcuts(graph: Graph) -> Graph:
    """Leave out imports of what is imported through others anyway."""

    def below(unit: str) -> set[str]:
        return set(graph[unit]).union(*(below(other) for other in graph[unit]))

    return {
        unit: [other for other in others if not any(other in below(each) for each in others if each != other)]
        for unit, others in graph.items()
    }


def loads_lightning() -> list[str]:
    """Return the units of the package that cannot be imported without Lightning."""
    graph, folder = import_graph(), PACKAGE
    own = {
        path.relative_to(folder).parts[0].removesuffix(".py")
        for path in folder.rglob("*.py")
        if any(each.split(".")[0] == "lightning" for each in imports(path))
    }
    # Of compat each file is imported by itself.
    found = own - {"compat"}
    while more := {unit for unit, others in graph.items() if unit not in found and found & set(others)}:
        found |= more
    return sorted(found)


# The walk of a batch.

# Besides the methods of classes, these functions are places that data comes to; others are parts of who calls them.
PLACES = ("evaluate", "pair_rows")
SEEN = (*(str(PACKAGE / name) for name in ("probe", "callbacks", "metrics")), __file__)


@dataclass
class Visit:
    """One call that data of a batch went through.

    Attributes:
        place: Class and method, or function.
        path: Of the file.
        got: The data that it got, in words.
        gave: The data that it returned, or yielded.
        batch: Number of the last batch of the pass so far, from 1 on.
        is_done: Whether the pass is over.
        around: The visit that it is a part of.
    """

    place: str
    path: str
    got: str
    gave: str
    batch: int
    is_done: bool
    around: Visit | None

    @property
    def depth(self) -> int:
        """How many visits since the first batch it is a part of."""
        return 0 if self.around is None or not self.around.batch else 1 + self.around.depth


@dataclass
class Call:
    """A call that is going on, and the one around it."""

    frame: Any
    visit: Visit | None
    around: Call | None


class Trail(TorchFunctionMode):
    """Follows data: what is made of the tensors of batches, and the calls of the package that get or return it."""

    def __init__(self) -> None:
        super().__init__()
        self.visits: list[Visit] = []
        self.around: list[str] = []  # The calls that lead to the first batch.
        self.is_on = self.is_done = False
        self._call: Call | None = None
        self._batch = 0
        self._kept: dict[int, Any] = {}  # Data by its id. It is kept so that nothing else gets the same id.

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep what an operation makes of data."""
        result = func(*args, **(kwargs or {}))
        if self.is_on and self._has_data((args, kwargs)):
            self._keep(result)
        return result

    def start(self, batch: Any) -> Any:
        """Take a batch of a loader as data, if the trail is on."""
        if self.is_on:
            self._batch += 1
            self._keep(batch)
            self._note("DataLoader", "torch", "", self._words(batch))
            self.around = self.around or [each.visit.place for each in self._calls() if each.visit is not None][::-1]
        return batch

    def end(self, metrics: Mapping[str, float]) -> None:
        """Take what came to a logger."""
        if self.is_on and self._has_data(metrics):
            self._note("Logger.log_metrics", "lightning", self._words(metrics))

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow what happens inside."""
        before = sys.getprofile()
        with self:
            sys.setprofile(self._profile)
            try:
                yield
            finally:
                sys.setprofile(before)
        kept = set[int]()  # Those with data, and those that led to them.
        for each in reversed(self.visits):
            if each.batch and (each.got or each.gave or id(each) in kept):
                kept |= {id(each), id(each.around)}
        self.visits = [each for each in self.visits if each.batch and id(each) in kept]

    def _profile(self, frame: Any, event: str, arg: Any) -> None:
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(SEEN):
            return
        if event == "call":
            self._enter(frame)
        elif self._call is not None and self._call.frame is frame:
            call, self._call = self._call, self._call.around
            if call.visit is not None and self.is_on:
                call.visit.gave = self._words(arg)
                self.is_done |= self._batch > 0 and call.visit.place == "evaluate"

    def _enter(self, frame: Any) -> None:
        place, visit = _place(frame), None
        around = next((each.visit for each in self._calls() if each.visit is not None), None)
        self.is_done |= place == "RowBuffer.flush"  # All batches have come.
        if place and (around is None or place.split(".")[0] != around.place.split(".")[0]):
            got = ", ".join(filter(None, (self._words(v) for name, v in frame.f_locals.items() if name != "self")))
            path = Path(frame.f_code.co_filename)
            visit = self._note(
                place, path.relative_to(PACKAGE).as_posix() if PACKAGE in path.parents else "your module", got
            )
        self._call = Call(frame, visit, self._call)

    def _note(self, place: str, path: str, got: str, gave: str = "") -> Visit:
        around = next((each.visit for each in self._calls() if each.visit is not None), None)
        visit = Visit(place, path, got, gave, self._batch, self.is_done, around)
        if self.is_on:
            self.visits.append(visit)
        return visit

    def _calls(self) -> Iterator[Call]:
        """Yield the calls that are going on, the last one first."""
        call = self._call
        while call is not None:
            yield call
            call = call.around

    def _keep(self, made: Any) -> None:
        self._kept |= {id(leaf): leaf for leaf in _leaves(made)}

    def _has_data(self, value: Any) -> bool:
        return any(id(leaf) in self._kept for leaf in _leaves(value))

    def _words(self, value: Any) -> str:
        """Say what a value is; nothing if there is no data in it."""
        if not self.is_on or not self._has_data(value):
            return ""
        if isinstance(value, Tensor | float):
            return "x".join(map(str, value.shape)) if isinstance(value, Tensor) and value.ndim else "value"
        if isinstance(value, Mapping):
            inside = {str(name): words for name, each in value.items() if (words := self._words(each))}
            if set(inside.values()) == {"value"}:
                return ", ".join(inside)
            return ", ".join(f"{name}: {words}" if name else words for name, words in inside.items())
        if isinstance(value, list | tuple):
            return ", ".join(filter(None, map(self._words, value)))
        return type(value).__name__


def _leaves(value: Any, depth: int = 6) -> Iterator[Any]:
    """Yield the tensors and floats in a value."""
    inside: Iterable[Any] = ()
    if isinstance(value, Tensor | float):
        yield value
    elif isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple):
        inside = value
    elif is_dataclass(value):
        inside = [getattr(value, each.name) for each in fields(value)]
    for each in inside if depth else ():
        yield from _leaves(each, depth - 1)


def _place(frame: Any) -> str:
    """Name class and method, or function; empty of what is a part of its caller."""
    code, owner = frame.f_code, frame.f_locals.get("self")
    if code.co_filename == __file__ and not isinstance(owner, Net):
        return ""
    for kind in type(owner).__mro__ if owner is not None else ():
        for member in vars(kind).values():
            method = member.fget if isinstance(member, property) else member
            if getattr(inspect.unwrap(method) if callable(method) else method, "__code__", None) is code:
                title = type(owner).__name__ if kind.__name__.startswith("_") else kind.__name__
                # One function hands all hooks on: its variable says which.
                name = frame.f_locals["name"] if code.co_name == "hook" and kind is EitherMonitor else code.co_name
                return "" if title.startswith("_") else f"{title}.{name}"
    return code.co_name if code.co_name in PLACES else ""


class Net(L.LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.fc(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Run the model."""
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Log(DummyLogger):
    """Tells a trail what arrives."""

    def __init__(self, trail: Trail) -> None:
        super().__init__()
        self._trail = trail

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Tell."""
        self._trail.end(metrics)


class Switch(L.Callback):
    """Switches a trail on where a walk begins, and tells it when the batches are over; before the monitors behind it.

    Args:
        trail: The trail.
        kind: Of the walk.
    """

    def __init__(self, trail: Trail, kind: Kind) -> None:
        self._trail, self._kind = trail, kind

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the batches of training."""
        self._trail.is_on = self._kind == "online"

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the batches of validation."""
        self._trail.is_on = self._kind == "validation"

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that they are over."""
        self._trail.is_done = self._kind == "validation"

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say that those of training are over, and follow those of an evaluation pass."""
        self._trail.is_on = self._kind != "validation"
        self._trail.is_done = self._kind == "online"

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The walk is over."""
        self._trail.is_on = False


def walk(kind: Kind, *others: L.Callback) -> Trail:
    """Train a small network for an epoch of three batches with a monitor, and follow the batches that it measures.

    Args:
        kind: Of an evaluation pass over the training set; of the steps of training; or of those of validation.
        others: Further callbacks, behind the monitor.
    """
    trail = Trail()
    monitor = NeuralCollapseMonitor(
        source="online" if kind == "online" else "sweep", stages=("val",) if kind == "validation" else ("train",)
    )
    with torch.random.fork_rng(), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(12, 1, 8, 8), torch.arange(12) % 3)
        loader = DataLoader(data, batch_size=4, collate_fn=lambda rows: trail.start(default_collate(rows)))
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=Log(trail), default_root_dir=folder,
            callbacks=[Switch(trail, kind), monitor, *others], num_sanity_val_steps=0,
            limit_val_batches=3 if kind == "validation" else 0, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        with warnings.catch_warnings(), trail.followed():
            warnings.simplefilter("ignore")  # Of workers and devices that the user has not asked for.
            trainer.fit(Net(), loader, loader)
    return trail


def walk_of_a_pass() -> dict[str, Trail]:
    """Return the walk of an evaluation pass, by its title."""
    return {"An evaluation pass at the end of an epoch: NeuralCollapseMonitor()": walk("sweep")}


def walks_of_steps() -> dict[str, Trail]:
    """Return the walks in the user's own steps, by their titles."""
    return {
        "In the steps of training: NeuralCollapseMonitor(source='online')": walk("online"),
        "In the steps of validation and test": walk("validation"),
    }


def steady(visits: Iterable[Visit]) -> list[Visit]:
    """Return what becomes of a batch that is not the first, and of all of them when the pass is over."""
    return [visit for visit in visits if visit.batch == 2 or (visit.is_done and visit.batch > 2)]


# Pictures.

GREEN, BLUE, GREY = "#d8efd9", "#d6e4f5", "#eeeeee"
EDGE = "#8a94a0"


def levels(graph: Graph) -> list[list[str]]:
    """Put units on floors: each as low as its imports allow."""
    floor = dict[str, int]()
    while len(floor) < len(graph):
        for unit, others in graph.items():
            if unit not in floor and all(each in floor for each in others):
                floor[unit] = 1 + max((floor[each] for each in others), default=-1)
    return [[unit for unit in graph if floor[unit] == i] for i in range(1 + max(floor.values()))]


def width(unit: str) -> float:
    """How wide a box is, in inches."""
    return 0.25 + 0.065 * len(unit)


def laid_out(graph: Graph) -> tuple[dict[str, tuple[float, float]], list[list[tuple[float, float]]]]:
    """Place units on floors so that few edges cross.

    Returns:
        Places of units, and edges as the points that they go through.
    """
    floors = levels(graph)
    height = {unit: i for i, floor in enumerate(floors) for unit in floor}
    rows: list[list[Any]] = [list(floor) for floor in floors]
    chains = []  # Of an edge over several floors, with a place of its own on each floor between.
    for unit, others in graph.items():
        for other in others:
            between = [(unit, other, i) for i in range(height[unit] - 1, height[other], -1)]
            for each in between:
                rows[each[2]].append(each)
            chains.append([unit, *between, other])
    near = defaultdict[Any, list[Any]](list)
    for chain in chains:
        for upper, lower in pairwise(chain):
            near[upper].append(lower)
            near[lower].append(upper)
    at = {each: float(i) for row in rows for i, each in enumerate(row)}
    wide = {each: width(each) + 0.15 if isinstance(each, str) else 0.3 for each in at}
    for turn in range(100):  # Each to the middle of its neighbours, then apart from those beside it.
        for row in rows if turn % 2 else rows[::-1]:
            wanted = {each: mean(at[other] for other in near[each] or row) for each in row}
            row.sort(key=lambda each: wanted[each])
            at |= _apart([(wanted[each], wide[each]) for each in row], row)
    low = min(at[each] - wide[each] / 2 for each in at)
    place = {each: (at[each] - low, float(i)) for i, row in enumerate(rows) for each in row}
    return {unit: place[unit] for unit in graph}, [[place[each] for each in chain] for chain in chains]


def _apart(wanted: list[tuple[float, float]], row: list[Any]) -> dict[Any, float]:
    """Place things of given widths near where they want to be, in order and without overlap."""
    groups: list[list[Any]] = []  # Sum of offsets wanted, number, width, members.
    for (x, width), each in zip(wanted, row, strict=True):
        groups.append([x, 1, width, [(each, width)]])
        while len(groups) > 1 and _start(groups[-2]) + groups[-2][2] > _start(groups[-1]):
            last, before = groups.pop(), groups[-1]
            before[0] += last[0] - last[1] * before[2]
            before[1] += last[1]
            before[2] += last[2]
            before[3] += last[3]
    placed = dict[Any, float]()
    for group in groups:
        x = _start(group)
        for each, width in group[3]:
            placed[each] = x + width / 2
            x += width
    return placed


def _start(group: list[Any]) -> float:
    return float(group[0] / group[1] - group[3][0][1] / 2)


@dataclass(frozen=True)
class ImportPicture:
    """A picture of who imports whom.

    Attributes:
        graphs: By title; a panel for each.
        colours: Of units; grey for others.
        apart: Units that many import: they get a bar below and no lines.
    """

    graphs: Mapping[str, Graph]
    colours: Mapping[str, str] = field(default_factory=dict)
    apart: Sequence[str] = ()

    @property
    def data(self) -> dict[str, Any]:
        """What is drawn, as JSON has it."""
        return {"graphs": self.graphs, "colours": self.colours, "apart": list(self.apart)}


def picture_of_layers() -> ImportPicture:
    """Who imports whom in the package."""
    graph, above = import_graph(), loads_lightning()
    colours = {unit: BLUE if unit in above else GREEN for unit in graph}
    title = "nclightning: who imports whom. Green loads without Lightning; blue needs it."
    return ImportPicture({title: graph}, colours, BASE)


def picture_of_files() -> ImportPicture:
    """Who imports whom among the files of the monitors and of the probe."""
    return ImportPicture(
        {f"nclightning/{name}": import_graph(f"nclightning.{name}") for name in ("callbacks", "probe")}
    )


IMPORT_PICTURES = {"architecture_layers.png": picture_of_layers, "architecture_files.png": picture_of_files}
WALK_PICTURES = {"architecture_pass.png": walk_of_a_pass, "architecture_steps.png": walks_of_steps}


def draw_imports(file: Path, picture: ImportPicture) -> None:
    """Draw who imports whom, without imports of what others import anyway."""
    graphs, apart = picture.graphs, picture.apart
    drawn = {}
    for title, graph in graphs.items():
        lines = {unit: [each for each in others if each not in apart] for unit, others in graph.items()}
        drawn[title] = laid_out(without_shortcuts({unit: lines[unit] for unit in lines if unit not in apart}))
    tall = [max(y for _, y in places.values()) + (1.8 if apart else 1) for places, _ in drawn.values()]
    right = max(x + width(unit) / 2 for places, _ in drawn.values() for unit, (x, _) in places.items())
    figure, panels = plt.subplots(
        len(graphs), figsize=(right + 0.2, 0.6 * sum(tall) + 0.4 * len(graphs)), squeeze=False, height_ratios=tall,
        layout="constrained",
    )  # fmt: skip
    for axes, (title, (places, edges)) in zip(panels[:, 0], drawn.items(), strict=True):
        for points in edges:
            axes.add_patch(PathPatch(_curve(points), fill=False, edgecolor=EDGE, linewidth=0.8))
        for unit, (x, y) in places.items():
            _box(axes, unit, x, y, width(unit), picture.colours.get(unit, GREY))
        if apart:
            _box(axes, "     ".join(apart), right / 2, -0.85, right, GREY)
        axes.set(xlim=(-0.05, right + 0.05))
        axes.set(ylim=(-1.3 if apart else -0.5, max(y for _, y in places.values()) + 0.5))
        axes.set_title(title, fontsize=10, loc="left")
        axes.axis("off")
    save(figure, file, picture.data)


def _box(axes: Any, text: str, x: float, y: float, wide: float, colour: str) -> None:
    shape = FancyBboxPatch((x - wide / 2, y - 0.2), wide, 0.4, "round,pad=0,rounding_size=0.05", zorder=2)
    shape.set(facecolor=colour, edgecolor=EDGE, linewidth=0.8)
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, zorder=3)


def _curve(points: Sequence[tuple[float, float]]) -> MplPath:
    """Lead from floor to floor smoothly, upright at both ends."""
    slopes = [0.0, *((after[0] - before[0]) / 2 for before, after in zip(points, points[2:], strict=False)), 0.0]
    vertices, codes = [points[0]], [MplPath.MOVETO]
    for i, ((x, y), (to_x, to_y)) in enumerate(pairwise(points)):
        vertices += [(x + slopes[i] / 3, y - 0.45), (to_x - slopes[i + 1] / 3, to_y + 0.45), (to_x, to_y)]
        codes += [MplPath.CURVE4] * 3
    return MplPath(vertices, codes)


def draw_walks(file: Path, trails: Mapping[str, Trail]) -> None:
    """Draw the walks of batches as rows, one panel for each, with time downward.

    Args:
        file: Where to.
        trails: By title.
    """
    walks = {title: steady(trail.visits) for title, trail in trails.items()}
    figure, panels = plt.subplots(
        len(walks), figsize=(11, 0.2 * sum(len(walk) + 3.5 for walk in walks.values())), squeeze=False,
        height_ratios=[len(walk) + 3.5 for walk in walks.values()], layout="constrained",
    )  # fmt: skip
    for axes, (title, visits) in zip(panels[:, 0], walks.items(), strict=True):
        first = next(i for i, visit in enumerate(visits) if visit.is_done)
        bands = ((0, first, BLUE, "each batch"), (first, len(visits), GREEN, "when the pass is over"))
        for top, end, colour, words in bands:
            axes.axhspan(top - 0.5, end - 0.5, facecolor=colour, linewidth=0)
            axes.text(0.12, (top + end - 1) / 2, words, rotation=90, ha="center", va="center", fontsize=8)
        for row, visit in enumerate(visits):
            x = 0.3 + 0.22 * visit.depth
            axes.text(x, row, visit.place, va="center", fontsize=8, family="monospace", weight="bold")
            axes.text(5.0, row, visit.path, va="center", fontsize=7.5, color="#555555")
            arrow = " \u2192 " if visit.got and visit.gave else ""
            got = f"\u2192 {visit.gave}" if visit.gave and not visit.got else visit.got
            axes.text(7.7, row, got + (f"{arrow}{visit.gave}" if arrow else ""), va="center", fontsize=7.5)
        for x, words in ((0.3, "who has the data"), (5.0, "file"), (7.7, "data it gets \u2192 gives")):
            axes.text(x, -1.0, words, va="center", fontsize=8, style="italic")
        axes.set(xlim=(0, 11.5), ylim=(len(visits) - 0.4, -1.6))
        axes.set_title(title, fontsize=10, loc="left")
        axes.axis("off")
    save(figure, file, walk_data(trails))


def walk_data(trails: Mapping[str, Trail]) -> dict[str, Any]:
    """Return what is drawn of walks: depth, place, file, data got and given."""
    return {
        title: [[each.depth, each.place, each.path, each.got, each.gave] for each in steady(trail.visits)]
        for title, trail in trails.items()
    }


def save(figure: Any, file: Path, data: Any) -> None:
    """Save a picture with the data that it shows."""
    figure.savefig(file, dpi=130, metadata={"Software": None, "Description": json.dumps(data)})
    plt.close(figure)


def saved(file: Path) -> Any:
    """Return the data that a picture shows."""
    with Image.open(file) as image:
        return json.loads(image.info["Description"])


def main() -> None:
    """Draw all."""
    for name, picture in IMPORT_PICTURES.items():
        draw_imports(IMAGES / name, picture())
    for name, trails in WALK_PICTURES.items():
        draw_walks(IMAGES / name, trails())


if __name__ == "__main__":
    main()
