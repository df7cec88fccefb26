"""Draw the picture of docs/report.md: ``python docs/report_picture.py`` (needs chromium)."""

import shutil
import subprocess
import tempfile
from pathlib import Path

from nclightning.cli import main
from nclightning.report import write_report

PICTURE = Path(__file__).resolve().parent / "images" / "report.png"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--window-size=1200,1020")


def draw() -> None:
    """Fit ``ufm_ce``, and take a picture of the upper part of its report."""
    with tempfile.TemporaryDirectory() as folder:
        words = ("--trainer.logger.init_args.save_dir", folder, "--trainer.enable_progress_bar", "false")
        main(["fit", "--config", "ufm_ce", *words])
        page = write_report(Path(folder) / "lightning_logs" / "version_0", Path(folder) / "report.html")
        chromium = shutil.which("chromium") or "chromium"
        command = [chromium, *FLAGS, "--virtual-time-budget=8000", f"--screenshot={PICTURE}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


if __name__ == "__main__":
    draw()
