"""What ``python -m nclightning`` can do, each command in a module that is imported when the command is run.

The libraries that one command needs take longer to load than most others take to run.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

__all__ = ["COMMANDS", "TRAINING", "run_training"]


def _of(module: str, function: str) -> Callable[[Any], None]:
    def run(words: Any) -> None:
        """Import the command, and run it with these words."""
        getattr(import_module(f"nclightning.{module}"), function)(words)

    return run


# These train nothing themselves; they are called with the words behind their names.
COMMANDS = {
    "measure": _of("series.command", "measure_files"),
    "reproduce": _of("commands.reproduce", "reproduce_figures"),
    "plot": _of("commands.plot", "plot_runs"),
    "theory": _of("commands.theory", "print_theory"),
}
# One parser of Lightning takes all words, or None for those of the process.
TRAINING = ("fit", "validate", "test")
run_training = _of("commands.training", "run_training")
