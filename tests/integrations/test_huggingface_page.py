"""What docs/huggingface.md shows, runs and prints what it says."""

import inspect
import re
from pathlib import Path

import pytest

from tests.integrations.tasks import measured, pad, text_model, texts

transformers = pytest.importorskip("transformers")

from nclightning.integrations.huggingface import NeuralCollapseCallback  # noqa: E402

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "huggingface.md").read_text()


def test_blocks_run_and_print_what_is_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.Trainer, "__init__", quietly(transformers.Trainer.__init__))
    args = transformers.TrainingArguments(
        "run", num_train_epochs=2, logging_strategy="epoch", eval_strategy="epoch", save_strategy="no", use_cpu=True,
        disable_tqdm=True, report_to=[], remove_unused_columns=False, log_level="error",
    )  # fmt: skip
    scope = {"model": text_model(), "train": texts(30), "test": texts(9), "collate": pad, "args": args}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, scope)
    shown = "".join(re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL))
    assert capsys.readouterr().out == shown
    assert scope["found"]["nc1"] == pytest.approx(measured(scope["trainer"])[8], rel=1e-4)


def quietly(init):
    def made(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.remove_callback(transformers.PrinterCallback)

    return made


def test_options_of_the_page_are_those_of_the_callback():
    page = PAGE.split("## Options")[1].split("## What is measured")[0]
    rows = re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE)
    (sentence,) = re.findall(r"mean what they mean everywhere: (.*?)\. When", page, re.DOTALL)
    names = set(inspect.signature(NeuralCollapseCallback).parameters)
    assert {*rows, *re.findall(r"`(\w+)`", sentence)} == names
