"""Run the command line: ``python -m nclightning``."""

from nclightning.cli import main
from nclightning.interrupts import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # Before main, whose imports take seconds.
    main()
