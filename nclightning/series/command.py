"""The command ``python -m nclightning measure``: its options, and the choice of the kind of files."""

from __future__ import annotations

import hashlib
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nclightning.command_parser import command_parser
from nclightning.configurations import find_configuration
from nclightning.errors import UserError
from nclightning.interrupts import Terminated
from nclightning.quantities import NC
from nclightning.series.arrays import NAMES, ArraysSettings, array_sources
from nclightning.series.opening import paths_of
from nclightning.series.places import KINDS, FileSet, find_config, find_files
from nclightning.series.runner import run_series
from nclightning.series.sets import ModelOptions, chosen_device
from nclightning.series.source import Source

__all__ = ["measure_files"]

_DESCRIPTION = """Measure neural collapse of the files that a training saved, in order of their steps: saved features,
checkpoints of Lightning, or model folders of Hugging Face. Writes readings.csv, TensorBoard events and measured.png
to --out.

If the command was stopped, the same command continues, and measures files that were added since."""
_EPILOG = """examples:
  python -m nclightning measure features.npz
  python -m nclightning measure dumps/step_*.npz --features h --labels y --weight fc.weight
  python -m nclightning measure features.npy --labels labels.npy
  python -m nclightning measure lightning_logs/version_0
  python -m nclightning measure checkpoints/*.ckpt --model my_project.models:Net --data my_project.data:CIFAR10
  python -m nclightning measure output/ --data reviews.csv --text review --labels sentiment

Checkpoints and .pt files are loaded with weights_only=True, so that no code in them can run. The config.yaml of a
run folder names classes, which are imported and created: read it first if the folder is not yours."""
# The kinds of files for which an option has a meaning. Options that are not listed here apply to all kinds.
_OPTION_KINDS = {
    "weight": ("arrays",), "bias": ("arrays",), "features": ("arrays",), "set": ("arrays",),
    "labels": ("arrays", "huggingface"), "config": ("lightning",), "model": ("lightning",),
    "precision": ("lightning",), "state_dict": ("lightning",), "data": ("lightning", "huggingface"),
    "text": ("huggingface",), "text_pair": ("huggingface",), "image": ("huggingface",),
    "labels_in_order": ("huggingface",), "batch_size": ("huggingface",), "num_workers": ("huggingface",),
    "head": ("lightning", "huggingface"), "layers": ("lightning", "huggingface"),
    "layer_pooling": ("lightning", "huggingface"), "stages": ("lightning", "huggingface"),
    "limit": ("lightning", "huggingface"), "device": ("lightning", "huggingface"),
    "seed": ("lightning", "huggingface"), "weights_only": ("arrays", "lightning"),
}  # fmt: skip
# Options that do not change values, or only through the content of files, which is compared separately.
_WITHOUT_EFFECT = ("out", "jobs", "overwrite", "num_workers", "paths", "config")


def measure_files(words: Sequence[str]) -> None:
    """Run the command.

    Args:
        words: The words of the command line after ``measure``.

    Raises:
        ValueError: If an option is wrong, or a file cannot be measured.
    """
    given = _parser().parse_args(words)
    if given.jobs < 1 or any(each is not None and each < 1 for each in (given.limit, given.batch_size)):
        raise UserError("--jobs, --limit and --batch_size must be at least 1.")
    if not given.out.strip():
        raise UserError("--out needs a folder.")
    place = find_files(paths_of(given.paths))
    _check_options(given, place)
    settings = {
        name: Path(value).name if isinstance(value, str) and Path(value).exists() else value
        for name, value in vars(given).items()
        if name not in _WITHOUT_EFFECT and value is not None
    }
    sources, more = _sources(given, place)
    try:
        run_series(sources, {"kind": place.kind} | settings | more, Path(given.out), given.jobs, given.overwrite)
    except (KeyboardInterrupt, Terminated):
        print("Interrupted. Finished measurements are kept; the same command continues.", file=sys.stderr)
        raise


