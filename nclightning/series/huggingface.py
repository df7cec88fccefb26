"""Sources that are model folders of Hugging Face, measured on images or texts on the disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from nclightning.errors import UserError
from nclightning.probe.host import PlainHost
from nclightning.probe.sets import DataSet
from nclightning.series.opening import content_of
from nclightning.series.sets import ModelOptions, measure_sets
from nclightning.series.source import steps_in_names
from nclightning.wording import one_line

try:
    import datasets  # type: ignore[import-untyped]
    import transformers
except ImportError as error:
    raise UserError(
        "models of Hugging Face need transformers, datasets and pillow: pip install nclightning[huggingface]."
    ) from error

__all__ = ["HuggingFaceData", "ModelSource", "model_sources"]

_TASKS = {"ForImageClassification": "image", "ForSequenceClassification": "text"}
_COLUMNS = {
    "text": ("text", "sentence", "review", "content"),
    "image": ("image", "img"),
    "labels": ("labels", "label", "target", "class"),
}
_STAGES = {"validation": "val", "valid": "val", "dev": "val", "eval": "val"}
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
_WEIGHTS = ("*.safetensors", "*.bin")


def model_sources(paths: Sequence[Path], data: HuggingFaceData, options: ModelOptions) -> list[ModelSource]:
    """Return a source for each model folder.

    Raises:
        ValueError: If a folder has no classifier of images or texts.
    """
    return [ModelSource(path, data, options) for path in paths]


@dataclass(frozen=True)
class HuggingFaceData:
    """Data on the disk, and options for reading them.

    Attributes:
        path: A folder of images with one folder per class, a data set of ``save_to_disk``, or a csv, json, jsonl or
            parquet file; None if the user gave none.
        columns: Names of the columns for text, text pair, image and labels; None to try the usual names.
        labels_in_order: Whether the data's label numbers are kept if label names differ from the model's.
        batch_size: Number of samples per forward.
        num_workers: Number of worker processes of the loader.
    """

    path: str | None
    columns: Mapping[str, str | None]
    labels_in_order: bool
    batch_size: int
    num_workers: int

    @property
    def place(self) -> Path:
        """The path of the data.

        Raises:
            ValueError: If there is none, or it does not exist.
        """
        if self.path is None:
            raise UserError(
                "models of Hugging Face need data: give --data FOLDER of images, one folder for each class, or of "
                "datasets' save_to_disk, or a csv, json, jsonl or parquet file."
            )
        path = Path(self.path)
        if not path.exists():
            raise UserError(f"--data {self.path}: no such file or folder.")
        return path

    def content(self) -> str:
        """Return a fingerprint of the data: of the content of a file, or of the names and sizes in a folder."""
        place = self.place
        if place.is_file():
            return content_of([place])
        files = sorted(each for each in place.rglob("*") if each.is_file())
        listed = [f"{each.relative_to(place)} {each.stat().st_size}" for each in files]
        return hashlib.blake2b("\n".join(listed).encode()).hexdigest()[:32]

    def load(self) -> dict[str, Any]:
        """Load the data by stage. Data without splits are the training set.

        Raises:
            ValueError: If they cannot be read.
        """
        place = self.place
        try:
            if place.is_dir() and any((place / name).is_file() for name in ("dataset_dict.json", "state.json")):
                loaded = datasets.load_from_disk(str(place))
            elif place.is_dir():
                loaded = datasets.load_dataset("imagefolder", data_dir=str(place))
            elif place.suffix.lower() in _BUILDERS:
                more = {"delimiter": "\t"} if place.suffix.lower() == ".tsv" else {}
                loaded = datasets.load_dataset(_BUILDERS[place.suffix.lower()], data_files=str(place), **more)
            else:
                raise UserError(f"--data {place}: expected a folder, or a csv, json, jsonl or parquet file.")
        except UserError:
            raise
        except Exception as error:  # The readers of datasets may raise anything.
            cause = error.__cause__ or error
            raise UserError(f"--data {place} cannot be read: {type(cause).__name__}: {one_line(cause)}") from error
        splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
        return {_STAGES.get(str(name), str(name)): data for name, data in splits.items()}

    def column(self, role: str, data: Any) -> str:
        """Return the name of the column for a role.

        Raises:
            ValueError: If there is none, or several have usual names.
        """
        names, wanted = data.column_names, self.columns[role]
        if wanted is not None:
            if wanted not in names:
                raise UserError(f"--{role} {wanted}: {self.path} has no such column, it has {', '.join(names)}.")
            return wanted
        meant = [name for name in _COLUMNS[role] if name in names]
        if len(meant) != 1:
            found = f"may be {' or '.join(meant)}" if meant else f"is none of {', '.join(names)}"
            raise UserError(f"{self.path}: the column of the {role} {found}: give --{role} COLUMN.")
        return meant[0]


class ModelSource:
    """A model folder. Its step is that in ``trainer_state.json``, or the number in its name.

    Args:
        path: The folder.
        data: The data.
        options: Options of the measurement.

    Raises:
        ValueError: If it is not a classifier of images or texts.
    """

    def __init__(self, path: Path, data: HuggingFaceData, options: ModelOptions) -> None:
        self.path, self._data, self._options, self.name = path, data, options, str(path)
        config = _read_json(path / "config.json")
        architecture = str((config.get("architectures") or ["none"])[0])
        tasks = [task for ending, task in _TASKS.items() if architecture.endswith(ending)]
        if not tasks:
            raise UserError(
                f"{path} has the architecture {architecture}, but only models for image or sequence classification can "
                "be measured: save the features of other models, and measure those."
            )
        if config.get("problem_type") not in (None, "single_label_classification"):
            raise UserError(f"{path} is trained for {config['problem_type']}: its samples have no single class.")
        self._task = tasks[0]
        weights = [each for pattern in _WEIGHTS for each in sorted(path.glob(pattern)) if "training" not in each.name]
        if not weights:
            raise UserError(f"{path} has no weights: no .safetensors and no .bin file.")
        if empty := [each for each in weights if not each.stat().st_size]:
            raise UserError(f"{empty[0]} is empty: it was being written when its process ended.")
        self._files = [path / "config.json", *weights]
        self.size = sum(each.stat().st_size for each in weights)
        state = path / "trainer_state.json"
        step = _read_json(state).get("global_step") if state.is_file() else steps_in_names([path])[0]
        self.step = int(step or 0)

    def fingerprint(self) -> str:
        """Return a fingerprint of configuration and weights."""
        return content_of(self._files)

    def weights(self) -> str:
        """Return a fingerprint of the weights."""
        return content_of(self._files[1:])

    def measure(self) -> dict[str, float]:
        """Load the model and measure it."""
        torch.manual_seed(self._options.seed)
        model = self._load().to(self._options.device)
        loaded = self._data.load()
        sets = {
            stage: [("", DataSet(self._loader(model, loaded[stage])))]
            for stage in ("train", *self._options.stages)
            if stage in loaded
        }
        try:
            return measure_sets(PlainHost(model), sets, self._options)
        except UserError as error:
            # The message of an error in a worker process includes its traceback.
            sentence = str(error).splitlines()[-1].removeprefix("nclightning.errors.UserError: ")
            raise UserError(f"{self.name}: {sentence}") from error

    def _load(self) -> Any:
        """Load the model. Raise if weights are missing or have other shapes."""
        kind = {"image": transformers.AutoModelForImageClassification,
                "text": transformers.AutoModelForSequenceClassification}[self._task]  # fmt: skip
        verbosity = transformers.utils.logging.get_verbosity()
        transformers.utils.logging.set_verbosity(50)  # Missing weights are reported below.
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            model, info = kind.from_pretrained(
                str(self.path), local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except Exception as error:  # safetensors, torch and the configuration may raise anything.
            raise UserError(f"{self.path} cannot be loaded: {type(error).__name__}: {one_line(error, 200)}") from error
        finally:
            transformers.utils.logging.set_verbosity(verbosity)
        for names, said in ((info["missing_keys"], "has no"), (info["mismatched_keys"], "has another shape for")):
            if names:
                shown = [str(each[0] if isinstance(each, tuple | list) else each) for each in sorted(names, key=str)]
                raise UserError(
                    f"{self.path} {said} {', '.join(shown[:3])}{' and others' if len(shown) > 3 else ''}: it is the "
                    "checkpoint of another model, or of a model whose head has not been trained."
                )
        return model

    def _loader(self, model: Any, data: Any) -> DataLoader[Any]:
        """Return a loader of batches as the model needs them."""
        labels = self._data.column("labels", data)
        mapped = _Labels(model.config, data, labels, self._data.labels_in_order, str(self._data.path))
        prepare = self._images(data) if self._task == "image" else self._texts(data)

        def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            numbers = torch.tensor([mapped(row[labels]) for row in rows])
            try:
                return dict(prepare(rows)) | {"labels": numbers}
            except (TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"{self._data.path}: the {self._task}s of {len(rows)} samples cannot be prepared; one may be "
                    f"missing, or images differ in size after the image processor: {one_line(error, 160)}"
                ) from error

        return DataLoader(
            _Rows(data, str(self._data.path)),
            self._data.batch_size,
            collate_fn=collate,
            num_workers=self._data.num_workers,
        )

    def _images(self, data: Any) -> Any:
        column, processor = self._data.column("image", data), self._processor(transformers.AutoImageProcessor)
        return lambda rows: processor([row[column].convert("RGB") for row in rows], return_tensors="pt")

    def _texts(self, data: Any) -> Any:
        """Return a function that tokenizes texts."""
        column, pair = self._data.column("text", data), self._data.columns["text_pair"]
        if pair is not None and pair not in data.column_names:
            raise UserError(f"--text_pair {pair}: {self._data.path} has only {', '.join(data.column_names)}.")
        tokenizer = self._processor(transformers.AutoTokenizer)
        return lambda rows: tokenizer(
            [row[column] for row in rows],
            None if pair is None else [row[pair] for row in rows],
            padding=True,
            truncation=True,
            return_tensors="pt",
        )

    def _processor(self, kind: Any) -> Any:
        """Return the image processor or tokenizer in the model folder."""
        what = "image processor" if kind is transformers.AutoImageProcessor else "tokenizer"
        repair = "save it there with save_pretrained, as the Trainer does with processing_class."
        try:
            made = kind.from_pretrained(str(self.path), local_files_only=True)
        except Exception as error:
            raise UserError(
                f"{self.path} has no {what} that can be loaded ({type(error).__name__}): {repair}"
            ) from error
        # Without these files transformers constructs a tokenizer that knows no word.
        files = ("tokenizer_config.json", "tokenizer.json", *getattr(made, "vocab_files_names", {}).values())
        if what == "tokenizer" and not any((self.path / each).is_file() for each in files):
            raise UserError(f"{self.path} has no {what}, none of the files {', '.join(dict.fromkeys(files))}: {repair}")
        return made


class _Rows(Dataset[Any]):
    """Rows of the data. A row that cannot be decoded, such as a damaged image, raises an error for the user."""

    def __init__(self, data: Any, source: str) -> None:
        self._data, self._source = data, source

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, number: int) -> Any:
        try:
            return self._data[number]
        except Exception as error:  # The decoders of datasets may raise anything.
            raise UserError(
                f"{self._source}: sample {number} cannot be read: {type(error).__name__}: {one_line(error)}"
            ) from error


class _Labels:
    """Maps labels of the data to those of the model: names by ``label2id``, numbers unchanged.

    Raises:
        ValueError: If the names of data and model differ.
    """

    def __init__(self, config: Any, data: Any, column: str, in_order: bool, source: str) -> None:
        self._known, self._count = dict(config.label2id or {}), int(config.num_labels)
        self._column, self._source = column, source
        feature = data.features[column]
        names = getattr(feature, "names", None)
        if names is None and getattr(feature, "dtype", "") in ("string", "large_string"):
            names = sorted({each for each in data[column] if each is not None})
            self._from: Mapping[Any, int] = self._agreed(names, in_order) if names else {}
        elif names is not None:
            agreed = self._agreed(names, in_order)
            self._from = {i: agreed[name] for i, name in enumerate(names)}
        else:
            self._from = {}

    def _agreed(self, names: Sequence[str], in_order: bool) -> dict[str, int]:
        """Return the model's number for each label name of the data."""
        unknown = [name for name in names if name not in self._known]
        if not unknown:
            return {name: int(self._known[name]) for name in names}
        if in_order and len(names) == self._count:
            return {name: i for i, name in enumerate(names)}
        known = sorted(self._known, key=self._known.__getitem__)
        raise UserError(
            f"{self._source} has the label {unknown[0]!r}, and the model knows {', '.join(known[:5])}"
            f"{', ...' if len(self._known) > 5 else ''}: set label2id in its config.json, or give --labels_in_order if "
            "its classes are numbered in the order of the data's names."
        )

    def __call__(self, label: Any) -> int:
        if self._from:
            found = self._from.get(label)
        else:
            whole = isinstance(label, int) and not isinstance(label, bool)
            found = label if whole and (0 <= label < self._count or label == -100) else None
        if found is None:
            raise UserError(
                f"{self._source}: the column {self._column} has the label {label!r}: labels must be integers from 0 to "
                f"{self._count - 1}, or names that the model knows."
            )
        return found


def _read_json(path: Path) -> dict[str, Any]:
    """Read a mapping from a JSON file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged, or is not JSON.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: expected a mapping.")
    return content
