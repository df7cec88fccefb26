"""One call brings a picture to any logger, with the arguments of its own methods."""

import inspect
import sys
import types
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from nclightning import pictures, ranks
from nclightning.errors import UserError, UserTypeError
from nclightning.pictures import log_picture, register_logger
from tests.offline_runs import finished_wandb_run, mlflow_pictures, wandb_pictures, wandb_rows

RED = np.zeros((4, 6, 3), np.uint8)
RED[..., 0] = 255


class Keeps:
    """Base of stand-ins: keeps what came."""

    def __init__(self):
        self.calls = []


class Comet(Keeps):
    """``comet_ml.CometExperiment`` 3.58."""

    def log_image(
        self, image_data, name=None, overwrite=False, image_format="png", image_scale=1.0, image_shape=None,
        image_colormap=None, image_minmax=None, image_channels="last", copy_to_tmp=True, step=None, annotations=None,
        metadata=None,
    ):  # fmt: skip
        self.calls.append((name, image_data, step))

    def log_figure(self, figure_name=None, figure=None, overwrite=False, step=None, metadata=None, format="auto"):
        raise AssertionError


class OnlyFigures(Keeps):
    def log_figure(self, figure_name=None, figure=None, overwrite=False, step=None, metadata=None, format="auto"):
        self.calls.append((figure_name, drawn(figure), step))


class Aim(Keeps):
    """``aim.Run`` 3.29."""

    experiment = "name of an experiment"

    def track(self, value, name=None, step=None, epoch=None, *, context=None):
        self.calls.append((name, np.asarray(value.image), step))


class ChannelsFirst(Keeps):
    def add_image(self, tag, image, step):
        self.calls.append((tag, image.transpose(1, 2, 0), step))


class AddsFigures(Keeps):
    def add_figure(self, tag, figure, global_step=None, close=True, walltime=None):
        self.calls.append((tag, drawn(figure), global_step))


class LikeLightning(Keeps):
    def log_image(self, key, images, step=None, **kwargs):
        self.calls.append((key, *images, step))


KINDS = [Comet, OnlyFigures, Aim, ChannelsFirst, AddsFigures, LikeLightning]


def drawn(figure):
    return pictures._pixels(figure)


@pytest.fixture(autouse=True)
def aim(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "aim", types.SimpleNamespace(Image=lambda image: types.SimpleNamespace(image=image))
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrap", [lambda client: client, lambda client: types.SimpleNamespace(experiment=client),
                                  lambda client: types.SimpleNamespace(tracker=client)])  # fmt: skip
def test_known_methods(kind, wrap):
    client = kind()
    log_picture(wrap(client), "a/b", RED, 7)
    ((tag, image, step),) = client.calls
    assert (tag, step) == ("a/b", 7)
    assert np.array_equal(image, RED)


def test_a_list_in_any_order_leaves_those_without_pictures_alone(tmp_path):
    clients = [kind() for kind in KINDS]
    others = [CSVLogger(tmp_path), DummyLogger(), MagicMock(), object(), None]
    for loggers in ([*clients, *others], [*reversed(others), *clients]):
        log_picture(loggers, "a", RED, 1)
    assert [len(client.calls) for client in clients] == [2] * len(clients)
    log_picture([], "a", RED, 1)  # logger=False
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("make", [CSVLogger, lambda _: DummyLogger(), lambda _: MagicMock(), lambda _: 3])
def test_a_single_logger_without_pictures_is_said(make, tmp_path):
    with pytest.raises(UserTypeError, match=r"does not accept pictures.*register_logger"):
        log_picture(make(tmp_path), "a", RED, 1)


def test_a_logger_of_the_user_makes_itself_known(monkeypatch):
    monkeypatch.setattr(pictures, "_registered", {})

    class Album:
        def __init__(self):
            self.pages = []

    class Special(Album):
        def add_image(self, tag, image, step):
            raise AssertionError

    @register_logger(Album)
    def write(album, tag, pixels, step):
        album.pages.append((tag, pixels.shape, step))

    album, special = Album(), Special()
    log_picture([types.SimpleNamespace(experiment=album), special], "a", RED, 3)
    assert album.pages == special.pages == [("a", (4, 6, 3), 3)]


def test_only_the_first_process_writes(monkeypatch):
    client = Comet()
    monkeypatch.setattr(ranks, "rank", lambda: 1)
    log_picture(client, "a", RED, 1)
    assert client.calls == []


