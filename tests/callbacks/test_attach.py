"""NeuralCollapseMonitor on modules that know nothing of it."""

import random
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from nclightning.callbacks import NeuralCollapseMonitor
from tests.callbacks.attached import N, Net, fit, hooks_of, loader, measure, read
from tests.trainers import quiet_trainer


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:You defined a `validation_step` but",
    "ignore:Found 1 module.* in eval mode at the start of training",
)
class TestSweep:
    def test_reads_the_whole_training_set_of_the_last_epoch(self, tmp_path, samples):
        model, trainer = fit(tmp_path, [NeuralCollapseMonitor()], loader(samples))
        # Features are float32 in batches of another size: their own rounding.
        assert read(trainer) == pytest.approx(measure(model, samples), rel=1e-5)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"source": "online"},
            {"every_n_steps": 2, "layers": ("body.0",), "measures": ("all",)},
            {"pictures_every_n_epochs": 1, "stages": ("train",)},
        ],
        ids=str,
    )
    def test_leaves_no_trace(self, options, tmp_path, samples):
        class Random(L.Callback):
            def on_train_end(self, trainer, pl_module):
                self.state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
                self.modes = [m.training for m in pl_module.modules()]

        runs = []
        data = loader(samples), loader(samples, shuffle=False)
        for callbacks in ([], [NeuralCollapseMonitor(**options)]):
            after = Random()
            logger = TensorBoardLogger(tmp_path) if "pictures_every_n_epochs" in options else False
            model, trainer = fit(tmp_path, [*callbacks, after], data, logger=logger)
            runs.append((model, trainer.optimizers[0].state_dict()["state"], after))
        (bare, bare_state, bare_after), (read, read_state, read_after) = runs
        for a, b in zip(bare.state_dict().values(), read.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        for key, state in bare_state.items():
            assert all(torch.equal(v, read_state[key][name]) for name, v in state.items())
        assert torch.equal(bare_after.state[0], read_after.state[0])
        assert bare_after.state[1:] == read_after.state[1:]
        assert bare_after.modes == read_after.modes
        assert hooks_of(read) == 0

    @pytest.mark.parametrize("key", ["labels", "label", "y", "target", "targets"])
    def test_mappings(self, key, tmp_path, samples):
        class Rows(Dataset):
            def __len__(self):
                return N

            def __getitem__(self, i):
                return {"x": samples[0][i], key: samples[1][i]}

        data = DataLoader(Rows(), batch_size=8)
        model, trainer = fit(tmp_path, [NeuralCollapseMonitor()], data, Net(labels_under=key))
        assert read(trainer) == pytest.approx(measure(model, samples), rel=1e-5)

    def test_cadence_in_epochs(self, tmp_path, samples):
        logged = []

        def note(pl_module, values):
            logged.append((pl_module.current_epoch, min(values)))

        watch = NeuralCollapseMonitor(every_n_epochs=2)
        watch.at_epochs().publish = note
        fit(tmp_path, [watch], loader(samples), max_epochs=5)
        assert logged == [(1, "nc/train/nc1"), (3, "nc/train/nc1")]

    def test_model_checkpoint_can_monitor_it(self, tmp_path, samples):
        keep = ModelCheckpoint(tmp_path, monitor="nc/train/nc1", save_top_k=1)
        fit(tmp_path, [NeuralCollapseMonitor(), keep], loader(samples), enable_checkpointing=True)
        assert float(keep.best_model_score) > 0

    def test_validation_collects_the_ordinary_forwards(self, tmp_path, samples):
        monitor = NeuralCollapseMonitor(head="last")
        data = (loader(samples), loader(samples, shuffle=False, drop_last=False))
        model, trainer = fit(tmp_path, [monitor], data, num_sanity_val_steps=0)
        assert read(trainer, "val") == pytest.approx(measure(model, samples), rel=1e-5)

    def test_a_named_head(self, tmp_path, samples):
        with pytest.raises(ValueError, match=r"no layer named head='fc' in Net. Layers with .*: 'body.0' with output"):
            fit(tmp_path, [NeuralCollapseMonitor(head="fc")], loader(samples))

    def test_labels_that_do_not_fit_the_head(self, tmp_path, samples):
        class Narrow(Net):
            def training_step(self, batch, batch_idx):
                return self(batch[0]).sum()

        with pytest.raises(ValueError, match=r"labels must be within 0\.\.2, the outputs of the head 'last'"):
            fit(tmp_path, [NeuralCollapseMonitor()], loader((samples[0], samples[1] + 1)), Narrow())

    def test_an_exception_in_the_sweep_restores_the_modes(self, tmp_path, samples):
        model = Net()
        model.body[3].eval()  # A part that the user froze.
        flags = [m.training for m in model.modules()]

        def fail(batch):
            raise RuntimeError("in the sweep")

        with pytest.raises(RuntimeError, match="in the sweep"):
            fit(tmp_path, [NeuralCollapseMonitor(batch_fn=fail)], loader(samples), model)
        assert [m.training for m in model.modules()] == flags
        assert hooks_of(model) == 0


@pytest.mark.parametrize("source", ["sweep", "online"])
def test_two_processes_read_what_one_reads(source, tmp_path):
    """An odd number of samples, which a distributed sampler pads, and a class that only one process sees."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randint(2, (50,), generator=generator)])
    data = torch.randn(51, 5, generator=generator), labels
    torch.manual_seed(0)
    model = Net(frozen=source == "online")  # Online readings are of changing weights: here of weights that stand still.
    if source == "online":  # Dropout is on, and batch norm keeps statistics of its own on each process.
        model.body[1] = model.body[3] = nn.Identity()
    trainer = quiet_trainer(
        tmp_path,
        max_epochs=2,
        callbacks=[
            NeuralCollapseMonitor(
                source=source, measures=("nc1", "nc2", "nc3", "accuracy") if source == "sweep" else None
            )
        ],
        strategy="ddp_fork_find_unused_parameters_true",
        devices=2,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of forking and few workers; none is about readings.
        trainer.fit(model, loader(data, drop_last=False), loader(data, shuffle=False, drop_last=False))
    expected = pytest.approx(measure(model, data), rel=1e-6)
    assert read(trainer) == expected
    if source == "online":  # In validation each process runs its own batch norm.
        assert read(trainer, "val") == expected


def test_cadence_is_validated():
    with pytest.raises(ValueError, match="every_n_epochs must be at least 1"):
        NeuralCollapseMonitor(every_n_epochs=0)
