"""Model folders of Hugging Face, with models from config and data on the disk."""

import csv
import gc

import numpy as np
import pytest
import torch

import nclightning
from nclightning.cli import main
from nclightning.figures import read_readings
from tests.series.models import IDS, NAMES, pillow, save_models, transformers

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    save_models(folder)
    return folder


@pytest.fixture
def here(files, monkeypatch, tmp_path):
    monkeypatch.chdir(files)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield tmp_path
    gc.collect()  # datasets leaves images open that are cut: not to be warned of in a later test.
    gc.freeze()  # Mostly libraries are left, which the next collection skips.


def measured(words, out):
    main(["measure", *words, "--out", str(out)])
    return read_readings(out)


def test_texts_give_what_measure_gives_at_the_steps_of_the_trainer(here):
    found = measured(["out", "--data", "reviews.csv"], here / "out")
    again = measured(["out", "--data", "stars.csv", "--text", "review", "--labels", "stars"], here / "again")
    assert found.iterations.tolist() == [20, 100]
    with open("reviews.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for i, step in enumerate(("20", "100")):
        folder = f"out/checkpoint-{step}"
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        inputs = transformers.AutoTokenizer.from_pretrained(folder)(
            [row["text"] for row in rows], padding=True, return_tensors="pt"
        )
        labels = torch.tensor([IDS[row["label"]] for row in rows])
        expected = nclightning.measure(model, [dict(inputs) | {"labels": labels}])
        for name, value in expected.items():
            assert found.values[f"nc/train/{name}"][i] == pytest.approx(value, rel=1e-12)
            assert again.values[f"nc/train/{name}"][i] == found.values[f"nc/train/{name}"][i]


def test_images_in_folders_by_class_get_the_numbers_of_the_model(here):
    found = measured(["resnet", "--data", "images", "--batch_size", "5"], here / "out")
    model = transformers.AutoModelForImageClassification.from_pretrained("resnet").eval()
    processor = transformers.AutoImageProcessor.from_pretrained("resnet")
    images = [pillow.open(f"images/{name}/{i}.png") for name in NAMES for i in range(4)]
    labels = torch.tensor([IDS[name] for name in NAMES]).repeat_interleave(4)
    expected = nclightning.measure(model, [dict(processor(images, return_tensors="pt")) | {"labels": labels}])
    assert found.iterations.tolist() == [0]
    for name, value in expected.items():
        assert found.values[f"nc/train/{name}"][0] == pytest.approx(value, rel=1e-5)  # In float32, in other batches.


def test_splits_on_the_disk_are_stages(here):
    rows = {"text": ["w1 w2", "w3", "w4 w5"] * 5, "label": ["bad", "ok", "good"] * 5}
    data = datasets.Dataset.from_dict(rows).class_encode_column("label")
    datasets.DatasetDict({"train": data, "validation": data}).save_to_disk(str(here / "disk"))
    words = ["out/checkpoint-20", "--data", str(here / "disk"), "--measures", "nc1", "ncc_accuracy"]
    values = measured(words, here / "out").values
    assert list(values) == [f"nc/{stage}/{name}" for stage in ("train", "val") for name in ("nc1", "ncc_accuracy")]
    assert values["nc/train/nc1"] == values["nc/val/nc1"]


def test_labels_of_other_names_are_taken_in_order_where_that_is_asked_for(here):
    values = measured(["out", "--data", "others.csv", "--labels_in_order"], here / "out").values
    assert all(np.isfinite(each).all() for each in values.values())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["out"], "models of Hugging Face need data: give --data FOLDER of images"),
        (["out", "--data", "nowhere.csv"], "--data nowhere.csv: no such file or folder"),
        (["out", "--data", "vocab.txt"], "--data vocab.txt: expected a folder, or a csv, json, jsonl or parquet"),
        (["out", "--data", "stars.csv"], "stars.csv: the column of the labels is none of review, stars"),
        (
            ["out", "--data", "reviews.csv", "--text", "x"],
            "--text x: reviews.csv has no such column, it has",
        ),
        (["out", "--data", "others.csv"], "others.csv has the label 'x', and the model knows bad, ok, good"),
        (
            ["base", "--data", "reviews.csv"],
            "base has no classifier.bias, classifier.weight: .* not been trained",
        ),
        (
            ["words", "--data", "reviews.csv"],
            "words has the architecture BertForMaskedLM, but only models for",
        ),
        (["zero", "--data", "reviews.csv"], "zero/model.safetensors is empty"),
        (["plain", "--data", "reviews.csv"], "plain has no tokenizer that can be loaded"),
        (
            ["wordless", "--data", "reviews.csv"],
            "wordless has no tokenizer, none of the files tokenizer_config.json, tokenizer.json",
        ),
        (
            ["out", "--data", "gaps.jsonl"],
            "out/checkpoint-20: gaps.jsonl: the texts of 6 samples cannot be prepared; one",
        ),
        (
            ["out", "--data", "gaps.jsonl", "--num_workers", "1"],
            "^error: out/checkpoint-20: gaps.jsonl: the texts of 6",
        ),
        (["resnet", "--data", "cut"], "resnet: cut: sample 0 cannot be read: "),
        (["out", "--data", "reviews.csv", "--config", "x"], "--config applies to checkpoints of Lightning"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_one_sentence_and_writes_nothing(words, message, here):
    with pytest.raises(SystemExit, match=message) as caught:
        main(["measure", *words, "--out", str(here / "out")])
    assert "\n" not in str(caught.value)
    assert not (here / "out").exists()
