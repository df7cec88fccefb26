"""Reads back what the clients of experiment loggers wrote on this machine."""

import json
import struct
import time
from pathlib import Path

import numpy as np
from PIL import Image

# A file of W&B is a log of LevelDB's format: blocks of so many bytes, in which records lie whole or in parts.
_BLOCK, _FILE_HEADER, _PART_HEADER = 32768, 7, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def wandb_records(folder):
    """Yield the records of the offline run in a folder, in order."""
    from wandb.proto import wandb_internal_pb2  # noqa: PLC0415 - takes a second, and may not be installed.

    (path,) = Path(folder).glob("*.wandb")
    data, at, parts = path.read_bytes(), _FILE_HEADER, []
    while at + _PART_HEADER <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _PART_HEADER:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        at += _PART_HEADER
        assert kind in (_FULL, _FIRST, _MIDDLE, _LAST)
        parts.append(data[at : at + size])
        at += size
        if kind in (_FULL, _LAST):
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def finished_wandb_run(run):
    """Finish an offline run, and return its folder once all is written."""
    import wandb  # noqa: PLC0415

    folder = Path(run.dir).parent
    run.finish()
    wandb.teardown()
    while not any(record.WhichOneof("record_type") == "exit" for record in wandb_records(folder)):
        time.sleep(0.05)  # A process of W&B's own writes.
    return folder


def wandb_rows(folder):
    """Return the rows of an offline run, each with its number under ``_step``."""
    rows = []
    for record in wandb_records(folder):
        if record.WhichOneof("record_type") == "history":
            row = {}
            for item in record.history.item:
                *outer, last = list(item.nested_key) or [item.key]
                place = row
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
            rows.append({key: value for key, value in row.items() if key not in ("_runtime", "_timestamp")})
    return rows


def wandb_pictures(folder, tag):
    """Return the pictures of a tag with the rows that they came in."""
    rows = [row for row in wandb_rows(folder) if tag in row]
    names = [row[tag]["filenames"] if "filenames" in row[tag] else [row[tag]["path"]] for row in rows]
    found = []
    for row, paths in zip(rows, names, strict=True):
        (path,) = paths
        found.append((row, read_picture(Path(folder) / "files" / path)))
    return found


def mlflow_curve(client, run_id, tag):
    """Return steps and values of a metric."""
    return [(each.step, each.value) for each in client.get_metric_history(run_id, tag)]


def mlflow_pictures(folder):
    """Return tag, step and picture of the images in a folder of artifacts, in order of steps."""
    found = []
    for path in (Path(folder) / "images").glob("*.png"):
        tag, _, step, *_ = path.name.split("+")
        found.append((tag.replace("~", "/"), int(step), read_picture(path)))
    return sorted(found, key=lambda each: each[:2])


def read_picture(path):
    """Return the pixels of a file."""
    with Image.open(path) as image:
        return np.asarray(image)
