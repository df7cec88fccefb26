"""Models of Hugging Face from config, with little data on the disk."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
pillow = pytest.importorskip("PIL.Image")
NAMES = ["bad", "good", "ok"]
IDS = {"bad": 0, "ok": 1, "good": 2}


def save_models(folder):
    """Leave model folders, good ones and bad ones, and data in a folder."""
    draw = np.random.default_rng(0)
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
    classifier = {"architectures": ["BertForSequenceClassification"]}
    content = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(json.dumps(content | classifier))
    for name, left in (("plain", "*token*"), ("zero", "*.safetensors")):
        shutil.copytree(folder / "out" / "checkpoint-20", folder / name)
        for path in (folder / name).glob(left):
            path.write_bytes(b"")
    shutil.copytree(folder / "out" / "checkpoint-20", folder / "wordless")
    for path in (folder / "wordless").glob("*token*"):
        path.unlink()
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
            image = pillow.fromarray(draw.integers(255, size=(9, 9, 3), dtype=np.uint8))
            image.save(folder / "images" / name / f"{i}.png")
    shutil.copytree(folder / "images", folder / "cut")
    for path in (folder / "cut" / "bad").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    lines = [json.dumps({"text": None if i == 2 else texts[i], "label": labels[i]}) for i in range(6)]
    (folder / "gaps.jsonl").write_text("\n".join(lines))
    network = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", **named)
    transformers.ResNetForImageClassification(network).save_pretrained(folder / "resnet")
    processor = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "do_resize": False}
    (folder / "resnet" / "preprocessor_config.json").write_text(json.dumps(processor))
