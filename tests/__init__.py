"""Tests mirror the package."""

import gc

gc.disable()  # While all is imported, of which searches for garbage would take a third; conftest.py enables them again.
