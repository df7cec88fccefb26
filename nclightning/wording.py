"""Converts errors of the parser, Lightning, torch and the operating system to one sentence for the user."""

from __future__ import annotations

import errno
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from pydoc import locate
from traceback import walk_tb
from typing import Any

from nclightning.compat.twins import is_refusal
from nclightning.configurations import find_configuration, read_configuration
from nclightning.errors import UserError, nearest
from nclightning.library_errors import client_error, constructor_error

__all__ = ["library_errors_worded", "message_for_user", "one_line", "option_of", "sentence_for_parser_error"]

# Patterns for the messages of jsonargparse. If a message matches several, the first one here is the most informative.
_KINDS = {
    "unknown": re.compile(r"(?:Option|does not accept option|Key|No action for key) ['\"](?P<name>[^'\"]+)['\"]"),
    "no file": re.compile(r"Expected a path but (?P<name>\S+\.(?:yaml|yml|json)) either not accessible"),
    "not text": re.compile(r"(?P<name>codec can't decode)"),
    "not a mapping": re.compile(r"Unable to load config (?P<name>.*)"),
    "missing": re.compile(r"the following arguments are required: (?P<name>.+)"),
    "no class": re.compile(r"Expected a dot import path string: (?P<name>\S+)"),
    "no name": re.compile(r"module '(?P<module>\S+)' has no attribute '(?P<name>\w+)'"),
    "no module": re.compile(r"No module named '(?P<name>[^']+)'"),
    "wrong class": re.compile(r"does not correspond to a subclass of (?P<name>\w+)"),
    "no class_path": re.compile(r"Not a valid subclass of (?P<name>\w+)"),
    "type": re.compile(
        r"Expected an? (?!path but)(?P<name>.+?)(?:\. Got value: (?P<value>.*?))?(?:\. Got value: .*)?$"
    ),
}
_SENTENCES = {
    "unknown": "{owner} has no argument {name!r}.",
    "no file": "{name}: no such file.",
    "not text": "the file is not text in UTF-8.",
    "not a mapping": "expected a mapping of options, or a YAML file with one, got {name}.",
    "missing": "{name} must be given{of_owner}.",
    "no class": "there is no class {name!r}.",
    "no name": "there is no {name!r} in {module}.",
    "no module": "there is no Python module {name!r}.",
    "wrong class": "{value} is not a {name}.",
    "no class_path": "expected a class_path with its init_args, got {value}.",
    "type": "expected {expected}, got {value}.",
}
_KEY = re.compile(r'Parser key "([^"]+)"')
_GROUP = re.compile(r"Group '([^']+)' does not accept")
_CLASS = re.compile(r"Problem with given class_path '([^']+)'|class_path='([^']+)'")
_GIVEN = re.compile(r"Given value: (?:NestedArg\(key='[^']*', val='?)?(.*?)(?:'?\))?$")
_TYPE_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list": "a list",
    "Sequence": "a list",
    "Iterable": "a list",
    "dict": "a mapping",
    "Mapping": "a mapping",
}
# Base classes of options that take a class. They are paths, so that errors about other options do not import Lightning.
_BASE_CLASSES = {
    "model": "lightning.pytorch.LightningModule",
    "data": "lightning.pytorch.LightningDataModule",
    "callbacks": "lightning.pytorch.Callback",
    "logger": "lightning.pytorch.loggers.Logger",
    "optimizer": "torch.optim.Optimizer",
}
# Functions of this package that pass the user's options to constructors of other libraries.
_CONSTRUCTING_FUNCTIONS = ("instantiate_classes", "before_fit", "configure_optimizers")
_LIBRARIES = ("lightning", "pytorch_lightning", "lightning_fabric", "torch", "torchmetrics")
# Errors that come from the disk or the run folder, not from a bug.
_DISK_ERRORS = ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "EIO", "ESTALE", "EFBIG")
# Parts of messages of torch and Lightning, and the sentence that replaces a message with one of these parts.
_LIBRARY_MESSAGES = (
    (
        ("can't allocate memory", "out of memory", "not enough memory", "Unable to allocate"),
        "this problem does not fit in memory: use fewer classes, samples or dimensions, or another device.",
    ),
    (
        ("PytorchStreamWriter failed", "Parent directory", "cannot be opened", "unexpected pos", "Missing folder"),
        "the run folder cannot be written ({}): the disk is full, or the folder no longer exists.",
    ),
    (("Error(s) in loading state_dict",), "the checkpoint does not fit the model: {}."),
)
_TOP_LEVEL_MODULES = ("nclightning", "torch", "lightning", "torchmetrics")
_MAX_SHOWN = 60


