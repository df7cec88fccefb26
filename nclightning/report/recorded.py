"""What a report is about: run folders, tables, series and measurements, each as it was found."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from nclightning.configurations import read_text
from nclightning.environment import FILE_NAME as ENVIRONMENT
from nclightning.errors import UserError, UserTypeError
from nclightning.figures.runs import Run, read_run
from nclightning.probe.results import Measurement
from nclightning.quantities import ERROR_BOUND_RATIO, EVALUATIONS, STEP_SIZE, quantity_of

__all__ = ["Given", "Record", "can_be_asked", "read_records"]

Given: TypeAlias = str | os.PathLike[str] | Measurement | Mapping[str, Any] | Run

_MOST_BYTES = 2**25
_CONFIGURATIONS = ("config.yaml", "hparams.yaml")


@dataclass(frozen=True)
class Record:
    """One run, or one measurement.

    Attributes:
        name: What it is called on the page; no two records of a page have the same.
        place: Where it was read from; empty for what came from Python.
        run: Its curves; None for a measurement, and for a folder that cannot be read.
        measurement: As :meth:`nclightning.Measurement.to_dict` returns it; None for a run.
        configuration: The files of settings, as text by name.
        environment: What the run folder says of versions and device; empty where it says nothing.
        fault: Why there is neither run nor measurement, in one sentence; else empty.
    """

    name: str
    place: str = ""
    run: Run | None = None
    measurement: dict[str, Any] | None = None
    configuration: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    fault: str = ""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What was set, flat: hyperparameters of a run, sizes of a measurement."""
        if self.run is not None:
            return _flat(self.run.settings)
        if self.measurement is None:
            return {}
        names = ("num_samples", "num_classes", "feature_dim", "head", "normalizes")
        return {name: self.measurement[name] for name in names if name in self.measurement}

    @property
    def has_iterations(self) -> bool:
        """Whether rows are iterations of a full-batch method, and not steps of minibatches or epochs."""
        return self.run is not None and (
            self.run.problem is not None
            or any(quantity_of(tag) in (STEP_SIZE, EVALUATIONS, ERROR_BOUND_RATIO) for tag in self.run.readings.values)
        )


def read_records(given: Iterable[Given]) -> list[Record]:
    """Read everything that a page is about.

    A folder among several that exists and cannot be read has its place on the page, with the reason.

    Args:
        given: Run folders, folders of ``python -m nclightning measure``, tables, files of
            :meth:`nclightning.Measurement.to_json`, and results that are in memory.

    Returns:
        One record for each, in order, under different names.

    Raises:
        ValueError: If there is none, one does not exist, or none can be read.
    """
    records = [_read(each) for each in given]
    if not records:
        raise UserError("give at least one run folder, table or measurement.")
    faults = [record.fault for record in records]
    if all(faults):
        raise UserError(faults[0])
    names = _different_names(records)
    return [
        Record(name, r.place, r.run, r.measurement, r.configuration, r.environment, r.fault)
        for name, r in zip(names, records, strict=True)
    ]


def can_be_asked(path: Path) -> bool:
    """Whether the system takes a path as a name at all, whatever is there: not one that is too long, or holds a 0.

    Args:
        path: As the user gave it.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return True
    except ValueError:
        return False
    except OSError as error:
        return error.errno != errno.ENAMETOOLONG
    return True


def _read(given: Given) -> Record:
    if isinstance(given, Measurement):
        return Record("measurement", measurement=given.to_dict())
    if isinstance(given, Run):
        return Record(given.folder.resolve().name, str(given.folder), given)
    if isinstance(given, Mapping):
        return Record("measurement", measurement=_checked(dict(given), "the mapping given"))
    if not isinstance(given, str | os.PathLike):
        raise UserTypeError(
            f"a report takes folders, files, Measurements and Runs, got {type(given).__name__}: pass the run's folder, "
            "or what nclightning.measure returned."
        )
    path = Path(given)
    if not can_be_asked(path) or not path.exists():
        raise UserError(f"{path} does not exist: give the folder of a run, such as lightning_logs/version_0.")
    name = path.resolve().name or str(path)
    try:
        if path.is_file() and path.suffix.lower() == ".json":
            return Record(path.stem, str(path), measurement=_read_measurement(path))
        run = read_run(path)
    except UserError as error:
        return Record(name, str(path), fault=str(error))
    folder = path if path.is_dir() else path.parent
    return Record(name, str(path), run, None, _configuration(folder), _environment(folder / ENVIRONMENT))


def _read_measurement(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path, str(path), _MOST_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is no JSON: {error}.") from error
    return _checked(content, str(path))


def _checked(content: Any, source: str) -> dict[str, Any]:
    """Return a measurement with numbers for values; refuse what is none."""
    repair = "give what Measurement.to_json wrote, or Measurement.to_dict returned."
    if not isinstance(content, dict) or not isinstance(content.get("measures"), dict):
        raise UserError(f"{source} is no measurement, since it has no measures: {repair}")
    try:
        measures = {str(name): float(value) for name, value in content["measures"].items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{source} is no measurement, since a measure is no number ({error}): {repair}") from error
    return content | {"measures": measures}


def _configuration(folder: Path) -> dict[str, str]:
    """Files of settings that can be read; what is damaged is said in its place."""
    found: dict[str, str] = {}
    resumed = sorted(path.name for path in folder.glob("config_resumed_*.yaml"))
    for name in (*_CONFIGURATIONS, *resumed, "measured.json"):
        if (folder / name).is_file():
            try:
                found[name] = read_text(folder / name, name, _MOST_BYTES)
            except UserError as error:
                found[name] = str(error)
    return found


def _environment(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path, str(path), _MOST_BYTES))
    except (ValueError, RecursionError):
        return {"": f"{path.name} is damaged"}
    return {str(name): str(value) for name, value in content.items()} if isinstance(content, dict) else {}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under names with dots, as they are typed on the command line."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat({str(key): each for key, each in value.items()}, f"{prefix}{name}.")
        elif not name.startswith("_"):
            flat[f"{prefix}{name}"] = value
    return flat


def _different_names(records: Sequence[Record]) -> list[str]:
    """Folder names; with folders above them where these are the same, and a number where all is the same."""
    names = [record.name for record in records]
    repeated = {name for name in names if names.count(name) > 1}
    for i, record in enumerate(records):
        if record.name in repeated and record.place:
            names[i] = "/".join(Path(record.place).resolve().parts[-2:])
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            names[i] = f"{name} ({seen[name]})"
    return names
