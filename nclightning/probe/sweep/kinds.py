"""What Python objects hold, and how to put it back into the same objects."""

from __future__ import annotations

import array
import collections
import copy
import functools
import io
import operator
import random
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

__all__ = ["LEAVES", "Kept", "keep"]

# Types of which nothing can be changed.
LEAVES = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, slice, type(...), types.ModuleType, types.CodeType}
    | {types.BuiltinFunctionType, torch.dtype, torch.device, torch.Size}
)
# A longer container holds data: what it contains is put back, but not what its items contain.
_LONGEST_SEARCHED = 10_000
# Packages whose objects are not searched: what they hold is not the model's, or is of this measurement itself.
_NOT_SEARCHED = {"lightning", "lightning_fabric", "pytorch_lightning", "nclightning", "wandb", "tensorboard"}
# Modules of the standard library whose objects are.
_SEARCHED = {"__main__", "collections", "functools", "itertools", "types", "random"}
_INSIDE_TORCH = ("torch._", "torch.fx", "torch.jit", "torch.distributed", "torch.utils.tensorboard")

Restore = Callable[[dict[int, Any]], str | None]
Children = Iterable[tuple[Any, Any]]


class Kept(NamedTuple):
    """What an object holds.

    Attributes:
        restore: Puts it back, given objects that take the place of others by their ``id``. Returns why it could not.
        children: Objects in it, with the name or number under which it holds each.
        instead: Takes the place of the object itself, whose state cannot be set.
    """

    restore: Restore | None = None
    children: Children = ()
    instead: Any = None


def keep(value: Any) -> Kept:
    """Remember what an object holds, without what the objects in it hold.

    Args:
        value: Anything but a tensor.
    """
    return _how(type(value))(value)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _how(kind: type) -> Callable[[Any], Kept]:
    if hasattr(kind, "cache_clear") and hasattr(kind, "cache_info"):
        return _cache
    return next((how for kinds, how in _HOW if issubclass(kind, kinds)), _object)


def _numbered(values: Iterable[Any]) -> Children:
    return enumerate(values) if len(values) <= _LONGEST_SEARCHED else ()  # type: ignore[arg-type]


