"""Whether something that starts without effect comes between a head and the output of its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nclightning.errors import UserError
from nclightning.heads import has_weight
from nclightning.probe.features import class_last
from nclightning.probe.found import REPAIRS
from nclightning.probe.likeness import Link, follows, pattern
from nclightning.probe.observation import Observation, observe
from nclightning.sharding import is_sharded

__all__ = ["check_effects", "check_functions", "words_of_layers"]

_MOST_LISTED = 12
# Logits as of a trained network, which a clamp would change.
_LARGE = 100


def check_effects(
    module: nn.Module, call: Callable[[], Any], layer: nn.Module, name: str, link: Link, identical: bool
) -> None:
    """Change what may start without effect, and see whether the output still follows from the logits.

    That is every parameter whose entries are all the same, such as an adapter of zeros, a bias apart or scales of one;
    and the size of the logits.

    Args:
        module: The model.
        call: Runs it.
        layer: Its head.
        name: Of the head.
        link: How the output follows.
        identical: Whether the output of the layer is that of the model itself.

    Raises:
        ValueError: If it does not.
    """
    constant = {} if is_sharded(module) else {n: p for n, p in module.named_parameters() if _is_constant(p)}
    if constant and _breaks(module, call, layer, link, constant):
        alone = [n for n, p in constant.items() if _breaks(module, call, layer, link, {n: p})]
        what = f"the parameter {alone[0]!r}" if alone else f"one of the parameters {', '.join(map(repr, constant))}"
        raise UserError(
            f"the output of {type(module).__name__} follows from the head {name!r} only while {what}, which starts "
            f"without effect, is as it starts: it comes between. Pass head={name!r} to measure the layer as it is, or "
            "a function (model) -> (weight, bias) to measure both together as the loss sees them."
        )
    if not identical and not link.undo:
        seen = observe(module, call, {layer: lambda output: pattern(output) * _LARGE})
        if _misses(seen, layer, link):
            raise UserError(
                f"the output of {type(module).__name__} follows from the head {name!r} only while logits are small, "
                f"as where they are clamped. Pass head={name!r} to measure the layer as it is."
            )


def check_functions(module: nn.Module, seen: Observation, layer: nn.Module, explained: set[str], most: int) -> None:
    """Refuse a layer beside which a weight without a layer makes a part of the output from the same features.

    Args:
        module: The model.
        seen: A run of it.
        layer: The layer.
        explained: Parts of the output that follow from it.
        most: Greatest label; -1 if not known.

    Raises:
        ValueError: If there is such a part, wide enough for the labels.
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
            # Differences of rows, in which a bias cancels.
            made, given = nn.functional.linear(rows, weight.to(rows)).diff(dim=0), leaf.reshape(-1, classes).diff(dim=0)
            if follows(given, made):
                raise UserError(
                    f"cannot tell which is the head of {type(module).__name__}: a layer makes one part of the output, "
                    f"and a weight without a layer of its own the part {name!r}. {words_of_layers(module, seen)} "
                    f"{REPAIRS}"
                )


def _is_constant(parameter: Tensor) -> bool:
    flat = parameter.detach().reshape(-1)
    return flat.is_floating_point() and len(flat) > 0 and bool((flat == flat[0]).all())


def _breaks(
    module: nn.Module, call: Callable[[], Any], layer: nn.Module, link: Link, changed: Mapping[str, Tensor]
) -> bool:
    try:
        with _replaced(changed):
            seen = observe(module, call)
    except Exception:  # It does not run with them.
        return False
    return _misses(seen, layer, link)


def _misses(seen: Observation, layer: nn.Module, link: Link) -> bool:
    runs, leaf = seen.of(layer), seen.leaves.get(link.part)
    if len(runs) != 1 or leaf is None:
        return False  # It goes another way, of which nothing is known.
    made = class_last(layer, runs[0].output)
    return bool(made.isfinite().all() & leaf.isfinite().all()) and bool(link.misses(leaf, made))


@contextmanager
def _replaced(parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Put other entries in the place of parameters, and their own memory back afterwards."""
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


def words_of_layers(module: nn.Module, seen: Observation) -> str:
    """Say which layers of a model ran, and what it returned."""
    names = {child: name for name, child in module.named_modules()}
    ran: dict[str, str] = {}
    for run in seen.runs:
        if has_weight(run.layer):
            ran[names[run.layer]] = f"{names[run.layer]!r} with output {tuple(run.output.shape)}"
    idle = [repr(n) for child, n in names.items() if n not in ran and not _is_scripted(child) and has_weight(child)]
    scripted = [n for child, n in names.items() if _is_scripted(child)]
    outer = [repr(n) for n in scripted if not any(n.startswith(f"{other}.") for other in scripted)]
    listed = list(ran.values())
    more = f" and {len(listed) - _MOST_LISTED} before" if len(listed) > _MOST_LISTED else ""
    outputs = ", ".join(f"{name or 'a tensor'} {tuple(t.shape)}" for name, t in seen.leaves.items())
    return (
        f"Layers with a weight that ran are: {', '.join(listed[-_MOST_LISTED:]) or 'none'}{more}"
        + (f"; that did not run: {', '.join(idle[-_MOST_LISTED:])}" if idle else "")
        + (f"; scripted or traced, so that no head is seen in them: {', '.join(outer)}" if outer else "")
        + f". The model returned {outputs or 'no floating tensor'}."
    )


def _is_scripted(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule)
