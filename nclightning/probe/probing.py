"""Measuring a network in a loop of the user's own: between steps by evaluation passes, or in the steps themselves."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nclightning.compat.accelerate import origin_of
from nclightning.compat.fabric import loader_of_fabric
from nclightning.errors import UserError
from nclightning.functional.statistics import BetweenWeights, GlobalMean
from nclightning.probe.building import Conventions, build, build_unlabelled
from nclightning.probe.collectors import Measuring, orthogonality
from nclightning.probe.detection import HeadArgument
from nclightning.probe.given import check_samples, checked_model, names_of, plain_name, readable, unwrapped
from nclightning.probe.host import PlainHost
from nclightning.probe.online import OnlineEpoch
from nclightning.probe.reader import BatchFn, ForwardFn, PairReader
from nclightning.probe.results import Measurement
from nclightning.probe.sets import DataSet, DecisionsGatherer, StatisticsGatherer, gather_alone
from nclightning.probe.sweep import known_indices
from nclightning.quantities import NC5
from nclightning.ranks import alone as on_its_own
from nclightning.ranks import are_several, meet
from nclightning.sharding import is_sharded

__all__ = ["Probe"]


class Probe:
    """Measures neural collapse of a network while a loop of your own trains it.

    For plain PyTorch, Lightning Fabric and Hugging Face accelerate. :meth:`read` does at a step what
    :class:`nclightning.callbacks.NeuralCollapseMonitor` does at it, :meth:`online` what ``source="online"`` does in an
    epoch, to the same numbers. Neither leaves a trace: weights, buffers, modes, hooks and random states are afterwards
    as before, bit for bit, or an error says what is not.

    Args:
        model: Any module, wrapped as it trains or not: of ``fabric.setup(model)``, ``accelerator.prepare(model)``,
            ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile`` the model inside runs, in the precision
            of Fabric or accelerate.
        measures: As for :func:`nclightning.measure`, as are all that follow.
        head: The last layer.
        layers: Dotted names of further modules to measure.
        layer_pooling: ``"mean"`` or ``"flatten"``.
        batch_fn: Splits a batch into model input and labels.
        forward_fn: Runs the model on the inputs of a batch.
        device: Where batches go.
        ignore_index: Label of samples to leave out.
        global_mean: Convention of NC1 on unbalanced data.
        between_weights: The same.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If it is of the wrong kind.

    Example:
        >>> model, loader = nn.Sequential(nn.Linear(2, 2)), [(torch.eye(2).repeat(3, 1), torch.arange(2).repeat(3))]
        >>> probe = Probe(model, measures=("nc1",))
        >>> probe.read(loader).tagged("nc/train")
        {'nc/train/nc1': 0.0}
    """

    def __init__(
        self,
        model: nn.Module,
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
    ) -> None:
        self._conventions = Conventions(global_mean, between_weights)
        self._measures = measures if measures is None or isinstance(measures, str) else tuple(measures)
        self._measuring = Measuring(self._measures, ignore_index, **self._conventions._asdict())
        self._model, self._device = unwrapped(checked_model(model, device), head), device
        if layer_pooling not in ("mean", "flatten"):
            raise UserError(f"layer_pooling must be 'mean' or 'flatten', got {layer_pooling!r}.")
        module = self._model.module
        names = tuple(plain_name(name, module) for name in names_of(layers))
        self._reader = PairReader(plain_name(head, module), names, layer_pooling, batch_fn, forward_fn, ignore_index)
        self._open: list[OnlineEpoch] = []

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_open": []}  # No block that runs is one of a copy.

    def _host(self) -> PlainHost:
        """The model where it is now."""
        return PlainHost(checked_model(self._model.module, self._device), self._device, self._model.precision)

    # Between steps.

    @overload
    def read(
        self, data: Mapping[str, Iterable[Any]], *, ood: Sequence[str] = ..., alone: bool = ...
    ) -> dict[str, Measurement]: ...

    @overload
    def read(self, data: Iterable[Any], *, alone: bool = ...) -> Measurement: ...

    def read(
        self, data: Mapping[str, Iterable[Any]] | Iterable[Any], *, ood: Sequence[str] = (), alone: bool = False
    ) -> Measurement | dict[str, Measurement]:
        """Measure the network as it is now by an evaluation pass over data, or two.

        Of several data sets by name, such as ``{"train": ..., "val": ...}``, that under ``train`` is the training set:
        decisions (``ncc_accuracy``, ...) on all of them, and ``nc5``, are by its class means. A data set that is alone
        is decided by its own.

        Args:
            data: A ``DataLoader`` or any iterable of batches; or several by name.
            ood: Names of data sets out of distribution, of which ``nc5`` is measured and no label is looked at.
            alone: Whether this process measures for itself, as in ``if rank == 0:``. Else all processes of
                torch.distributed must call, share the samples out, and get the same result.

        Returns:
            The values by name, with tables and pictures of them; of several data sets a dictionary of such.

        Raises:
            ValueError: In one sentence with the repair: if the head cannot be found, labels do not fit, or only some
                of several processes came.
            TypeError: The same for objects of the wrong kind.
        """
        start = time.perf_counter()
        several = isinstance(data, Mapping) and not any(isinstance(each, Tensor) for each in data.values())
        if ood and not several:
            raise UserError(
                "ood names data sets: pass them by name, as read({'train': ..., 'far': ...}, ood=('far',))."
            )
        sets = _checked(data, ood, self._measuring) if several else {"": data}  # type: ignore[arg-type]
        again = [*(["layers"] if self._reader.layers else []), *self._measuring.of_decisions]
        for each in sets.values():
            _check_running(each)
        sets = {name: readable(each, () if name in ood else again) for name, each in sets.items()}
        if alone and are_several():
            _check_alone(self._model.module, sets)
        with on_its_own() if alone else nullcontext():
            meet("measure", "All processes must call it; nclightning.Probe(model).read(data, alone=True) is for one.")
            found = self._read(sets, ood, start)
        return found if several else found[""]

    def _read(self, sets: Mapping[str, Iterable[Any]], ood: Sequence[str], start: float) -> dict[str, Measurement]:
        host, reader, measuring = self._host(), self._reader, self._measuring
        gathered: dict[str, StatisticsGatherer] = {}
        for name, data in sets.items():
            make = partial(StatisticsGatherer, reader, measuring, name not in ood)
            stats = gather_alone(host, DataSet(data), make)
            gathered[name] = stats
            if name not in ood:
                whole = stats.statistics[""]
                check_samples(whole.counts, whole.means, reader.head_of(host.module).name, name)
        class_means = next((gathered[name].statistics for name in ("", "train") if name in gathered), None)
        head = reader.whole_head_of(host.module)
        found: dict[str, Measurement] = {}
        for name, each in gathered.items():
            if name in ood:
                assert class_means is not None
                value = orthogonality(class_means[""], each.statistics[""])
                found[name] = build_unlabelled({NC5.name: value}, each.statistics[""], head, start)
                continue
            values, of_classes = each.collector.read(each.statistics), {}
            if class_means is not None and measuring.decides(class_means):
                collector = measuring.decisions_collector(head, class_means)
                gather_alone(host, DataSet(sets[name]), partial(DecisionsGatherer, reader, collector))
                values |= collector.read()
                of_classes = collector.per_class()
            ordered = in_order(values, self._measures)
            found[name] = build(each.statistics, ordered, of_classes, head, self._conventions, start)
        return found

    # In steps.

    def online(self) -> OnlineEpoch:
        """Measure the forwards of one epoch of training, which run anyway.

        .. code-block:: python

            with probe.online() as epoch:
                for x, y in epoch.batches(loader):
                    ...  # A step, with model(x) in it.
            epoch.measurement

        The features are those of the steps, in training mode while weights change; the head is that of the end of the
        block. The model and where it is may not be changed for other ones within.

        Returns:
            For ``with``; see :class:`nclightning.probe.online.OnlineEpoch`.

        Raises:
            ValueError: If the model is compiled, if measures need class means first, or inside of another such block.
        """
        if self._model.is_compiled:
            raise UserError(
                "Probe.online needs the features of training's own forwards, which a compiled model does not show to "
                "hooks: use Probe.read, which runs it uncompiled."
            )
        if self._measuring.of_decisions:
            raise UserError(
                f"measures {list(self._measuring.of_decisions)} need fixed class means: use Probe.read, or leave them "
                "out for Probe.online."
            )
        return OnlineEpoch(self._host(), self._reader, self._measuring, self._conventions, self._open)


def in_order(values: Mapping[str, Tensor], names: Sequence[str] | None) -> dict[str, Tensor]:
    """Bring values into the order in which they were asked for, those of layers behind, layer by layer."""
    first = [name for name in names or () if name in values]
    groups = list(dict.fromkeys(tag.rpartition("/")[0] for tag in values))
    rest = sorted(values, key=lambda tag: groups.index(tag.rpartition("/")[0]))
    return {name: values[name] for name in dict.fromkeys([*first, *rest])}


def _checked(
    sets: Mapping[str, Iterable[Any]], ood: Sequence[str], measuring: Measuring
) -> Mapping[str, Iterable[Any]]:
    """Refuse names of data sets that mean nothing."""
    if isinstance(ood, str):
        raise UserError(f"ood must be a sequence of names: write ({ood!r},).")
    if unknown := [name for name in ood if name not in sets or name == "train"]:
        raise UserError(f"ood must name data sets other than 'train' among {list(sets)}, got {unknown}.")
    needed = [*measuring.of_decisions, *([NC5.name] if ood else [])]
    if needed and "train" not in sets:
        raise UserError(
            f"{', '.join(needed)} of several data sets need the class means of the training set: pass it under the "
            f"name 'train' beside {list(sets)}."
        )
    if not sets:
        raise UserError("data must be batches, or a mapping from names to such, got an empty mapping.")
    return sets


def _check_running(data: Any) -> None:
    """Refuse a loader that hands out, whoever asks, what one and the same iterator has next."""
    loader = origin_of(loader_of_fabric(data)).loader
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is DataLoader.__iter__:
        return
    usual = vars(DataLoader(TensorDataset(torch.zeros(1))))
    own = (name for name, value in vars(loader).items() if name not in usual and isinstance(value, Iterator))
    if name := next(own, None):
        raise UserError(
            f"{type(loader).__name__} goes on with an iterator that it keeps as {name!r}, so that to read it would "
            "take batches from training: pass a plain torch.utils.data.DataLoader over its dataset."
        )


def _check_alone(module: nn.Module, sets: Mapping[str, Iterable[Any]]) -> None:
    """Refuse what one of several processes cannot read on its own, or not all of."""
    if is_sharded(module):
        raise UserError(
            f"the weights of {type(module).__name__} are shared out over the processes, of which none can run it "
            "alone: call read(data) on all of them."
        )
    for loader in sets.values():
        mapped = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if mapped and known_indices(loader) is None:  # type: ignore[arg-type]
            raise UserError(
                f"which samples the sampler {type(loader.sampler).__name__} leaves to other processes cannot be "  # type: ignore[attr-defined]
                "told: pass read(data, alone=True) a DataLoader with a plain sampler, or call read(data) on all."
            )
