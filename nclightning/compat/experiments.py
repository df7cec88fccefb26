"""Undocumented names of Lightning's experiment loggers."""

from __future__ import annotations

from typing import Any

__all__ = ["batch_options", "prefixed"]


def prefixed(logger: Any, tag: str) -> str:
    """Return a tag as a logger writes it.

    Non-public: ``Logger._prefix`` of Lightning's loggers (lightning 2.6); the character after it is public. Without it
    pictures of a logger with ``prefix=`` would be grouped separately from its curves.

    Args:
        logger: Any logger.
        tag: The tag.
    """
    prefix = getattr(logger, "_prefix", None)
    if not (isinstance(prefix, str) and prefix):
        return tag
    return f"{prefix}{getattr(logger, 'LOGGER_JOIN_CHAR', '-')}{tag}"


def batch_options(logger: Any) -> dict[str, Any]:
    """Return what an ``MLFlowLogger`` passes to each ``log_batch``.

    Non-public: ``MLFlowLogger._log_batch_kwargs`` (lightning 2.6). Without it the user's ``synchronous=`` would be
    lost.

    Args:
        logger: The logger.
    """
    return dict(getattr(logger, "_log_batch_kwargs", {}))
