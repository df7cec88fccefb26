"""The environment of a run, as saved in its folder: versions, machine and device."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["FILE_NAME", "describe_environment", "environment_as_json"]

FILE_NAME = "environment.json"
_PACKAGES = ("nclightning", "torch", "lightning", "torchmetrics", "numpy")


def describe_environment() -> dict[str, str]:
    """Return versions and the kind of machine, without using a device or changing a random state.

    Returns:
        Text by name. Names of the user and the host are not included.
    """
    import torch  # noqa: PLC0415 - reading the name of the file must not load torch.

    found = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    found["torch build"] = torch.__version__
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["threads"] = str(torch.get_num_threads())
    found["default dtype"] = str(torch.get_default_dtype()).removeprefix("torch.")
    found["seed"] = os.environ.get("PL_GLOBAL_SEED", "not set")  # Set by Lightning's seed_everything.
    found["device"] = "cpu"
    # Only if the process already uses CUDA, because asking for the name would initialise it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = str(torch.version.cuda)
        found["device"] = torch.cuda.get_device_name()
    return found


def environment_as_json() -> str:
    """Return :func:`describe_environment` as JSON for the run folder."""
    return json.dumps(describe_environment(), indent=1) + "\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # Run from a clone.
        return "not installed"
