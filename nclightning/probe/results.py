"""The result of a measurement: values by name and by class, a table, and a picture."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nclightning.errors import UserError, UserTypeError, listed, nearest
from nclightning.files import replaced
from nclightning.probe.tables import Row, as_html, as_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Measurement"]

Table = Mapping[str, NDArray[Any]]


class Measurement(Mapping[str, float]):
    """Neural collapse of one model on one data set, as :func:`nclightning.measure` returns it.

    An immutable mapping from names to floats: ``nc1``, ``nc2``, ... at the head, and ``<layer>/nc1``, ... at further
    layers. ``print`` and notebooks show a table with the meaning of each value, and its value at collapse. Two
    measurements are equal if their values and tables are, where ``nan`` equals ``nan``; their times may differ.

    Args:
        values: Values by name.
        tables: Values for each class: at the head under ``""``, at further layers under their names.
        num_samples: Number of samples measured, without those left out by ``ignore_index``.
        feature_dim: Dimension d of the features at the head.
        rank: ``nc1_rank``, the number of significant directions of the class means; None if it was not measured.
        cosines: Cosines of the centred class means, ``(K, K)``, or of evenly spaced classes if K is large.
        cosine_classes: Numbers of these classes.
        head: Name of the head; None if there was none.
        normalizes: Whether it is a cosine head, so that features and rows were divided by their norms.
        left_out: Names of measures that were left out because there was no head.
        seconds: Duration of the measurement in seconds.

    Example:
        >>> import nclightning
        >>> found = nclightning.measure(
        ...     features=[[1.0, 0.1], [1.0, -0.1], [-1.0, 0.0]],
        ...     labels=[0, 0, 1],
        ...     measures=("nc1", "nc2_equinorm_means"),
        ... )
        >>> isinstance(found, nclightning.Measurement), list(found), found.num_samples
        (True, ['nc1', 'nc2_equinorm_means'], 3)
        >>> found.per_class()["variance"].round(3).tolist()
        [0.01, 0.0]
    """

    def __init__(
        self,
        values: Mapping[str, float],
        tables: Mapping[str, Table],
        *,
        num_samples: int,
        feature_dim: int,
        rank: int | None = None,
        cosines: NDArray[np.float32] | None = None,
        cosine_classes: NDArray[np.int64] | None = None,
        head: str | None = None,
        normalizes: bool = False,
        left_out: tuple[str, ...] = (),
        seconds: float = math.nan,
    ) -> None:
        self._values = {str(name): float(value) for name, value in values.items()}
        self._tables = {name: dict(table) for name, table in tables.items()}
        self._cosines, self._cosine_classes = cosines, cosine_classes
        self.num_samples, self.feature_dim, self.rank = num_samples, feature_dim, rank
        self.head, self.normalizes, self.left_out = head, normalizes, tuple(left_out)
        self.seconds = float(seconds)
        self._closed = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_closed" in vars(self):
            raise AttributeError(f"a Measurement cannot be changed; dict(measurement) can. Got {name} = {value!r}.")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Measurement cannot be changed; dict(measurement) can. Got del {name}.")

    # The mapping.

    def __getitem__(self, name: str) -> float:
        try:
            return self._values[name]
        except KeyError:
            known = list(self._values)
            raise KeyError(f"{name!r} was not measured; there are {listed(known)}.{nearest(name, known)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Measurement):
            return self._values == other if isinstance(other, Mapping) else NotImplemented
        return _are_equal(self._content(), other._content())

    __hash__ = None  # type: ignore[assignment]

    # Further properties.

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of samples of each class, ``(K,)``."""
        counts: NDArray[np.int64] = self._tables[""]["count"].copy()
        return counts

    @property
    def num_classes(self) -> int:
        """Number of classes K, including those without samples."""
        return len(self._tables[""]["count"])

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the further layers measured."""
        return tuple(name for name in self._tables if name)

    def per_class(self, layer: str = "") -> dict[str, NDArray[Any]]:
        """Return the values for each class, as columns of a table with one row per class.

        ``pandas.DataFrame(measurement.per_class())`` is a data frame of it. With more than 2048 classes, the columns
        ``cdnv`` and ``equiangularity`` exist only if a measure of all pairs of classes, such as ``nc1_cdnv``, was
        requested.

        | column | value |
        |---|---|
        | ``class``, ``count`` | number of the class, and number of its samples |
        | ``variance`` | mean squared distance from the class mean |
        | ``mean_norm`` | norm of the class mean minus the mean of all class means |
        | ``cdnv`` | as ``nc1_cdnv``: variance over squared distance, mean over the other classes |
        | ``equiangularity`` | mean deviation of the cosines with the other class means from -1/(K-1) |
        | ``head_norm``, ``nc3_cosine`` | norm of the row of the head, and its cosine with the class mean |
        | ``ncc_accuracy``, ... | measures of decisions on the samples of the class, if they were measured |

        Args:
            layer: Name of a further layer; empty for the input of the head.

        Returns:
            Arrays ``(K,)`` by column; ``nan`` for a class without samples.

        Raises:
            ValueError: If the layer was not measured.
        """
        if layer not in self._tables:
            raise UserError(
                f"layer={layer!r} was not measured: pass it in layers=(...) to measure. "
                f"There are {', '.join(map(repr, self._tables))}."
            )
        return {name: column.copy() for name, column in self._tables[layer].items()}

    def tagged(self, prefix: str) -> dict[str, float]:
        """Return the values by tag for a logger, as in ``wandb.log(found.tagged("nc/train"), step)``.

        Args:
            prefix: First part of each tag, such as ``nc/train`` in ``nc/train/nc1``, the tag that
                :class:`nclightning.callbacks.NeuralCollapseMonitor` logs.
        """
        return {f"{prefix}/{name}": value for name, value in self._values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return everything in plain Python objects. ``dict(measurement)`` has only the values."""
        tables = {
            layer: {name: column.tolist() for name, column in table.items()} for layer, table in self._tables.items()
        }
        return {
            "measures": dict(self._values),
            "num_samples": self.num_samples,
            "num_classes": self.num_classes,
            "feature_dim": self.feature_dim,
            "rank": self.rank,
            "head": self.head,
            "normalizes": self.normalizes,
            "left_out": list(self.left_out),
            "seconds": self.seconds,
            "per_class": tables.pop(""),
            "layers": tables,
        }

    def to_json(self, path: str | os.PathLike[str] | None = None, *, indent: int | None = None) -> str:
        """Return :meth:`to_dict` as JSON with all digits, and write it to a file if a path is given.

        JSON has no ``nan`` and no infinity. They are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, which
        ``float`` reads.

        Args:
            path: Path of the file. An existing file is replaced; the folder must exist. None writes no file.
            indent: As for ``json.dumps``.

        Raises:
            OSError: If the file cannot be written. An existing file is then unchanged.
        """
        if isinstance(path, int):
            raise UserTypeError(f"path must be the name of a file, got {path}: write to_json(indent={path}).")
        text = json.dumps(_without_nonfinite(self.to_dict()), indent=indent, allow_nan=False)
        if path is not None:
            with replaced(Path(path)) as partial:
                partial.write_text(text, encoding="utf-8")
        return text

    def plot(self) -> Figure:
        """Draw the distance of each value from that at collapse, and the cosines of the class means.

        Returns:
            A matplotlib figure, not registered with pyplot. ``figure.savefig(path)`` writes it; notebooks show it.
        """
        from nclightning.probe.drawing import draw  # noqa: PLC0415 - matplotlib takes half a second

        return draw(self.rows(), self._headline(), self._cosines, self._cosine_classes, self._num_present)

    # Tables.

    def rows(self) -> list[Row]:
        """Return the values as rows of a table, those of the head first."""
        sizes = self._num_present, self.feature_dim
        return [Row.of(name, value, *sizes, self.layers) for name, value in self._values.items()]

    @property
    def _num_present(self) -> int:
        return int((self._tables[""]["count"] > 0).sum())

    def _headline(self) -> str:
        """Return the first line of the table: sizes, head and time."""
        head = "no head" if self.head is None else f"{'cosine head' if self.normalizes else 'head'} {self.head!r}"
        classes = f"{self.num_classes} classes, " if self.num_classes else ""  # There are none without labels.
        size = f"{self.num_samples} samples, {classes}{self.feature_dim} features, {head}"
        return size if math.isnan(self.seconds) else f"{size}, {self.seconds:.3g} s"

    def _notes(self) -> list[str]:
        """Return sentences about absent classes, the rank, and measures that were left out."""
        notes = []
        if absent := self.num_classes - self._num_present:
            notes.append(
                f"{absent} of {self.num_classes} classes have no samples; measures of class means leave them out."
            )
        if self.rank is not None:
            most = min(self._num_present - 1, self.feature_dim)
            notes.append(f"Class means spread along {self.rank} of at most {most} directions.")
        if self.left_out:
            notes.append(f"Left out because they need the head: {', '.join(self.left_out)}.")
        return notes

    def __repr__(self) -> str:
        return as_text(f"Measurement of {self._headline()}", self.rows(), self._notes())

    def _repr_html_(self) -> str:
        return as_html(f"Measurement of {self._headline()}", self.rows(), self._notes())

    def _content(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("seconds", "_closed")}


def _are_equal(one: Any, other: Any) -> bool:
    """Return whether two values, arrays or dictionaries are equal, where nan equals nan."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return (
            isinstance(one, np.ndarray)
            and isinstance(other, np.ndarray)
            and one.dtype == other.dtype
            and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return list(one) == list(other) and all(_are_equal(value, other[name]) for name, value in one.items())
    both_nan = isinstance(one, float) and isinstance(other, float) and math.isnan(one) and math.isnan(other)
    return bool(both_nan or one == other)


def _without_nonfinite(value: Any) -> Any:
    """Replace numbers that are not finite by strings, in nested lists and dictionaries."""
    if isinstance(value, dict):
        return {name: _without_nonfinite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_nonfinite(each) for each in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value
