"""Configurations: YAML files, and those that are shipped."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from nclightning.errors import UserError

__all__ = ["find_configuration", "model_arguments", "read_configuration", "shipped_configs"]


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
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs()
    found = shipped.get(name.removesuffix(".yaml"))
    if found is None:
        raise UserError(
            f"--config {name}: no such file, and no shipped configuration of that name. "
            f"Shipped are: {', '.join(shipped)}."
        )
    return found


def read_configuration(path: Path) -> dict[str, Any]:
    """Read a configuration; ``lambda`` is no Python name, so it becomes the model's argument ``lambda_``.

    Args:
        path: YAML file.

    Returns:
        Its content.

    Raises:
        ValueError: If it cannot be read or is no mapping.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--config {path}: expected a mapping of options, got {type(config).__name__}.")
    init_args = model_arguments(config)
    if "lambda" in init_args:
        init_args["lambda_"] = init_args.pop("lambda")
    return config


def model_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the model's ``init_args`` within a configuration; empty where it has none."""
    section: Any = config.get("fit", config)
    for name in ("model", "init_args"):
        section = section.get(name) if isinstance(section, dict) else None
    return section if isinstance(section, dict) else {}
