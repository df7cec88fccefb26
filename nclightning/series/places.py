"""Detection of the kind of files: saved features, checkpoints of Lightning, or models of Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from nclightning.errors import UserError
from nclightning.series.opening import check_file, load_torch

__all__ = ["KINDS", "FileSet", "find_config", "find_files"]

KINDS = {
    "arrays": "saved features",
    "lightning": "checkpoints of Lightning",
    "huggingface": "models of Hugging Face",
}
_ARRAYS = (".npz", ".npy", ".safetensors", ".pt", ".pth")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin")


class FileSet(NamedTuple):
    """Files of one kind.

    Attributes:
        kind: A key of ``KINDS``.
        paths: The files, or model folders.
    """

    kind: str
    paths: list[Path]


def find_files(paths: Sequence[Path]) -> FileSet:
    """Return the files to measure, including those in folders.

    Raises:
        ValueError: If a folder has none, the kind of a file is not known, or there are several kinds.
    """
    found = [_in_folder(path) if path.is_dir() else FileSet(_kind_of(path), [path]) for path in paths]
    for place, path in zip(found, paths, strict=True):
        if place.kind != found[0].kind:
            raise UserError(
                f"{paths[0]} has {KINDS[found[0].kind]} and {path} has {KINDS[place.kind]}: measure each kind "
                "separately."
            )
    return FileSet(found[0].kind, list(dict.fromkeys(each for place in found for each in place.paths)))


def _in_folder(folder: Path) -> FileSet:
    """Return the files to measure in a folder."""
    if folder.suffix == ".ckpt":
        check_file(folder)
    models = [each for each in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", each.name) and _is_model(each)]
    if models or _is_model(folder):
        return FileSet("huggingface", sorted(models) or [folder])
    for place in (folder, folder / "checkpoints"):
        if checkpoints := sorted(place.glob("*.ckpt")):
            return FileSet("lightning", checkpoints)
    files = sorted(each for each in folder.iterdir() if each.suffix.lower() in _ARRAYS)
    if files:
        kinds = {_kind_of(each): each for each in files}
        if len(kinds) == 1:
            return FileSet(next(iter(kinds)), files)
        raise UserError(
            f"{folder} has files of two kinds, {' and '.join(map(str, kinds.values()))}: give the files, not the "
            "folder."
        )
    raise UserError(
        f"{folder} has nothing to measure: no checkpoints (*.ckpt, also in checkpoints/), no checkpoint-N folders of "
        "Hugging Face, no saved features (.npz, .npy, .pt, .safetensors)."
    )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _kind_of(path: Path) -> str:
    """Return the kind of a file by its suffix, or by its content if the suffix is that of torch."""
    ending = path.suffix.lower()
    if ending == ".ckpt":
        return "lightning"
    if ending in _TORCH_SUFFIXES:
        return "lightning" if _is_checkpoint(path) else "arrays"
    if ending in _ARRAYS:
        return "arrays"
    raise UserError(
        f"{path}: its kind is not known. Saved features are .npz, .npy, .pt, .pth or .safetensors, checkpoints of "
        "Lightning .ckpt, models of Hugging Face folders with a config.json."
    )


def _is_checkpoint(path: Path) -> bool:
    """Return whether a file is a checkpoint of Lightning."""
    try:
        content = load_torch(path, weights_only=True)
    except UserError:
        return False  # The error is raised later, with the options of the user.
    return isinstance(content, dict) and {"state_dict", "global_step"} <= content.keys()


def find_config(checkpoints: Sequence[Path]) -> Path | None:
    """Return the configuration that LightningCLI saved in the run folder of checkpoints; None if there is none."""
    folder = checkpoints[0].parent
    places = [folder, folder.parent] if folder.resolve().name == "checkpoints" else [folder]
    return next((each / "config.yaml" for each in places if (each / "config.yaml").is_file()), None)
