"""Tiny models and data sets of Hugging Face's tasks, and a quiet trainer."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import Dataset

HIDDEN, CLASSES = 16, 3


class Rows(Dataset):
    """A list of samples, each a mapping."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return dict(self.rows[index])


def _bert(kind, **options):
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(
        vocab_size=50, max_position_embeddings=16, num_labels=options.pop("num_labels", CLASSES), **sizes, **options
    )
    torch.manual_seed(0)
    return kind(config)


def text_model(**options):
    return _bert(transformers.BertForSequenceClassification, **options)


def token_model():
    return _bert(transformers.BertForTokenClassification)


def image_model():
    config = transformers.ViTConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8,
        patch_size=4, num_labels=CLASSES,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(config)


def language_model():
    config = transformers.GPT2Config(
        vocab_size=12, n_positions=16, n_embd=HIDDEN, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def texts(count, seed=0):
    """Sentences of several lengths; the words tell the class."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(3, 8, (), generator=draw))
        words = torch.randint(1, 16, (length,), generator=draw) + 16 * (i % CLASSES)
        rows.append({"input_ids": words.tolist(), "labels": i % CLASSES})
    return Rows(rows)


def tagged(count, seed=0):
    """Sentences with a class for each word; the first ones have none."""
    rows = texts(count, seed).rows
    return Rows([{**row, "labels": [-100, *(word // 16 for word in row["input_ids"][1:])]} for row in rows])


def sentences(count, seed=0):
    """Sentences whose words are their labels."""
    draw = torch.Generator().manual_seed(seed)
    words = [torch.randint(0, 12, (5,), generator=draw).tolist() for _ in range(count)]
    return Rows([{"input_ids": each, "labels": list(each)} for each in words])


def images(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(CLASSES, 3, 8, 8, generator=draw, dtype=torch.float64)
    noise = torch.randn(count, 3, 8, 8, generator=draw, dtype=torch.float64)
    return Rows([{"pixel_values": means[i % CLASSES] + noise[i], "labels": i % CLASSES} for i in range(count)])


def pad_all(rows):
    """Make a batch as long as any."""
    return pad(rows, 8)


def pad(rows, longest=0):
    """Make a batch, as DataCollatorWithPadding does."""
    longest = max(longest, *(len(row["input_ids"]) for row in rows))

    def padded(values, with_what):
        return torch.tensor([[*each, *[with_what] * (longest - len(each))] for each in values])

    batch = {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
    }
    labels = [row["labels"] for row in rows if "labels" in row]
    if labels:
        batch["labels"] = padded(labels, -100) if isinstance(labels[0], list) else torch.tensor(labels)
    return batch


@dataclass
class Task:
    """A model with data for it."""

    model: Any
    data: Any
    collate: Any


TASKS = {
    "text": Task(text_model, texts, pad),
    "image": Task(image_model, images, transformers.default_data_collator),
    "token": Task(token_model, tagged, pad),
    "language": Task(language_model, sentences, pad),
}


class Wrapped(nn.Module):
    """A model within another one, as of adapters."""

    def __init__(self, model):
        super().__init__()
        self.base_model, self.scale = model, nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, *args, **kwargs):
        return self.base_model(*args, **kwargs)


def trainer_of(folder, model, train=None, kind=transformers.Trainer, callbacks=(), eval_dataset=None, **options):
    """Make a trainer that shows nothing."""
    known = {"data_collator", "compute_loss_func", "compute_metrics", "optimizers"}
    own = {"data_collator": pad} | {name: options.pop(name) for name in known & options.keys()}
    arguments = {
        "output_dir": str(folder), "report_to": [], "num_train_epochs": 1, "per_device_train_batch_size": 8,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 1,
        "learning_rate": 1e-3, "remove_unused_columns": False, "dataloader_pin_memory": False, "log_level": "error",
    } | options  # fmt: skip
    args = transformers.TrainingArguments(**arguments)
    made = kind(
        model=model, args=args, train_dataset=train, eval_dataset=eval_dataset, callbacks=list(callbacks), **own
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def measured(trainer, key="nc/nc1"):
    """Return what was logged, by optimizer step."""
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}
