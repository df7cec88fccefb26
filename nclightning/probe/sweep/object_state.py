"""Saving and restoring the state of Python objects in place: containers, attributes, arrays, generators, functions."""

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

__all__ = ["LEAVES", "SavedState", "save_state"]

# Types of immutable objects.
LEAVES = frozenset(
    {type(None), bool, int, float, complex, str, bytes, range, slice, type(...), types.ModuleType, types.CodeType}
    | {types.BuiltinFunctionType, torch.dtype, torch.device, torch.Size}
)
# Longer containers are taken for data: the list of their items is restored, but not the state of the items.
_LONGEST_SEARCHED = 10_000
# Packages whose objects are not searched, because they belong to the trainer, a logger or this measurement.
_NOT_SEARCHED = {"lightning", "lightning_fabric", "pytorch_lightning", "nclightning", "wandb", "tensorboard"}
# Modules of the standard library whose objects are searched.
_SEARCHED = {"__main__", "collections", "functools", "itertools", "types", "random"}
_INSIDE_TORCH = ("torch._", "torch.fx", "torch.jit", "torch.distributed", "torch.utils.tensorboard")

Restore = Callable[[dict[int, Any]], str | None]
Children = Iterable[tuple[Any, Any]]


class SavedState(NamedTuple):
    """The saved state of an object.

    Attributes:
        restore: Function that restores it. It gets a mapping from the ``id`` of objects to their replacements, and
            returns why it failed, or None.
        children: The objects that it refers to, with their names or numbers.
        replacement: A replacement for the object itself, if its state cannot be set.
    """

    restore: Restore | None = None
    children: Children = ()
    replacement: Any = None


def save_state(value: Any) -> SavedState:
    """Save the state of an object, but not the state of the objects that it refers to.

    Args:
        value: Any object except a tensor.
    """
    return _saver_of(type(value))(value)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _saver_of(kind: type) -> Callable[[Any], SavedState]:
    """Return the function that saves the state of objects of a class."""
    if hasattr(kind, "cache_clear") and hasattr(kind, "cache_info"):
        return _cache
    return next((how for kinds, how in _SAVERS if issubclass(kind, kinds)), _object)


def _numbered(values: Iterable[Any]) -> Children:
    return enumerate(values) if len(values) <= _LONGEST_SEARCHED else ()  # type: ignore[arg-type]


def _same(some: Iterable[Any], others: Iterable[Any]) -> bool:
    return all(map(operator.is_, some, others))


def _mapping(value: dict[Any, Any]) -> SavedState:
    """Save the items of a dictionary."""
    # Methods of the base class are used, because a subclass may override them.
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

    def restore(replacements: dict[int, Any]) -> None:
        wanted = {key: replacements.get(id(item), item) for key, item in saved.items()} if replacements else saved
        same = base.__len__(value) == len(wanted) and _same(base.keys(value), wanted)
        if same and _same(base.values(value), wanted.values()):
            return
        base.clear(value)
        for key, item in wanted.items():
            base.__setitem__(value, key, item)

    saved_state = SavedState(restore, children)
    return _combined(saved_state, _attributes(value)) if getattr(value, "__dict__", None) else saved_state


def _container(value: Any) -> SavedState:
    """Save the items of a list, deque, set or array."""
    saved = list(value)

    def restore(replacements: dict[int, Any]) -> None:
        wanted = [replacements.get(id(item), item) for item in saved] if replacements else saved
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

    saved_state = SavedState(restore, () if isinstance(value, bytearray | array.array) else _numbered(saved))
    return _combined(saved_state, _attributes(value)) if getattr(value, "__dict__", None) else saved_state


def _array(value: np.ndarray[Any, Any]) -> SavedState:
    """Save the content of a numpy array."""
    if not value.flags.writeable:
        return SavedState()
    saved = value.copy()

    def restore(replacements: dict[int, Any]) -> None:
        if value.shape != saved.shape:
            value.resize(saved.shape, refcheck=False)
        if value.dtype == object or value.tobytes() != saved.tobytes():
            value[...] = saved

    return SavedState(restore)


