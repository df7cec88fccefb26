"""Measures that a user adds to those of the package."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nclightning.errors import UserError, UserTypeError
from nclightning.metrics.measures import MEASURES, Measure, MeasureInput
from nclightning.quantities import NC, NC1, QUANTITIES, Collapsed, Quantity

__all__ = ["register_measure"]

_PACKAGE_TAGS = frozenset(QUANTITIES)

Read = Callable[[MeasureInput], Tensor | float]


def register_measure(
    name: str,
    text: str,
    *,
    at_collapse: Collapsed = None,
    needs_head: bool = False,
    needs_scatter: bool = False,
    needs_classes: bool = True,
) -> Callable[[Read], Read]:
    """Add a measure, as a decorator of the function that evaluates it.

    From then on ``measures=(name,)`` and ``measures=("all",)`` evaluate it wherever measures are chosen by name:
    :func:`nclightning.measure`, :class:`nclightning.Probe`, :class:`nclightning.metrics.NeuralCollapse` and the
    monitors. The function gets a :class:`nclightning.metrics.measures.MeasureInput`: ``stats``, the
    :class:`nclightning.functional.ClassStatistics` of all samples, ``weight`` and ``bias`` of the head. It never sees
    single samples. Each process registers for itself: where processes are started anew, register in a module that they
    import. A name may be registered again, as when a cell of a notebook runs twice; names of the package may not.

    Args:
        name: An identifier; the monitors log ``nc/train/<name>``.
        text: What the value tells, in a few words, for tables.
        at_collapse: Its value at neural collapse, or a function ``(num_classes, feature_dim) -> value``; None if it is
            not known.
        needs_head: Whether it reads ``weight`` or ``bias``. Without a head it is then left out.
        needs_scatter: Whether it reads the within-class covariance, which takes memory of d x d numbers.
        needs_classes: Whether it takes labels for classes. It is then left out where labels say groups of samples.

    Returns:
        The decorator; the function itself stays as it is.

    Raises:
        ValueError: If the name is no identifier or one of the package's.
        TypeError: When it is evaluated, if the function gives anything but one number.

    Example:
        >>> from nclightning import measure
        >>> from nclightning.metrics import MEASURES, register_measure
        >>> from nclightning.quantities import QUANTITIES
        >>> @register_measure("mean_size", "root mean square of the centred class means")
        ... def mean_size(reading):
        ...     means, present = reading.means
        ...     return (means.square().sum() / present.sum()).sqrt()
        >>> measure(features=[[3.0], [3.0], [-3.0]], labels=[0, 0, 1], measures=["mean_size"])["mean_size"]
        3.0
        >>> del MEASURES["mean_size"], QUANTITIES["nc/mean_size"]  # forget it again
    """
    if not name.isidentifier():
        raise UserError(f"name must be an identifier such as 'effective_rank', got {name!r}.")
    quantity = Quantity(name, NC, text, collapsed=at_collapse, chart=NC1.chart, maker="measure")
    if quantity.tag() in _PACKAGE_TAGS:
        raise UserError(f"name={name!r} is a measure of the package; choose another name.")

    def register(read: Read) -> Read:
        def evaluate(reading: MeasureInput) -> Tensor:
            value = read(reading)
            if not isinstance(value, int | float | Tensor) or (isinstance(value, Tensor) and value.numel() != 1):
                got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise UserTypeError(f"the function of the measure {name!r} must return one number, got {got}.")
            return torch.as_tensor(value).to(reading.stats.means).reshape(())

        QUANTITIES[quantity.tag()] = quantity
        MEASURES[name] = Measure(evaluate, needs_head, needs_scatter, needs_classes)
        return read

    return register
