"""Hooks that still run if a subclass overrides them without calling ``super``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

__all__ = ["ProtectedHooks", "protected"]

Hook = TypeVar("Hook", bound=Callable[..., Any])


def protected(hook: Hook) -> Hook:
    """Mark a hook of a :class:`ProtectedHooks` class: it runs even if an override does not call ``super``."""

    @wraps(hook)
    def run(self: ProtectedHooks, *args: Any, **options: Any) -> Any:
        self.hooks_run().add(hook.__name__)
        return hook(self, *args, **options)

    run.is_protected = True  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


class ProtectedHooks:
    """Base class for classes whose hooks must run, because a resumed run needs what they do.

    Lightning's own hooks do nothing, so that users often override them without calling ``super``.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in cls.__mro__[1:]:
            for name, hook in vars(base).items():
                if getattr(hook, "is_protected", False) and not hasattr(override := getattr(cls, name), "is_protected"):
                    setattr(cls, name, _with(override, hook, name))

    def hooks_run(self) -> set[str]:
        """Return the names of protected hooks that have run since their overrides were called."""
        names: set[str] = vars(self).setdefault("names_of_hooks_run", set())
        return names


def _with(override: Callable[..., Any], hook: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return an override after which the hook is called, unless the override has called it."""

    @wraps(override)
    def run(self: ProtectedHooks, *args: Any, **options: Any) -> Any:
        self.hooks_run().discard(name)
        result = override(self, *args, **options)
        if name not in self.hooks_run():
            hook(self, *args, **options)
        return result

    run.is_protected = True  # type: ignore[attr-defined]
    return run
