"""Logging of pictures to any experiment logger.

A logger is recognised by the arguments of its methods, so that its library is imported only if it is in use. Loggers of
other kinds can be added with :func:`register_logger`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nclightning import ranks
from nclightning.compat.experiments import prefixed
from nclightning.errors import UserError, UserTypeError
from nclightning.sending import argument_names, is_wandb_run, join_row, send_values, wandb_run

__all__ = ["Picture", "PictureWriter", "log_picture", "picture_writers", "register_logger"]

Picture = Any  # A matplotlib figure, an array, a PIL image, or the path of an image file.
Pixels = NDArray[np.uint8]
Write = Callable[[Any, str, Pixels, "int | None"], None]
_registered: dict[type, Write] = {}


class PictureWriter:
    """Writes pictures to one logger. :func:`picture_writers` returns the writers of loggers.

    Args:
        write: Function that writes a picture. It is called with tag, pixels ``(height, width, 3)`` uint8, and step.
        join: For a logger with numbered rows, a function with the same arguments that adds a picture to the row that
            is logged next.

    Example:
        >>> import numpy as np
        >>> from nclightning.pictures import PictureWriter
        >>> writer = PictureWriter(lambda tag, pixels, step: print(tag, pixels.shape, step))
        >>> writer.with_prefix("run-")("black", np.zeros((2, 3, 3), dtype=np.uint8), 5)
        run-black (2, 3, 3) 5
    """

    def __init__(
        self,
        write: Callable[[str, Pixels, int | None], None],
        join: Callable[[str, Pixels, int | None], None] | None = None,
    ) -> None:
        self._write, self._join = write, join

    def __call__(self, tag: str, pixels: Pixels, step: int | None, *, joins_next: bool = False) -> None:
        """Write a picture.

        Args:
            tag: Name of the picture.
            pixels: ``(height, width, 3)`` uint8.
            step: Position on the x-axis.
            joins_next: Whether values of the same step are logged next, so that the picture can join their row.
        """
        if joins_next and self._join is not None:
            self._join(tag, pixels, step)
        else:
            self._write(tag, pixels, step)

    def with_prefix(self, prefix: str) -> PictureWriter:
        """Return a writer that adds a prefix to tags."""
        return PictureWriter(lambda tag, pixels, step: self._write(prefix + tag, pixels, step)) if prefix else self


def log_picture(logger: Any, tag: str, picture: Picture, step: int | None = None) -> None:
    """Log a picture, such as ``measurement.plot()``, to any experiment logger.

    If there are several processes, only the first one writes.

    Args:
        logger: A logger of Lightning, Fabric or accelerate for TensorBoard, W&B, MLflow, Comet or Aim; an object of
            these libraries themselves: a ``SummaryWriter``, a W&B run, ``mlflow`` or ``(client, run_id)``, a Comet
            experiment, an Aim run; an object of a class that was registered with :func:`register_logger`; or a list of
            loggers, such as ``trainer.loggers``, of which those that do not accept pictures are skipped.
        tag: Name of the picture.
        picture: A matplotlib figure; an array or tensor ``(height, width)``, ``(height, width, 3)`` or ``(height,
            width, 4)`` of dtype uint8, or of floats from 0 to 1; a PIL image; or the path of an image file.
        step: Position on the x-axis. For a W&B run it is the number that you pass to ``run.log(step=...)``; without it
            the picture is added to the row that is logged next.

    Raises:
        TypeError: If a single logger does not accept pictures, or the picture has another type or dtype.

    Example:
        >>> import numpy as np
        >>> from nclightning.pictures import log_picture
        >>> class Writer:
        ...     def add_image(self, tag, img_tensor, global_step):
        ...         print(tag, img_tensor.shape, global_step)
        >>> log_picture(Writer(), "black", np.zeros((2, 3)), step=5)
        black (3, 2, 3) 5
    """
    if ranks.rank() != 0:
        return
    several = isinstance(logger, list)
    writers = picture_writers(logger if several else [logger])
    if not writers and not several:
        raise UserTypeError(
            f"logger={_named(logger)} does not accept pictures: supported are TensorBoard, W&B, MLflow, Comet and Aim. "
            "Add another kind with nclightning.pictures.register_logger."
        )
    if writers:
        pixels = _pixels(picture)
        for write in writers:
            write(tag, pixels, step)


def register_logger(kind: type) -> Callable[[Write], Write]:
    """Register a function that writes pictures to loggers of a class. It is used as a decorator.

    Args:
        kind: Class of the logger, or of its attribute ``experiment``. Subclasses are included.

    Returns:
        The decorator. The function is called with the logger, the tag, pixels ``(height, width, 3)`` uint8, and the
        step, which may be None.

    Example:
        >>> import numpy as np
        >>> from nclightning.pictures import log_picture, register_logger
        >>> class Album:
        ...     def __init__(self):
        ...         self.pages = {}
        >>> @register_logger(Album)
        ... def write(album, tag, pixels, step):
        ...     album.pages[tag, step] = pixels
        >>> album = Album()
        >>> log_picture(album, "black", np.zeros((2, 3)), step=5)
        >>> album.pages["black", 5].shape
        (2, 3, 3)
    """

    def register(write: Write) -> Write:
        _registered[kind] = write
        return write

    return register


def picture_writers(loggers: Sequence[Any]) -> list[PictureWriter]:
    """Return a writer for each logger that accepts pictures.

    Args:
        loggers: Loggers of any kinds. Those that do not accept pictures are skipped.

    Returns:
        The writers in the order of the loggers.

    Example:
        >>> import numpy as np
        >>> from nclightning.pictures import picture_writers
        >>> class Writer:
        ...     def add_image(self, tag, img_tensor, global_step):
        ...         print(tag, img_tensor.shape, global_step)
        >>> writers = picture_writers([Writer(), "no logger"])
        >>> len(writers)
        1
        >>> writers[0]("black", np.zeros((2, 3, 3), dtype=np.uint8), 5)
        black (3, 2, 3) 5
    """
    return [writer for writer in map(_writer, loggers) if writer is not None]


# Recognition of loggers.


def _writer(logger: Any) -> PictureWriter | None:
    """Return a writer for a logger or its client; None if it does not accept pictures."""
    for each in _layers(logger):
        for known in (_own, _mlflow, _wandb, _by_method):
            writer = known(each)
            if writer is not None:  # The writer for W&B adds the logger's prefix itself.
                return writer if known is _wandb else writer.with_prefix(prefixed(logger, ""))
    return None


def _own(logger: Any) -> PictureWriter | None:
    """Return a writer with the function that the user registered for the class of a logger."""
    write = next((_registered[kind] for kind in type(logger).__mro__ if kind in _registered), None)
    return None if write is None else PictureWriter(partial(write, logger))


def _layers(logger: Any) -> Iterator[Any]:
    """Yield a logger and its client, which is the attribute ``experiment`` in Lightning, ``tracker`` in accelerate."""
    yield logger
    for name in ("experiment", "tracker"):
        inner = None if isinstance(logger, ModuleType) else getattr(logger, name, None)
        if inner is not None and inner is not logger:
            yield inner


def _mlflow(logger: Any) -> PictureWriter | None:
    """Return a writer for MLflow: Lightning's logger, a client with a run's id, a run, or the module ``mlflow``."""
    client: Any = logger
    options: dict[str, Any] = {}
    if isinstance(logger, tuple) and len(logger) == 2:
        client, options["run_id"] = logger
    elif hasattr(logger, "run_id") and "run_id" in argument_names(getattr(logger, "experiment", None), "log_image"):
        client, options["run_id"] = logger.experiment, logger.run_id
    elif type(logger).__module__.startswith("mlflow.") and hasattr(getattr(logger, "info", None), "run_id"):
        from mlflow import MlflowClient  # noqa: PLC0415

        client, options["run_id"] = MlflowClient(), logger.info.run_id
    names = argument_names(client, "log_image")
    if not {"image", "key", "step"} <= names:
        return None
    if "run_id" in names and "run_id" not in options:
        raise UserError("logger is an MlflowClient, which can write to several runs: pass (client, run_id).")

    def write(tag: str, pixels: Pixels, step: int | None) -> None:
        # MLflow raises an error for other characters.
        client.log_image(image=pixels, key=re.sub(r"[^\w\-./ ]", "_", tag, flags=re.ASCII), step=step, **options)

    return PictureWriter(write)


def _wandb(logger: Any) -> PictureWriter | None:
    """Return a writer for W&B: Lightning's logger, a run, or the module ``wandb`` with its run."""
    if (run := wandb_run(logger)) is not None:
        return PictureWriter(
            lambda tag, pixels, step: send_values(logger, {tag: _wandb_image(pixels)}, step),
            lambda tag, pixels, step: join_row(logger, run, {tag: _wandb_image(pixels)}, step),
        )
    if {"key", "images", "step"} <= argument_names(logger, "log_image"):
        return PictureWriter(lambda tag, pixels, step: logger.log_image(tag, [pixels], step=step))
    is_module = isinstance(logger, ModuleType) and logger.__name__ == "wandb"
    run = logger.run if is_module else logger
    if is_module and run is None:
        raise UserError("logger is the module wandb, which has no run yet: call wandb.init() first.")
    return PictureWriter(partial(_write_to_run, run)) if is_wandb_run(run) else None


