"""``python -m nclightning report``: one HTML page about runs and measurements."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from nclightning.command_parser import command_parser
from nclightning.report import write_report

__all__ = ["report_runs"]


def report_runs(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: Arguments that follow ``report``.

    Raises:
        ValueError: If a run cannot be read, or the page cannot be written.
    """
    parser = command_parser(
        "report",
        "Write one HTML page about runs, which opens without a network: verdicts in words with the rule behind each, "
        "interactive curves, rates measured and predicted, settings and versions.",
        "examples:\n  python -m nclightning report lightning_logs/version_0\n"
        "  python -m nclightning report lightning_logs/version_* --out comparison.html\n"
        "  python -m nclightning report measurement.json",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run folders, also those of Lightning's loggers and of 'measure'; or JSON of nclightning.measure",
    )
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page (default: report.html)")
    parser.add_argument("--overwrite", action="store_true", help="also if FILE is there and is no report")
    given = parser.parse_args(words)
    path = write_report(given.runs, given.out, overwrite=given.overwrite)
    Console().print(f"wrote {path}", highlight=False, soft_wrap=True, markup=False)
