"""The commands of ``python -m nclightning``. The module of a command is imported only when the command runs.

The libraries that one command needs take longer to import than most other commands take to run.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

__all__ = ["COMMANDS", "TRAINING", "run_training"]


def _of(module: str, function: str) -> Callable[[Any], None]:
    def run(words: Any) -> None:
        """Import the command and run it with these arguments."""
        with _without_garbage_collection():
            command = getattr(import_module(f"nclightning.{module}"), function)
        command(words)

    return run


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Import without garbage collection, which takes a fifth of the time of an import and frees hardly anything.

    In a process that runs nothing but the command, the imported objects are also frozen: later collections skip them.
    In the process of another program they are not, because frozen objects are never freed.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        program = getattr(sys.modules["__main__"], "__spec__", None)
        if program is not None and program.name == "nclightning.__main__":
            gc.freeze()
        if was_enabled:
            gc.enable()


# Commands that do not train. They are called with the arguments that follow their names.
COMMANDS = {
    "measure": _of("series.command", "measure_files"),
    "reproduce": _of("commands.reproduce", "reproduce_figures"),
    "plot": _of("commands.plot", "plot_runs"),
    "report": _of("commands.report", "report_runs"),
    "theory": _of("commands.theory", "print_theory"),
}
# Commands of Lightning. They share one parser, which takes all arguments; None stands for those of the process.
TRAINING = ("fit", "validate", "test")
run_training = _of("commands.training", "run_training")
