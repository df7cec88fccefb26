"""Public names of a package that are imported when they are first asked for.

Lightning, torchmetrics and matplotlib take as long to import as torch. Whoever needs one light name of a package, such
as a table of the theory or the measures of arrays, does not wait for what the others need.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Make ``__getattr__`` and ``__dir__`` of a package (PEP 562).

    Type checkers do not run it: the package also imports the same names under ``TYPE_CHECKING``.

    Args:
        package: Its ``__name__``.
        names: Public names by the module below the package that has them.

    Returns:
        Both functions. The modules of the package can be asked for, too.
    """
    homes = {name: f"{package}.{module}" for module, public in names.items() for name in public}

    def get(name: str) -> Any:
        if name in homes:
            value = getattr(import_module(homes[name]), name)
            setattr(sys.modules[package], name, value)
            return value
        if name.isidentifier() and not name.startswith("_") and find_spec(f"{package}.{name}") is not None:
            return import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def list_names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, list_names
