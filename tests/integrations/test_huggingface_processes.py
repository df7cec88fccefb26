"""Several processes under Hugging Face's Trainer give the numbers of one."""

import os
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset

import nclightning
from nclightning.errors import UserError
from nclightning.probe.sweep import num_own_samples
from tests.integrations.tasks import measured, pad, pad_all, text_model, texts, trainer_of
from tests.processes import on

pytest.importorskip("transformers")

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState, GradientState, PartialState

from nclightning.integrations.huggingface import NeuralCollapseCallback

MEASURES = ("nc1", "nc2", "nc3", "ncc_accuracy")
TRAIN, OTHER = 29, 13  # Odd, so that the last batches are uneven and samplers repeat samples.


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(map(dict, self.rows))


class Bad(Stream):
    """On the second process its samples are others."""

    def __iter__(self):
        return iter(map(dict, self.rows if dist.get_rank() == 0 else self.rows[::-1]))


def train(folder, data, **options):
    # A small rate, with which the sums of gradients over processes do not differ visibly.
    trainer = trainer_of(
        folder, text_model().double(), data, eval_dataset=texts(OTHER, seed=1), eval_strategy="steps", eval_steps=3,
        max_steps=3, learning_rate=0.0, callbacks=[NeuralCollapseCallback(measures=MEASURES)], **options,
    )  # fmt: skip
    trainer.train()
    of_training = {key: measured(trainer, f"nc/{key}")[3] for key in MEASURES}
    return of_training, {key: measured(trainer, f"eval_nc/{key}")[3] for key in MEASURES}


def jobs(folder, few):
    """Return what each job gives."""
    loader = Accelerator(cpu=True).prepare(DataLoader(texts(TRAIN), 4, shuffle=True, collate_fn=pad))
    found = {
        "map": train(folder, texts(TRAIN)),
        "measure": dict(nclightning.measure(text_model().double(), loader, measures=MEASURES)),
    }
    for dispatches in (False, True):
        loader = DataLoader(texts(TRAIN), 4, collate_fn=pad_all)
        device = torch.device("cpu")
        made = prepare_data_loader(loader, device=device, put_on_device=True, dispatch_batches=dispatches)
        own = torch.cat([batch["input_ids"].sum(dim=1) for batch in made])
        found["own", dispatches] = own[: num_own_samples(made)].tolist()
    if few:
        return found
    apart = {"accelerator_config": {"dispatch_batches": False}}
    found["grouped"] = train(folder, texts(TRAIN), train_sampling_strategy="group_by_length")
    found["stream"] = train(folder, Stream(texts(TRAIN).rows), **apart)
    found["dispatched"] = train(folder, Stream(texts(TRAIN).rows), data_collator=pad_all)
    for job, data, head in (
        ("error", Bad(texts(TRAIN).rows), None),
        ("head", texts(TRAIN), only_on_the_first),
    ):
        callback = NeuralCollapseCallback(head=head)
        trainer = trainer_of(folder, text_model(), data, data_collator=pad_all, max_steps=1, callbacks=[callback])
        try:
            trainer.train()
        except UserError as error:
            found[job] = str(error), trainer.state.global_step
    return found


def only_on_the_first(model):
    if dist.get_rank():
        raise UserError("no head here.")
    return model.classifier.weight, model.classifier.bias


def in_process(folder, few):
    os.environ["RANK"] = str(dist.get_rank())
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()  # What was found in the process that this one is forked from.
    return jobs(folder, few)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    model = text_model().double()
    of_training = nclightning.measure(model, DataLoader(texts(TRAIN), 8, collate_fn=pad), measures=MEASURES)
    return train(folder, texts(TRAIN)), of_training


@pytest.mark.filterwarnings("ignore")  # Of forking and few workers.
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_give_the_numbers_of_one(world, tmp_path, alone):
    (of_training, of_other), plain = alone
    found = on(world, tmp_path, partial(in_process, tmp_path / "run", world > 2), group=True)
    close = {"rel": 1e-12, "abs": 1e-12}
    assert of_training == pytest.approx(dict(plain), **close)
    for each in found:
        for job in each.keys() & {"map", "grouped", "stream", "dispatched"}:
            assert each[job][0] == pytest.approx(of_training, **close), job
            assert each[job][1] == pytest.approx(of_other, **close), job
        assert each["measure"] == pytest.approx(of_training, **close)
    sums = sorted(sum(row["input_ids"]) for row in texts(TRAIN).rows)
    for dispatches in (False, True):
        assert sorted(value for each in found for value in each["own", dispatches]) == sums
    if world == 2:
        assert len(found[0]) == 9
        (first, _), (second, _) = (each["head"] for each in found)
        assert "no head here" in second
        assert "1 of 2 processes failed" in first
        for each in found:
            assert "Bad yields different samples on different processes" in each["error"][0]
            assert each["error"][1] == each["head"][1] == 0
