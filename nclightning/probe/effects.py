"""Checks for operations after the head that have no effect at initialisation, such as an adapter of zeros."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nclightning.errors import UserError
from nclightning.heads import has_weight
from nclightning.probe.agreement import Link, follows, pattern
from nclightning.probe.features import class_last
from nclightning.probe.found_head import REPAIRS
from nclightning.probe.observation import Observation, observe
from nclightning.sharding import is_sharded

__all__ = ["check_effects", "check_functions", "describe_layers"]

_MAX_LISTED = 12
# Scale of logits as in a trained network, which a clamp would change.
_LARGE = 100


def check_effects(
    module: nn.Module, call: Callable[[], Any], layer: nn.Module, name: str, link: Link, identical: bool
) -> None:
    """Raise if the output of a model follows from its head only because other parameters have no effect yet.

    Two things are changed, one after the other. First every parameter whose entries are all equal, such as an adapter
    of zeros, a separate bias or scales of one. Then the size of the logits. The output must follow each time.

    Args:
        module: The model.
        call: Function that runs the model.
        layer: The head.
        name: Name of the head.
        link: How the output follows from the logits.
        identical: Whether the model returns the very tensor that the layer returned.

    Raises:
        ValueError: If the output no longer follows.
    """
    constant = {} if is_sharded(module) else {n: p for n, p in module.named_parameters() if _is_constant(p)}
    if constant and _breaks(module, call, layer, link, constant):
        alone = [n for n, p in constant.items() if _breaks(module, call, layer, link, {n: p})]
        what = f"the parameter {alone[0]!r}" if alone else f"one of the parameters {', '.join(map(repr, constant))}"
        raise UserError(
            f"the output of {type(module).__name__} follows from the head {name!r} only as long as {what} keeps its "
            f"initial value, at which it has no effect. Pass head={name!r} to measure the layer as it is, or "
            "a function (model) -> (weight, bias) to measure both together as the loss sees them."
        )
    if not identical and not link.undo:
        seen = observe(module, call, {layer: lambda output: pattern(output) * _LARGE})
        if _misses(seen, layer, link):
            raise UserError(
                f"the output of {type(module).__name__} follows from the head {name!r} only as long as logits are "
                f"small, for example because they are clamped. Pass head={name!r} to measure the layer as it is."
            )


def check_functions(module: nn.Module, seen: Observation, layer: nn.Module, explained: set[str], most: int) -> None:
    """Raise if a weight outside of any layer computes another part of the output from the same features.

    Args:
        module: The model.
        seen: A run of the model.
        layer: The layer that was found.
        explained: Parts of the output that follow from this layer.
        most: Largest label; -1 if not known.

    Raises:
        ValueError: If there is such a part, and it has enough columns for the labels.
    """
    inputs = class_last(layer, seen.of(layer)[-1].inputs)
    rows = inputs.reshape(-1, inputs.shape[-1])
    if is_sharded(module):
        return
    own = {id(each) for each in (*layer.parameters(), *layer.buffers())}
    weights = [each.detach() for each in (*module.parameters(), *module.buffers()) if id(each) not in own]
    for name, leaf in seen.leaves.items():
        classes = leaf.shape[-1] if leaf.ndim > 1 else 0
        if name in explained or classes <= max(most, 1) or leaf.numel() != len(rows) * classes or len(rows) < 3:
            continue
        made_of = [w for w in weights if w.shape == (classes, rows.shape[1])]
        made_of += [w.t() for w in weights if w.shape == (rows.shape[1], classes)]
        for weight in made_of:
            # Differences of rows are compared, because a bias cancels in them.
            made, given = nn.functional.linear(rows, weight.to(rows)).diff(dim=0), leaf.reshape(-1, classes).diff(dim=0)
            if follows(given, made):
                raise UserError(
                    f"cannot tell which is the head of {type(module).__name__}: a layer computes one part of the "
                    f"output, and a weight that belongs to no layer computes the part {name!r}. "
                    f"{describe_layers(module, seen)} {REPAIRS}"
                )


def _is_constant(parameter: Tensor) -> bool:
    flat = parameter.detach().reshape(-1)
    return flat.is_floating_point() and len(flat) > 0 and bool((flat == flat[0]).all())


def _breaks(
    module: nn.Module, call: Callable[[], Any], layer: nn.Module, link: Link, changed: Mapping[str, Tensor]
) -> bool:
    """Return whether the output no longer follows from the logits if parameters have other values."""
    try:
        with _replaced(changed):
            seen = observe(module, call)
    except Exception:  # The model does not run with the changed parameters.
        return False
    return _misses(seen, layer, link)


def _misses(seen: Observation, layer: nn.Module, link: Link) -> bool:
    """Return whether an output did not follow from the logits of a layer in a run."""
    runs, leaf = seen.of(layer), seen.leaves.get(link.part)
    if len(runs) != 1 or leaf is None:
        return False  # The model took another path, which says nothing about this one.
    made = class_last(layer, runs[0].output)
    return bool(made.isfinite().all() & leaf.isfinite().all()) and bool(link.misses(leaf, made))


@contextmanager
def _replaced(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Give parameters other values within the block, and restore their own memory afterwards."""
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            count = torch.arange(1, parameter.numel() + 1, dtype=torch.float64, device=parameter.device)
            noise = 0.5 + 0.5 * torch.cos(count * count + len(name))
            parameter.data = own[name] + noise.reshape(parameter.shape).to(parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def describe_layers(module: nn.Module, seen: Observation) -> str:
    """Return sentences that list the layers of a model that ran, and its outputs."""
    names = {child: name for name, child in module.named_modules()}
    ran: dict[str, str] = {}
    for run in seen.runs:
        if has_weight(run.layer):
            ran[names[run.layer]] = f"{names[run.layer]!r} with output {tuple(run.output.shape)}"
    idle = [repr(n) for child, n in names.items() if n not in ran and not _is_scripted(child) and has_weight(child)]
    scripted = [n for child, n in names.items() if _is_scripted(child)]
    outer = [repr(n) for n in scripted if not any(n.startswith(f"{other}.") for other in scripted)]
    listed = list(ran.values())
    more = f" and {len(listed) - _MAX_LISTED} before" if len(listed) > _MAX_LISTED else ""
    outputs = ", ".join(f"{name or 'a tensor'} {tuple(t.shape)}" for name, t in seen.leaves.items())
    return (
        f"Layers with a weight that ran are: {', '.join(listed[-_MAX_LISTED:]) or 'none'}{more}"
        + (f"; that did not run: {', '.join(idle[-_MAX_LISTED:])}" if idle else "")
        + (f"; scripted or traced, where no head can be seen: {', '.join(outer)}" if outer else "")
        + f". The model returned {outputs or 'no floating tensor'}."
    )


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)
