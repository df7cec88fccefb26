"""Saved features and checkpoints, measured in order of their steps: ``python -m nclightning measure``.

A :class:`nclightning.series.source.Source` is one of them. The runner knows no more of it: not where its features come
from.
"""
