"""Lays the parts of a report out as one HTML page that needs nothing else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from nclightning.errors import UserError
from nclightning.figures.rates import LinearFit, fit_range
from nclightning.figures.runs import Run
from nclightning.figures.tables import error_bound_constant_of
from nclightning.files import make_folder, replaced
from nclightning.quantities import CERTIFIED_GAP, DISTANCE, GAP, GRAD_NORM, PREDICTED_DECAY, measure_named, quantity_of
from nclightning.report.curves import charts_of
from nclightning.report.quantities import label_of
from nclightning.report.recorded import Given, Record, can_be_asked, read_records
from nclightning.report.verdicts import sizes_of, verdicts_on
from nclightning.theory import UFMProblem

__all__ = ["MARK", "render", "write_report"]

# In the head of each report: a file without it is somebody else's.
MARK = '<meta name="generator" content="nclightning report">'
_LOOKED_THROUGH = 2000  # Bytes of a file in which the mark must stand.
# The predicted decay is that of the gap, which is quadratic in the distance; the gradient is linear in it.
_ORDERS = {GAP.tag(): 1.0, CERTIFIED_GAP.tag(): 1.0, DISTANCE.tag(): 2.0, GRAD_NORM.tag(): 2.0}
_NOT_RECORDED = "not recorded"


def write_report(given: Given | Iterable[Given], out: str | Path = "report.html", *, overwrite: bool = False) -> Path:
    """Write one HTML page about runs and measurements: verdicts, curves, rates, settings and versions.

    The page needs no network and no other file.

    Args:
        given: Run folders, tables, folders of ``python -m nclightning measure``, files of ``Measurement.to_json``,
            or :class:`nclightning.probe.Measurement`, its ``to_dict()`` and :class:`nclightning.figures.Run`.
        out: Where to write. A report that is there is replaced.
        overwrite: Whether to replace a file that is no report.

    Returns:
        Where it was written.

    Raises:
        ValueError: If nothing can be read, or the page cannot be written.

    Example:
        >>> from nclightning.report import write_report
        >>> write_report(["lightning_logs/version_0", "lightning_logs/version_1"], "two.html")  # doctest: +SKIP
    """
    is_one = isinstance(given, str | os.PathLike | Mapping | Run)
    records, path = read_records([given] if is_one else given), Path(out)  # type: ignore[list-item,arg-type]
    if not can_be_asked(path):
        raise UserError(f"--out {str(path)[:80]!r} cannot be the name of a file: choose another --out.")
    if path.is_dir():
        raise UserError(f"--out {path} is a folder: give the name of a file, such as {path / 'report.html'}.")
    if path.exists() and not overwrite and not _is_report(path):
        raise UserError(f"--out {path} exists and is no report of nclightning: choose another name, or --overwrite.")
    page = render(records)
    try:
        make_folder(path.parent)
        with replaced(path) as partial:
            # Names of files, and JSON, may hold half of a surrogate pair.
            partial.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}. Choose another --out.") from error
    return path


def _is_report(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(_LOOKED_THROUGH)
    except OSError:
        return False


def render(records: Sequence[Record]) -> str:
    """Return the page as text.

    Args:
        records: What it is about.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    parts = files("nclightning.report") / "parts"
    read = {name: (parts / name).read_text(encoding="utf-8") for name in ("page.html", "style.css", "page.js")}
    curves = [record for record in records if record.run is not None]
    charts = charts_of(records)
    return environment.from_string(read["page.html"]).render(
        mark=Markup(MARK),
        title=records[0].name if len(records) == 1 else f"{len(records)} runs",
        style=Markup(read["style.css"]),
        script=Markup(read["page.js"]),
        plotly=Markup(get_plotlyjs() if charts else ""),
        data=Markup(as_script({"charts": charts})),
        charts=charts,
        records=[_section(i, record) for i, record in enumerate(records)],
        toggles=_toggles(charts, records) if len(curves) > 1 else [],
        settings=_compared([record.settings for record in records]),
        environment=_compared([record.environment for record in records]),
        names=[record.name for record in records],
    )


