"""Tests mirror the package."""

import gc

gc.disable()  # A third of the time of the imports of all tests. conftest.py enables it again.