def _write_to_run(run: Any, tag: str, pixels: Pixels, step: int | None) -> None:
    """Add a picture to a row of a W&B run, or to its current row if that is later."""
    if step is not None and step >= run.step:
        run.log({tag: _wandb_image(pixels)}, step=step)
        return
    if step is not None:
        ranks.rank_zero_warn(
            f"W&B is at row {run.step} and drops what comes for an earlier one: the picture {tag!r} of step={step} "
            "joins that row. Pass the step that you pass to run.log(step=...), or none."
        )
    # A separate row would increase W&B's count, and silently drop a row to which the user gives this number.
    run.log({tag: _wandb_image(pixels)}, commit=False)


def _wandb_image(pixels: Pixels) -> Any:
    """Convert pixels to an image of W&B."""
    from wandb import Image  # noqa: PLC0415

    return Image(pixels)


# TensorBoard, Comet, Aim, and loggers with the same methods: name of the method, required arguments, and the call.
_METHODS: tuple[tuple[str, set[str], Write], ...] = (
    ("add_image", {"dataformats"}, lambda to, tag, pixels, step: to.add_image(tag, pixels, step, dataformats="HWC")),
    ("add_image", set(), lambda to, tag, pixels, step: to.add_image(tag, pixels.transpose(2, 0, 1), step)),
    ("log_image", {"name", "step"}, lambda to, tag, pixels, step: to.log_image(pixels, name=tag, step=step)),
    ("log_figure", {"figure", "step"}, lambda to, tag, pixels, step: to.log_figure(tag, _figure(pixels), step=step)),
    ("add_figure", set(), lambda to, tag, pixels, step: to.add_figure(tag, _figure(pixels), step)),
    ("track", {"value", "name", "step"}, lambda to, tag, pixels, step: to.track(_aim(pixels), name=tag, step=step)),
)