def _state(value: Any) -> SavedState:
    """Save the state of a random generator."""
    bits = getattr(value, "bit_generator", value)
    saved: Any
    if isinstance(bits, random.Random):
        saved = bits.getstate()
    else:
        saved = copy.deepcopy(bits.state) if isinstance(bits, np.random.BitGenerator) else bits.get_state()

    def restore(replacements: dict[int, Any]) -> None:
        if isinstance(bits, random.Random):
            bits.setstate(saved)
        elif isinstance(bits, np.random.BitGenerator):
            bits.state = saved
        else:
            bits.set_state(saved)

    return SavedState(restore)


def _cell(value: types.CellType) -> SavedState:
    """Save the variable of a closure."""
    try:
        saved = value.cell_contents
    except ValueError:  # The cell is empty.
        return SavedState()

    def restore(replacements: dict[int, Any]) -> None:
        value.cell_contents = replacements.get(id(saved), saved)

    return SavedState(restore, (("a variable", saved),))


def _function(value: types.FunctionType) -> SavedState:
    """Save the variables, attributes and global variables of a function of the user."""
    root = (value.__module__ or "").partition(".")[0]
    if root in _NOT_SEARCHED | sys.stdlib_module_names - _SEARCHED or root in {"torch", "numpy", "torchmetrics"}:
        return SavedState()
    inside: list[Any] = [*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__]
    children = [("a variable", each) for each in inside if each is not None]
    saved_state = _attributes(value)
    saved_state = _combined(SavedState(None, children), saved_state) if vars(value) else SavedState(None, children)
    return saved_state if _is_library(value.__module__) else _combined(saved_state, _globals(value))


def _globals(value: types.FunctionType) -> SavedState:
    """Save the global variables that a function names."""
    space = value.__globals__
    saved = {name: space[name] for name in _names(value.__code__) if name in space}

    def restore(replacements: dict[int, Any]) -> None:
        for name, item in saved.items():
            if space.get(name) is not (wanted := replacements.get(id(item), item)):
                space[name] = wanted

    return SavedState(restore, saved.items())


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> frozenset[str]:
    inner = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return frozenset(code.co_names).union(*inner)


def _class(value: type) -> SavedState:
    """Save the attributes of a class of the user."""
    saved = {name: item for name, item in vars(value).items() if not name.startswith("__")}

    def restore(replacements: dict[int, Any]) -> None:
        now = {name for name in vars(value) if not name.startswith("__")}
        for name in now - saved.keys():
            delattr(value, name)
        for name, item in saved.items():
            if vars(value).get(name) is not (wanted := replacements.get(id(item), item)):
                setattr(value, name, wanted)

    bases = (("a base class", base) for base in value.__bases__ if not _is_library(base.__module__))
    return SavedState(restore, [*saved.items(), *bases])


def _cache(value: Any) -> SavedState:
    """Save that a cache of results is empty. A cache with entries may grow, which changes no result."""
    is_empty = not value.cache_info().currsize

    def restore(replacements: dict[int, Any]) -> None:
        if is_empty:
            value.cache_clear()

    return SavedState(restore, (("the function", value.__wrapped__),))


def _generator(value: types.GeneratorType[Any, Any, Any]) -> SavedState:
    """Save the position of a generator, which cannot be restored."""
    where = _position(value)

    def restore(replacements: dict[int, Any]) -> str | None:
        return None if _position(value) == where else "a generator cannot be rewound"

    return SavedState(restore)


def _iterator(value: Any) -> SavedState:
    """Save an iterator as a copy that replaces it."""
    if isinstance(value, io.IOBase):
        return SavedState()
    try:
        with warnings.catch_warnings():
            # From Python 3.12 on, iterators of itertools warn that Python 3.14 does not know how to copy them.
            warnings.simplefilter("ignore", DeprecationWarning)
            return SavedState(None, _numbered(value.__reduce__()[1]), _copy_of(value))
    except (TypeError, IndexError):
        return SavedState()