def _same(some: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(map(operator.is_, some, others))


def _mapping(value: dict[Any, Any]) -> Kept:
    # Not by methods of the object's own class, which may do something else.
    base: Any = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
    saved = dict(base.items(value))
    if not saved:
        children: Children = ()
    elif len(saved) <= _LONGEST_SEARCHED:
        children = saved.items()
        if not LEAVES.issuperset(map(type, saved)):
            children = [*children, *(("a key", key) for key in saved)]
    else:
        children = ()

    def restore(instead: dict[int, Any]) -> None:
        wanted = {key: instead.get(id(item), item) for key, item in saved.items()} if instead else saved
        same = base.__len__(value) == len(wanted) and _same(base.keys(value), wanted)
        if same and _same(base.values(value), wanted.values()):
            return
        base.clear(value)
        for key, item in wanted.items():
            base.__setitem__(value, key, item)

    kept = Kept(restore, children)
    return _both(kept, _attributes(value)) if getattr(value, "__dict__", None) else kept


def _container(value: Any) -> Kept:
    saved = list(value)

    def restore(instead: dict[int, Any]) -> None:
        wanted = [instead.get(id(item), item) for item in saved] if instead else saved
        if len(value) == len(wanted) and _same(value, wanted):
            return
        if isinstance(value, collections.deque):
            value.clear()
            value.extend(wanted)
        elif isinstance(value, set):
            value.clear()
            value.update(wanted)
        elif isinstance(value, array.array):
            value[:] = array.array(value.typecode, wanted)
        else:
            value[:] = wanted

    kept = Kept(restore, () if isinstance(value, bytearray | array.array) else _numbered(saved))
    return _both(kept, _attributes(value)) if getattr(value, "__dict__", None) else kept


def _array(value: np.ndarray[Any, Any]) -> Kept:
    if not value.flags.writeable:
        return Kept()
    saved = value.copy()

    def restore(instead: dict[int, Any]) -> None:
        if value.shape != saved.shape:
            value.resize(saved.shape, refcheck=False)
        if value.dtype == object or value.tobytes() != saved.tobytes():
            value[...] = saved

    return Kept(restore)


def _state(value: Any) -> Kept:
    """Keep the state of a random generator."""
    bits = getattr(value, "bit_generator", value)
    saved: Any
    if isinstance(bits, random.Random):
        saved = bits.getstate()
    else:
        saved = copy.deepcopy(bits.state) if isinstance(bits, np.random.BitGenerator) else bits.get_state()

    def restore(instead: dict[int, Any]) -> None:
        if isinstance(bits, random.Random):
            bits.setstate(saved)
        elif isinstance(bits, np.random.BitGenerator):
            bits.state = saved
        else:
            bits.set_state(saved)

    return Kept(restore)


def _cell(value: types.CellType) -> Kept:
    try:
        saved = value.cell_contents
    except ValueError:  # It is empty.
        return Kept()

    def restore(instead: dict[int, Any]) -> None:
        value.cell_contents = instead.get(id(saved), saved)

    return Kept(restore, (("a variable", saved),))


def _function(value: types.FunctionType) -> Kept:
    root = (value.__module__ or "").partition(".")[0]
    if root in _NOT_SEARCHED | sys.stdlib_module_names - _SEARCHED or root in {"torch", "numpy", "torchmetrics"}:
        return Kept()
    inside: list[Any] = [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__]
    children = [("a variable", each) for each in inside if each is not None]
    kept = _attributes(value)
    kept = _both(Kept(None, children), kept) if vars(value) else Kept(None, children)
    return kept if _is_library(value.__module__) else _both(kept, _globals(value))


def _globals(value: types.FunctionType) -> Kept:
    """Keep the global variables that a function names."""
    space = value.__globals__
    saved = {name: space[name] for name in _names(value.__code__) if name in space}

    def restore(instead: dict[int, Any]) -> None:
        for name, item in saved.items():
            if space.get(name) is not (wanted := instead.get(id(item), item)):
                space[name] = wanted

    return Kept(restore, saved.items())


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    inner = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def _class(value: type) -> Kept:
    saved = {name: item for name, item in vars(value).items() if not name.startswith("__")}

    def restore(instead: dict[int, Any]) -> None:
        now = {name for name in vars(value) if not name.startswith("__")}
        for name in now - saved.keys():
            delattr(value, name)
        for name, item in saved.items():
            if vars(value).get(name) is not (wanted := instead.get(id(item), item)):
                setattr(value, name, wanted)

    bases = (("a base class", base) for base in value.__bases__ if not _is_library(base.__module__))
    return Kept(restore, [*saved.items(), *bases])


def _cache(value: Any) -> Kept:
    """Keep a cache of results empty. One that has entries may get more: results of the same arguments are the same."""
    is_empty = not value.cache_info().currsize

    def restore(instead: dict[int, Any]) -> None:
        if is_empty:
            value.cache_clear()

    return Kept(restore, (("the function", value.__wrapped__),))


def _generator(value: types.GeneratorType[Any, Any, Any]) -> Kept:
    where = _position(value)

    def restore(instead: dict[int, Any]) -> str | None:
        return None if _position(value) == where else "a generator cannot be rewound"

    return Kept(restore)


def _iterator(value: Any) -> Kept:
    if isinstance(value, io.IOBase):
        return Kept()
    try:
        with warnings.catch_warnings():
            # From Python 3.12 on, iterators of itertools warn that Python 3.14 does not know how to copy them.
            warnings.simplefilter("ignore", DeprecationWarning)
            return Kept(None, _numbered(value.__reduce__()[1]), _copy_of(value))
    except (TypeError, IndexError):
        return Kept()


def _copy_of(value: Any) -> Any:
    """Copy an iterator with those that it goes through."""
    make, arguments, *state = value.__reduce__()
    plain = (isinstance(each, Iterator) and not hasattr(each, "__dict__") for each in arguments)
    made = make(*(_copy_of(each) if is_one else each for each, is_one in zip(arguments, plain, strict=True)))
    if state and state[0] is not None:
        made.__setstate__(state[0])
    return made


def _position(value: types.GeneratorType[Any, Any, Any]) -> Any:
    frame = value.gi_frame
    return None if frame is None else (frame.f_lasti, {name: id(item) for name, item in frame.f_locals.items()})


def _object(value: Any) -> Kept:
    """Keep the attributes of an object, if it can be one of the model's."""
    kind = type(value)
    if not isinstance(value, nn.Module):
        if kind.__module__.partition(".")[0] in sys.stdlib_module_names - _SEARCHED:
            return Kept()
        modules = [base.__module__ for base in kind.__mro__]
        if any(name.partition(".")[0] in _NOT_SEARCHED or name.startswith(_INSIDE_TORCH) for name in modules):
            return Kept()
    kept = _attributes(value)
    return kept if _is_library(kind.__module__) else _both(kept, Kept(None, (("its class", kind),)))


def _attributes(value: Any) -> Kept:
    kept = Kept()
    state = getattr(value, "__dict__", None)
    if isinstance(state, dict):
        kept = _mapping(state)
    kind: Any = type(value)
    names = _slots(kind)
    if not names or isinstance(value, types.FunctionType | type):
        return kept
    saved = {name: getattr(value, name) for name in names if hasattr(value, name)}

    def restore(instead: dict[int, Any]) -> None:
        for name, item in saved.items():
            if getattr(value, name, None) is not (wanted := instead.get(id(item), item)):
                object.__setattr__(value, name, wanted)

    return _both(kept, Kept(restore, saved.items()))


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[str, ...]:
    found = (item for base in kind.__mro__ for item in vars(base).items())
    return tuple(name for name, slot in found if isinstance(slot, types.MemberDescriptorType))


def _both(one: Kept, other: Kept) -> Kept:
    def restore(instead: dict[int, Any]) -> str | None:
        reasons = [each.restore(instead) for each in (one, other) if each.restore is not None]
        return next((reason for reason in reasons if reason), None)

    return Kept(restore, [*one.children, *other.children])


@functools.lru_cache(maxsize=4096)
def _is_library(module: str | None) -> bool:
    """Whether a module is not of the user's own code: its global variables and classes are left alone."""
    root = (module or "").partition(".")[0]
    if root in _NOT_SEARCHED or root in sys.stdlib_module_names - {"__main__"}:
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _slots_of(*names: str) -> Callable[[Any], Kept]:
    return lambda value: Kept(None, [(name, getattr(value, name)) for name in names])


_HOW: tuple[tuple[Any, Callable[[Any], Kept]], ...] = (
    (dict, _mapping),
    ((list, collections.deque, set, bytearray, array.array), _container),
    ((tuple, frozenset), lambda value: Kept(None, _numbered(value))),
    (types.ModuleType, lambda _: Kept()),
    (np.ndarray, _array),
    ((torch.Generator, random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator), _state),
    (types.FunctionType, _function),
    (types.MethodType, _slots_of("__self__", "__func__")),
    (type, lambda value: Kept() if _is_library(value.__module__) else _class(value)),
    (types.CellType, _cell),
    ((staticmethod, classmethod), _slots_of("__func__")),
    (property, _slots_of("fget", "fset")),
    (functools.partial, _slots_of("func", "args", "keywords")),
    (types.GeneratorType, _generator),
    (Iterator, lambda value: _object(value) if hasattr(value, "__dict__") else _iterator(value)),
)
