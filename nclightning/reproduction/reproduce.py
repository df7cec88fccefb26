"""Run the experiments that are missing, draw the figures and write the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from nclightning.errors import UserError
from nclightning.figures import Run, draw_collapse, draw_error_bound, draw_gaps, fit_straight, read_run
from nclightning.figures.readings import Array
from nclightning.reproduction.claims import METRICS_REACH, check_claims, check_error_bound
from nclightning.reproduction.error_bound import (
    Constants,
    Reading,
    Study,
    read,
    study_constants,
    study_error_bound,
    write,
)
from nclightning.reproduction.experiments import ERROR_BOUND, FIGURES, OPTIMIZERS, Experiment, experiments
from nclightning.reproduction.optimizers import (
    check_optimizers,
    draw_comparison,
    optimizer_experiments,
    read_optimizers,
)
from nclightning.reproduction.report import write_report
from nclightning.reproduction.runner import run_all

__all__ = ["reproduce"]

_DRAW = {1: draw_gaps, 2: draw_gaps, 3: draw_collapse, 4: draw_collapse}


def reproduce(
    figures: Sequence[int | str] = (*FIGURES, ERROR_BOUND),
    out: str | Path | None = None,
    quick: bool = False,
    jobs: int | None = None,
) -> Path:
    """Reproduce figures of the paper and check its claims about them.

    Runs that finished in an earlier call are not repeated. A run that was killed resumes from its checkpoint.

    Args:
        figures: Any of 1, 2, 3, 4, ``"error_bound"`` for a study of the error bound, and ``"optimizers"`` for a
            comparison of seven optimizers on one problem.
        out: Folder for runs, figures and report; None is ``reproduction``, or ``reproduction_quick`` if ``quick``.
        quick: Whether to make fewer and shorter runs, which take a few minutes.
        jobs: Number of runs at a time, each with one thread; None is the number of cores.

    Returns:
        Path of the report.

    Raises:
        ValueError: If an argument is out of range, if the folder cannot be written or has runs of other settings, or
            if runs did not finish.

    Example:
        >>> from nclightning.reproduction import reproduce
        >>> reproduce([1, 2], quick=True).name  # doctest: +SKIP
        'report.md'
    """
    chosen = tuple(figure for figure in FIGURES if figure in figures)
    if not figures or set(figures) - {*FIGURES, ERROR_BOUND, OPTIMIZERS}:
        raise UserError(f"figures must be out of 1, 2, 3, 4, {ERROR_BOUND!r}, {OPTIMIZERS!r}, got {list(figures)}.")
    if jobs is not None and jobs < 1:
        raise UserError(f"jobs must be at least 1, got {jobs}.")
    folder = Path(("reproduction_quick" if quick else "reproduction") if out is None else out)
    listed, console = experiments(chosen, quick), Console()
    if OPTIMIZERS in figures:
        listed = [*optimizer_experiments(quick), *listed]
    failures = run_all(folder, listed, jobs or _count_cores(), console)
    if failures:
        raise UserError(
            f"{len(failures)} of {len(listed)} runs did not finish, the first being {failures[0].name}: "
            f"{failures[0].reason}. What finished is kept; the same command goes on."
        )
    runs = {figure: _read(folder, listed, figure) for figure in chosen}
    compared = read_optimizers(folder) if OPTIMIZERS in figures else {}
    try:
        for figure, own in runs.items():
            _announce(console, _DRAW[figure](own, folder / f"figure{figure}"))
        claims, study = check_claims(runs), None
        if ERROR_BOUND in figures:
            study = _study(folder, console)
            claims += check_error_bound(study.readings)
        if compared:
            _announce(console, draw_comparison(compared, folder))
            claims += check_optimizers(compared)
        report = write_report(folder, runs, claims, quick, study, compared)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}.") from error
    _announce(console, [report])
    return report


def _announce(console: Console, paths: Sequence[Path]) -> None:
    for path in paths:
        console.print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)


def _read(folder: Path, listed: Sequence[Experiment], figure: int) -> list[Run]:
    fit = partial(fit_straight, ending_at_most=METRICS_REACH) if figure == 3 else fit_straight
    return [read_run(folder / "runs" / each.name, fit) for each in listed if figure in each.figures]


def _study(folder: Path, console: Console) -> Study:
    """Make the study of the error bound unless its tables exist, and draw it."""
    points, constants = folder / "error_bound.csv", folder / "fact_1.csv"
    if not points.is_file():
        console.print("studying the error bound")
        write(points, study_error_bound())
    if not constants.is_file():
        write(constants, study_constants())
    study = Study(read(points, Reading), read(constants, Constants))
    perturbed, descents, threshold = (
        _curves(study.readings, kind) for kind in ("perturbation", "trajectory", "threshold")
    )
    _announce(console, draw_error_bound(perturbed, descents, threshold, folder / "error_bound"))
    return study


def _curves(readings: Sequence[Reading], kind: str) -> dict[tuple[str, int], tuple[Array, Array]]:
    groups: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for r in readings:
        if r.kind == kind:
            groups.setdefault((r.loss, r.num_classes), []).append((r.distance, r.ratio))
    return {key: (np.array(points)[:, 0], np.array(points)[:, 1]) for key, points in groups.items()}


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
