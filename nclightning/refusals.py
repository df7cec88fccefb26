"""What others refuse to do with options of the user: clients of experiment loggers, and constructors in a list."""

from __future__ import annotations

import re

__all__ = ["of_a_client", "of_a_list"]

# What they refuse, such as an address or a login, was configured by the user.
_CLIENTS = ("aim", "comet_ml", "mlflow", "neptune", "wandb")
_NONE_FITS = "Does not validate against any of the Union subtypes"  # Of jsonargparse, which drops the error itself.
_SAID = re.compile(r"^  - (?!Expected an? |Not a valid |Problem with )(.+)$", re.MULTILINE)
_CLASS = re.compile(r"class_path='([^']+)'")


def of_a_client(error: BaseException | None) -> str | None:
    """Say what the client of an experiment logger refused.

    Args:
        error: What was raised.

    Returns:
        None if no client raised it or one of its causes.
    """
    while error is not None:
        client = type(error).__module__.partition(".")[0]
        if client in _CLIENTS:
            return f"the logger's client {client} says: {error}"
        error = error.__cause__ or error.__context__
    return None


def of_a_list(error: BaseException) -> str | None:
    """Say what a constructor refused whose class stands in a list, such as one of several loggers.

    Args:
        error: Of jsonargparse, which tells of it among other types that do not fit either.

    Returns:
        None if it is another error.
    """
    text = str(error)
    said = _SAID.findall(text) if _NONE_FITS in text else []
    if not said:
        return None
    # Objects before it were made: the first class that is still a name is the one that refused.
    waiting = _CLASS.search(text.rpartition("Given value: ")[2])
    return f"{waiting[1].rpartition('.')[2]}: {said[0]}" if waiting else str(said[0])