def test_what_a_picture_may_be(tmp_path):
    client = Comet()
    Image.fromarray(RED).save(tmp_path / "red.png")
    transparent = np.dstack([RED, np.full((4, 6), 255, np.uint8)])
    for picture in (
        RED, RED / 255, torch.tensor(RED), transparent, Image.fromarray(RED), tmp_path / "red.png",
        str(tmp_path / "red.png"), torch.tensor(RED / 255, requires_grad=True),
    ):  # fmt: skip
        log_picture(client, "a", picture)
    assert all(np.array_equal(image, RED) for _, image, _ in client.calls)
    transparent[..., 3] = 0
    log_picture(client, "a", transparent)
    log_picture(client, "a", np.ones((4, 6)))
    assert all((image == 255).all() for _, image, _ in client.calls[-2:])


def test_a_figure_is_as_before():
    figure = plt.figure(figsize=(3, 2), dpi=50)
    canvas = figure.canvas
    client = Comet()
    log_picture(client, "a", figure)
    log_picture(client, "a", Figure(figsize=(3, 2), dpi=50))
    assert [image.shape for _, image, _ in client.calls] == [(100, 150, 3)] * 2
    assert figure.canvas is canvas
    assert figure.dpi == 50
    plt.close(figure)


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (np.zeros((3, 40, 40)), r"\(height, width, 3\).*got an array of shape \(3, 40, 40\)"),
        (np.full((2, 2), 3.0), "dtype uint8, or of floats from 0 to 1, got float64 from 3.0 to 3.0"),
        (np.full((2, 2), np.nan), "got float64 from nan to nan"),
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (None, "got"),
    ],
)
def test_no_picture_is_said(picture, said):
    with pytest.raises(UserError, match=said):
        log_picture(Comet(), "a", picture)


def test_tensorboard(tmp_path):
    writer = SummaryWriter(tmp_path / "plain")
    logger = TensorBoardLogger(tmp_path, prefix="mine")
    log_picture([writer, logger], "a", RED, 5)
    writer.close()
    logger.finalize("success")
    for folder, tag in ((tmp_path / "plain", "a"), (logger.log_dir, "mine-a")):
        (event,) = EventAccumulator(str(folder)).Reload().Images(tag)
        assert (event.step, event.height, event.width) == (5, 4, 6)


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    client = mlflow.MlflowClient()
    with pytest.raises(UserError, match=r"pass \(client, run_id\)"):
        log_picture(client, "a", RED, 1)
    with mlflow.start_run() as run:
        log_picture((client, run.info.run_id), "nc/train/angles", RED, 1)
        log_picture(run, "layer:0=a/b", RED, 2)
        log_picture(mlflow, "nc", RED, 3)
        mlflow.flush_artifact_async_logging()
    found = mlflow_pictures(tmp_path / "mlruns" / run.info.experiment_id / run.info.run_id / "artifacts")
    assert [(tag, step) for tag, step, _ in found] == [("layer_0_a/b", 2), ("nc", 3), ("nc/train/angles", 1)]
    assert all(np.array_equal(image, RED) for *_, image in found)


def test_a_plain_run_of_wandb(tmp_path, monkeypatch):
    """Whether its user numbers the rows or not, no row is lost and none is added."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with pytest.raises(UserError, match=r"wandb.init\(\)"):
        log_picture(wandb, "a", RED, 1)
    run = wandb.init(mode="offline", dir=tmp_path)
    for step in range(3):  # Counted by W&B.
        run.log({"loss": step})
        log_picture(run, "unnumbered", RED)
    for step in range(10, 14):  # Numbered by the user.
        if step == 12:
            log_picture(wandb, "before", RED, step)
        run.log({"loss": step}, step=step)
        if step == 12:
            log_picture(run, "after", RED, step)
            with pytest.warns(UserWarning, match="at row 12 and drops"):
                log_picture(run, "late", RED, 5)
    folder = finished_wandb_run(run)
    rows = wandb_rows(folder)
    assert [row["loss"] for row in rows if "loss" in row] == [0, 1, 2, 10, 11, 12, 13]
    assert [row["_step"] for row in rows if "loss" in row] == [0, 1, 2, 10, 11, 12, 13]
    assert [row["_step"] for row, _ in wandb_pictures(folder, "unnumbered")] == [1, 2, 3]
    for tag in ("before", "after", "late"):
        ((row, image),) = wandb_pictures(folder, tag)
        assert row["_step"] == 12
        assert np.array_equal(image, RED)


def test_stand_ins_are_like_the_clients():
    comet = pytest.importorskip("comet_ml")
    theirs = inspect.signature(comet.OfflineExperiment.log_image).parameters
    assert list(theirs) == list(inspect.signature(Comet.log_image).parameters)
