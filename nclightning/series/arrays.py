"""Sources that are files of saved features, labels and a head."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nclightning.errors import UserError
from nclightning.probe.measuring import measure
from nclightning.quantities import NC, tagged
from nclightning.series.opening import check_file, content_of, load_arrays
from nclightning.series.source import steps_in_names

__all__ = ["NAMES", "ArraySource", "ArraysSettings", "array_sources"]

# Names of arrays, in the order in which they are tried, without regard to case.
NAMES: dict[str, tuple[str, ...]] = {
    "features": ("features", "feature", "feats", "h", "embeddings", "embedding", "hidden"),
    "labels": ("labels", "label", "y", "targets", "target"),
    "weight": ("weight", "w", "head.weight", "fc.weight", "classifier.weight"),
    "bias": ("bias", "b", "head.bias", "fc.bias", "classifier.bias"),
}
_NEEDED = ("features", "labels")
_FILES = (".npy", ".npz", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class ArraysSettings:
    """How arrays are found and measured.

    Attributes:
        names: For each array argument of :func:`nclightning.measure`, the name of the array in the file, or the path of
            a separate file; None to try the names in ``NAMES``.
        options: Further arguments of :func:`nclightning.measure`.
        set_name: Name of the data set in tags, such as ``train``.
        weights_only: As for ``torch.load``.
    """

    names: Mapping[str, str | None]
    options: Mapping[str, Any]
    set_name: str
    weights_only: bool

    @property
    def files(self) -> list[Path]:
        """Separate files, which all steps share."""
        return [Path(name) for name in self.names.values() if name is not None and _is_file(name)]


def _is_file(name: str) -> bool:
    return name.endswith(_FILES) and Path(name).is_file()


def array_sources(paths: Sequence[Path], settings: ArraysSettings) -> list[ArraySource]:
    """Return a source for each file of features.

    Raises:
        ValueError: If there are several files and one has no number in its name, or a file cannot be read.
    """
    for path in (*paths, *settings.files):
        check_file(path)
    steps = steps_in_names(paths)
    if len(paths) > 1 and None in steps:
        unnamed = paths[steps.index(None)]
        raise UserError(
            f"{unnamed} has no number in its name, which is needed to order several files: name it like "
            f"{unnamed.stem}_100{unnamed.suffix}."
        )
    return [ArraySource(path, step or 0, settings) for path, step in zip(paths, steps, strict=True)]


class ArraySource:
    """One file of features.

    Args:
        path: The file.
        step: The step in its name.
        settings: Settings that all files share.
    """

    def __init__(self, path: Path, step: int, settings: ArraysSettings) -> None:
        self.path, self.step, self._settings = path, step, settings
        self.name, self.size = str(path), path.stat().st_size

    def fingerprint(self) -> str:
        """Return a fingerprint of the file and of the shared files."""
        return content_of([self.path, *self._settings.files])

    weights = fingerprint

    def measure(self) -> dict[str, float]:
        """Measure the arrays."""
        chosen = self._settings
        own = load_arrays(self.path, chosen.weights_only)
        arrays = {role: self._find(role, own) for role in NAMES}
        if arrays["weight"] is None and chosen.names["bias"] is None:
            arrays["bias"] = None  # A bias without a weight, found by its name, is not that of the head.
        try:
            found = measure(**arrays, **chosen.options)
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error
        return tagged(found, NC, chosen.set_name)

    def _find(self, role: str, own: Mapping[str, Any]) -> Any:
        """Return the array for an argument; None if there is none and it is not needed."""
        wanted = self._settings.names[role]
        if wanted is not None and _is_file(wanted):
            return _only(load_arrays(Path(wanted), self._settings.weights_only), role, wanted)
        if wanted is not None:
            if wanted not in own and (os.sep in wanted or Path(wanted).suffix in _FILES or Path(wanted).is_file()):
                reason = f"files are {', '.join(_FILES)}" if Path(wanted).exists() else "no such file"
                raise UserError(f"--{role} {wanted}: {reason}, and {self.name} has no array of that name.")
            if wanted not in own:
                raise UserError(f"{self.name} has no array {wanted!r} for --{role}, it has {_listed(own)}.")
            return own[wanted]
        if role == "features" and list(own) == [""]:
            return own[""]
        return self._look_for(role, own)

    def _look_for(self, role: str, own: Mapping[str, Any]) -> Any:
        """Return the array that has one of the usual names for an argument; None if there is none."""
        meant = [name for each in NAMES[role] for name in own if name.lower() == each]
        if len(meant) > 1:
            raise UserError(
                f"{self.name} has several arrays that may be the {role}, {' and '.join(meant)}: give --{role} NAME."
            )
        if meant:
            return own[meant[0]]
        if role in _NEEDED:
            raise UserError(
                f"{self.name} has no {role}: looked for {', '.join(NAMES[role])}, it has {_listed(own)}. Give --{role} "
                "NAME, or the path of a file with them."
            )
        return None


def _only(arrays: Mapping[str, Any], role: str, path: str) -> Any:
    """Return the array of a separate file for one argument."""
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    meant = [name for each in NAMES[role] for name in arrays if name.lower() == each]
    if len(meant) != 1:
        raise UserError(f"--{role} {path}: expected a file with one array, it has {_listed(arrays)}.")
    return arrays[meant[0]]


def _listed(arrays: Mapping[str, Any]) -> str:
    names = [repr(name) if name else "one array without a name" for name in arrays]
    return ", ".join([*names[:8], *(["..."] if len(names) > 8 else [])]) or "nothing"