def sentence_for_parser_error(message: str, words: Sequence[str], options: Iterable[str], source: str = "") -> str:
    """Convert an error message of a parser to one sentence.

    Args:
        message: The message of argparse or jsonargparse, possibly of several lines.
        words: The command line.
        options: All options, as they are written on the command line.
        source: The option that named the configuration with the error, such as ``--config a.yaml``; empty if the error
            is on the command line.

    Returns:
        The sentence, with the option as it was typed, and a suggestion for a misspelt name.
    """
    words = list(words)
    if (found := re.search(r"unrecognized arguments: (\S+)", message)) is not None:
        name = found[1].partition("=")[0]
        if name.startswith("-"):
            return f"{name}: no such option.{_nearest_option(name, options)}"
        return f"{name!r} does not belong to an option. Options begin with --."
    if (found := re.search(r"argument (?:-\w/)?(\S+): expected \S+ \S*\s?argument", message)) is not None:
        # Options that another option, or nothing, follows.
        without_value = [word for word, after in zip(words, [*words[1:], "--"], strict=False) if after.startswith("--")]
        return f"{next((word for word in without_value if word.startswith(found[1])), found[1])} needs a value."
    lines = message.splitlines()
    kind, at, found = _most_informative(lines)
    path, owner = _option_path(lines[: at + 1]), _captured(_CLASS, lines[: at + 1])
    if found is None:
        said = one_line(_KEY.sub(r"\1", message.removeprefix("argument ")))
        return f"{source}: {said}" if source else said
    name = re.sub(r"^(fit|validate|test)\.", "--", found["name"])  # A required option, as the user types it.
    option, value = (None, None) if source else _typed_option([*path, name] if kind == "unknown" else path, words)
    if option is None and not source:  # The parser found the error after it had read the configurations.
        source = _configuration_with([*path, name] if kind == "unknown" else path, words)
    value = value or found.groupdict().get("value") or _captured(_GIVEN, lines[at:], first=True) or "nothing"
    if kind == "unknown" and owner is None:
        path.append(name)
        said = "no such option." + _nearest_option(f"--{'.'.join(path)}", options, dashes=not source)
    else:
        expected = _expected_types(lines, at) if kind == "type" else ""
        said = _SENTENCES["no class_path" if expected == "null" else kind].format(
            name=name,
            value=_shortened(value),
            owner=owner,
            of_owner=f" for {owner}" if owner else "",
            module=found.groupdict().get("module"),
            expected=expected,
        ) + nearest(name, _valid_names(kind, owner, path, found))
    return ": ".join(filter(None, (source, option or ".init_args.".join(path), said)))


def _configuration_with(path: Sequence[str], words: Sequence[str]) -> str:
    """Return ``--config FILE`` for the last configuration that sets an option, else for the last configuration.

    It is empty if the command line has no configuration.
    """
    given = [after for word, after in pairwise(words) if word in ("-c", "--config")]
    for each in reversed(given):
        content: Any = read_configuration(find_configuration(each))
        for name in ".".join(path).split("."):
            content = content.get(name) if isinstance(content, dict) else None
        if content is not None:
            return f"--config {each}"
    return f"--config {given[-1]}" if given else ""


def _valid_names(kind: str, owner: str | None, path: Sequence[str], found: re.Match[str]) -> Sequence[str]:
    """Return the valid names, one of which may be suggested for a misspelt one."""
    if kind == "unknown" and owner is not None:
        return _arguments(owner)
    if kind == "no class":
        return _classes(path)
    if kind == "no name":
        return dir(import_module(found["module"]))
    return _TOP_LEVEL_MODULES if kind == "no module" else ()


def option_of(message: str, words: Sequence[str]) -> str:
    """Return the option of the command line that a message is about; empty if there is none.

    Args:
        message: A message of jsonargparse.
        words: The command line.
    """
    return _typed_option(_option_path(message.splitlines()), words)[0] or ""


def _most_informative(lines: Sequence[str]) -> tuple[str, int, re.Match[str] | None]:
    """Find the most informative line of a message: its key in ``_KINDS`` (empty if there is none), number and match."""
    for kind, pattern in _KINDS.items():
        for i, line in enumerate(lines):
            if (found := pattern.search(line)) is not None:
                return kind, i, found
    return "", len(lines), None


