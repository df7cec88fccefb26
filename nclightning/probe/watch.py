"""Hooks that copy features, and check that these belong to the labels and to the output of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nclightning.compat.torch import version_of
from nclightning.errors import UserError
from nclightning.probe.features import FeatureHooks, first_argument, first_tensor
from nclightning.probe.found_head import FoundHead
from nclightning.probe.hooks import hook_call, hook_result
from nclightning.probe.inputs import tensors_of
from nclightning.probe.observation import Observation

__all__ = ["Entry", "FirstStepHooks", "Watch", "entry_of"]


class Entry(NamedTuple):
    """The places where inputs enter a model.

    Attributes:
        layers: Names of the modules whose input is a tensor of the batch.
        start: Names of these modules and of the first layer, with copies of their input.
        is_written: Whether the model overwrites its inputs.
    """

    layers: tuple[str, ...]
    start: Mapping[str, Tensor]
    is_written: bool


def entry_of(module: nn.Module, seen: Observation, inputs: Any, is_written: bool) -> Entry:
    """Find the innermost modules at which the inputs of a batch enter a model.

    Args:
        module: The model.
        seen: A run of the model on the inputs.
        inputs: Inputs of the batch.
        is_written: Whether the run overwrote them.
    """
    names, leaves = {child: name for name, child in module.named_modules()}, list(tensors_of(inputs))
    alike = {layer: True for layer, _, _ in seen.calls}
    for layer, raw_input, _ in seen.calls:
        alike[layer] = alike[layer] and any(_is_same(raw_input, leaf) for leaf in leaves)
    # The inner one of two nested modules with the same input is chosen: a step may skip the outer one.
    chain = [layer for layer, same in alike.items() if same]
    inner = [layer for i, layer in enumerate(chain) if not set(chain[i + 1 : i + 2]) & set(layer.modules())]
    first = next((layer for layer, _, _ in seen.calls if not list(layer.children())), None)
    watched = {*inner, *([first] if first is not None else [])}
    start: dict[str, Tensor] = {}
    for layer, _, value in seen.calls:
        if layer in watched:
            start.setdefault(names[layer], value.detach().clone())
    return Entry(tuple(names[layer] for layer in inner), start, is_written)


def _is_same(tensor: Tensor, leaf: Tensor) -> bool:
    """Return whether a tensor is the same object as another one, or a view of all its elements in the same order."""
    if tensor is leaf:
        return True
    return (
        tensor.dtype == leaf.dtype
        and tensor.numel() == leaf.numel() > 0
        and tensor.layout == leaf.layout == torch.strided
        and tensor.is_contiguous()
        and leaf.is_contiguous()
        and tensor.data_ptr() == leaf.data_ptr()
    )


def _differs(tensor: Tensor, leaf: Tensor) -> Tensor:
    """Return whether two tensors differ after rounding to the lower one of their precisions."""
    if tensor.dtype != leaf.dtype and tensor.is_floating_point() and leaf.is_floating_point():
        lower = min(tensor.dtype, leaf.dtype, key=lambda dtype: dtype.itemsize)
        tensor, leaf = tensor.to(lower), leaf.to(lower)
    return (tensor != leaf).any()


class Watch:
    """Hooks that copy the features of one forward per batch, and check on the device that they fit the batch.

    A step of the user may run the model several times, for example on unlabelled samples or in a closure. The features
    are then those of the first run on the inputs of the batch.

    Args:
        found: The head.
        module: The model.
        layers: Further layers by name.
        pooling: As for :class:`nclightning.probe.features.FeatureHooks`.
        entry: Where inputs enter the model, for steps of the user; None for evaluation passes.
        online: Whether these are training steps. Such a step may mix samples or change their order, so that the inputs
            are compared with those of the batch.
    """

    def __init__(
        self,
        found: FoundHead,
        module: nn.Module,
        layers: Mapping[str, nn.Module],
        pooling: Literal["mean", "flatten"],
        entry: Entry | None = None,
        online: bool = False,
    ) -> None:
        self._found, self._module, self._online, self._in_steps = found, module, online, entry is not None
        self._batch_tensors: list[Tensor] = []  # The inputs of the current batch.
        self._checks_versions = online and entry is not None and not entry.is_written
        self._versions: list[int] = []  # The version counters of the inputs at the start of the step.
        # Whether the current run is on the inputs of the batch, and the same of the run whose features are kept.
        self._run_match: Literal["yes", "maybe", "no", "unseen"] = "unseen"
        self._kept_match: str | None = None
        self._kept_differs: Tensor | None = None  # Whether the inputs of the kept run have other values.
        self._logits: Tensor | None = None  # The output of the head in the kept run.
        self._is_compared = False  # Whether the output of the kept run has been compared with the logits.
        # Results of the checks over all batches. They stay on the device until verify.
        self._misses: Tensor | None = None
        self._differs: Tensor | None = None
        # These hooks come before those at the features: the head itself may be the layer where inputs enter.
        self._handles: list[RemovableHandle] = [
            hook_call(module.get_submodule(name), self._enter) for name in (() if entry is None else entry.layers)
        ]
        self._hooks = FeatureHooks(found.source(module), layers, pooling, self._is_needed if self._in_steps else None)
        # In training, forward may return other things than logits, so a step is checked only if positions depend on it.
        self._checks = found.is_checked and (entry is None or bool(found.pooling))
        if self._checks and found.reader.layer is not None:
            self._handles.append(hook_result(module.get_submodule(found.path), self._keep_logits))
        if self._in_steps and self._checks and found.exit is not None:
            self._handles.append(hook_result(module.get_submodule(found.exit), self._compare_exit))

    def begin(self, inputs: Any) -> None:
        """Prepare for the step of a batch."""
        self._batch_tensors = [inputs] if isinstance(inputs, Tensor) else list(tensors_of(inputs))
        self._versions = [version_of(leaf) for leaf in self._batch_tensors] if self._checks_versions else []
        self._hooks.kept, self._hooks.runs, self._run_match = {}, 0, "unseen"
        if self._kept_match is not None:  # The last step failed.
            self._forget()

    def _forget(self) -> None:
        """Forget the kept run."""
        self._kept_match, self._kept_differs, self._logits, self._is_compared = None, None, None, False

    def _enter(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Find out whether the model runs on the inputs of the batch, as a hook where inputs enter it."""
        tensor = first_argument(args, kwargs)
        if tensor is None:
            return
        place = next((i for i, leaf in enumerate(self._batch_tensors) if _is_same(tensor, leaf)), None)
        if place is not None:
            if self._kept_match not in (None, "yes"):  # The kept features belong to a run on other inputs.
                self._hooks.kept.clear()
                self._forget()
            if self._kept_match is None and self._is_changed(place):
                self._kept_differs = torch.ones((), dtype=torch.bool, device=tensor.device)
            self._run_match = "yes"
        elif self._kept_match is None:
            alike = [
                i
                for i, own in enumerate(self._batch_tensors)
                if own.shape == tensor.shape and own.device == tensor.device
            ]
            self._run_match = "maybe" if alike else "no"
            if alike and self._online:
                differs = [torch.ones((), dtype=torch.bool, device=tensor.device)]
                differs += [_differs(tensor.detach(), self._batch_tensors[i]) for i in alike if not self._is_changed(i)]
                self._kept_differs = torch.stack(differs).all()
        else:
            self._run_match = "no"

    def _is_changed(self, place: int) -> bool:
        """Return whether the step overwrote an input, for example to mix samples."""
        return self._checks_versions and version_of(self._batch_tensors[place]) != self._versions[place]

    def _is_needed(self) -> bool:
        """Return whether features of the current run are needed, provided that none are kept yet."""
        if self._kept_match is None:
            self._kept_match = self._run_match
        return self._kept_match == self._run_match

    def _keep_logits(self, args: Any, output: Any) -> None:
        """Keep the output of the head, as a hook after its forward."""
        if (
            (not self._in_steps or self._is_needed())
            and self._logits is None
            and (raw_output := first_tensor(output)) is not None
        ):
            self._logits = raw_output.detach().clone()

    def _compare_exit(self, args: Any, output: Any) -> None:
        """Compare the output with the logits, as a hook after the module that returns it."""
        if "" in self._hooks.kept and not self._is_compared:
            self._compare(output, exit_only=True)

    def _compare(self, output: Any, exit_only: bool) -> None:
        """Compare the output with the logits, and choose the features at the positions that it used."""
        found, rows = self._found, self._hooks.kept[""]
        logits, part = found.logits(self._module, rows, self._logits), found.part_of(output, exit_only)
        if part is None and exit_only:
            return  # In training the module may return other things.
        self._is_compared = True
        if logits is None or part is None:
            misses = torch.ones((), dtype=torch.bool, device=rows.device)
        else:
            link = found.link_of(rows)
            misses = link.misses(part, logits) & logits.isfinite().all(dim=-1).any()
            if found.varies and rows.ndim > 2 and len(part) == len(rows):
                chosen = link.chosen(part, logits)
                self._hooks.kept[""] = rows.flatten(1, -2)[torch.arange(len(rows), device=rows.device), chosen]
        self._misses = misses if self._misses is None else self._misses | misses

    @property
    def is_idle(self) -> bool:
        """Whether the model has not run since the last batch began."""
        return self._run_match == "unseen" and not self._hooks.runs

    def take(self, output: Any = None, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Return the features of a batch by name.

        Args:
            output: The output of the model, in an evaluation pass.
            labels: The labels of the batch, in a step.

        Raises:
            ValueError: If it is not known which features belong to the batch, or their number is not that of labels.
        """
        runs = self._hooks.runs
        if not self._in_steps:
            if self._checks and "" in self._hooks.kept and runs == 1:
                self._compare(output, exit_only=False)
            kept = self._hooks.take(once=True)
            self._forget()
            return kept
        if runs and (self._is_unsure(runs) or (self._found.varies and not self._is_compared)):
            raise self._refusal()
        if self._kept_differs is not None:
            self._differs = self._kept_differs if self._differs is None else self._differs | self._kept_differs
        kept = self._hooks.take()
        self._forget()
        if labels is not None and labels.shape[:1] not in ((), kept[""].shape[:1]):
            raise self._refusal()
        return kept

    def _is_unsure(self, runs: int) -> bool:
        """Return whether it is not known that the features belong to the inputs of the batch."""
        if self._kept_match == "yes":
            return False
        return runs > 1 or (self._online and self._kept_match == "no")

    def verify(self) -> None:
        """Raise if a check failed on any batch. Transfers to the host.

        Raises:
            ValueError: If an output did not follow from the logits, or inputs were not those of the batch.
        """
        misses, differs, self._misses, self._differs = self._misses, self._differs, None, None
        if misses is not None and bool(misses):
            raise self._found.refusal(self._module)
        if differs is not None and bool(differs):
            raise self._refusal()

    def _refusal(self) -> UserError:
        """Return the error for features that do not belong to the batch."""
        name, title = self._found.reader.name, type(self._module).__name__
        if self._online:
            return UserError(
                "source='online' and Probe.online pair features with labels by their places in the batch, and the "
                f"training step runs {title} on other inputs than those of the batch: they may be mixed, in "
                "another order or from other samples. Use source='sweep' or Probe.read; or change batches before the "
                "step, in on_after_batch_transfer or as epoch.batches((change(x), y) for x, y in loader); or pass "
                "batch_fn=(batch) -> (inputs, labels) with inputs and labels as the step makes them."
            )
        return UserError(
            f"the head {name!r} of {title} ran in a validation or test step on other samples than those of the batch, "
            "or several times, never visibly on these: features cannot be paired with labels. Leave the stage out of "
            "stages=, and pass its loader as datasets={'name': loader}, for an evaluation pass; or pass "
            "batch_fn=(batch) -> (inputs, labels) with inputs and labels as the step passes them to the model."
        )

    def remove(self) -> None:
        """Remove all hooks."""
        self._hooks.remove()
        for handle in self._handles:
            handle.remove()
        self._handles, self._batch_tensors = [], []
        self._forget()


class FirstStepHooks:
    """Hooks that check whether the first training step runs the head, and runs the model on the inputs of the batch.

    Args:
        module: The model.
        entry: Where inputs enter the model.
        layer: The layer at which features are read.
        head_only: Whether inputs are not checked. The hook then removes itself at its first call, because some hosts do
            not report a step that failed.
    """

    def __init__(self, module: nn.Module, entry: Entry, layer: nn.Module, head_only: bool = False) -> None:
        self._runs, self._head_only = 0, head_only
        self._same: list[Tensor] = []
        self._handles = [hook_call(layer, self._count)]
        for name, value in ({} if head_only else entry.start).items():
            self._handles.append(hook_call(module.get_submodule(name), self._compare_with(value)))

    def _count(self, args: Any, kwargs: dict[str, Any]) -> None:
        """Count the calls of the head."""
        self._runs += 1
        if self._head_only:
            self.remove()

    def _compare_with(self, value: Tensor) -> Any:
        """Return a hook that compares the input of a module with an earlier one."""

        def compare(args: Any, kwargs: dict[str, Any]) -> None:
            tensor = first_argument(args, kwargs)
            if tensor is not None and tensor.device == value.device:
                # The step may pass only a part of the batch, or the batch together with other samples.
                count = min(tensor.numel(), value.numel())
                own, given = tensor.detach().reshape(-1)[:count].to(value.dtype), value.reshape(-1)[:count]
                self._same.append(torch.isclose(own, given, equal_nan=True).all())

        return compare

    def end(self) -> tuple[bool, bool]:
        """Remove all hooks. Return whether inputs differed, and whether the head ran. Transfers to the host."""
        self.remove()
        differs = bool(self._same) and not any(bool(same) for same in self._same)
        self._same = []
        return differs, self._runs > 0

    @staticmethod
    def words(title: str, head: str, differs: bool, runs: bool) -> str:
        """Return a warning about what the step did differently, and how to measure it; empty if there is none.

        Args:
            title: Name of the module's class.
            head: Name of the head.
            differs: Whether inputs differed.
            runs: Whether the head ran.
        """
        if not runs:
            return (
                f"the head {head!r}, whose output is that of the forward of {title}, did not run in the first "
                "training step: if the loss uses another layer, pass head= that one, and forward_fn=(module, inputs) "
                "-> output that runs it."
            )
        if differs:
            return (
                f"the first training step ran {title} on other inputs than those of the batch. With source='sweep', "
                "which runs it on the batch, pass forward_fn=(module, inputs) -> output that prepares inputs as the "
                "step does; if the step augments them, samples without augmentation are measured. source='online' "
                "pairs features with labels by place and needs batch_fn=(batch) -> (inputs, labels) with inputs as the "
                "step makes them."
            )
        return ""

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
