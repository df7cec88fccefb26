"""The paper's four figures from one command."""

from nclightning.reproduction.reproduce import reproduce

__all__ = ["reproduce"]
