"""Finds, in source, names of other libraries that their documentation does not promise. See ``foreign_uses``."""

import ast
import inspect
import re
import textwrap
from functools import cache
from importlib import import_module
from types import ModuleType

# Libraries whose modules are judged one by one. Of others only names with underscores are.
JUDGED = {
    "jsonargparse", "lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning", "tensorboard", "torch",
    "torchmetrics", "torchvision",
}  # fmt: skip
# Their modules that their documentation shows as the places to import from.
DOCUMENTED_MODULES = {
    "jsonargparse", "lightning", "torch", "torchmetrics",
    *(f"lightning.pytorch{name}" for name in ("", ".callbacks", ".cli", ".core.optimizer", ".loggers",
      ".loggers.logger", ".plugins.io", ".plugins.precision", ".strategies", ".utilities")),
    *(f"torch.{name}" for name in ("autograd", "backends", "backends.cudnn", "compiler", "cuda", "distributed",
      "distributed.fsdp", "distributed.tensor", "fft", "func", "jit", "linalg", "nn", "nn.functional", "nn.init",
      "nn.parallel", "nn.parameter", "nn.utils", "optim", "optim.lr_scheduler", "random", "special", "utils",
      "utils.data", "utils.hooks", "utils.tensorboard", "version")),
}  # fmt: skip
# Attributes without an underscore that are not documented either.
INTERNAL = {
    "all_writers", "batch_progress", "epoch_loop", "epoch_progress", "evaluation_loop", "file_writer", "fit_loop",
    "manual_optimization", "optim_progress", "optim_step_progress", "predict_loop", "test_loop",
    "train_progress_bar_id", "validate_loop",
}  # fmt: skip
# Names with an underscore that documentation shows: of named tuples, and in the os module.
DOCUMENTED = {"_asdict", "_field_defaults", "_fields", "_make", "_replace"}
_BY_NAME = {"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller", "__getattr__", "__setattr__",
            "__getattribute__", "__delattr__"}  # fmt: skip
_IMPORTS = {"import_module", "__import__", "locate"}


def is_private(name):
    return name.startswith("_") and name.isidentifier() and name.strip("_") != "" and not name.endswith("__")


