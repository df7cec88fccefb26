"""Reads and checks configurations: YAML files of the user, and those that are shipped with the package."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nclightning.arguments import name_lambda
from nclightning.errors import UserError

__all__ = [
    "check_yaml",
    "find_configuration",
    "model_arguments",
    "parse_yaml",
    "read_configuration",
    "read_text",
    "shipped_configs",
    "yaml_problem",
]

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Limits far above what configurations need, and far below what would take long to process.
_MAX_BYTES = 2**20
_MAX_ENTRIES = 20_000
_MAX_LEVELS = 50


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configurations by name."""
    folder = Path(str(resources.files("nclightning"))) / "configs"
    if not folder.is_dir():  # In a checkout they are beside the package, in a wheel inside.
        folder = Path(__file__).resolve().parents[1] / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_configuration(name: str) -> Path:
    """Return the file that ``--config`` names.

    Args:
        name: A path, or the name of a shipped configuration with or without ``.yaml``. An existing file takes
            precedence.

    Returns:
        The path of the file.

    Raises:
        ValueError: If there is no such file and no such configuration.
    """
    if not name.strip():
        raise UserError(f"--config needs a file, or one of the names {', '.join(shipped_configs())}.")
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # Unknown home folder, name too long, or zero byte.
        raise UserError(f"--config {name[:100]!r}: not a valid file name ({error}).") from error
    if is_folder:
        raise UserError(f"--config {name} is a folder. Give a file in it, such as {Path(name) / 'config.yaml'}.")
    shipped = shipped_configs()
    found = shipped.get(name.removesuffix(".yaml"))
    if found is None:
        raise UserError(
            f"--config {name}: no such file, and no shipped configuration of that name. "
            f"Shipped configurations: {', '.join(shipped)}."
        )
    return found


def read_configuration(path: Path, option: str = "--config") -> dict[str, Any]:
    """Read a configuration.

    Args:
        path: The YAML file.
        option: The option that named the file, for messages.

    Returns:
        The content of the file.

    Raises:
        ValueError: If it cannot be read, is not a mapping, or fails :func:`check_yaml`.
    """
    source = f"{option} {path}"
    text = read_text(path, source)
    try:
        config = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: {yaml_problem(error)}.") from error
    except ValueError as error:  # Also raised for text that YAML takes for a number or date, but cannot convert.
        raise UserError(f"{source}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{source}: expected a mapping of options, got {type(config).__name__}.")
    return config


def model_arguments(path: Path) -> dict[str, Any]:
    """Return the model's ``init_args`` in a configuration.

    Args:
        path: The YAML file. Its model may be the path of another file, relative to this one.

    Returns:
        Arguments by name, with ``lambda`` renamed to ``lambda_``; empty if there are none.

    Raises:
        ValueError: If a file cannot be read.
    """
    config = read_configuration(path)
    section: Any = next((config[name] for name in ("fit", "validate", "test") if name in config), config)
    model = section.get("model") if isinstance(section, dict) else None
    if isinstance(model, str) and model.endswith((".yaml", ".yml", ".json")):
        model = read_configuration(path.parent / model, f"--config {path}: model")
    arguments = model.get("init_args") if isinstance(model, dict) else None
    if not isinstance(arguments, dict):
        return {}
    name_lambda(arguments)
    return arguments


def read_text(path: Path, source: str, most_bytes: int = _MAX_BYTES) -> str:
    """Read a small text file.

    Args:
        path: The file.
        source: The option that named it, for messages.
        most_bytes: Largest size that is accepted, in bytes.

    Returns:
        The text without a byte-order mark.

    Raises:
        ValueError: If it cannot be read, is too large, or is not text in UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}.") from error
    if len(content) > most_bytes:
        raise UserError(f"{source}: larger than {most_bytes:,} bytes, which is too large for such a file.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not text in UTF-8. Save it as UTF-8, if it is text.") from error
    if "\0" in text:
        raise UserError(f"{source}: not a text file, it contains zero bytes.")
    return text


def parse_yaml(text: str) -> Any:
    """Read plain values from YAML.

    Args:
        text: The YAML text.

    Returns:
        The values.

    Raises:
        ValueError: If the text fails :func:`check_yaml`, or has an impossible number or date.
        yaml.YAMLError: If it is not YAML.
    """
    check_yaml(text)
    return yaml.load(text, Loader=_LOADER)


def check_yaml(text: str, any_tag: bool = False) -> None:
    """Raise unless a text is safe YAML: of limited size and depth, without duplicate keys or tags of Python objects.

    Aliases of aliases can expand a short text to any number of entries. If a mapping has the same key twice, PyYAML
    silently drops one of the two values.

    Args:
        text: The YAML text.
        any_tag: Whether to allow tags of Python objects.

    Raises:
        ValueError: If the text is not safe. The message has the line number.
        yaml.YAMLError: If it is not YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_LEVELS:
            raise UserError(f"line {_line(event)} is nested more than {_MAX_LEVELS} levels deep.")
    for document in yaml.compose_all(text, Loader=_LOADER):
        # A text without aliases has fewer entries than characters, so that only aliases can exceed this limit.
        _count_expanded(document, {}, any_tag, max(_MAX_ENTRIES, len(text)))


def _count_expanded(
    node: yaml.Node, known: dict[int, tuple[int, int] | None], any_tag: bool, most: int
) -> tuple[int, int]:
    """Return the numbers of entries and levels of a node, with all aliases expanded.

    ``known`` has the results by the ids of nodes. An alias refers to an earlier node, so that its result is known. None
    marks a node whose children are being counted.
    """
    if id(node) in known:
        measured = known[id(node)]
        if measured is None:
            raise UserError(f"line {_line(node)} contains an alias of itself.")
        return measured
    known[id(node)] = None
    if not any_tag and (":python/" in node.tag or not node.tag.startswith("tag:yaml.org,2002:")):
        raise UserError(f"line {_line(node)} has the tag {_quoted(node.tag)}. Use plain values.")
    entries, levels = 1, 0
    for child in _children(node):
        below = _count_expanded(child, known, any_tag, most)
        entries, levels = entries + below[0], max(levels, below[1])
    if entries > most or levels >= _MAX_LEVELS:
        raise UserError(f"line {_line(node)} has too many entries or levels once its aliases are expanded.")
    known[id(node)] = entries, levels + 1
    return entries, levels + 1


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    """Yield the nodes below a node. Raise if a mapping has the same key twice."""
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise UserError(f"line {_line(key)} repeats the key {_quoted(key.value)}.")
                seen.add((key.tag, key.value))
            yield key
            yield value


def yaml_problem(error: yaml.YAMLError) -> str:
    """Describe in one line what is wrong with a YAML file.

    Args:
        error: An error of PyYAML.

    Returns:
        The message with the line number, without a full stop.
    """
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if problem is None:
        return f"not YAML ({' '.join(str(error).split())[:200]})"
    return f"not YAML ({problem}{'' if mark is None else f', line {mark.line + 1}'})"


def _line(part: Any) -> int:
    """Return the line number of a node or an event."""
    return int(part.start_mark.line) + 1


def _quoted(text: str) -> str:
    """Quote a text, and shorten it to 60 characters."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
