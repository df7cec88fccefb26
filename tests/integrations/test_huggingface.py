"""Neural collapse under Hugging Face's Trainer."""

import copy
import importlib
import random
import sys

import lightning as L
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, IterableDataset

import nclightning
from nclightning.callbacks import NeuralCollapseMonitor
from nclightning.errors import UserError
from nclightning.probe.sweep import sequential_loader
from tests.integrations.tasks import (
    TASKS,
    Rows,
    Wrapped,
    image_model,
    images,
    measured,
    pad,
    text_model,
    texts,
    trainer_of,
)
from tests.trainers import quiet_trainer

transformers = pytest.importorskip("transformers")

from nclightning.integrations.huggingface import NeuralCollapseCallback  # noqa: E402

MEASURES = ("nc1", "nc2", "nc3", "ncc_accuracy")


class OfTask(L.LightningModule):
    """A model of transformers in Lightning, whose weights stay."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("name", TASKS)
def test_all_hosts_agree(name, tmp_path):
    task = TASKS[name]
    model, train, other = task.model().double(), task.data(29), task.data(13, seed=1)
    trainer = trainer_of(
        tmp_path, model, train, eval_dataset=other, eval_strategy="epoch", data_collator=task.collate,
        callbacks=[NeuralCollapseCallback(measures=MEASURES)],
    )  # fmt: skip
    trainer.train()
    loader = DataLoader(train, 8, collate_fn=task.collate)
    plain = nclightning.measure(model, loader, measures=MEASURES)
    of_other = nclightning.measure(model, DataLoader(other, 5, collate_fn=task.collate))
    lightning = quiet_trainer(tmp_path, max_epochs=1, callbacks=[NeuralCollapseMonitor(measures=MEASURES)])
    lightning.fit(OfTask(model).train(), DataLoader(train, 8, shuffle=True, collate_fn=task.collate))
    for key in MEASURES:
        assert measured(trainer, f"nc/{key}")[4] == pytest.approx(plain[key], rel=1e-12, abs=1e-12)
        assert float(lightning.callback_metrics[f"nc/train/{key}"]) == pytest.approx(plain[key], rel=1e-12, abs=1e-12)
    for key in of_other:
        assert measured(trainer, f"eval_nc/{key}")[4] == pytest.approx(of_other[key], rel=1e-12, abs=1e-12)


class Noisy(Rows):
    """Draws from all global random states."""

    def __getitem__(self, index):
        row = super().__getitem__(index)
        shift = random.random() + np.random.rand() + float(torch.rand(()))
        return {**row, "pixel_values": row["pixel_values"].float() + shift}


class Counting(transformers.ViTForImageClassification):
    """Has a buffer that each forward changes."""

    def __init__(self, config):
        super().__init__(config)
        self.loss_type = "ForImageClassification"  # Else by the name of the class.
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)


def states(trainer):
    model = trainer.model
    generators = random.getstate()[1], np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return generators, [module.training for module in model.modules()], hooks


def test_a_run_is_bit_for_bit_the_same_without_it(tmp_path):
    config = image_model().config
    config.hidden_dropout_prob = 0.3
    runs = []
    for callbacks in ([], [NeuralCollapseCallback(measures=("all",), every_n_steps=3, layers=("vit.layers.0",))]):
        transformers.set_seed(0)
        trainer = trainer_of(
            tmp_path, Counting(copy.deepcopy(config)), Noisy(images(29).rows), eval_dataset=Noisy(images(9).rows),
            data_collator=transformers.default_data_collator, eval_strategy="epoch", num_train_epochs=3,
            gradient_accumulation_steps=2, callbacks=callbacks, logging_steps=2,
        )  # fmt: skip
        trainer.train()
        times = ("runtime", "per_second")
        entries = [e for e in trainer.state.log_history if not any("nc/" in key for key in e)]
        history = [{k: v for k, v in e.items() if not k.endswith(times)} for e in entries]
        runs.append((history, states(trainer), trainer.model.state_dict(), trainer.optimizer.state_dict()["state"]))
    (history, state, weights, optimizer), (history_with, state_with, weights_with, optimizer_with) = runs
    assert [e["step"] for e in trainer.state.log_history if "nc/nc1" in e] == [2, 3, 4, 6]
    assert history == history_with
    assert state == state_with
    assert all(torch.equal(weights[key], weights_with[key]) for key in weights)
    assert weights["calls"] > 0
    for number, of_parameter in optimizer.items():
        assert all(torch.equal(value, optimizer_with[number][key]) for key, value in of_parameter.items())


class Stream(IterableDataset):
    """Samples one after the other, once or for ever."""

    def __init__(self, rows, endless=False):
        self.rows, self.endless = rows, endless

    def __iter__(self):
        while True:
            yield from map(dict, self.rows)
            if not self.endless:
                return


class OwnLoss(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        output = model(**inputs)
        loss = cross_entropy(output.logits, labels)
        return (loss, output) if return_outputs else loss


class OwnLoader(transformers.Trainer):
    def get_train_dataloader(self):
        return DataLoader(self.train_dataset, batch_size=8, shuffle=True, collate_fn=self.data_collator)


class OwnLog(transformers.Trainer):
    def log(self, logs, *args):
        super().log({**logs, "own": 1.0}, *args)


def own_loss(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits, labels)


# Options of the trainer and of the callback, and the steps at which the training set is measured.
SETUPS = {
    "two epochs": ({"num_train_epochs": 2}, {}, [4, 8]),
    "every second epoch, and the last": ({"num_train_epochs": 3}, {"every_n_epochs": 2}, [8, 12]),
    "steps": ({"num_train_epochs": 2}, {"every_n_steps": 3}, [3, 4, 6, 8]),
    "accumulation": ({"gradient_accumulation_steps": 3}, {}, [2]),
    "the middle of an epoch": ({"max_steps": 6}, {"every_n_epochs": 5}, [6]),
    "label smoothing": ({"label_smoothing_factor": 0.1}, {}, [4]),
    "a loss function": ({"compute_loss_func": own_loss}, {}, [4]),
    "a loss of the trainer's": ({"kind": OwnLoss}, {}, [4]),
    "a loader of the trainer's": ({"kind": OwnLoader}, {}, [4]),
    "logs of the trainer's": ({"kind": OwnLog}, {}, [4]),
    "length-grouped": ({"train_sampling_strategy": "group_by_length"}, {}, [4]),
    "dropped batches": ({"dataloader_drop_last": True}, {}, [3]),
    "a stream": ({"max_steps": 6, "train": Stream(texts(29).rows)}, {}, [4, 6]),
    "gradient checkpointing": ({"gradient_checkpointing": True}, {}, [4]),
    "an adapter": ({"model": lambda: Wrapped(text_model()), "label_names": ["labels"]}, {}, [4]),
    "bfloat16": ({"bf16": True}, {}, [4]),
    "a batch size that is found": ({"auto_find_batch_size": True}, {}, [4]),
    "other names of labels": (
        {
            "model": lambda: Renamed(text_model()),
            "label_names": ["classes"],
            "data_collator": lambda rows: {("classes" if k == "labels" else k): v for k, v in pad(rows).items()},
        },
        {},
        [4],
    ),
}  # fmt: skip


class Renamed(Wrapped):
    def forward(self, classes=None, **kwargs):
        return self.base_model(labels=classes, **kwargs)


@pytest.mark.filterwarnings("ignore")  # Of what transformers and torch say about setups.
@pytest.mark.parametrize("name", SETUPS)
def test_setups(name, tmp_path):
    options, own, steps = SETUPS[name]
    options = {"train": texts(29), "model": text_model, **options}
    callback = NeuralCollapseCallback(**own)
    trainer = trainer_of(tmp_path, **{**options, "model": options["model"]()}, callbacks=[callback])
    trainer.train()
    found = measured(trainer)
    assert list(found) == steps
    inner = getattr(trainer.model, "base_model", trainer.model) if "model" in SETUPS[name][0] else trainer.model
    again = nclightning.measure(inner, DataLoader(texts(29), 29, collate_fn=pad))
    # Features in bfloat16 that autocast makes depend on how many samples there are at once.
    assert found[steps[-1]] == pytest.approx(again["nc1"], rel=0.2 if name == "bfloat16" else 1e-4)


def test_an_endless_stream_is_measured_as_far_as_it_was_read(tmp_path):
    callback = NeuralCollapseCallback()
    rows = texts(40).rows
    trainer = trainer_of(tmp_path, text_model(), Stream(rows, endless=True), max_steps=3, callbacks=[callback])
    trainer.train()
    again = nclightning.measure(trainer.model, DataLoader(Rows(rows[:24]), 24, collate_fn=pad))
    assert measured(trainer)[3] == pytest.approx(again["nc1"], rel=1e-4)


def multi_hot(rows):
    return {**pad(rows), "labels": one_hot(pad(rows)["labels"], 3).float()}


def as_numbers(rows):
    return {**pad(rows), "labels": pad(rows)["labels"].float()}


REFUSED = {
    "regression": (lambda: text_model(num_labels=1), as_numbers, {}, "is trained for regression"),
    "several labels": (text_model, multi_hot, {}, "is trained on several labels for each sample"),
    "several label names": (
        text_model,
        lambda rows: {**pad(rows), "start": pad(rows)["labels"]},
        {"label_names": ["labels", "start"]},
        "label_names are labels, start, and neural collapse has one label",
    ),
    "labels out of range": (
        text_model,
        lambda rows: {**pad(rows), "labels": pad(rows)["labels"] + 1},
        {},
        r"labels must be within 0\.\.2, the outputs of the head 'classifier'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused_before_the_first_step(name, tmp_path):
    model, collate, options, words = REFUSED[name]
    trainer = trainer_of(
        tmp_path, model(), texts(9), data_collator=collate, callbacks=[NeuralCollapseCallback()], **options
    )
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(UserError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0
    assert all(torch.equal(before[key], value) for key, value in trainer.model.state_dict().items())


class Echo(nn.Module):
    """Reads its input where it gets no labels, as BART does; else what comes before each label."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Embedding(6, 4), nn.Linear(4, 5)

    def forward(self, input_ids, labels=None):
        tokens = input_ids if labels is None else torch.nn.functional.pad(labels.clamp_min(0)[:, :-1], (1, 0), value=5)
        logits = self.head(self.body(tokens))
        if labels is None:
            return {"logits": logits}
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("length", [6, 7])
def test_a_decoder_reads_what_labels_make_it_read(length):
    torch.manual_seed(0)
    tokens, labels = torch.randint(5, (20, length)), torch.randint(5, (20, 6))
    labels[3, 4:] = -100
    model = Echo()
    read = torch.nn.functional.pad(labels.clamp_min(0)[:, :-1], (1, 0), value=5)
    counted = labels >= 0
    plain = nclightning.measure(
        features=model.body(read)[counted].detach(), labels=labels[counted], weight=model.head.weight.detach()
    )
    found = nclightning.measure(model, [{"input_ids": tokens, "labels": labels}])
    assert found["nc1"] == pytest.approx(plain["nc1"], rel=1e-9)


