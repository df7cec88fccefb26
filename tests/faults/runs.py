"""Runs of the command line in forked processes, to which something happens."""

import hashlib
import logging
import os
import random
import time
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nclightning.callbacks
import nclightning.commands.training
import nclightning.data
import nclightning.figures.convergence
import nclightning.models  # noqa: F401 (children find everything loaded)
from nclightning.cli import main
from nclightning.files import observers
from tests.forked import end_with

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # It says what a resumed run replaces.

CONFIG = """
seed_everything: 0
model:
  class_path: nclightning.models.UFM
  init_args:
    {num_classes: 3, samples_per_class: 2, feature_dim: 4, loss: ce, lambda: 5.0e-3, iterations_per_step: 5,
     optimizer: {class_path: nclightning.optim.ArmijoGD}}
data: {class_path: nclightning.data.IndexDataModule}
trainer:
  max_steps: 60
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  callbacks: [{class_path: nclightning.callbacks.LastCheckpoint, init_args: {every_n_iterations: 10}}]
neural_collapse: {every_n_iterations: 3}
optimality: {every_n_iterations: 4, stop_distance: %s, stop_at_floor: false}
"""
# One run takes its iterations, the other stops at a distance that it reaches before.
STOPS = {"iterations": "null", "distance": "1.0e-3"}


@dataclass(frozen=True)
class Ending:
    """How a process ended: its status, minus a signal's number if one ended it, and what it wrote to stderr."""

    status: int
    errors: str

    @property
    def sentence(self):
        """The one line that refuses, or None."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        return lines[0] if len(lines) == 1 and "Traceback" not in self.errors else None


def launch(words, folder, disturb=None):
    """Fork a process that runs the command line in a folder; return its number."""
    pid = os.fork()
    if not pid:
        end_with(lambda: _run(words, folder, disturb))
    return pid


def _run(words, folder, disturb):
    os.chdir(folder)
    for name, descriptor in (("out", 1), ("errors", 2)):
        os.dup2(os.open(f"{name}.{os.getpid()}", os.O_WRONLY | os.O_CREAT), descriptor)
    Figure.draw = lambda *_: None  # Files are what is struck, not what is in a picture.
    if disturb is not None:
        disturb()
    main(words)


def end_of(pid, folder):
    """Wait for a process."""
    _, status = os.waitpid(pid, 0)
    files = [folder / f"{name}.{pid}" for name in ("errors", "out")]
    errors = files[0].read_text(errors="replace") if files[0].exists() else ""
    for file in files:
        file.unlink(missing_ok=True)
    return Ending(os.waitstatus_to_exitcode(status), errors)


def run(words, folder, disturb=None):
    """Run the command line in a process of its own, to its end."""
    return end_of(launch(words, folder, disturb), folder)


def at_operation(number, act):
    """Call ``act(operation, size)`` at an announcement of the file layer, counted from 0.

    The size is that of the file before the operation; None if there was none.
    """
    count, before = 0, None

    def observe(operation):
        nonlocal count, before
        if not operation.done:
            before = operation.path.stat().st_size if operation.path.is_file() else None
        if count == number:
            act(operation, before)
        count += 1

    observers.append(observe)


def recording(path):
    """Write each announcement of a run to a file, a line each."""

    def observe(operation):
        with path.open("a") as file:
            file.write(f"{operation.name}\t{'after' if operation.done else 'before'}\n")

    return lambda: observers.append(observe)


def with_clock(offset):
    """Let the clock of a process be off by so many seconds."""

    def set_clock():
        true = time.time
        time.time = lambda: true() + offset

    return set_clock


def contents(folder):
    """Hash the files of a folder, but for locks and what a process of the harness prints."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock" and path.parent != folder
    }


@dataclass
class Recorded:
    """What a finished run left."""

    table: bytes
    weights: dict
    scalars: dict
    ending: set

    @classmethod
    def of(cls, run_folder):
        """Read a run folder."""
        checkpoint = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
        events = EventAccumulator(str(run_folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
        events.Reload()
        scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        weights = checkpoint["state_dict"] | {"step": checkpoint["global_step"]}
        ending = {path.name for path in run_folder.iterdir() if path.suffix == ".png"} | {
            f"image {tag}: {len(events.Images(tag))}" for tag in events.Tags()["images"]
        }
        ending |= {tag for tag in events.summary_metadata if tag.startswith("_hparams_/")}
        return cls((run_folder / "readings.csv").read_bytes(), weights, scalars, ending)

    def difference(self, other):
        """Name what differs; None if nothing does."""
        if self.table != other.table:
            return "readings.csv"
        same = self.weights.keys() == other.weights.keys() and all(
            torch.equal(torch.as_tensor(value), torch.as_tensor(other.weights[key]))
            for key, value in self.weights.items()
        )
        if not same:
            return "weights"
        if self.scalars != other.scalars:
            tags = {tag for tag in self.scalars | other.scalars if self.scalars.get(tag) != other.scalars.get(tag)}
            return f"scalars {sorted(tags)[:3]}"
        return None if self.ending == other.ending else f"ending {self.ending ^ other.ending}"


def flip_bit(path, chance):
    """Turn round a bit of a file."""
    data = bytearray(path.read_bytes())
    position = chance.randrange(8 * len(data))
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def cut(path, chance):
    """Leave the beginning of a file."""
    os.truncate(path, chance.randrange(path.stat().st_size))


def chances(seed, number):
    """Random numbers of one fault, whatever the others are."""
    return random.Random(f"{seed}/{number}")
