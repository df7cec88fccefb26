"""Measurement of a network in the user's own training loop: by evaluation passes, or from the training forwards."""

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
from nclightning.probe.host import PlainHost
from nclightning.probe.online import OnlineEpoch
from nclightning.probe.reader import BatchFn, ForwardFn, PairReader
from nclightning.probe.results import Measurement
from nclightning.probe.sets import DataSet, DecisionsGatherer, StatisticsGatherer, gather_alone
from nclightning.probe.sweep import known_indices
from nclightning.probe.validation import check_samples, checked_model, names_of, plain_name, readable, unwrapped
from nclightning.quantities import NC5
from nclightning.ranks import alone as on_its_own
from nclightning.ranks import are_several, wait_for_all
from nclightning.sharding import is_sharded

__all__ = ["Probe"]


class Probe:
    """Measures neural collapse of a network that your own loop trains.

    It works in plain PyTorch, Lightning Fabric and Hugging Face accelerate. :meth:`read` makes an evaluation pass
    between steps, and :meth:`online` uses the forwards of training. Both give the same numbers as
    :class:`nclightning.callbacks.NeuralCollapseMonitor` with ``source="sweep"`` and ``source="online"``. Weights,
    buffers, modes, hooks and random states are bit for bit the same before and after; if something could not be
    restored, an error names it.

    Args:
        model: Any module, with or without its wrapper for training. For ``fabric.setup(model)``,
            ``accelerator.prepare(model)``, ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``, the
            model inside is run, in the precision of Fabric or accelerate.
        measures: As for :func:`nclightning.measure`, as are all that follow.
        head: The last layer.
        layers: Dotted names of further modules to measure.
        layer_pooling: ``"mean"`` or ``"flatten"``.
        batch_fn: Function that splits a batch into model input and labels.
        forward_fn: Function that runs the model on the inputs of a batch.
        device: Device of the batches.
        ignore_index: Label of samples to leave out.
        global_mean: Convention of NC1 on unbalanced data: ``"class"`` or ``"sample"``.
        between_weights: Convention of NC1 on unbalanced data: ``"uniform"`` or ``"count"``.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an argument has the wrong type.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from nclightning import Probe
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
        return vars(self) | {"_open": []}  # A copy has no running blocks.

    def _host(self) -> PlainHost:
        """Return the host of the model on its current device."""
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
        """Measure the network in its current state by an evaluation pass over data, or by two.

        ``data`` may be several data sets by name, such as ``{"train": ..., "val": ...}``. That under ``train`` is the
        training set. Its class means are used for measures of decisions, such as ``ncc_accuracy``, on all data sets,
        and for ``nc5``. A single data set without a name is compared with its own class means.

        Args:
            data: A ``DataLoader`` or any iterable of batches; or several by name.
            ood: Names of out-of-distribution data sets. ``nc5`` is measured on them, and their labels are not used.
            alone: Whether this process measures on its own, as in ``if rank == 0:``. If not, all processes of
                torch.distributed must call; each takes its share of the samples, and all get the same result.

        Returns:
            A mapping of values by name, which also has tables and a picture; for several data sets a dictionary of
            these.

        Raises:
            ValueError: If the head cannot be found, labels do not fit, or only some of several processes call. The
                message has the repair.
            TypeError: If an argument has the wrong type. The message has the repair.
        """
        start = time.perf_counter()
        several = isinstance(data, Mapping) and not any(isinstance(each, Tensor) for each in data.values())
        if ood and not several:
            raise UserError(
                "ood names data sets: pass them by name, as read({'train': ..., 'far': ...}, ood=('far',))."
            )
        sets = _checked(data, ood, self._measuring) if several else {"": data}  # type: ignore[arg-type]
        again = [*(["layers"] if self._reader.layers else []), *self._measuring.decision_measures]
        for each in sets.values():
            _check_running(each)
        sets = {name: readable(each, () if name in ood else again) for name, each in sets.items()}
        if alone and are_several():
            _check_alone(self._model.module, sets)
        with on_its_own() if alone else nullcontext():
            wait_for_all(
                "measure", "All processes must call it; nclightning.Probe(model).read(data, alone=True) is for one."
            )
            found = self._read(sets, ood, start)
        return found if several else found[""]

    def _read(self, sets: Mapping[str, Iterable[Any]], ood: Sequence[str], start: float) -> dict[str, Measurement]:
        """Measure data sets: statistics of all of them first, then decisions."""
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
        head = reader.head_snapshot(host.module)
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
        """Measure one epoch of training from its own forwards, without further ones.

        .. code-block:: python

            with probe.online() as epoch:
                for x, y in epoch.batches(loader):
                    ...  # A step, with model(x) in it.
            epoch.measurement

        The features are those of the training steps: the model is in training mode, and its weights change during the
        epoch. The head is that at the end of the block. Within the block, the model must stay the same object on the
        same device.

        Returns:
            A context manager; see :class:`nclightning.probe.online.OnlineEpoch`.

        Raises:
            ValueError: If the model is compiled, if a measure needs class means before the pass, or inside another such
                block.
        """
        if self._model.is_compiled:
            raise UserError(
                "Probe.online needs the features of training's own forwards, which a compiled model does not show to "
                "hooks: use Probe.read, which runs it uncompiled."
            )
        if self._measuring.decision_measures:
            raise UserError(
                f"measures {list(self._measuring.decision_measures)} need fixed class means: use Probe.read, or leave "
                "them out for Probe.online."
            )
        return OnlineEpoch(self._host(), self._reader, self._measuring, self._conventions, self._open)


def in_order(values: Mapping[str, Tensor], names: Sequence[str] | None) -> dict[str, Tensor]:
    """Return values in the order of the names, followed by those of further layers, layer by layer."""
    first = [name for name in names or () if name in values]
    groups = list(dict.fromkeys(tag.rpartition("/")[0] for tag in values))
    rest = sorted(values, key=lambda tag: groups.index(tag.rpartition("/")[0]))
    return {name: values[name] for name in dict.fromkeys([*first, *rest])}


def _checked(
    sets: Mapping[str, Iterable[Any]], ood: Sequence[str], measuring: Measuring
) -> Mapping[str, Iterable[Any]]:
    """Return data sets by name. Raise if a name in ``ood`` is unknown, or the training set is needed and missing."""
    if isinstance(ood, str):
        raise UserError(f"ood must be a sequence of names: write ({ood!r},).")
    if unknown := [name for name in ood if name not in sets or name == "train"]:
        raise UserError(f"ood must name data sets other than 'train' among {list(sets)}, got {unknown}.")
    needed = [*measuring.decision_measures, *([NC5.name] if ood else [])]
    if needed and "train" not in sets:
        raise UserError(
            f"{', '.join(needed)} of several data sets need the class means of the training set: pass it under the "
            f"name 'train' beside {list(sets)}."
        )
    if not sets:
        raise UserError("data must be batches, or a mapping from names to such, got an empty mapping.")
    return sets


def _check_running(data: Any) -> None:
    """Raise if a loader keeps one iterator for all passes, so that a pass would take batches away from training."""
    loader = origin_of(loader_of_fabric(data)).loader
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is DataLoader.__iter__:
        return
    usual = vars(DataLoader(TensorDataset(torch.zeros(1))))
    own = (name for name, value in vars(loader).items() if name not in usual and isinstance(value, Iterator))
    if name := next(own, None):
        raise UserError(
            f"{type(loader).__name__} keeps one iterator for all passes, as {name!r}, so that reading it would "
            "take batches from training: pass a plain torch.utils.data.DataLoader over its dataset."
        )


def _check_alone(module: nn.Module, sets: Mapping[str, Iterable[Any]]) -> None:
    """Raise if one of several processes cannot run the model on its own, or cannot read all samples."""
    if is_sharded(module):
        raise UserError(
            f"the weights of {type(module).__name__} are split between the processes, so that none of them can run it "
            "alone: call read(data) on all of them."
        )
    for loader in sets.values():
        mapped = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if mapped and known_indices(loader) is None:  # type: ignore[arg-type]
            raise UserError(
                f"which samples the sampler {type(loader.sampler).__name__} leaves to other processes is not "  # type: ignore[attr-defined]
                "known: pass read(data, alone=True) a DataLoader with a plain sampler, or call read(data) on all."
            )
