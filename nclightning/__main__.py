"""``python -m nclightning``."""

from nclightning.cli import main

if __name__ == "__main__":
    main()