def _option_path(lines: Sequence[str]) -> list[str]:
    """Return the option names in a message, from the outermost to the innermost, which is indented furthest."""
    path: list[tuple[int, str]] = []
    for line in lines:
        for pattern in (_KEY, _GROUP):
            if (found := pattern.search(line)) is not None:
                indent = len(line) - len(line.lstrip(" -"))
                path = [*((i, name) for i, name in path if i < indent), (indent, found[1])]
    return [name for _, name in path]


def _captured(pattern: re.Pattern[str], lines: Sequence[str], first: bool = False) -> str | None:
    """Return the text that a pattern captures in its last match, or in its first one; None without a match."""
    found = [next(filter(None, match.groups()), "") for line in lines for match in pattern.finditer(line)]
    return (found[0] if first else found[-1]) if found else None


def _expected_types(lines: Sequence[str], at: int) -> str:
    """Describe the expected types, which are in line ``at`` and in the next lines with the same indentation."""
    indent, names = len(lines[at]) - len(lines[at].lstrip()), list[str]()
    for line in lines[at:]:
        found = _KINDS["type"].search(line)
        if found is None or len(line) - len(line.lstrip()) != indent:
            break
        literal = re.match(r"typing\.Literal\[(.*)\]", found["name"])
        names += [found["name"]] if literal is None else literal[1].split(", ")
    described = list(dict.fromkeys(map(_type_in_words, names)))
    described = [each for each in described if each != "null"] or described
    return " or ".join(filter(None, (", ".join(described[:-1]), described[-1])))


def _type_in_words(expected: str) -> str:
    """Describe a type in plain words. A permitted value is returned unchanged."""
    name = re.sub(r"<class '([^']+)'>", r"\1", expected)
    if name == expected and "[" not in name and "." not in name:
        return name  # A permitted value, not a type.
    name = name.partition("[")[0].rpartition(".")[2]
    return _TYPE_WORDS.get(name, f"a {name}")


def _typed_option(path: Sequence[str], words: Sequence[str]) -> tuple[str | None, str | None]:
    """Return the option on the command line that sets an argument or a part of it, and its value; None if unknown."""
    if not path:
        return None, None
    wanted = re.sub(r"^model\.lambda$", "model.lambda_", ".".join(path))
    best: tuple[int, str | None, str | None] = (0, None, None)
    for i, word in enumerate(words):
        name, equals, value = word.partition("=")
        key = name[2:].replace(".init_args", "").rstrip("+")
        key = "model.lambda_" if name in ("--lambda", "--model.lambda", "--model.init_args.lambda") else key
        if name.startswith("--") and (wanted + ".").startswith(key + ".") and len(key) >= best[0]:
            value = value if equals else words[i + 1] if i + 1 < len(words) else ""
            best = len(key), name, value if key == wanted else None
    return best[1:]


def _nearest_option(name: str, options: Iterable[str], dashes: bool = True) -> str:
    """Suggest an option for a misspelt one; empty if none is similar."""
    if name == "--lambda":
        return " Did you mean model.init_args.lambda?"
    options = [*options, "--config", "--lambda"]
    root, dot, rest = name.partition(".")
    said = nearest(name.lstrip("-"), [each.lstrip("-") for each in options]).replace("mean ", "mean --")
    if not said and dot:  # An option of an option: --modle.init_args.loss.
        said = nearest(root, dict.fromkeys(each.partition(".")[0] for each in options))
        said = f"{said[:-1]}.{rest}?" if said else ""
    if not dashes:  # In a configuration.
        said = said.replace("--", "")
    return said


def _arguments(owner: str) -> list[str]:
    """Return the names of a constructor's arguments; none if it cannot be inspected."""
    try:
        module, _, name = owner.rpartition(".")
        parameters = inspect.signature(getattr(import_module(module), name)).parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        return []
    return list(parameters)


def _classes(path: Sequence[str]) -> list[str]:
    """Return the names of the classes that an option accepts."""
    base = _BASE_CLASSES.get(path[-1].rpartition(".")[2].rstrip("+")) if path else None
    return [] if base is None else [each.__name__ for each in _subclasses(locate(base))]


