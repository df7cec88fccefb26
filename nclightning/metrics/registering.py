"""Registration of a user's own measures."""

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
    :class:`nclightning.functional.ClassStatistics` of all samples, and ``weight`` and ``bias`` of the head. Single
    samples are not available. The registration is valid in the current process; processes that start later must import
    a module that registers the measure. A name may be registered again, for example when a notebook cell runs twice.
    Names of the package cannot be replaced.

    Args:
        name: An identifier. The monitors log the measure as ``nc/train/<name>``.
        text: The meaning of the value in a few words, for tables.
        at_collapse: Its value at neural collapse, or a function ``(num_classes, feature_dim) -> value``; None if it is
            not known.
        needs_head: Whether it needs ``weight`` or ``bias``. Then it is left out if there is no head.
        needs_scatter: Whether it needs the within-class scatter, which takes memory for d x d numbers.
        needs_classes: Whether labels must be classes. Then it is left out where labels number groups of samples.

    Returns:
        The decorator, which returns the function unchanged.

    Raises:
        ValueError: If the name is not an identifier, or is one of the package's.
        TypeError: When the measure is evaluated, if the function does not return one number.

    Example:
        >>> from nclightning import measure
        >>> from nclightning.metrics import MEASURES, register_measure
        >>> from nclightning.quantities import QUANTITIES
        >>> @register_measure("mean_size", "root mean square of the centred class means")
        ... def mean_size(given):
        ...     means, present = given.means
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
        def evaluate(given: MeasureInput) -> Tensor:
            value = read(given)
            if not isinstance(value, int | float | Tensor) or (isinstance(value, Tensor) and value.numel() != 1):
                got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise UserTypeError(f"the function of the measure {name!r} must return one number, got {got}.")
            return torch.as_tensor(value).to(given.stats.means).reshape(())

        QUANTITIES[quantity.tag()] = quantity
        MEASURES[name] = Measure(evaluate, needs_head, needs_scatter, needs_classes)
        return read

    return register
