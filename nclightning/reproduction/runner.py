"""Run a list of experiments side by side; what is finished stays finished."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from nclightning.errors import UserError
from nclightning.files import FolderLock, delete_folder, is_sound, make_folder, replaced
from nclightning.interrupts import terminable
from nclightning.reproduction.experiments import Experiment

__all__ = ["Failure", "run_all", "run_as_child"]

# A child runs the command line and marks its end itself, so that no run that finished can be taken for unfinished.
_CHILD = (
    "import sys; from nclightning.cli import main; from nclightning.reproduction.runner import run_as_child; "
    "run_as_child(main, sys.argv[1], sys.argv[2:])"
)
_POLL_SECONDS = 0.5
_TAIL_BYTES = 4096


@dataclass(frozen=True)
class Failure:
    """A run that ended without finishing.

    Attributes:
        name: Of the experiment.
        reason: The last line it wrote.
    """

    name: str
    reason: str


class Store:
    """The folder of a sweep: ``runs/NAME/`` are ordinary run folders, ``state/NAME.json`` says what was run.

    Args:
        folder: Made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run_folder(self, experiment: Experiment) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / experiment.name

    def state_path(self, experiment: Experiment) -> Path:
        """File with the words of a run and whether it finished."""
        return self.folder / "state" / f"{experiment.name}.json"

    def is_finished(self, experiment: Experiment) -> bool:
        """Whether a run is done.

        Raises:
            ValueError: If it was begun with other settings, or its state cannot be read.
        """
        path, folder = self.state_path(experiment), self.run_folder(experiment)
        if not (path.is_file() and folder.is_dir()):
            return False  # Whoever deletes the folder of a run wants it anew.
        try:
            state = json.loads(path.read_text())
            words, finished = list(state["words"]), bool(state["finished"])
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is damaged. Delete {folder} to run it anew.") from error
        if words != list(experiment.words):
            raise UserError(
                f"{folder} was run with other settings ({' '.join(words)}). Choose another folder with --out, or "
                "delete this one."
            )
        return finished

    def begin(self, experiment: Experiment) -> list[str]:
        """Record that a run begins, and say how.

        Returns:
            The words to run: from its last checkpoint that is not damaged, else anew. A run that was killed at its end,
            before it could say so, only makes up what is missing.
        """
        folder, words = self.run_folder(experiment), ["fit", *experiment.words]
        checkpoints = [folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt")]
        checkpoint = next((path for path in checkpoints if is_sound(path)), None)
        if checkpoint and (folder / "config.yaml").is_file() and (folder / "readings.csv").is_file():
            words += ["--ckpt_path", str(checkpoint)]
        elif folder.exists():
            delete_folder(folder)  # Killed before its first checkpoint, or damaged.
        logger = "--trainer.logger.init_args"
        words += [f"{logger}.save_dir", str(self.folder), f"{logger}.name", "runs"]
        self._write(experiment, finished=False)
        return [*words, f"{logger}.version", experiment.name]

    def _write(self, experiment: Experiment, finished: bool) -> None:
        write_json(self.state_path(experiment), {"words": list(experiment.words), "finished": finished})


def write_json(path: Path, content: object) -> None:
    """Write a file that is on the disk when this returns."""
    make_folder(path.parent)
    with replaced(path) as partial:
        partial.write_text(json.dumps(content, indent=1))


def run_as_child(main: Callable[[list[str]], None], state_path: str, words: list[str]) -> None:
    """Run a command line that ends with its parent, and mark it as finished.

    Args:
        main: Takes the words.
        state_path: File to mark.
        words: Of the command line.
    """

    def end_with_parent() -> None:
        os.read(sys.stdin.fileno(), 1)  # The parent holds the other end and never writes.
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    main(words)
    path = Path(state_path)
    write_json(path, json.loads(path.read_text()) | {"finished": True})


def run_all(folder: Path, experiments: Sequence[Experiment], jobs: int, console: Console) -> list[Failure]:
    """Run what is not finished yet, ``jobs`` at a time.

    Args:
        folder: Of the sweep.
        experiments: All that belong to it, the long ones last.
        jobs: Processes at a time, each with one thread.
        console: For progress.

    Returns:
        What did not finish; the next call goes on with it.

    Raises:
        ValueError: If the folder cannot be written, is in use, or holds runs of other settings.
    """
    store = Store(folder)
    with _locked(folder), terminable():
        waiting = [each for each in experiments if not store.is_finished(each)]
        if not waiting:
            if experiments:
                console.print(f"All {len(experiments)} runs are finished.")
            return []
        done = len(experiments) - len(waiting)
        if done:
            console.print(f"{done} of {len(experiments)} runs are finished already.")
        failures = []
        with _progress(console) as progress, ThreadPoolExecutor(jobs) as pool:
            stopping = threading.Event()
            total = progress.add_task("runs", total=len(experiments), completed=done, reached="")
            # Long ones first, so that no core waits for the last.
            futures = {pool.submit(_run, store, each, progress, stopping): each for each in reversed(waiting)}
            try:
                for future in as_completed(futures):
                    reason, name = future.result(), futures[future].name
                    progress.advance(total)
                    if reason is None:
                        progress.console.print(f"finished {name}", highlight=False)
                    else:
                        failures.append(Failure(name, reason))
                        progress.console.print(f"[red]failed[/red] {name}: {escape(reason)}", highlight=False)
            except BaseException:
                stopping.set()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return failures


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FolderLock(folder)
    try:
        make_folder(folder)
        lock.acquire()
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}. Choose another --out.") from error
    try:
        yield
    finally:
        lock.release()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[reached]}"),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=2,
    )


def _run(store: Store, experiment: Experiment, progress: Progress, stopping: threading.Event) -> str | None:
    """Run one experiment to its end; return why it did not finish, or None."""
    if stopping.is_set():
        return "not begun"
    try:
        words = store.begin(experiment)
    except OSError as error:
        return error.strerror or str(error)
    task = progress.add_task(f"  {experiment.name}", total=None, reached="starting")
    command = [sys.executable, "-c", _CHILD, str(store.state_path(experiment)), *words]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=os.environ | threads
        )
        _follow(child, store.run_folder(experiment) / "readings.csv", progress, task, stopping)
        progress.remove_task(task)
        if child.returncode == 0 and store.is_finished(experiment):
            return None
        last = _last_line(output)
        if not last or last.startswith("Look at it:"):  # A run that was stopped closes with its report.
            return f"ended with status {child.returncode}"
        return last


def _follow(
    child: subprocess.Popen[bytes], readings: Path, progress: Progress, task: TaskID, stopping: threading.Event
) -> None:
    """Show how far a child is until it ends; an interrupt of the terminal reaches it by itself."""
    asked = False
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_POLL_SECONDS)
            break
        if stopping.is_set() and not asked:
            child.terminate()
            asked = True
        iteration = _last_iteration(readings)
        progress.update(task, reached="starting" if iteration is None else f"iteration {iteration:,}")
    assert child.stdin is not None
    child.stdin.close()


def _last_iteration(readings: Path) -> int | None:
    """Iteration of the last whole row of a table that may be in writing."""
    try:
        with readings.open("rb") as file:
            file.seek(max(0, readings.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    iteration = lines[-2].split(b",")[0] if len(lines) > 1 else b""
    return int(iteration) if iteration.isdigit() else None


def _last_line(output: IO[bytes]) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - _TAIL_BYTES))
    lines = output.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""