def _by_method(logger: Any) -> PictureWriter | None:
    """Return a writer for a logger that has one of the known methods."""
    for method, needed, write in _METHODS:
        names = argument_names(logger, method)
        if len(names) >= 3 and needed <= names:
            return PictureWriter(partial(write, logger))
    return None


def _aim(pixels: Pixels) -> Any:
    """Convert pixels to an image of Aim."""
    from aim import Image  # type: ignore[import-not-found]  # noqa: PLC0415
    from PIL import Image as Pillow  # noqa: PLC0415

    return Image(Pillow.fromarray(pixels))


def _named(logger: Any) -> str:
    text = repr(logger)
    return text if len(text) <= 60 else f"{text[:57]}..."


# Conversion of pictures.


def _pixels(picture: Picture) -> Pixels:
    """Convert a picture to uint8 ``(height, width, 3)`` on a white background."""
    from PIL import Image  # noqa: PLC0415 - as matplotlib, half a second

    if hasattr(picture, "savefig"):  # A matplotlib figure. savefig does not change its canvas.
        file = io.BytesIO()
        picture.savefig(file, format="png", dpi=picture.dpi if isinstance(picture.dpi, float | int) else 100)
        image: Image.Image = Image.open(file)
    elif isinstance(picture, str | Path):
        image = Image.open(picture)
    elif isinstance(picture, Image.Image):
        image = picture
    else:
        image = Image.fromarray(_bytes(picture))
    image = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def _bytes(array: Any) -> Pixels:
    """Convert an array to uint8 ``(height, width)`` or ``(height, width, channels)``."""
    array = np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise UserTypeError(
            f"picture must be a matplotlib figure, an image, its path, or an array (height, width), (height, width, 3) "
            f"or (height, width, 4), got {_named(array) if array.ndim == 0 else f'an array of shape {array.shape}'}."
        )
    if array.dtype.kind == "f" and array.min() >= 0 and array.max() <= 1:
        array = np.round(array * 255)
    elif array.dtype != np.uint8:
        span = f"{array.dtype} from {array.min()} to {array.max()}"
        raise UserTypeError(f"picture must be of dtype uint8, or of floats from 0 to 1, got {span}.")
    pixels: Pixels = array.astype(np.uint8)
    return pixels


def _figure(pixels: Pixels) -> Any:
    """Return a matplotlib figure that shows pixels one to one."""
    from matplotlib.figure import Figure  # noqa: PLC0415

    dpi = 100
    figure = Figure(figsize=(pixels.shape[1] / dpi, pixels.shape[0] / dpi), dpi=dpi)
    figure.figimage(pixels)
    return figure
