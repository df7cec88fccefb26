"""Measurement of a network in plain PyTorch: find its head, collect its features in an evaluation pass, measure.

An *evaluation pass*, in short a *sweep*, runs a model over a data set to collect features. It leaves no trace: weights,
buffers, modes, hooks and random states are the same before and after it. :mod:`nclightning.probe.sweep` makes them.
"""
