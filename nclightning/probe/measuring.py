"""The front door: neural collapse of a network on data, or of arrays, in one call."""

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
    need_scatter,
    read_measures,
    reading_of,
)
from nclightning.metrics.decided import Decisions, count_decisions, totals_of
from nclightning.metrics.measures import MEASURES
from nclightning.probe.arrays import Arrays, arrays
from nclightning.probe.building import Conventions, build
from nclightning.probe.collectors import Measuring
from nclightning.probe.detection import HeadArgument
from nclightning.probe.given import readable
from nclightning.probe.probing import Probe, in_order
from nclightning.probe.reader import BatchFn, ForwardFn
from nclightning.probe.results import Measurement
from nclightning.quantities import DEFAULT_MEASURES

__all__ = ["measure"]

_ROWS_AT_A_TIME = 2**13
_OF_ARRAYS = ("features", "labels", "weight", "bias")
_OF_MODELS = ("model", "data", "head", "layers", "batch_fn", "forward_fn", "device")


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
    """Measure neural collapse of a network on a data set, or of features that are at hand.

    ``measure(model, data)`` makes one evaluation pass: the model frozen in eval mode, its head found by itself, each
    sample once. Weights, buffers, modes, hooks and random states are afterwards as before, bit for bit, or an error
    says what is not. ``measure(features=..., labels=..., weight=..., bias=...)`` takes arrays of torch or numpy, or
    lists. Both agree with :class:`nclightning.metrics.NeuralCollapse` and
    :class:`nclightning.callbacks.NeuralCollapseMonitor`.

    Args:
        model: Any module. It is not moved; its forward runs in the precision that surrounds the call, such as
            ``torch.autocast``. Of ``DataParallel``, ``DistributedDataParallel`` and compiled models it is the model
            inside that runs, and that ``head``, ``layers`` and ``forward_fn`` see.
        data: A ``DataLoader`` or any iterable of batches. Of a loader all samples that it can yield are read, in
            order, without shuffling and dropped batches (:func:`nclightning.probe.sweep.sequential_loader`). An
            iterator, such as a generator, is used up. Where torch.distributed runs, all processes must call, share
            the samples out, and get the same result.
        measures: Names out of :data:`nclightning.metrics.MEASURES`, and ``ncc_accuracy``, ``ncc_mismatch``,
            ``accuracy``, ``cosine_margin``, which take a second pass; ``("all",)`` for all. None takes ``nc1``,
            ``nc2`` and ``nc3``; of arrays without a weight those of them that need none.
        head: The last layer: its dotted name, the module itself, or a function ``(model) -> (weight, bias)``. None
            finds the layer whose output is seen to be the model's output, or what that follows from.
        layers: Dotted names of further modules to measure; these take a second pass, too.
        layer_pooling: ``"mean"`` averages maps ``(B, C, H, W)`` over space and sequences ``(B, T, d)`` over positions,
            ``"flatten"`` takes all entries.
        batch_fn: Splits a batch into model input and labels. None takes pairs ``(x, y)`` and mappings with the labels
            under ``labels``, ``label``, ``y``, ``target`` or ``targets``.
        forward_fn: Runs the model on the inputs of a batch, ``(model, inputs) -> output``. None calls the model.
        device: Where batches go. None takes that of the model's first parameter.
        ignore_index: Label of samples to leave out.
        global_mean: Convention of NC1 on unbalanced data: mean of ``"class"`` means or of ``"sample"``.
        between_weights: The same: ``"uniform"`` or ``"count"``.
        features: ``(N, d)`` of any floating type; or ``(B, T, d)`` with labels ``(B, T)``.
        labels: ``(N,)`` integers of any type, ``0..K-1``.
        weight: Of the head, ``(K, d)`` as in ``nn.Linear(d, K)``. None leaves out what needs it.
        bias: Of the head, ``(K,)``, or None.

    Returns:
        The values by name, with tables and pictures of them.

    Raises:
        ValueError: In one sentence with the repair: if the head cannot be found, or shapes or labels do not fit.
        TypeError: The same for objects of the wrong kind.

    Example:
        >>> found = measure(features=[[2.1, 0.0], [1.9, 0.0], [-2.0, 0.0]], labels=[0, 0, 1])
        >>> round(found["nc1"], 6)
        0.000833
    """
    of_arrays = [
        name for name, value in zip(_OF_ARRAYS, (features, labels, weight, bias), strict=True) if value is not None
    ]
    options = (model, data, head, layers or None, batch_fn, forward_fn, device)
    of_model = [name for name, value in zip(_OF_MODELS, options, strict=True) if value is not None]
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
    rows, labels, num_classes, head = given
    of_statistics, of_decisions, left_out = measuring.of_statistics, measuring.of_decisions, tuple[str, ...]()
    if head is None:
        wanted = (*(DEFAULT_MEASURES if of_statistics is None else of_statistics), *of_decisions)
        left_out = tuple(
            name for name in wanted if (MEASURES[name].needs_head if name in MEASURES else name != "ncc_accuracy")
        )
        if left_out and measures is not None and tuple(measures) != ("all",):
            raise UserError(f"measures {list(left_out)} read the head: pass weight=, or leave them out.")
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
        values = read_measures(chosen, reading_of(stats, head, *conventions))
        if of_decisions:
            pieces = zip(torch.split(rows, _ROWS_AT_A_TIME), torch.split(labels, _ROWS_AT_A_TIME), strict=True)
            counted = [count_decisions(some, own, stats, head, ignore_index) for some, own in pieces]
            decided = reduce(Decisions.merge, counted)
            totals, samples = totals_of(decided), decided.samples
            values |= {name: totals[name].sum() / samples.sum() for name in of_decisions}
            of_classes[""] = {name: totals[name] / samples for name in of_decisions}
    return build({"": stats}, in_order(values, measures), of_classes, head, conventions, start, left_out)
