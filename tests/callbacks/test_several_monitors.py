"""Several monitors in one trainer, and what a checkpoint holds of them."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from nclightning.data import IndexDataModule
from nclightning.models import UFM
from tests.callbacks.attached import Net, fit, loader, metrics
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
]

PAIRS = {
    "measures": ({}, {"measures": ("nc1_cdnv", "accuracy")}),
    "stages": ({"stages": ("train",), "source": "online"}, {"stages": ("val",)}),
    "sets": ({"stages": ("train",)}, {"stages": ("test",), "datasets": "half"}),
    "cadences": ({"measures": ("nc1",), "every_n_steps": 2}, {"measures": ("nc2",), "every_n_epochs": 2}),
}


def make(options, samples):
    half = {"half": loader(tuple(part[:20] for part in samples))}
    return NeuralCollapseMonitor(**(options | ({"datasets": half} if "datasets" in options else {})))


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_two_monitors_read_what_each_reads_alone(pair, samples, tmp_path):
    def run(*chosen):
        torch.manual_seed(0)
        data = loader(samples), loader(samples, shuffle=False, drop_last=False)
        return fit(tmp_path, [make(options, samples) for options in chosen], data, Net(), max_epochs=2)

    alone = [metrics(run(options)[1]) for options in pair]
    _, together = run(*pair)
    assert metrics(together) == alone[0] | alone[1]
    together.save_checkpoint(tmp_path / "both.ckpt")
    states = torch.load(tmp_path / "both.ckpt", weights_only=False)["callbacks"]
    assert len(states) == 2
    again = [make(options, samples) for options in pair]
    trainer = quiet_trainer(tmp_path, max_epochs=2, callbacks=again)
    trainer.fit(Net(), loader(samples), ckpt_path=tmp_path / "both.ckpt")
    for monitor, expected in zip(again, alone, strict=True):
        assert monitor.state_dict()["last"] == pytest.approx({f"nc/{name}": v for name, v in expected.items()})


CLASHES = {
    "equal": ({}, {}),
    "other cadence": ({}, {"every_n_epochs": 2}),
    "heads": ({"head": "last"}, {"head": "auxiliary"}),
    "layers": ({"layers": ["body"]}, {}),
    "sources": ({"source": "online"}, {"measures": ["nc1"]}),
    "one measure": ({"measures": ("all",)}, {"measures": ["nc2_equinorm_means"], "stages": ["val"]}),
    "sets": ({"stages": ["test"], "datasets": "half"}, {"stages": ["train"], "datasets": "half"}),
}


@pytest.mark.parametrize("pair", CLASHES.values(), ids=CLASHES)
def test_two_that_log_the_same_tags_are_refused(pair, samples, tmp_path):
    monitors = [make(options, samples) for options in pair]
    name = "NeuralCollapseMonitor"
    message = rf"two callbacks .* {name} and {name}, both log 'nc/\w+/\w+'.*leave one.*measures=\.\.\."
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, monitors, loader(samples))


@pytest.mark.parametrize("options", [{}, {"every_n_iterations": 5}], ids=str)
def test_two_of_a_full_batch_run(options, tmp_path):
    def run(*monitors):
        quiet_trainer(tmp_path, max_steps=20, callbacks=list(monitors)).fit(ufm(), datamodule=IndexDataModule())

    with pytest.raises(ValueError, match="OptimalityMonitor and OptimalityMonitor, both log 'loss'"):
        run(OptimalityMonitor(), OptimalityMonitor(theory=False, **options))
    with pytest.raises(ValueError, match="both log 'nc/train/nc1' and 5 more"):
        run(NeuralCollapseMonitor(), NeuralCollapseMonitor(stages=("val",), **options))
    run(NeuralCollapseMonitor(), NeuralCollapseMonitor(measures=("nc1_cdnv",), **options), OptimalityMonitor())


def ufm():
    torch.manual_seed(0)
    return UFM(4, 3, 6, "ce", lambda_=5e-3, iterations_per_step=10)


def test_state_keys():
    assert NeuralCollapseMonitor(every_n_epochs=7).state_key == "NeuralCollapseMonitor"
    assert OptimalityMonitor(stop_distance=1e-3).state_key == "OptimalityMonitor"
    keys = [
        NeuralCollapseMonitor(**options).state_key
        for options in ({}, {"measures": ["nc1"]}, {"head": "fc"}, {"datasets": {"a": []}}, {"stages": ["val"]})
    ]
    assert len(set(keys)) == 5
    assert keys[1] == NeuralCollapseMonitor(measures=("nc1",)).state_key
    assert "object at 0x" not in NeuralCollapseMonitor(measures=["nc1"], batch_fn=lambda batch: batch).state_key
    assert OptimalityMonitor(loss="ce").state_key != OptimalityMonitor(loss="mse").state_key


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("options", [{}, {"measures": ("nc1", "nc2")}], ids=str)
def test_a_checkpoint_of_before_is_loaded(options, samples, tmp_path):
    """Then the key was the name of the class, whatever the settings."""
    monitor = NeuralCollapseMonitor(every_n_epochs=2, **options)
    _, trainer = fit(tmp_path, [monitor], loader(samples), max_epochs=2)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    checkpoint = torch.load(tmp_path / "new.ckpt", weights_only=False)
    (state,) = checkpoint["callbacks"].values()
    checkpoint["callbacks"] = {"NeuralCollapseMonitor": state}
    torch.save(checkpoint, tmp_path / "old.ckpt")
    again = NeuralCollapseMonitor(every_n_epochs=2, **options)
    trainer = quiet_trainer(tmp_path, max_epochs=3, callbacks=[again])
    trainer.fit(Net(), loader(samples), ckpt_path=tmp_path / "old.ckpt")
    assert again.state_dict() == state
    assert len(state["last"]) == (2 if options else 3)


def test_an_old_state_of_a_full_batch_run_is_loaded():
    monitor = OptimalityMonitor().at_iterates()
    monitor.load_state_dict({"smallest": 1.0, "smallest_at": 3, "decay": 0.25})  # A power of 4 has an exact root.
    later = {"modes": [0.5, 0.0, 0.0, 0.0], "followed": 0, "stopped_at": None, "distance": math.nan}
    assert monitor.state_dict() == {"last": {}, "smallest": 1.0, "smallest_at": 3, "decay": 0.25} | later


@pytest.mark.parametrize("tag", ["optimality/gap", "log10/optimality/distance", "nc/train/nc1", "loss"])
def test_a_full_batch_run_is_resumed_under_callbacks_that_monitor_it(tag, tmp_path):
    def run(max_steps, **options):
        callbacks = [
            OptimalityMonitor(50),  # The resumed run reads nothing for a while.
            NeuralCollapseMonitor(50),
            EarlyStopping(tag, check_on_train_epoch_end=True, patience=100),
            ModelCheckpoint(tmp_path, monitor=tag, filename="kept", save_on_train_epoch_end=True),
        ]
        trainer = quiet_trainer(tmp_path, max_steps=max_steps, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(ufm(), datamodule=IndexDataModule(), **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return trainer, callbacks

    trainer, callbacks = run(60)
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    saved = callbacks[0].state_dict()["last"] | callbacks[1].state_dict()["last"]
    assert saved == pytest.approx(values, nan_ok=True)
    trainer, _ = run(80, ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 80


def test_another_module_is_resumed_under_callbacks_that_monitor_its_gap(samples, tmp_path):
    data = samples[0][:48], torch.arange(48) % 3

    def run(epochs, **options):
        # The first epoch has no value yet; of a resumed run one is demanded.
        strict = "ckpt_path" in options
        stop = EarlyStopping("optimality/gap", patience=100, check_on_train_epoch_end=True, strict=strict)
        monitor = OptimalityMonitor(loss="ce", every_n_epochs=2)
        trainer = quiet_trainer(tmp_path, max_epochs=epochs, callbacks=[monitor, stop])
        torch.manual_seed(0)
        trainer.fit(Net(), loader(data), **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return trainer, monitor

    first, monitor = run(2)
    state = monitor.state_dict()["last"]
    assert state.keys() == {f"optimality/{k}" for k in metrics(first, "optimality/")}
    # The third epoch has no value of its own.
    again, _ = run(3, ckpt_path=tmp_path / "last.ckpt")
    assert float(again.callback_metrics["optimality/gap"]) == state["optimality/gap"]
