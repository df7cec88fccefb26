"""Run the command line: ``python -m nclightning``."""

from nclightning.cli import main
from nclightning.interrupts import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # Before the imports that take seconds.
    main()
