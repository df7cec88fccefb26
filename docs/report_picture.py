"""Draw the picture of docs/report.md: ``python docs/report_picture.py`` (needs chromium)."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from nclightning.cli import main
from nclightning.report import write_report

PICTURE = Path(__file__).resolve().parent / "images" / "report.png"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--window-size=1200,960")


def draw() -> None:
    """Fit ``ufm_ce``, and take a picture of the upper part of its report."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        main(["fit", "--config", "ufm_ce", "--trainer.enable_progress_bar", "false"])
        page = write_report("lightning_logs/version_0").resolve()
        chromium = shutil.which("chromium") or "chromium"
        command = [chromium, *FLAGS, "--virtual-time-budget=8000", f"--screenshot={PICTURE}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)
        os.chdir(PICTURE.parent)


if __name__ == "__main__":
    draw()
