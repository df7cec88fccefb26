"""Lazy import of a package's public names.

Lightning, torchmetrics and matplotlib take as long to import as torch. With lazy names, users of a light part of the
package, such as the theory or the measures of arrays, do not wait for the imports of the other parts.
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
    """Return ``__getattr__`` and ``__dir__`` for a package (PEP 562).

    Type checkers do not run this function. The package must therefore also import the names under ``TYPE_CHECKING``.

    Args:
        package: The ``__name__`` of the package.
        names: For each submodule, its public names.

    Returns:
        Both functions. Submodules of the package are imported at first access, too.
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