def test_errors_can_be_warnings(tmp_path):
    callback = NeuralCollapseCallback(head="nowhere", on_error="warn")
    trainer = trainer_of(tmp_path, text_model(), texts(9), callbacks=[callback])
    with pytest.warns(UserWarning, match="no measurement of neural collapse: .*nowhere"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert measured(trainer) == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs must be at least 1"),
        ({"stages": ("val",)}, "stages"),
        ({"stages": "train"}, r"write \('train',\)"),
        ({"measures": ("nc9",)}, "nc9"),
        ({"layers": "bert"}, r"write \('bert',\)"),
        ({"ood": "eval"}, r"write \('eval',\)"),
    ],
)
def test_arguments_are_checked(options, words):
    with pytest.raises(UserError, match=words):
        NeuralCollapseCallback(**options)


def test_a_head_that_no_step_runs_is_told(tmp_path):
    class Two(Wrapped):
        def __init__(self, model):
            super().__init__(model)
            self.other = nn.Linear(16, 3)

    class Other(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            rows = model.base_model.bert(inputs["input_ids"]).pooler_output
            return cross_entropy(model.other(rows), inputs["labels"])

    trainer = trainer_of(tmp_path, Two(text_model()), texts(9), Other, callbacks=[NeuralCollapseCallback()])
    with pytest.warns(UserWarning, match=r"'base_model\.classifier'.* did not run in the first training step"):
        trainer.train()


def test_values_reach_loggers_and_choose_the_best_model(tmp_path):
    """Of several evaluation sets, one of them out of distribution."""
    stopping = transformers.EarlyStoppingCallback(early_stopping_patience=5)
    trainer = trainer_of(
        tmp_path / "run", text_model(), texts(29), num_train_epochs=3,
        eval_dataset={"own": texts(9, seed=1), "far": texts(9, seed=2)},
        eval_strategy="epoch", save_strategy="epoch", metric_for_best_model="own_nc/nc1", greater_is_better=False,
        load_best_model_at_end=True, report_to=["tensorboard"],
        callbacks=[NeuralCollapseCallback(measures=MEASURES, ood=("far",)), stopping],
    )  # fmt: skip
    trainer.train()
    history = measured(trainer, "eval_own_nc/nc1")
    assert list(measured(trainer)) == list(history) == [4, 8, 12]
    assert trainer.state.best_metric == min(history.values())
    (events,) = (tmp_path / "run").rglob("events.out*")
    read = EventAccumulator(str(events)).Reload()
    expected = {*(f"train/nc/{name}" for name in MEASURES), *(f"eval/own_nc/{name}" for name in MEASURES)}
    tags = read.Tags()["scalars"]
    assert {tag for tag in tags if "nc/" in tag} == {*expected, "eval/far_nc/nc5"}
    # On the weights of the best checkpoint, which are the model's again.
    again = trainer.evaluate()
    assert again["eval_own_nc/nc1"] == pytest.approx(trainer.state.best_metric, rel=1e-6)


def test_an_early_stopping_that_comes_first_is_refused(tmp_path):
    trainer = trainer_of(
        tmp_path, text_model(), texts(9), eval_dataset=texts(9), eval_strategy="epoch", save_strategy="epoch",
        metric_for_best_model="nc/nc1", load_best_model_at_end=True,
        callbacks=[transformers.EarlyStoppingCallback(), NeuralCollapseCallback()],
    )  # fmt: skip
    with pytest.raises(UserError, match="put NeuralCollapseCallback first"):
        trainer.train()


def test_an_evaluation_alone_and_a_prediction(tmp_path):
    trainer = trainer_of(tmp_path, text_model(), texts(29), eval_dataset=texts(9, seed=1))
    trainer.add_callback(NeuralCollapseCallback(measures=MEASURES, stages=("eval", "test"), layers=("bert.pooler",)))
    without = trainer_of(tmp_path, text_model(), eval_dataset=texts(9, seed=1))
    transformers.set_seed(0)
    metrics, state = trainer.evaluate(), torch.get_rng_state()
    transformers.set_seed(0)
    without.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    assert {f"eval_nc/{name}" for name in (*MEASURES, "bert.pooler/nc1", "bert.pooler/ncc_accuracy")} <= metrics.keys()
    assert measured(trainer, "eval_nc/nc1") == {0: metrics["eval_nc/nc1"]}
    predicted = trainer.predict(texts(9, seed=1)).metrics
    assert predicted["test_nc/nc1"] == pytest.approx(metrics["eval_nc/nc1"], rel=1e-6)
    assert trainer.evaluate(metric_key_prefix="later")["later_nc/nc1"] == metrics["eval_nc/nc1"]
    without = trainer_of(tmp_path, text_model(), eval_dataset=texts(9))
    without.add_callback(NeuralCollapseCallback(measures=MEASURES))
    with pytest.raises(UserError, match="need the class means of the training set"):
        without.evaluate()
    bare = trainer_of(tmp_path, text_model(), eval_dataset=texts(9), callbacks=[NeuralCollapseCallback()])
    assert "eval_nc/nc1" in bare.evaluate()


def test_a_resumed_run_measures_what_the_whole_one_does(tmp_path):
    found = []
    for options in ({}, {"resume_from_checkpoint": str(tmp_path / "checkpoint-3")}):
        trainer = trainer_of(
            tmp_path, text_model(), texts(29), save_strategy="steps", save_steps=3, num_train_epochs=2,
            callbacks=[NeuralCollapseCallback()],
        )  # fmt: skip
        trainer.train(**options)
        found.append(measured(trainer))
    assert found[0] == found[1]
    assert list(found[0]) == [4, 8]


def test_a_resumed_run_reads_as_much_of_a_stream_as_the_whole_one(tmp_path):
    found = []
    for options in ({}, {"resume_from_checkpoint": str(tmp_path / "checkpoint-3")}):
        trainer = trainer_of(
            tmp_path, text_model(), Stream(texts(40).rows), save_strategy="steps", save_steps=3, max_steps=5,
            callbacks=[NeuralCollapseCallback(every_n_steps=4)],
        )  # fmt: skip
        trainer.train(**options)
        found.append(measured(trainer))
    assert found[0] == found[1]
    assert list(found[0]) == [4, 5]


class AsksForLogs(transformers.TrainerCallback):
    """Returns another control than it gets, at ends of epochs and of logs."""

    def on_epoch_end(self, args, state, control, **kwargs):
        control = copy.copy(control)
        control.should_log = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        control = copy.copy(control)
        control.should_training_stop = control.should_training_stop or "nc/nc1" in logs
        return control


def test_what_other_callbacks_ask_for_is_done(tmp_path):
    callbacks = [AsksForLogs(), NeuralCollapseCallback()]
    trainer = trainer_of(tmp_path, text_model(), texts(29), logging_steps=99, num_train_epochs=2, callbacks=callbacks)
    trainer.train()
    assert measured(trainer, "loss").keys() == {4}
    assert trainer.state.global_step == 4


def test_an_error_of_those_that_get_the_logs_is_theirs(tmp_path):
    class Failing(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "nc/nc1" in logs:
                raise KeyError("loss")

    callbacks = [NeuralCollapseCallback(on_error="warn"), Failing()]
    trainer = trainer_of(tmp_path, text_model(), texts(9), callbacks=callbacks)
    with pytest.raises(KeyError, match="loss"):
        trainer.train()


def test_sets_without_labels_are_evaluated_and_predicted_without_a_measurement(tmp_path):
    bare = Rows([{"input_ids": row["input_ids"]} for row in texts(9).rows])
    callback = NeuralCollapseCallback(stages=("train", "eval", "test"))
    trainer = trainer_of(
        tmp_path, text_model(), texts(9), eval_dataset=bare, eval_strategy="epoch", callbacks=[callback]
    )
    with pytest.warns(UserWarning, match="neural collapse of 'eval' is not measured: .* has no labels"):
        trainer.train()
    assert measured(trainer).keys() == {2}
    with pytest.warns(UserWarning, match="neural collapse of 'test' is not measured"):
        assert len(trainer.predict(bare).predictions) == 9


@pytest.mark.parametrize(
    ("metric", "own", "words"),
    [
        ("nc/nc2_means", {}, r"'nc/nc2_means' is not measured: put 'nc2_means' into measures, which are nc1, nc2, nc3"),
        ("eval_nc/accuracy", {}, "put 'accuracy' into measures"),
        ("eval_nc/nc1", {"stages": ("train",)}, "stages must have 'eval'"),
    ],
)
def test_a_best_model_by_what_is_not_measured_is_refused(metric, own, words, tmp_path):
    trainer = trainer_of(
        tmp_path, text_model(), texts(9), eval_dataset=texts(9), eval_strategy="epoch", save_strategy="epoch",
        metric_for_best_model=metric, load_best_model_at_end=True, callbacks=[NeuralCollapseCallback(**own)],
    )  # fmt: skip
    with pytest.raises(UserError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_set_out_of_distribution_needs_no_labels(tmp_path):
    bare = Rows([{"input_ids": row["input_ids"]} for row in texts(9, seed=1).rows])
    found = []
    for other in (bare, texts(9, seed=1)):
        callback = NeuralCollapseCallback(ood=("eval",))
        trainer = trainer_of(
            tmp_path, text_model(), texts(9), eval_dataset=other, eval_strategy="epoch", callbacks=[callback]
        )
        trainer.train()
        found.append(measured(trainer, "eval_nc/nc5"))
    assert found[0] == found[1]
    assert found[0].keys() == {2}


def test_a_first_step_that_fails_leaves_no_hook(tmp_path):
    class Failing(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            super().compute_loss(*args, **kwargs)
            raise KeyboardInterrupt

    trainer = trainer_of(tmp_path, text_model(), texts(9), Failing, callbacks=[NeuralCollapseCallback()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert sum(states(trainer)[2]) == 0


def test_a_best_model_by_the_least_collapsed_is_told(tmp_path):
    trainer = trainer_of(
        tmp_path, text_model(), texts(9), eval_dataset=texts(9), eval_strategy="epoch",
        metric_for_best_model="nc/nc1", callbacks=[NeuralCollapseCallback()],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="least collapsed for the best: pass greater_is_better=False"):
        trainer.train()


class Masking:
    """Leaves out labels by draws from a generator of its own, which it makes when it is first called."""

    def __init__(self):
        self.drawn, self.generator = [], None

    def __call__(self, rows):
        self.generator = self.generator or torch.Generator().manual_seed(3)
        self.drawn = [*self.drawn, float(torch.rand((), generator=self.generator))]
        return pad(rows)


def test_draws_of_a_collator_are_those_without_it(tmp_path):
    drawn = []
    for callbacks in ([], [NeuralCollapseCallback(every_n_steps=2)]):
        collate = Masking()
        trainer = trainer_of(
            tmp_path, text_model(), texts(29), num_train_epochs=2, data_collator=collate, callbacks=callbacks,
            eval_dataset=texts(9), eval_strategy="epoch",
        )  # fmt: skip
        trainer.train()
        drawn.append(collate.drawn)
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 12


def test_names_out_of_distribution_that_are_none_are_told(tmp_path):
    trainer = trainer_of(
        tmp_path,
        text_model(),
        texts(9),
        eval_dataset={"own": texts(9)},
        callbacks=[NeuralCollapseCallback(ood=("far",))],
    )
    with pytest.warns(UserWarning, match="ood names far, and what is evaluated is own"):
        trainer.train()


class OwnOrder(DataLoader):
    def __iter__(self):
        return super().__iter__()


def test_a_refusal_names_no_way_that_only_other_hosts_have(tmp_path):
    class OfOwnOrder(transformers.Trainer):
        def get_train_dataloader(self):
            return OwnOrder(self.train_dataset, batch_size=8, collate_fn=self.data_collator)

    trainer = trainer_of(tmp_path, text_model(), texts(9), OfOwnOrder, callbacks=[NeuralCollapseCallback()])
    with pytest.raises(UserError, match=r"Use a plain DataLoader\.$"):
        trainer.train()
    with pytest.raises(UserError, match=r"source='online' or Probe\.online"):
        sequential_loader(trainer.get_train_dataloader())


def test_a_hook_outside_of_a_trainer_is_refused():
    with pytest.raises(UserError, match=r"is called by no transformers\.Trainer"):
        NeuralCollapseCallback().on_evaluate(None, None, None)


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "nclightning.integrations.huggingface")
    words = r"NeuralCollapseCallback needs transformers and accelerate: pip install 'nclightning\[huggingface\]'\."
    with pytest.raises(ImportError, match=words):
        importlib.import_module("nclightning.integrations.huggingface")


def test_what_transformers_fails_on_is_said_as_it_is(monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise ImportError("cannot import name 'PeftModel' from 'peft'", name="peft")

    monkeypatch.setitem(sys.modules, "transformers", Broken())
    monkeypatch.delitem(sys.modules, "nclightning.integrations.huggingface")
    with pytest.raises(ImportError, match="cannot import name 'PeftModel'"):
        importlib.import_module("nclightning.integrations.huggingface")
