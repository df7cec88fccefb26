"""What a run ran on: versions, machine and device, as its folder keeps them."""

from __future__ import annotations

import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["FILE_NAME", "describe_environment", "environment_as_json"]

FILE_NAME = "environment.json"
_PACKAGES = ("nclightning", "torch", "lightning", "torchmetrics", "numpy")


def describe_environment() -> dict[str, str]:
    """Collect versions and the kind of machine. Nothing is started on a device, and no random state is touched.

    Returns:
        Text by name, without a name of the user or of the host.
    """
    import torch  # noqa: PLC0415 - reading the name of the file must not load torch.

    found = {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}
    found["torch build"] = torch.__version__
    found["platform"] = f"{platform.system()} {platform.machine()}"
    found["threads"] = str(torch.get_num_threads())
    found["default dtype"] = str(torch.get_default_dtype()).removeprefix("torch.")
    found["seed"] = os.environ.get("PL_GLOBAL_SEED", "not set")  # Where Lightning's seed_everything leaves it.
    found["device"] = "cpu"
    # Only where the process uses it already: to ask for the name would start it.
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["cuda"] = str(torch.version.cuda)
        found["device"] = torch.cuda.get_device_name()
    return found


def environment_as_json() -> str:
    """Return :func:`describe_environment` as the run folder keeps it."""
    return json.dumps(describe_environment(), indent=1) + "\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # Run from a clone.
        return "not installed"