def as_script(content: Any) -> str:
    """Return JSON that can stand within a script element whatever text is in it.

    Args:
        content: Of plain objects.
    """
    text = json.dumps(content, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _toggles(charts: Sequence[dict[str, Any]], records: Sequence[Record]) -> list[tuple[int, str, str]]:
    """Number, name and colour of each run that has a curve."""
    colors = {curve["run"]: curve["color"] for chart in charts for curve in chart["curves"]}
    return [(i, records[i].name, colors[i]) for i in sorted(colors)]


def _section(number: int, record: Record) -> dict[str, Any]:
    return {
        "number": number,
        "name": record.name,
        "place": record.place,
        "verdicts": verdicts_on(record),
        "rates": [] if record.run is None else _rates(record.run),
        "unit": "iteration" if record.has_iterations else "step",
        "last": "" if record.run is None else f"{record.run.summary.iteration:,}",
        "measures": _measures(record),
        "files": record.configuration,
    }


def _rates(run: Run) -> list[list[str]]:
    """Rows of the table of rates: what was measured, and what is predicted for the same iterations."""
    rows, summary = [], run.summary
    for tag, value in summary.last.items():
        fit = summary.fits[tag]
        predicted = _predicted(run, tag, fit)
        rows.append([label_of(tag), f"{value:.3e}", *_cells(fit), "-" if predicted is None else f"{predicted:.4g}"])
    constant = None if run.problem is None else error_bound_constant_of(run.problem)
    if summary.kappa is not None or constant is not None:
        measured = "-" if summary.kappa is None else f"{summary.kappa:.6g}"
        rows.append(["error-bound constant", measured, *_cells(None), "-" if constant is None else f"{constant:.6g}"])
    return rows


def _predicted(run: Run, tag: str, fit: LinearFit | None) -> float | None:
    """Iterations per decade that the theory predicts for the steps that were taken; None where it predicts none.

    Those of NC1-NC3 are a heuristic: the decay of the gap, in the ratio of the two predicted exponents.
    """
    decay = run.readings.values.get(PREDICTED_DECAY.tag())
    if fit is None or decay is None:
        return None
    line = fit_range(run.readings.iterations, decay, fit.first, fit.last)
    if line is None or line.slope >= 0:
        return None
    if tag in _ORDERS:
        return _ORDERS[tag] * line.iterations_per_decade
    quantity = quantity_of(tag)
    if not isinstance(run.problem, UFMProblem) or quantity is None:
        return None
    rates = run.problem.decay_rates()
    rate = getattr(rates, quantity.name, math.nan)
    return line.iterations_per_decade * rates.gap / rate if rate > 0 else None


def _cells(fit: LinearFit | None) -> list[str]:
    if fit is None:
        return ["-"] * 5
    return [
        f"{fit.iterations_per_decade:.4g}",
        f"{fit.factor:.6f}",
        f"{fit.r_squared:.5f}",
        f"{fit.decades:.1f}",
        f"{fit.first:,}-{fit.last:,}",
    ]


def _measures(record: Record) -> list[list[str]]:
    """Rows of the table of a measurement: name, value, meaning, value at collapse."""
    if record.measurement is None:
        return []
    K, d = sizes_of(record.measurement)
    rows = []
    for name, value in record.measurement["measures"].items():
        quantity = measure_named(name.rpartition("/")[2])
        collapsed = quantity.at_collapse(K, d) if K else None
        rows.append([name, f"{value:.6g}", quantity.meaning, "-" if collapsed is None else f"{collapsed:.6g}"])
    return rows


def _compared(each: Sequence[dict[str, Any]]) -> list[tuple[str, list[str], bool]]:
    """Rows of names and values, with whether records differ; those that differ first."""
    names = dict.fromkeys(name for settings in each for name in settings)
    rows = []
    for name in names:
        values = [_text(settings[name]) if name in settings else _NOT_RECORDED for settings in each]
        rows.append((name, values, len(set(values)) > 1))
    return sorted(rows, key=lambda row: not row[2])


def _text(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 300 else f"{text[:300]} ..."
