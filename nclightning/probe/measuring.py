"""``nclightning.measure``: neural collapse of a network on data, or of arrays, in one call."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import nn

from nclightning.errors import UserError
from nclightning.functional import class_statistics
from nclightning.functional.linear import autocast_off
from nclightning.functional.statistics import BetweenWeights, GlobalMean
from nclightning.metrics.choice import (
    check_conventions,
    choose_measures,
    evaluate_measures,
    measure_input,
    need_scatter,
)
from nclightning.metrics.decided import Decisions, count_decisions, totals_of
from nclightning.metrics.measures import MEASURES
from nclightning.probe.arrays import Arrays, arrays
from nclightning.probe.building import Conventions, build
from nclightning.probe.collectors import Measuring
from nclightning.probe.detection import HeadArgument
from nclightning.probe.probing import Probe, in_order
from nclightning.probe.reader import BatchFn, ForwardFn
from nclightning.probe.results import Measurement
from nclightning.probe.validation import readable
from nclightning.quantities import DEFAULT_MEASURES

__all__ = ["measure"]

_ROWS_AT_A_TIME = 2**13
_ARRAY_ARGUMENTS = ("features", "labels", "weight", "bias")
_MODEL_ARGUMENTS = ("model", "data", "head", "layers", "batch_fn", "forward_fn", "device")


def measure(
    model: nn.Module | None = None,
    data: Iterable[Any] | None = None,
    *,
    measures: Sequence[str] | None = None,
    head: HeadArgument = None,
    layers: Sequence[str] = (),
    layer_pooling: Literal["mean", "flatten"] = "mean",
    batch_fn: BatchFn | None = None,
    forward_fn: ForwardFn | None = None,
    device: torch.device | str | None = None,
    ignore_index: int | None = -100,
    global_mean: GlobalMean = "class",
    between_weights: BetweenWeights = "uniform",
    features: Any = None,
    labels: Any = None,
    weight: Any = None,
    bias: Any = None,
) -> Measurement:
    """Measure neural collapse of a network on a data set, or of given features.

    ``measure(model, data)`` makes one evaluation pass: the frozen model runs in eval mode over each sample once, and
    its head is detected. Afterwards weights, buffers, modes, hooks and random states are bit for bit as before; if
    something could not be restored, an error names it. ``measure(features=..., labels=..., weight=..., bias=...)``
    takes torch tensors, numpy arrays or lists. Both agree with :class:`nclightning.metrics.NeuralCollapse` and
    :class:`nclightning.callbacks.NeuralCollapseMonitor`. Statistics are accumulated in float64.

    Args:
        model: Any module. It is not moved, and runs in the precision that surrounds the call, such as
            ``torch.autocast``. For ``DataParallel``, ``DistributedDataParallel`` and compiled models, the model inside
            is run, and ``head``, ``layers`` and ``forward_fn`` refer to it.
        data: A ``DataLoader`` or any iterable of batches. A loader is read without shuffling and dropped batches: every
            sample that it can yield, in order. An iterator, such as
            a generator, is consumed. With torch.distributed, all processes must call; each takes its share of the
            samples, and all get the same result.
        measures: Names from :data:`nclightning.metrics.MEASURES`, and ``ncc_accuracy``, ``ncc_mismatch``,
            ``accuracy``, ``cosine_margin``, which need a second pass; ``("all",)`` for all. None is ``nc1``, ``nc2``
            and ``nc3``, without those that need a weight if arrays are given without one.
        head: The last layer: its dotted name, the module itself, or a function ``(model) -> (weight, bias)``. None
            detects the layer that is seen to return the model's output, or logits from which it follows.
        layers: Dotted names of further modules to measure. They need a second pass, too.
        layer_pooling: ``"mean"`` averages maps ``(B, C, H, W)`` over space and sequences ``(B, T, d)`` over positions,
            ``"flatten"`` keeps all entries.
        batch_fn: Function that splits a batch into model input and labels. None accepts pairs ``(x, y)``, and mappings
            with the labels under ``labels``, ``label``, ``y``, ``target`` or ``targets``.
        forward_fn: Function that runs the model on the inputs of a batch, ``(model, inputs) -> output``. None calls the
            model.
        device: Device of the batches. None is that of the model's first parameter.
        ignore_index: Label of samples to leave out.
        global_mean: Convention of NC1 on unbalanced data: the global mean is that of the ``"class"`` means, or that of
            the samples (``"sample"``).
        between_weights: Convention of NC1 on unbalanced data: classes have ``"uniform"`` weights, or their ``"count"``.
        features: ``(N, d)`` of any floating dtype; or ``(B, T, d)`` with labels ``(B, T)``.
        labels: ``(N,)`` integers of any dtype, ``0..K-1``.
        weight: Weight of the head, ``(K, d)`` as in ``nn.Linear(d, K)``. None leaves out measures that need it.
        bias: Bias of the head, ``(K,)``, or None.

    Returns:
        A mapping of values by name, which also has tables and a picture.

    Raises:
        ValueError: If the head cannot be found, or shapes or labels do not fit. The message has the repair.
        TypeError: If an argument has the wrong type. The message has the repair.

    Example:
        >>> import nclightning
        >>> found = nclightning.measure(features=[[2.1, 0.0], [1.9, 0.0], [-2.0, 0.0]], labels=[0, 0, 1])
        >>> round(found["nc1"], 6)
        0.000833
    """
    of_arrays = [
        name
        for name, value in zip(_ARRAY_ARGUMENTS, (features, labels, weight, bias), strict=True)
        if value is not None
    ]
    options = (model, data, head, layers or None, batch_fn, forward_fn, device)
    of_model = [name for name, value in zip(_MODEL_ARGUMENTS, options, strict=True) if value is not None]
    if of_arrays and of_model:
        raise UserError(
            f"{', '.join(of_arrays)} cannot go together with {', '.join(of_model)}: pass measure(model, data) with its "
            "options, or measure(features=..., labels=..., weight=..., bias=...)."
        )
    if of_arrays:
        start, conventions = time.perf_counter(), Conventions(global_mean, between_weights)
        measures = measures if measures is None or isinstance(measures, str) else tuple(measures)
        measuring = Measuring(measures, ignore_index, **conventions._asdict())
        given = arrays(features, labels, weight, bias, ignore_index)
        return _measure_arrays(given, measuring, measures, ignore_index, conventions, start)
    if isinstance(data, Mapping):
        readable(data)  # Raises: it is one batch.
    return Probe(
        model,  # type: ignore[arg-type]
        measures=measures,
        head=head,
        layers=layers,
        layer_pooling=layer_pooling,
        batch_fn=batch_fn,
        forward_fn=forward_fn,
        device=device,
        ignore_index=ignore_index,
        global_mean=global_mean,
        between_weights=between_weights,
    ).read(data)  # type: ignore[arg-type]


@torch.no_grad()
def _measure_arrays(
    given: Arrays,
    measuring: Measuring,
    measures: Sequence[str] | None,
    ignore_index: int | None,
    conventions: Conventions,
    start: float,
) -> Measurement:
    """Measure features that are given as arrays."""
    rows, labels, num_classes, head = given
    of_statistics, of_decisions = measuring.statistics_measures, measuring.decision_measures
    left_out = tuple[str, ...]()
    if head is None:
        wanted = (*(DEFAULT_MEASURES if of_statistics is None else of_statistics), *of_decisions)
        left_out = tuple(
            name for name in wanted if (MEASURES[name].needs_head if name in MEASURES else name != "ncc_accuracy")
        )
        if left_out and measures is not None and tuple(measures) != ("all",):
            raise UserError(f"measures {list(left_out)} need the head: pass weight=, or leave them out.")
        of_statistics = None if of_statistics is None else tuple(name for name in of_statistics if name not in left_out)
        of_decisions = tuple(name for name in of_decisions if name not in left_out)
    check_conventions(*conventions)
    head_rows = 0 if head is None else num_classes
    chosen = () if of_statistics == () else choose_measures(of_statistics, rows.shape[1], head_rows)
    stats = class_statistics(
        rows, labels, num_classes, scatter=need_scatter(chosen), ignore_index=ignore_index, copy=False
    )
    of_classes = {}
    with autocast_off(rows.device):
        values = evaluate_measures(chosen, measure_input(stats, head, *conventions))
        if of_decisions:
            pieces = zip(torch.split(rows, _ROWS_AT_A_TIME), torch.split(labels, _ROWS_AT_A_TIME), strict=True)
            counted = [count_decisions(some, own, stats, head, ignore_index) for some, own in pieces]
            decided = reduce(Decisions.merge, counted)
            totals, samples = totals_of(decided), decided.samples
            values |= {name: totals[name].sum() / samples.sum() for name in of_decisions}
            of_classes[""] = {name: totals[name] / samples for name in of_decisions}
    return build({"": stats}, in_order(values, measures), of_classes, head, conventions, start, left_out)
