"""Training with and without a monitor is the same, bit for bit, whatever a model remembers."""

import functools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nclightning.callbacks import NeuralCollapseMonitor
from nclightning.errors import UserError
from nclightning.probe.sweep import TraceError
from tests.callbacks import stateful
from tests.callbacks.stateful import CASES, REFUSED, D, K
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
    pytest.mark.filterwarnings("ignore:The total number of parameters detected may be inaccurate"),
]
MODES = {
    "sweep": {},
    "steps": {"every_n_steps": 2, "measures": ("nc1", "ncc_accuracy")},
    "online": {"source": "online"},
}


def data():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, D, generator=generator), torch.arange(24) % K
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True), DataLoader(TensorDataset(x, y), batch_size=12)


def run(make, folder, callbacks=()):
    """Train, and return all that training left."""
    torch.manual_seed(1), random.seed(1), np.random.seed(1)
    stateful._CALLS, stateful.OfClass.calls, stateful.noted.calls = 0, 0, 0
    stateful._SEEN.clear(), stateful.ByDefault.change.__defaults__[0].clear()
    stateful.CachedMethod.table.cache_clear()
    model = make()
    trainer = quiet_trainer(folder, callbacks=list(callbacks), max_epochs=2)
    trainer.fit(model, *data())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    optimizer = trainer.optimizers[0].state_dict()["state"]
    own = {name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("nc/")}
    read = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("nc/")}
    states = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
    bits = {name: (tuple(t.shape), t.detach().contiguous().numpy().tobytes()) for name, t in tensors.items()}
    moments = [(i, name, t.tolist()) for i, state in optimizer.items() for name, t in state.items()]
    return {"tensors": bits, "optimizer": moments, "logs": own, "losses": model.losses, "random": states}, read


bare = functools.lru_cache(lambda make, folder: run(make, folder)[0])


# Class means of decisions in validation are of weights that its own forwards change.
CHANGING = ("weights that each forward renormalises", "a parameter that is replaced", "an optimizer of its own")


@pytest.mark.parametrize(("name", "mode"), [(n, m) for n in CASES for m in MODES if n not in CHANGING or m != "steps"])
def test_training_is_the_same_with_a_monitor(name, mode, tmp_path):
    left, read = run(CASES[name], tmp_path, [NeuralCollapseMonitor(**MODES[mode])])
    assert left == bare(CASES[name], tmp_path.parent)
    assert all(np.isfinite(value) for value in read.values())
    assert {tag.split("/")[1] for tag in read} == {"train", "val"}


@pytest.mark.parametrize("name", CHANGING)
def test_class_means_of_other_weights_than_those_of_a_step_are_refused(name, tmp_path):
    with pytest.raises(UserError, match="the step itself swaps weights"):
        run(CASES[name], tmp_path, [NeuralCollapseMonitor(**MODES["steps"])])


@pytest.mark.parametrize("on_error", ["raise", "warn"])
@pytest.mark.parametrize(
    ("name", "what"), [("a generator function", "'steps'.*cannot be rewound"), ("a gradient", "'shift'")]
)
def test_what_cannot_be_put_back_is_refused(name, what, on_error, tmp_path):
    with pytest.raises(TraceError, match=what) as caught:
        run(REFUSED[name], tmp_path, [NeuralCollapseMonitor(on_error=on_error)])
    assert "\n" not in str(caught.value)


def test_there_are_sixty():
    assert len(CASES) + len(REFUSED) >= 60
