"""Which floor each unit of the package is on: a file imports only from floors below its own."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nclightning"


FLOORS = {
    "compat": -3,
    "lazy": -3,
    "errors": -2,
    "overrides": -2,
    "quantities": -2,
    "sharding": -1,
    "problems": -1,
    "sending": 0,
    "pictures": 1,
    "objective": 0.5,
    "heads": 0,
    "ranks": 0,
    "theory": 0,
    "functional": 0,
    "optim": 1,
    "metrics": 1,
    "probe": 2,
    "arguments": 3,
    "files": 1,
    "table": 3,
    "interrupts": 3,
    "configurations": 4,
    "models": 4,
    "data": 4,
    "loggers": 4,
    "folders": 5,
    "resuming": 6,
    "saved_config": 6,
    "callbacks": 6,
    "integrations": 6,
    "environment": 0,
    "figures": 7,
    "report": 8,
    "reproduction": 8,
    "summaries": 8,
    "closing": 9,
    "library_errors": 7,
    "wording": 8,
    "parsing": 9,
    "command_parser": 9,
    "problem_options": 10,
    "mistakes": 9,
    "series": 10,
    "commands": 11,
    "cli": 12,
    "__main__": 13,
}


# Pairs that share no code although their floors would allow it.
STRANGERS = {
    ("theory", "functional"), ("functional", "theory"), ("theory", "objective"), ("functional", "objective"),
    ("problems", "functional"), ("functional", "problems"), ("problems", "objective"),
    ("callbacks", "models"), ("callbacks", "data"),
    *(("integrations", other) for other in ("callbacks", "loggers", "data", "models")),
}  # fmt: skip