def _parser() -> ArgumentParser:
    """Construct the parser of the command."""
    parser = command_parser("measure", _DESCRIPTION, _EPILOG)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="files, folders or patterns of one kind")
    add("--out", default="measured", help="folder to write to (default: measured)")
    add("--overwrite", action="store_true", help="measure all files again if --out has another series")
    add("--jobs", type=int, default=1, metavar="N", help="files measured at once, if the memory suffices (default: 1)")
    what = parser.add_argument_group("measurement, as in nclightning.measure")
    what.add_argument("--measures", nargs="+", metavar="NAME", help="default: nc1 nc2 nc3; 'all' for all")
    what.add_argument("--ignore_index", type=_optional_int, metavar="N", help="label to leave out (default: -100)")
    what.add_argument("--global_mean", choices=("class", "sample"), help="convention of NC1 on unbalanced data")
    what.add_argument("--between_weights", choices=("uniform", "count"), help="convention of NC1 on unbalanced data")
    what.add_argument("--head", metavar="NAME", help="the last layer, if it is not found")
    what.add_argument("--layers", nargs="+", metavar="NAME", help="further layers")
    what.add_argument("--layer_pooling", choices=("mean", "flatten"))
    what.add_argument("--stages", nargs="+", choices=("train", "val", "test"), help="default: train val")
    what.add_argument("--limit", type=int, metavar="N", help="largest number of batches per set")
    arrays = parser.add_argument_group("saved features: .npz, .pt, .safetensors, .npy")
    for role in NAMES:
        arrays.add_argument(
            f"--{role}", metavar="NAME", help=f"array or file (default: one of {', '.join(NAMES[role])})"
        )
    arrays.add_argument("--set", metavar="NAME", help=f"name of the data set in the tags {NC}/SET/... (default: train)")
    models = parser.add_argument_group("checkpoints of Lightning, and model folders of Hugging Face")
    models.add_argument("--config", metavar="FILE", help="saved by LightningCLI (default: that of the run folder)")
    models.add_argument("--model", metavar="MODULE:CLASS", help="its hyperparameters come from the checkpoint")
    models.add_argument("--data", metavar="MODULE:NAME|PATH", help="data module, or function that returns loaders; "
                        "for Hugging Face a folder of images or data set, or a csv, json or parquet file")  # fmt: skip
    models.add_argument("--precision", help="of the trainer (default: that of the configuration or the weights)")
    models.add_argument("--state_dict", metavar="KEY", help="entry of the checkpoint with the weights")
    models.add_argument("--weights_only", type=_bool, metavar="true|false", help="false runs code that is in the files")
    models.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    models.add_argument("--seed", type=int, metavar="N", help="random seed for model and data (default: 0)")
    for name in ("text", "text_pair", "image"):
        models.add_argument(f"--{name}", metavar="COLUMN", help="column of the data; --labels is that of the labels")
    models.add_argument("--labels_in_order", action="store_true", default=None,
                        help="keep the data's label numbers if label names differ from the model's")  # fmt: skip
    models.add_argument("--batch_size", type=int, metavar="N", help="default: 32")
    models.add_argument("--num_workers", type=int, metavar="N", help="processes that load data (default: 0)")
    return parser


def _optional_int(text: str) -> int | str:
    """Convert an option to an integer, or keep the word ``none``."""
    try:
        return text if text == "none" else int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is no integer, and not none") from None


def _bool(text: str) -> bool:
    """Convert an option to a bool."""
    if text.lower() not in ("true", "false"):
        raise ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _check_options(given: Namespace, place: FileSet) -> None:
    """Raise if an option does not apply to this kind of files."""
    for name, kinds in _OPTION_KINDS.items():
        if getattr(given, name) is not None and place.kind not in kinds:
            raise UserError(
                f"--{name} applies to {' and '.join(KINDS[kind] for kind in kinds)}, but {given.paths[0]} has "
                f"{KINDS[place.kind]}: leave it out."
            )


def _sources(given: Namespace, place: FileSet) -> tuple[Sequence[Source], dict[str, Any]]:
    """Return the sources, and further settings that change values."""
    options = {name: getattr(given, name) for name in ("global_mean", "between_weights", "ignore_index", "measures")}
    options = {name: value for name, value in options.items() if value is not None}
    if options.get("ignore_index") == "none":
        options["ignore_index"] = None
    if given.measures is not None:
        options["measures"] = tuple(name for each in given.measures for name in each.split(",") if name)
    if place.kind == "arrays":
        names = {role: getattr(given, role) for role in NAMES}
        settings = ArraysSettings(names, options, given.set or "train", given.weights_only is not False)
        return array_sources(place.paths, settings), {}
    of_models = ("head", "layer_pooling", "limit", "seed", "weights_only", "state_dict")
    options |= {name: getattr(given, name) for name in of_models if getattr(given, name) is not None}
    options |= {name: tuple(getattr(given, name)) for name in ("layers", "stages") if getattr(given, name) is not None}
    device = str(chosen_device(given.device or "auto"))
    chosen = ModelOptions(**options, device=device)
    chosen.measuring()  # Raises at an unknown measure.
    if place.kind == "huggingface":
        from nclightning.series.huggingface import HuggingFaceData, model_sources  # noqa: PLC0415

        columns = {name: getattr(given, name) for name in ("text", "text_pair", "image", "labels")}
        data = HuggingFaceData(given.data, columns, bool(given.labels_in_order), given.batch_size or 32,
                               given.num_workers or 0)  # fmt: skip
        return model_sources(place.paths, data, chosen), {"device": device, "data_content": data.content()}
    from nclightning.series.checkpoints import Training, checkpoint_sources  # noqa: PLC0415

    config = find_configuration(given.config) if given.config is not None else None
    if config is None and given.model is None:
        config = find_config(place.paths)
    training = Training(config, given.model, given.data, given.precision, chosen)
    training.check()
    digest = {} if config is None else {"config_content": hashlib.blake2b(config.read_bytes()).hexdigest()[:32]}
    return checkpoint_sources(place.paths, training), {"device": device} | digest
