"""The file layer. Every file or folder that the package writes, renames, deletes or locks goes through here.

A crash, a killed process or a full disk leaves the earlier files intact. An operation that fails raises
:class:`WriteError`, which names the file.
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
