"""Run the command line: ``python -m nclightning``."""

from nclightning.interrupts import follow_launcher

if __name__ == "__main__":
    follow_launcher()  # Before the imports that take seconds.
    from nclightning.cli import main

    main()