def _copy_of(value: Any) -> Any:
    """Copy an iterator, and the iterators that it reads."""
    make, arguments, *state = value.__reduce__()
    plain = (isinstance(each, Iterator) and not hasattr(each, "__dict__") for each in arguments)
    made = make(*(_copy_of(each) if is_one else each for each, is_one in zip(arguments, plain, strict=True)))
    if state and state[0] is not None:
        made.__setstate__(state[0])
    return made


def _position(value: types.GeneratorType[Any, Any, Any]) -> Any:
    frame = value.gi_frame
    return None if frame is None else (frame.f_lasti, {name: id(item) for name, item in frame.f_locals.items()})


def _object(value: Any) -> SavedState:
    """Save the attributes of an object, unless it belongs to a library that is not searched."""
    kind = type(value)
    if not isinstance(value, nn.Module):
        if kind.__module__.partition(".")[0] in sys.stdlib_module_names - _SEARCHED:
            return SavedState()
        modules = [base.__module__ for base in kind.__mro__]
        if any(name.partition(".")[0] in _NOT_SEARCHED or name.startswith(_INSIDE_TORCH) for name in modules):
            return SavedState()
    saved_state = _attributes(value)
    return (
        saved_state
        if _is_library(kind.__module__)
        else _combined(saved_state, SavedState(None, (("its class", kind),)))
    )


def _attributes(value: Any) -> SavedState:
    """Save the attributes and slots of an object."""
    saved_state = SavedState()
    state = getattr(value, "__dict__", None)
    if isinstance(state, dict):
        saved_state = _mapping(state)
    kind: Any = type(value)
    names = _slots(kind)
    if not names or isinstance(value, types.FunctionType | type):
        return saved_state
    saved = {name: getattr(value, name) for name in names if hasattr(value, name)}

    def restore(replacements: dict[int, Any]) -> None:
        for name, item in saved.items():
            if getattr(value, name, None) is not (wanted := replacements.get(id(item), item)):
                object.__setattr__(value, name, wanted)

    return _combined(saved_state, SavedState(restore, saved.items()))


@functools.lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[str, ...]:
    found = (item for base in kind.__mro__ for item in vars(base).items())
    return tuple(name for name, slot in found if isinstance(slot, types.MemberDescriptorType))


def _combined(one: SavedState, other: SavedState) -> SavedState:
    """Join two saved states of one object."""

    def restore(replacements: dict[int, Any]) -> str | None:
        reasons = [each.restore(replacements) for each in (one, other) if each.restore is not None]
        return next((reason for reason in reasons if reason), None)

    return SavedState(restore, [*one.children, *other.children])


@functools.lru_cache(maxsize=4096)
def _is_library(module: str | None) -> bool:
    """Return whether a module is a library and not the user's own code. Its variables and classes are left alone."""
    root = (module or "").partition(".")[0]
    if root in _NOT_SEARCHED or root in sys.stdlib_module_names - {"__main__"}:
        return True
    file = getattr(sys.modules.get(module or ""), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def _slots_of(*names: str) -> Callable[[Any], SavedState]:
    return lambda value: SavedState(None, [(name, getattr(value, name)) for name in names])


_SAVERS: tuple[tuple[Any, Callable[[Any], SavedState]], ...] = (
    (dict, _mapping),
    ((list, collections.deque, set, bytearray, array.array), _container),
    ((tuple, frozenset), lambda value: SavedState(None, _numbered(value))),
    (types.ModuleType, lambda _: SavedState()),
    (np.ndarray, _array),
    ((torch.Generator, random.Random, np.random.RandomState, np.random.Generator, np.random.BitGenerator), _state),
    (types.FunctionType, _function),
    (types.MethodType, _slots_of("__self__", "__func__")),
    (type, lambda value: SavedState() if _is_library(value.__module__) else _class(value)),
    (types.CellType, _cell),
    ((staticmethod, classmethod), _slots_of("__func__")),
    (property, _slots_of("fget", "fset")),
    (functools.partial, _slots_of("func", "args", "keywords")),
    (types.GeneratorType, _generator),
    (Iterator, lambda value: _object(value) if hasattr(value, "__dict__") else _iterator(value)),
)
