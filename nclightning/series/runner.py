"""The run of a series: measures the files that have no row yet, and writes rows in the order of steps."""

from __future__ import annotations

import math
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from nclightning.errors import UserError
from nclightning.figures.series import draw_series
from nclightning.interrupts import ends_with_launcher, follow_launcher, terminable
from nclightning.series.memory import available_memory
from nclightning.series.source import Source, in_order
from nclightning.series.store import Store

__all__ = ["run_series"]

# Estimate of the memory per process: a fixed part, and a multiple of the file's size for weights and activations.
# At most the share _SHARE of the free memory is used.
_PROCESS_BYTES, _COPIES, _SHARE = 700 * 2**20, 4, 0.8
_MAX_ROWS_SHOWN = 40


def run_series(
    sources: Sequence[Source], settings: Mapping[str, Any], folder: Path, jobs: int = 1, overwrite: bool = False
) -> None:
    """Measure a series, and write ``readings.csv``, TensorBoard events and ``measured.png`` to a folder.

    Args:
        sources: The sources in any order.
        settings: All settings that change values.
        folder: The folder. Its existing rows are kept.
        jobs: Number of processes; fewer are used if the memory does not suffice.
        overwrite: Whether to delete existing rows.

    Raises:
        ValueError: If a source cannot be measured. Rows of earlier sources are kept.
    """
    ordered, notes = in_order(sources)
    store, said = Store(folder, settings), Console(stderr=True)
    for note in notes:
        said.print(note, highlight=False, soft_wrap=True, markup=False)
    with terminable(), store.opened(overwrite):
        waiting = store.waiting(ordered)
        if gone := len(store.rows.keys() - {each.step for each in ordered}):
            said.print(f"measured files that no longer exist: {gone}; their rows are kept.", highlight=False)
        if store.rows:
            said.print(f"existing rows: {len(store.rows)}, files to measure: {len(waiting)}.", highlight=False)
        store.begin()
        threads = max(1, torch.get_num_threads() // jobs)
        processes = _affordable(waiting, jobs, said)
        with _progress(said) as progress:
            task = progress.add_task("measuring", total=len(ordered), completed=len(ordered) - len(waiting), at="")
            for source, values in _measured(waiting, processes, threads):
                store.add(source, values)
                if unknown := [tag for tag, value in values.items() if math.isnan(value)]:
                    more = f" and {len(unknown) - 1} others are" if len(unknown) > 1 else " is"
                    said.print(f"{source.name}: {unknown[0]}{more} nan.", highlight=False, soft_wrap=True, markup=False)
                progress.update(task, advance=1, at=f"step {source.step}")
        draw_series(store.folder, store.picture)
        _show(store)


def _progress(console: Console) -> Progress:
    """Return a progress bar, which is shown on terminals only."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[at]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def _affordable(waiting: Sequence[Source], jobs: int, console: Console) -> int:
    """Return the number of processes that fit in memory. It is printed if the user asked for several."""
    wanted = min(jobs, len(waiting))
    if jobs == 1 or wanted < 1:
        return 1
    each = _PROCESS_BYTES + _COPIES * max(source.size for source in waiting)
    available = available_memory()
    limited = wanted if available is None else max(1, min(wanted, int(_SHARE * available / each)))
    free = "" if available is None else f", {available / 2**30:.1f} GiB are free"
    console.print(
        f"Measuring {limited} at a time (--jobs {jobs}; about {each / 2**30:.1f} GiB for each{free}).",
        highlight=False,
        soft_wrap=True,
    )
    return limited


def _measured(waiting: Sequence[Source], processes: int, threads: int) -> Iterator[tuple[Source, dict[str, float]]]:
    """Yield the values of each source, in order."""
    if processes == 1:
        torch.set_num_threads(threads)
        for source in waiting:
            yield source, source.measure()
        return
    # A forked process could not use a GPU that this process has already used.
    context = multiprocessing.get_context("spawn")
    with ends_with_launcher(), ProcessPoolExecutor(processes, context, _start_worker, (waiting, threads)) as pool:
        futures = [pool.submit(_measure, i) for i in range(len(waiting))]
        try:
            for source, future in zip(waiting, futures, strict=True):
                yield source, future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a measuring process was killed, most often because the memory was full: use fewer --jobs. The same "
                "command continues."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_waiting: Sequence[Source] = ()  # Set in each process of the pool.


def _start_worker(waiting: Sequence[Source], threads: int) -> None:
    """Set up a worker process."""
    global _waiting  # noqa: PLW0603
    follow_launcher()
    torch.set_num_threads(threads)
    _waiting = waiting


def _measure(number: int) -> dict[str, float]:
    return _waiting[number].measure()


def _show(store: Store) -> None:
    """Print the rows as a table, evenly thinned if they are many, and the paths of the files."""
    console = Console() if sys.stdout is not None and sys.stdout.isatty() else Console(width=200)
    steps = sorted(store.rows)
    stride = -(-len(steps) // _MAX_ROWS_SHOWN)
    shown = [step for i, step in enumerate(reversed(steps)) if i % stride == 0][::-1]
    tags = list(dict.fromkeys(tag for step in steps for tag in store.rows[step]))
    thinned = "" if stride == 1 else f" (one of {stride})"
    table = Table(title=f"Neural collapse of {len(steps)} {'states' if len(steps) > 1 else 'state'}{thinned}")
    table.add_column("step", justify="right", no_wrap=True)
    for tag in tags:
        table.add_column(escape(tag), justify="right")
    for step in shown:
        row = store.rows[step]
        table.add_row(str(step), *(f"{row[tag]:.4g}" if tag in row else "-" for tag in tags))
    console.print(table)
    for path in (store.table_path, store.picture):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"view with: tensorboard --logdir {store.folder}", highlight=False, soft_wrap=True, markup=False)
