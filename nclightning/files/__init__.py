"""The file layer: all that the package writes, renames, deletes, makes, brings to disk or locks goes through here.

A crash, a kill or a full disk leaves what was there before. What the disk refuses is a :class:`WriteError`, which names
the file.
"""

from nclightning.files.checkpoints import check_checkpoint, is_sound, save_checkpoint
from nclightning.files.locks import FolderLock
from nclightning.files.operations import (
    Operation,
    WriteError,
    append,
    create,
    delete,
    delete_folder,
    keep_as,
    make_folder,
    observers,
    replaced,
    sync,
)

__all__ = [
    "FolderLock",
    "Operation",
    "WriteError",
    "append",
    "check_checkpoint",
    "create",
    "delete",
    "delete_folder",
    "is_sound",
    "keep_as",
    "make_folder",
    "observers",
    "replaced",
    "save_checkpoint",
    "sync",
]
