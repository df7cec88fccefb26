"""Hooks that subclasses add to, and cannot lose."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

__all__ = ["KeptHooks", "kept"]

Hook = TypeVar("Hook", bound=Callable[..., Any])


def kept(hook: Hook) -> Hook:
    """Mark a hook of a class made from :class:`KeptHooks`: it runs even where an override does not call ``super``."""

    @wraps(hook)
    def run(self: KeptHooks, *args: Any, **options: Any) -> Any:
        self.hooks_run().add(hook.__name__)
        return hook(self, *args, **options)

    run.is_kept = True  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


class KeptHooks:
    """Base of classes whose hooks keep what a resumed run needs.

    Lightning's own hooks do nothing, so that it is common to override them without ``super``.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in cls.__mro__[1:]:
            for name, hook in vars(base).items():
                if getattr(hook, "is_kept", False) and not hasattr(override := getattr(cls, name), "is_kept"):
                    setattr(cls, name, _with(override, hook, name))

    def hooks_run(self) -> set[str]:
        """Return the names of kept hooks that have run since their overrides began."""
        names: set[str] = vars(self).setdefault("names_of_hooks_run", set())
        return names


def _with(override: Callable[..., Any], hook: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Let a hook run after its override, unless that has called it."""

    @wraps(override)
    def run(self: KeptHooks, *args: Any, **options: Any) -> Any:
        self.hooks_run().discard(name)
        result = override(self, *args, **options)
        if name not in self.hooks_run():
            hook(self, *args, **options)
        return result

    run.is_kept = True  # type: ignore[attr-defined]
    return run
