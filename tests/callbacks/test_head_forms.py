"""Each form of head, output and batch is measured right, or refused with the argument that repairs it."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader

from nclightning.callbacks import NeuralCollapseMonitor
from tests.forms import CASES, Wrapped, oracle
from tests.trainers import quiet_trainer


def fit(form, folder, callbacks=()):
    model = Wrapped(form, 0.1)
    trainer = quiet_trainer(folder, max_epochs=1, callbacks=list(callbacks))
    trainer.steps = 0
    loader = DataLoader([form.batch, *form.later], batch_size=None, collate_fn=lambda batch: batch)
    try:
        trainer.fit(model, loader)
    finally:
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
        form.steps = trainer.steps
    return model, {k.removeprefix("nc/train/"): float(v) for k, v in trainer.callback_metrics.items()}


def made(name):
    torch.manual_seed(0)
    return CASES[name]()


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*in eval mode at the start of training")
@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name, tmp_path):
    form = made(name)
    monitor = NeuralCollapseMonitor(**{"stages": ("train",)} | form.options)
    if form.refused:
        with pytest.raises((ValueError, TypeError), match=f"(?s){form.refused}"):
            fit(form, tmp_path, [monitor])
        assert form.steps == form.late
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, read = fit(form, tmp_path, [monitor])
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning) and "head" in str(w.message)]
    assert [form.warns in each for each in said] == [True] * bool(form.warns)
    model.net.eval()
    with torch.no_grad():
        expected = oracle(*form.pair(model.net, form.batch))
    exact = not any(p.dtype == torch.bfloat16 for p in model.parameters())
    assert {k: read[k] for k in expected} == pytest.approx(expected, rel=1e-4 if exact else 5e-2, abs=1e-6)
    bare = fit(made(name), tmp_path)[0].state_dict()
    assert all(torch.equal(value, bare[key]) for key, value in model.state_dict().items())