def members(tree):
    """Private names that the classes of a file define: by ``def``, in the class body, or by writing to ``self``."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for each in node.body:
                targets = getattr(each, "targets", [getattr(each, "target", None)])
                names |= {t.id for t in targets if isinstance(t, ast.Name)}
                names |= {each.name} if isinstance(each, ast.FunctionDef | ast.ClassDef) else set()
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def foreign_uses(source, own=frozenset()):
    """Yield line and name of what a file uses of other libraries that their documentation does not promise.

    A private name has one underscore in front, or two and none at the end. Found is

    - ``x._name``, read, written or deleted, if ``x`` is ``self``, ``cls`` or ``super()`` and no class of the package
      (``own``) defines the name, and if ``x`` is anything else and no class of the same file does;
    - ``x.name`` with a name of ``INTERNAL``;
    - text that is such a name, wherever it stands, unless a class of the package defines it: most often it is given to
      ``getattr`` or looked up in ``vars(x)``;
    - text that begins with an underscore within what names an attribute in ``getattr`` and the like, as in an f-string;
    - an import, by statement or by ``import_module``, ``__import__`` and ``locate``, from a module of a judged library
      that is not documented, or of a private name or module of any library;
    - ``a.b.c`` that goes through such a module.

    ``DOCUMENTED`` names, ``os._exit`` and imports of this package are let be. What a class that is made from a foreign
    one does with its private names through ``self`` takes the class: see ``foreign_members``.
    """
    tree = ast.parse(source)
    here, objects = members(tree), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((node.lineno, name) for name in _imported(node, objects))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        found = None
        if isinstance(node, ast.Attribute):
            found = _attribute(node, own if _is_self(node.value) else here, objects)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            found = _text(node.value, own | here)
        elif isinstance(node, ast.Call):
            found = _call(node)
        if found is not None:
            yield node.lineno, found


def _attribute(node, allowed, objects):
    if node.attr in INTERNAL:
        return node.attr
    if is_private(node.attr):
        return None if node.attr in allowed | DOCUMENTED or ast.unparse(node) == "os._exit" else node.attr
    module = _module_of(node, objects)
    return module if module is not None and not _is_documented(module) else None


def _text(text, allowed):
    is_name = text in INTERNAL or (is_private(text) and text not in allowed | DOCUMENTED)
    return text if is_name or re.fullmatch(rf"({'|'.join(JUDGED)})(\.\w+)*\._\w+(\.\w+)*", text) else None


def _call(node):
    name, arguments = getattr(node.func, "attr", getattr(node.func, "id", "")), node.args
    if name in _BY_NAME:
        return next((text for each in arguments if (text := _beginning(each)) is not None), None)
    if name in _IMPORTS and arguments and isinstance(arguments[0], ast.Constant):
        return None if _is_documented(str(arguments[0].value)) else arguments[0].value
    return None


def _beginning(node):
    """The text that what names an attribute begins with, if that is of a private one; None else."""
    if isinstance(node, ast.Constant):
        return node.value if re.search(r"\._(?!_)", str(node.value)) else None  # Without a dot it was seen as a text.
    while not isinstance(node, ast.Constant):
        if isinstance(node, ast.JoinedStr) and node.values:
            node = node.values[0]
        elif isinstance(node, ast.BinOp):
            node = node.left
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # Of format().
            node = node.func.value
        else:
            return None
    return node.value if re.match(r"(.*\.)?_(?!_)", str(node.value)) else None


def _is_self(node):
    return (isinstance(node, ast.Name) and node.id in ("self", "cls")) or (
        isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"
    )


def _is_documented(module):
    root, *parts = module.split(".")
    if root == "nclightning":
        return True
    return not any(map(is_private, (root, *parts))) and (root not in JUDGED or module in DOCUMENTED_MODULES)


def _imported(node, objects):
    """Yield what an import statement takes of undocumented things; note what its names stand for."""
    for alias in node.names:
        if isinstance(node, ast.Import):
            module, name = alias.name, None
            objects[alias.asname or alias.name.partition(".")[0]] = (
                alias.name if alias.asname else module.partition(".")[0]
            )
        else:
            module, name = node.module or "", alias.name
        if not _is_documented(module):
            yield module
        elif module.partition(".")[0] not in ("nclightning", "__future__") and name is not None:
            if is_private(name):
                yield f"{module}.{name}"
            elif module.partition(".")[0] in JUDGED and isinstance(_get(module, name), ModuleType):
                found = _get(module, name).__name__
                objects[alias.asname or name] = found
                if not _is_documented(found):
                    yield found


def _get(module, name):
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


def _module_of(node, objects):
    """Name of the judged module that a dotted expression stands for; None if it is something else."""
    if isinstance(node, ast.Name):
        module = objects.get(node.id)
    elif isinstance(node, ast.Attribute) and (within := _module_of(node.value, objects)) is not None:
        module = found.__name__ if isinstance(found := _get(within, node.attr), ModuleType) else None
    else:
        module = None
    return module if module is not None and module.partition(".")[0] in JUDGED else None


def foreign_members(kind, package="nclightning"):
    """Private names of its foreign base classes that a class touches on itself, or takes for something else.

    That is what its body defines, or reads or writes on ``self``, ``cls`` or ``super()``, of the private and internal
    names that a base class outside of the package has: in its body, or written to ``self`` in its source.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = members(tree) | {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _is_self(n.value)}
    return {name for name in body if is_private(name) or name in INTERNAL} & {
        name for base in kind.__mro__ if base.__module__.partition(".")[0] != package for name in _names_of(base)
    } - DOCUMENTED


@cache
def _names_of(base):
    names = set(vars(base)) | set(vars(base).get("__annotations__", {}))
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
    except (OSError, TypeError):  # Of built-in classes.
        return names
    return names | {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value)
    }
