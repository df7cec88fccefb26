"""Reading of saved files without running code that may be in them."""

from __future__ import annotations

import glob
import hashlib
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nclightning.errors import UserError
from nclightning.files import check_checkpoint

__all__ = ["check_file", "content_of", "load_arrays", "load_torch", "paths_of", "weights_of"]

_BLOCK, _BLOCKS = 2**20, 16
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def paths_of(words: Iterable[str]) -> list[Path]:
    """Return the files and folders that words of the command line name, each once.

    Args:
        words: Paths, or patterns such as ``run/*.ckpt`` that the shell has not expanded.

    Raises:
        ValueError: If a word matches nothing.
    """
    paths: dict[Path, None] = {}
    for word in words:
        path = Path(word).expanduser()
        found = [path] if path.exists() else [Path(each) for each in sorted(glob.glob(str(path), recursive=True))]
        if not found:
            pattern = "no file matches the pattern" if glob.has_magic(word) else "no such file or folder"
            raise UserError(f"{word}: {pattern}.")
        paths |= dict.fromkeys(found)
    return list(paths)


def check_file(path: Path) -> None:
    """Raise unless a path is a file that is not empty, and complete if it is an archive.

    Raises:
        ValueError: With the reason.
    """
    if path.is_dir():
        raise UserError(
            f"{path} must be a file, but is a folder: a checkpoint that several processes wrote in parts must first be "
            "consolidated (python -m lightning.pytorch.utilities.consolidate_checkpoint)."
        )
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}.") from error
    if not start:
        raise UserError(f"{path} is empty: it was being written when its process ended. Delete it, or save it again.")
    if start == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut off: its end is missing. Delete it, or save it again.")


def content_of(paths: Sequence[Path]) -> str:
    """Return a fingerprint of the content of files: of the checksums in archives, of sampled blocks in other files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(f"{path.stat().st_size}\n".encode())
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for part in archive.infolist():
                    digest.update(f"{part.filename.partition('/')[2]} {part.CRC} {part.file_size}\n".encode())
            continue
        size = path.stat().st_size
        with path.open("rb") as file:
            for i in range(_BLOCKS):
                file.seek(max(0, size - _BLOCK) * i // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def weights_of(state: Mapping[str, Any]) -> str:
    """Return a fingerprint of tensors and their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(state.items()):
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_torch(path: Path, weights_only: bool, checked: bool = False) -> Any:
    """Load a file of ``torch.save``, mapped into memory so that only the parts in use are read.

    Args:
        path: The file.
        weights_only: As for ``torch.load``.
        checked: Whether to verify all checksums of the file.

    Raises:
        ValueError: If it is damaged, or contains objects that ``weights_only`` refuses.
    """
    check_file(path)
    archive = zipfile.is_zipfile(path)
    if checked and archive:
        check_checkpoint(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=archive)
    except pickle.UnpicklingError as error:
        found = _GLOBAL.search(str(error))
        if not weights_only or found is None:
            raise UserError(f"{path} is damaged, or torch.save did not write it.") from error
        raise UserError(
            f"{path} contains an object of {found[1]}, and unpickling objects can run any code: it was loaded with "
            "weights_only=True, which refuses them. Give --weights_only false if you trust its source."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise UserError(f"{path} is damaged, or torch.save did not write it.") from error


def load_arrays(path: Path, weights_only: bool) -> Mapping[str, Any]:
    """Load the arrays in a file by name. The array of a ``.npy`` file, or a single tensor, has an empty name.

    Args:
        path: A ``.npz``, ``.npy``, ``.pt``, ``.pth`` or ``.safetensors`` file.
        weights_only: As for ``torch.load``.

    Raises:
        ValueError: If it is damaged, contains pickled objects, or has another format.
    """
    check_file(path)
    ending = path.suffix.lower()
    if ending in (".npz", ".npy"):
        return _load_numpy(path)
    if ending == ".safetensors":
        return _load_safetensors(path)
    if ending not in (".pt", ".pth", ".ckpt", ".bin"):
        raise UserError(f"{path}: arrays are read from .npz, .npy, .pt, .pth and .safetensors files.")
    content = load_torch(path, weights_only, checked=True)
    if isinstance(content, Tensor | np.ndarray):
        return {"": content}
    if not isinstance(content, Mapping):
        raise UserError(
            f"{path} must contain a mapping of tensors, got a {type(content).__name__}: save {{'features': h, "
            "'labels': y}."
        )
    return {str(name): value for name, value in content.items()}


def _load_numpy(path: Path) -> Mapping[str, Any]:
    content = _read_numpy(path, lambda: np.load(path, allow_pickle=False))
    return {"": content} if isinstance(content, np.ndarray) else _Archive(path, content)


class _Archive(Mapping[str, Any]):
    """Arrays of a ``.npz`` file. Each is read when it is used, because others may contain objects."""

    def __init__(self, path: Path, content: Any) -> None:
        self._path, self._content = path, content

    def __getitem__(self, name: str) -> Any:
        return _read_numpy(self._path, lambda: self._content[name])

    def __contains__(self, name: object) -> bool:
        return name in self._content.files

    def __iter__(self) -> Iterator[str]:
        return iter(self._content.files)

    def __len__(self) -> int:
        return len(self._content.files)


def _read_numpy(path: Path, read: Callable[[], Any]) -> Any:
    """Call a function that reads a numpy file, and convert its errors for the user."""
    try:
        return read()
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, SyntaxError) as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} contains pickled objects, which can run any code: save arrays of numbers, such as "
                "labels.astype(int), and pad lists of arrays with different lengths first."
            ) from error
        raise UserError(f"{path} is damaged or cut off: save it again.") from error


def _load_safetensors(path: Path) -> dict[str, Any]:
    """Load the arrays of a safetensors file."""
    try:
        from safetensors import SafetensorError  # noqa: PLC0415
        from safetensors.torch import load_file  # noqa: PLC0415
    except ImportError as error:
        raise UserError(f"{path}: reading it needs safetensors: pip install safetensors.") from error
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off: save it again.") from error
