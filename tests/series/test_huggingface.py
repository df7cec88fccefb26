"""Model folders of Hugging Face, with models from config and data on the disk."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

import nclightning
from nclightning.cli import main
from nclightning.figures import read_readings

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
pillow = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ["bad", "good", "ok"]
IDS = {"bad": 0, "ok": 1, "good": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("files"), np.random.default_rng(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(30))]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
    named = {"num_labels": 3, "label2id": IDS, "id2label": {i: name for name, i in IDS.items()}}
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, **sizes, **named)
    for step in (100, 20):
        place = folder / "out" / f"checkpoint-{step}"
        torch.manual_seed(step)
        transformers.BertForSequenceClassification(config).save_pretrained(place)
        tokenizer.save_pretrained(place)
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    transformers.BertModel(config).save_pretrained(folder / "base")
    transformers.BertForMaskedLM(config).save_pretrained(folder / "words")
    content = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(
        json.dumps(content | {"architectures": ["BertForSequenceClassification"]})
    )
    for name, left in (("plain", "*token*"), ("zero", "*.safetensors")):
        shutil.copytree(folder / "out" / "checkpoint-20", folder / name)
        for path in (folder / name).glob(left):
            path.write_bytes(b"")
    texts = [" ".join(f"w{i}" for i in draw.integers(30, size=draw.integers(2, 9))) for _ in range(30)]
    labels = [NAMES[i % 3] for i in range(30)]
    for name, header, column in (
        ("reviews", ("text", "label"), labels), ("stars", ("review", "stars"), [IDS[each] for each in labels]),
        ("others", ("text", "label"), ["x", "y", "z"] * 10),
    ):  # fmt: skip
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, *zip(texts, column, strict=True)])
    for name in NAMES:
        (folder / "images" / name).mkdir(parents=True)
        for i in range(4):
            pillow.fromarray(draw.integers(255, size=(9, 9, 3), dtype=np.uint8)).save(
                folder / "images" / name / f"{i}.png"
            )
    network = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", **named)
    transformers.ResNetForImageClassification(network).save_pretrained(folder / "resnet")
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "do_resize": False}
    (folder / "resnet" / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def here(files, monkeypatch, tmp_path):
    monkeypatch.chdir(files)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


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
        (["out", "--data", "stars.csv"], "stars.csv has no column for the labels that is known, only review, stars"),
        (
            ["out", "--data", "reviews.csv", "--text", "x"],
            "--text x: reviews.csv has no such column, it has text, label",
        ),
        (["out", "--data", "others.csv"], "others.csv has the label 'x', and the model knows bad, ok, good"),
        (
            ["base", "--data", "reviews.csv"],
            "base has no classifier.bias, classifier.weight: .* head is not trained yet",
        ),
        (
            ["words", "--data", "reviews.csv"],
            "words holds the architecture BertForMaskedLM, and models for image or seq",
        ),
        (["zero", "--data", "reviews.csv"], "zero/model.safetensors is empty"),
        (["plain", "--data", "reviews.csv"], "plain has no tokenizer that can be loaded"),
        (["out", "--data", "reviews.csv", "--config", "x"], "--config is for checkpoints of Lightning"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_one_sentence_and_writes_nothing(words, message, here):
    with pytest.raises(SystemExit, match=message) as caught:
        main(["measure", *words, "--out", str(here / "out")])
    assert "\n" not in str(caught.value)
    assert not (here / "out").exists()
