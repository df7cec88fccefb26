"""Errors of other libraries about the user's options: of clients of experiment loggers, and of constructors."""

from __future__ import annotations

import re

__all__ = ["client_error", "constructor_error"]

# Their errors, for example about an address or a login, are about the user's configuration.
_CLIENTS = ("aim", "comet_ml", "mlflow", "neptune", "wandb")
_NONE_FITS = (
    "Does not validate against any of the Union subtypes"  # The message of jsonargparse, which drops the error itself.
)
_SAID = re.compile(r"^  - (?!Expected an? |Not a valid |Problem with )(.+)$", re.MULTILINE)
_CLASS = re.compile(r"class_path='([^']+)'")


def client_error(error: BaseException | None) -> str | None:
    """Return a message if the client of an experiment logger raised an error or one of its causes; else None.

    Args:
        error: The error.
    """
    while error is not None:
        client = type(error).__module__.partition(".")[0]
        if client in _CLIENTS:
            return f"the logger's client {client} says: {error}"
        error = error.__cause__ or error.__context__
    return None


def constructor_error(error: BaseException) -> str | None:
    """Return a message if the constructor of a class in a list, such as one of several loggers, raised an error.

    Args:
        error: An error of jsonargparse, which reports it among other types that do not fit either.

    Returns:
        The message; None if it is another error.
    """
    text = str(error)
    said = _SAID.findall(text) if _NONE_FITS in text else []
    if not said:
        return None
    # Objects are constructed in order, so the first class that is still a name is the one that failed.
    waiting = _CLASS.search(text.rpartition("Given value: ")[2])
    return f"{waiting[1].rpartition('.')[2]}: {said[0]}" if waiting else str(said[0])