def _subclasses(base: Any) -> Iterator[type]:
    """Yield all subclasses of a class."""
    derived: list[type] = base.__subclasses__()
    for each in derived:
        yield each
        yield from _subclasses(each)


def _shortened(value: str) -> str:
    """Quote a value, and shorten it if it is long."""
    return repr(value if len(value) <= _MAX_SHOWN else f"{value[: _MAX_SHOWN - 3]}...")


def one_line(text: object, most: int = 400) -> str:
    """Convert a text to one line that ends with a full stop.

    Args:
        text: The text.
        most: Largest number of characters.

    Returns:
        The line.
    """
    line = " ".join(str(text).split())
    line = line if len(line) <= most else f"{line[:most]}..."
    return line if line.endswith((".", "!", "?")) else f"{line}."


@contextmanager
def library_errors_worded(words: Sequence[str], what: str = "") -> Iterator[None]:
    """Convert errors to user errors if Lightning or torch raises them about the user's options.

    Objects of these libraries are constructed from the options in the block.

    Args:
        words: The command line.
        what: The option to name if the message mentions no option or value of the command line.

    Raises:
        UserError: Instead of the library's error. Other exceptions may be bugs of this package or of the user's code,
            and are raised unchanged.
    """
    try:
        yield
    except Exception as error:
        user_error = _user_error(error, words, what)
        if user_error is None:
            raise
        raise user_error from error


def _user_error(error: BaseException, words: Sequence[str], what: str) -> UserError | None:
    """Convert an exception of a library to a user error; None if it may be a bug."""
    client_text, constructor_text = client_error(error), constructor_error(error)
    while (cause := error.__cause__ or error.__context__) is not None:  # The first cause is the most informative.
        error = cause
    if isinstance(error, UserError):
        return error
    if client_text is not None:
        return UserError(one_line(client_text, most=1000))
    if constructor_text is None and not _raised_by_library(error):
        return None
    text = one_line(error) if constructor_text is None else one_line(constructor_text, most=1000)
    options = [word.partition("=") for word in words]
    given = [
        (name, value if equals else after)
        for (name, equals, value), after in zip(options, [*words[1:], ""], strict=True)
        if name.startswith("--")
    ]
    for name, value in reversed(given):  # The last occurrence of an option counts.
        if re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", text):
            return UserError(f"{name} {value}: {text}")
    for name, value in reversed(given):
        if len(value) > 1 and value in text:
            return UserError(f"{name} {value}: {text}")
    return UserError(f"{what}: {text}" if what else text)


def _raised_by_library(error: BaseException) -> bool:
    """Return whether the code of Lightning or torch itself raised an error, not code that it called."""
    if not (isinstance(error, (ValueError, TypeError, ModuleNotFoundError)) or is_refusal(error)):
        return False
    frames = [(frame.f_globals.get("__name__", ""), frame.f_code.co_name) for frame, _ in walk_tb(error.__traceback__)]
    ours = [frame for frame in frames if frame[0].partition(".")[0] == "nclightning"]
    return frames[-1][0].partition(".")[0] in _LIBRARIES and (not ours or ours[-1][1] in _CONSTRUCTING_FUNCTIONS)


def message_for_user(error: BaseException) -> str | None:
    """Return one sentence for an error that the user can fix.

    Args:
        error: The error that ended a command.

    Returns:
        The sentence; None if the error may be a bug of this package or of code that it calls.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return one_line(cause, most=2000)
        cause = cause.__cause__
    if (said := client_error(error)) is not None:
        return one_line(said, most=1000)
    if is_refusal(error):
        return one_line(error)
    if isinstance(error, OSError):
        return _disk_error(error)
    if isinstance(error, (MemoryError, RuntimeError)):
        text = "out of memory" if isinstance(error, MemoryError) else str(error)
        said = next((each for parts, each in _LIBRARY_MESSAGES if any(part in text for part in parts)), None)
        return None if said is None else said.format(one_line(text, 200)[:-1])
    return None


def _disk_error(error: OSError) -> str | None:
    """Return one sentence for an error of the disk or the run folder; None for other errors."""
    name = "" if error.filename is None else f"{error.filename}: "
    if errno.errorcode.get(error.errno or 0) in _DISK_ERRORS:
        return f"{name}{error.strerror}."
    if error.errno == errno.ENOENT and name and not Path(error.filename).parent.exists():
        return f"{name}its folder no longer exists. Only what was saved before remains of the run."
    return None
