"""Run the command line: ``python -m nclightning``."""

import sys

from nclightning.interrupts import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # Before the imports that take seconds.
    if sys.argv[1:2] == ["measure"]:  # Of saved features, without Lightning.
        from nclightning.mistakes import mistakes_worded

        with mistakes_worded():
            from nclightning.series.command import measure_files

            measure_files(sys.argv[2:])
    else:
        from nclightning.cli import main

        main()
