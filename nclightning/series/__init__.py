"""Measurement of a series of saved features or checkpoints: ``python -m nclightning measure``.

A :class:`nclightning.series.source.Source` is one state of the series. The runner uses only this interface, so that it
treats all kinds of files alike.
"""
