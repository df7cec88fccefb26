"""Configurations: YAML files, and those that are shipped."""

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
# Far above what configurations need, far below what takes long to process.
_MOST_BYTES = 2**20
_MOST_ENTRIES = 20_000
_MOST_LEVELS = 50


def shipped_configs() -> dict[str, Path]:
    """Return the shipped configurations by name."""
    folder = Path(str(resources.files("nclightning"))) / "configs"
    if not folder.is_dir():  # A checkout keeps them beside the package; the wheel holds them inside.
        folder = Path(__file__).resolve().parents[1] / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_configuration(name: str) -> Path:
    """Find the file that ``--config`` names.

    Args:
        name: A path, or the name of a shipped configuration with or without ``.yaml``. A file here wins.

    Returns:
        The file.

    Raises:
        ValueError: If there is neither.
    """
    if not name.strip():
        raise UserError(f"--config needs a file, or a name out of {', '.join(shipped_configs())}.")
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # No such home, a name too long, a zero byte.
        raise UserError(f"--config {name[:100]!r}: no readable file name ({error}).") from error
    if is_folder:
        raise UserError(f"--config {name} is a folder. Give a file in it, such as {Path(name) / 'config.yaml'}.")
    shipped = shipped_configs()
    found = shipped.get(name.removesuffix(".yaml"))
    if found is None:
        raise UserError(
            f"--config {name}: no such file, and no shipped configuration of that name. "
            f"Shipped are: {', '.join(shipped)}."
        )
    return found


def read_configuration(path: Path, option: str = "--config") -> dict[str, Any]:
    """Read a configuration.

    Args:
        path: YAML file.
        option: What names the file, for messages.

    Returns:
        Its content.

    Raises:
        ValueError: If it cannot be read, is no mapping, or is not what it looks like: see :func:`check_yaml`.
    """
    source = f"{option} {path}"
    text = read_text(path, source)
    try:
        config = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: {yaml_problem(error)}.") from error
    except ValueError as error:  # Also of a number or a date that YAML takes for one.
        raise UserError(f"{source}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{source}: expected a mapping of options, got {type(config).__name__}.")
    return config


def model_arguments(path: Path) -> dict[str, Any]:
    """Read the model's ``init_args`` in a configuration.

    Args:
        path: YAML file. Its model may be the path of another one, relative to this one.

    Returns:
        Arguments by name, with ``lambda`` under its name in Python; empty where there are none.

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


def read_text(path: Path, source: str, most_bytes: int = _MOST_BYTES) -> str:
    """Read a small text file.

    Args:
        path: The file.
        source: What names it, for messages.
        most_bytes: A larger file is refused.

    Returns:
        Its text, without a byte-order mark.

    Raises:
        ValueError: If it cannot be read, is too large, or is no text in UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(most_bytes + 1)
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}.") from error
    if len(content) > most_bytes:
        raise UserError(f"{source}: larger than {most_bytes:,} bytes, so it is not what it is given as.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: no text in UTF-8. Save it as UTF-8, if it is text.") from error
    if "\0" in text:
        raise UserError(f"{source}: no text, it holds zero bytes.")
    return text


def parse_yaml(text: str) -> Any:
    """Read plain values.

    Args:
        text: YAML.

    Returns:
        Its content.

    Raises:
        ValueError: As of :func:`check_yaml`, or of a number or a date that YAML takes for one.
        yaml.YAMLError: If it is no YAML.
    """
    check_yaml(text)
    return yaml.load(text, Loader=_LOADER)


def check_yaml(text: str, any_tag: bool = False) -> None:
    """Raise unless a text is YAML that is read in a time and a memory that its length tells.

    Aliases can stand for any number of entries and for themselves, and a key that comes twice loses one of its values.

    Args:
        text: To check.
        any_tag: Whether tags of Python objects are left to the caller.

    Raises:
        ValueError: With the place.
        yaml.YAMLError: If it is no YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise UserError(f"line {_line(event)} is nested more than {_MOST_LEVELS} levels deep.")
    for document in yaml.compose_all(text, Loader=_LOADER):
        # Without aliases a text has fewer entries than letters.
        _measure(document, {}, any_tag, max(_MOST_ENTRIES, len(text)))


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None], any_tag: bool, most: int) -> tuple[int, int]:
    """Count entries and levels with all aliases written out. An alias names what came before, so that is known."""
    if id(node) in known:
        measured = known[id(node)]
        if measured is None:
            raise UserError(f"line {_line(node)} holds an alias of itself.")
        return measured
    known[id(node)] = None
    if not any_tag and (":python/" in node.tag or not node.tag.startswith("tag:yaml.org,2002:")):
        raise UserError(f"line {_line(node)} has the tag {_shown(node.tag)}. Write plain values.")
    entries, levels = 1, 0
    for child in _children(node):
        below = _measure(child, known, any_tag, most)
        entries, levels = entries + below[0], max(levels, below[1])
    if entries > most or levels >= _MOST_LEVELS:
        raise UserError(f"line {_line(node)} has too many entries or levels once its aliases are written out.")
    known[id(node)] = entries, levels + 1
    return entries, levels + 1


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise UserError(f"line {_line(key)} gives {_shown(key.value)} a second time.")
                seen.add((key.tag, key.value))
            yield key
            yield value


def yaml_problem(error: yaml.YAMLError) -> str:
    """Say in one line what is wrong with a YAML file.

    Args:
        error: Of PyYAML.

    Returns:
        With the line, without a full stop.
    """
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if problem is None:
        return f"no YAML ({' '.join(str(error).split())[:200]})"
    return f"no YAML ({problem}{'' if mark is None else f', line {mark.line + 1}'})"


def _line(part: Any) -> int:
    return int(part.start_mark.line) + 1


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
