"""Each name of another library that its documentation does not promise: that it is there, and means what it did."""

import copy
import importlib
import signal
import warnings
from argparse import ArgumentParser as PlainParser
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from nclightning.callbacks import NeuralCollapseMonitor
from nclightning.compat import (
    accelerate,
    experiments,
    fabric,
    hparams,
    parsers,
    progress,
    recorded,
    tensorboard,
    torchmetrics,
    twins,
)
from nclightning.compat import lightning as pl_names
from nclightning.compat import torch as names
from nclightning.compat import transformers as hf_names
from tests.trainers import quiet_trainer

# ---------------------------------------------------------------------------------------------------------------- torch


def test_version_of_counts_writes_and_nothing_else():
    tensor = torch.zeros(3)
    before = names.version_of(tensor)
    assert tensor.sum() == 0
    assert names.version_of(tensor) == before
    tensor.add_(1)
    tensor[0] = 2
    assert names.version_of(tensor) == before + 2
    tensor.data.add_(1)  # Which is why there are checks by value beside it.
    assert names.version_of(tensor) == before + 2
    with torch.inference_mode():
        assert names.version_of(torch.zeros(1)) == -1


def test_parameters_and_buffers_of_a_module_are_its_own():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    module.register_parameter("none", None)
    module.tied = module[1]
    assert dict(names.parameters_of(module)) == {"none": None}
    assert set(names.parameters_of(module[1])) == {"weight", "bias"}
    assert set(names.buffers_of(module[0])) == {"running_mean", "running_var", "num_batches_tracked"}
    assert names.buffers_of(module) == {}


def test_a_buffer_that_was_deleted_comes_back_as_a_buffer():
    module = nn.BatchNorm1d(2)
    mean = module.running_mean
    del module.running_mean
    names.buffers_of(module)["running_mean"] = mean
    assert module.running_mean is mean
    assert "running_mean" in module.state_dict()


def test_holders_are_where_a_module_keeps_its_parts():
    assert all(isinstance(vars(nn.Linear(1, 1))[name], dict) for name in names.HOLDERS)


@pytest.mark.parametrize("how", ["module", "in place", "function"])
def test_compiled_parts_are_known(how):
    module, parent = nn.Linear(1, 1), nn.Module()
    assert not names.is_compiled(module)
    if how == "module":
        assert names.is_compiled(torch.compile(module, backend="eager"))
        return
    if how == "in place":
        module.compile(backend="eager")
        assert names.is_compiled(module)
        return
    parent.child, parent.step = module, torch.compile(module.forward, backend="eager")
    assert names.is_compiled(parent)
    assert not names.is_compiled(parent.child)


def test_what_is_compiled_is_had_back():
    module = nn.Sequential(nn.Linear(1, 1))
    compiled = torch.compile(module, backend="eager")
    assert names.uncompiled(compiled) is module
    assert names.uncompiled(module) is None
    assert f"{names.COMPILED_PREFIX}0" in dict(compiled.named_modules())


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("hook", [f"register_{name}" for name in HOOKS])
def test_hooks_on_a_module_are_known_until_they_are_removed(hook):
    module, other = nn.Linear(1, 1), nn.Linear(1, 1)
    assert not names.has_hooks((module, other))
    handle = getattr(module, hook)(lambda *_: None)
    assert names.has_hooks((other, module))
    assert not names.has_hooks((other,))
    handle.remove()
    assert not names.has_hooks((module,))


@pytest.mark.parametrize("hook", [f"register_module_{name}" for name in HOOKS])
def test_hooks_on_all_modules_are_known_until_they_are_removed(hook):
    handle = getattr(nn.modules.module, hook)(lambda *_: None)
    try:
        assert names.has_hooks(())
    finally:
        handle.remove()
    assert not names.has_hooks(())


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_gradients_are_known_until_they_are_removed(hook):
    p = nn.Parameter(torch.zeros(1))
    assert not names.sees_gradients(p)
    handle = getattr(p, hook)(lambda _: None)
    assert names.sees_gradients(p)
    handle.remove()
    assert not names.sees_gradients(p)


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_ddp_leaves_parameters_out(group):
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names.leave_out_of_ddp(module, ["0.weight"])
    wrapped = DistributedDataParallel(copy.deepcopy(module))
    assert wrapped.parameters_to_ignore == {"0.weight"}
    assert [name for name, _ in zip(*wrapped._build_params_for_reducer(), strict=True) if name is None] == []
    assert len(wrapped._build_params_for_reducer()[0]) == 3


class Doubling(names.OwnEntries):
    """Saves twice its value, and loads half of it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("value", torch.ones(1))

    def change_saved(self, entries, prefix):
        entries[f"{prefix}value"] = entries[f"{prefix}value"] * 2

    def change_loaded(self, entries, prefix):
        return entries | {f"{prefix}value": entries[f"{prefix}value"] / 2}


def test_the_store_of_processes_keeps_what_they_write(group):
    store = names.default_store()
    store.set("nclightning/test", "here")
    assert store.check(["nclightning/test"])
    assert store.add("nclightning/count", 1) == store.add("nclightning/count", 0) == 1
    store.delete_key("nclightning/test")
    assert store.timeout


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-true"])
def test_what_fabric_wraps_is_had_back(precision):
    model, loader = nn.Linear(2, 2), DataLoader(TensorDataset(torch.zeros(2, 2)))
    made = L.Fabric(accelerator="cpu", devices=1, precision=precision)
    wrapped, batches = made.setup(model), made.setup_dataloaders(loader)
    assert fabric.loader_of_fabric(batches).dataset is loader.dataset
    assert fabric.loader_of_fabric(loader) is loader
    sampler = RandomSampler(range(3))
    shared = DistributedSamplerWrapper(sampler, num_replicas=2, rank=0)
    assert fabric.sampler_of_lightning(shared) is sampler
    assert fabric.sampler_of_lightning(sampler) is None
    assert wrapped.module is model
    assert fabric.precision_of_fabric(model) is None
    with fabric.precision_of_fabric(wrapped).forward_context():
        inputs = fabric.precision_of_fabric(wrapped).convert_input(torch.ones(1, 2))
        assert torch.equal(model(inputs).float(), wrapped(torch.ones(1, 2)).float())


@pytest.mark.parametrize("copied", [False, True])
def test_own_entries_are_changed_at_any_depth_also_in_copies(copied):
    module = nn.Sequential(nn.Linear(1, 1), nn.Sequential(Doubling()))
    module = copy.deepcopy(module) if copied else module
    module[1][0].value.fill_(3)
    saved = module.state_dict()
    assert saved["1.0.value"] == 6
    other = nn.Sequential(nn.Linear(1, 1), nn.Sequential(Doubling()))
    other.load_state_dict(saved)
    assert other[1][0].value == 3
    assert saved["1.0.value"] == 6


# --------------------------------------------------------------------------------------------------------- torchmetrics


class Sum(torchmetrics.OpenMetric):
    """A sum, with a list, that fails on what is not finite."""

    full_state_update = False

    def __init__(self, **options):
        super().__init__(**options)
        self.add_state("total", torch.zeros(()), dist_reduce_fx=None)
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("hidden_list", [], dist_reduce_fx=None)
        self.prepared = 0

    def update(self, value):
        self.total = self.total + value
        self.count = self.count + 1
        self.hidden_list.append(value)
        if not value.isfinite():
            raise ValueError("no number")

    def compute(self):
        return self.total

    def prepare_sync(self):
        self.prepared += 1

    def merge_states(self, earlier):
        self.total = self.total + earlier["total"]
        self.count = self.count + earlier["count"]
        self.hidden_list = [*earlier["hidden_list"], *self.hidden_list]


def test_merge_states_is_what_forward_and_merge_state_use():
    metric, other = Sum(), Sum()
    assert metric(torch.tensor(2.0)) == 2
    assert metric(torch.tensor(3.0)) == 3
    assert (metric.total, metric.count, metric.hidden_list) == (5, 2, [2, 3])
    other.update(torch.tensor(4.0))
    metric.merge_state(other)
    assert (metric.compute(), metric.count) == (9, 3)


def test_without_merge_states_torchmetrics_merges():
    class Plain(Sum):
        merge_states = torchmetrics.OpenMetric.merge_states

    metric = Plain()
    metric(torch.tensor(2.0))
    assert metric.total.tolist() == [0, 2]


def test_states_are_prepared_once_before_they_are_gathered():
    gathered = []

    def gather(tensor, group=None):
        gathered.append(metric.prepared)
        return [tensor, tensor]

    metric = Sum()
    metric.update(torch.tensor(2.0))
    assert not metric.is_synced
    metric.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    assert metric.is_synced
    assert metric.count == 2
    assert set(gathered) == {1}
    metric.unsync()
    assert not metric.is_synced


def test_an_error_in_forward_leaves_states_and_books_as_they_were():
    metric = Sum()
    metric(torch.tensor(2.0))
    before = {name: copy.copy(value) for name, value in vars(metric).items()}
    with pytest.raises(ValueError, match="no number"), metric.as_before_on_error():
        metric(torch.tensor(torch.nan))
    after = vars(metric)
    assert after.keys() == before.keys()
    assert {name for name, value in before.items() if not same(value, after[name])} == set()
    assert metric(torch.tensor(3.0)) == 3
    assert metric.compute() == 5


def same(one, other):
    return callable(one) or one is other or bool(one == other)


def test_books_are_all_that_forward_changes():
    """A name that forward sets and that is not put back would be found by the test before: those are all of them."""
    changed = set()

    class Watched(Sum):
        def __setattr__(self, name, value):
            if name.startswith("_") and getattr(self, "watching", False):
                changed.add(name)
            super().__setattr__(name, value)

    metric = Watched()
    metric.watching = True
    metric(torch.tensor(2.0))
    known = {*torchmetrics._BOOKS, "_computed", "_forward_cache", "_update_called", "_cache"}
    assert changed <= known
    assert {"_update_count", "_to_sync", "_should_unsync", "_enable_grad", "_computed"} <= changed


def test_states_are_left_out_of_state_dict_by_the_beginning_of_their_names():
    metric = Sum()
    metric.persistent(True)
    metric.leave_unsaved("hidden_")
    assert set(metric.state_dict()) == {"total", "count"}


def test_a_changed_default_is_what_reset_sets():
    metric = Sum()
    metric.change_default("count", torch.tensor(7))
    metric.reset()
    assert metric.count == 7
    assert metric.count.dtype == torch.long


def test_draw_is_what_torchmetrics_draws():
    figure, axis = Sum().draw(torch.tensor(2.0), None)
    assert axis.figure is figure
    assert len(axis.lines) == 1


# ------------------------------------------------------------------------------------------------------------ lightning


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.seen = {}

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


LOADER = DataLoader(TensorDataset(torch.ones(6, 2)), batch_size=2)


class At(L.Callback):
    """Calls a function in a hook."""

    def __init__(self, hook, function):
        setattr(self, hook, lambda trainer, pl_module, *_: function(trainer, pl_module))


def fitted(tmp_path, *callbacks, module=None, loader=LOADER, **options):
    trainer = quiet_trainer(tmp_path, callbacks=list(callbacks), **{"max_epochs": 1} | options)
    trainer.fit(module or Net(), loader)
    return trainer


def test_trainer_of_a_module_is_none_until_it_has_one(tmp_path):
    module, seen = Net(), []
    assert pl_names.trainer_of(module) is None
    trainer = fitted(tmp_path, At("on_fit_start", lambda _, m: seen.append(pl_names.trainer_of(m))), module=module)
    assert seen == [trainer]
    assert pl_names.trainer_of(Net()) is None
    with pytest.raises(RuntimeError):
        _ = Net().trainer


@pytest.mark.parametrize("of", ["module", "datamodule"])
def test_a_batch_is_prepared_by_the_hook_of_module_or_data_module(of, tmp_path):
    class Halving:
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] / 2]

    class Data(*([Halving] if of == "datamodule" else []), L.LightningDataModule):
        def train_dataloader(self):
            return LOADER

    class Module(*([Halving] if of == "module" else []), Net):
        pass

    seen, data = [], {"datamodule": Data()} if of == "datamodule" else {"train_dataloaders": LOADER}
    look = At("on_train_batch_start", lambda _, m: seen.append(pl_names.prepare_batch(m, [torch.ones(1)])[0].item()))
    quiet_trainer(tmp_path, max_epochs=1, callbacks=[look]).fit(Module(), **data)
    assert seen == [0.5] * 3


@pytest.mark.parametrize("hook", ["on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"])
@pytest.mark.parametrize("of", ["nobody", "module", "data module", "instance"])
def test_batches_are_moved_plainly_where_no_hook_of_the_user_sees_them(hook, of):
    def own(self, batch, *_):
        return batch

    module = type("Module", (Net,), {hook: own} if of == "module" else {})()
    data = type("Data", (L.LightningDataModule,), {hook: own} if of == "data module" else {})()
    if of == "instance":
        setattr(module, hook, own.__get__(module))
    trainer = SimpleNamespace(datamodule=data)
    assert pl_names.moves_plainly(trainer, module) is (of == "nobody")
    trainer.datamodule = None
    assert pl_names.moves_plainly(trainer, module) is (of in ("nobody", "data module"))


def test_batches_read_are_those_of_the_epoch(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(torch.ones(100, 1, 2))

    seen = []
    look = [At(hook, lambda t, _: seen.append(pl_names.batches_read(t))) for hook in ("on_train_batch_end",) * 2]
    look.append(At("on_train_epoch_end", lambda t, _: seen.append(-pl_names.batches_read(t))))
    trainer = fitted(tmp_path, *look, loader=DataLoader(Stream(), batch_size=1), limit_train_batches=3, max_epochs=2)
    assert seen == [1, 1, 2, 2, 3, 3, -3] * 2
    assert pl_names.batches_read(trainer) == 3


def test_ends_of_epochs_and_validations_are_known_at_their_last_batch(tmp_path):
    def at_ends(**options):
        seen = []
        names = progress.is_last_batch, progress.is_before_more

        class Look(L.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                seen.append((names[0](trainer), names[1](trainer, batch_idx)))

        fitted(tmp_path, Look(), **options)
        return seen

    assert at_ends(max_epochs=2) == [(False, False), (False, False), (True, True)] * 2
    every = at_ends(module=Validating(), max_epochs=2, val_check_interval=2, check_val_every_n_epoch=None)
    assert every == [(False, False), (False, True), (True, True), (False, True), (False, False), (True, True)]


class Validating(Net):
    def validation_step(self, batch, batch_idx):
        pass

    def val_dataloader(self):
        return LOADER


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_end"])
def test_a_checkpoint_between_epochs_is_resumed_with_all_batches_at_their_steps(hook, tmp_path):
    """Without the two changes the first epoch after a resume would be short, or steps would be shifted."""
    saved, steps = tmp_path / "a.ckpt", []

    def save(trainer, _):
        if trainer.global_step == 3 and trainer.training:
            trainer.save_checkpoint(saved)

    class Saving(At):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            change = progress.count_as_before_batch if hook == "on_train_batch_start" else progress.count_as_new_epoch
            change(checkpoint)

    fitted(tmp_path, Saving(hook, save), max_epochs=-1, max_steps=4 if hook == "on_train_batch_start" else 3)
    assert progress.epochs_done(torch.load(saved, weights_only=False)) == 1
    ends = At("on_train_epoch_end", lambda t, _: steps.append(t.global_step))
    trainer = quiet_trainer(tmp_path, callbacks=[ends], max_epochs=-1, max_steps=9, logger=(logger := Steps()))
    trainer.fit(Logging(), LOADER, ckpt_path=saved)
    assert steps == [6, 9]
    assert logger.steps == [3, 4, 5, 6, 7, 8]  # Lightning logs the step before.


class Logging(Net):
    def training_step(self, batch, batch_idx):
        self.log("here", 1.0)
        return super().training_step(batch, batch_idx)


class Counting(Net):
    """Makes ten iterations in each Lightning step, by an optimizer that Lightning does not see."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        pl_names.count_iterations(self.trainer, 10, self.trainer.global_step + 10)
        self.log("here", float(batch_idx))


class Steps(DummyLogger):
    """Notes at which steps values come."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def log_metrics(self, metrics, step=None):
        self.steps += [step] if "here" in metrics else []


def test_counted_iterations_are_steps_of_the_trainer_of_logs_and_of_checkpoints(tmp_path):
    logger, saved = Steps(), ModelCheckpoint(tmp_path, every_n_train_steps=20, save_top_k=-1, filename="{step}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of ModelCheckpoint, that no state before the optimization was saved.
        trainer = fitted(
            tmp_path, saved, module=Counting(), logger=logger, enable_checkpointing=True, max_steps=50, max_epochs=-1
        )
    assert trainer.global_step == 50
    assert logger.steps == [10, 20, 30, 40, 50]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=20.ckpt", "step=40.ckpt"]
    content = torch.load(tmp_path / "step=40.ckpt", weights_only=False)
    assert pl_names.iterations_done(content) == content["global_step"] == 40
    with pytest.raises(KeyError):
        pl_names.iterations_done({"loops": {}})


def test_values_presented_are_found_by_other_callbacks(tmp_path):
    def show(trainer, _):
        pl_names.present(trainer, {"mine": torch.tensor(float(trainer.global_step))})
        pl_names.present_logged(trainer, {"also": torch.tensor(1.0)})

    stop = EarlyStopping("mine", mode="min", patience=1)
    trainer = fitted(tmp_path, At("on_train_batch_start", show), stop, max_epochs=9)
    assert trainer.current_epoch == 2
    assert trainer.callback_metrics["mine"] == 5
    assert trainer.logged_metrics["also"] == 1


def test_a_trainer_shows_that_it_validates_and_goes_on_training(tmp_path):
    seen = []

    def look(trainer, pl_module):
        with pl_names.shown_as_validating(trainer):
            seen.append((trainer.training, trainer.validating, trainer.state.fn == "fit"))
        seen.append((trainer.training, trainer.validating, trainer.state.fn == "fit"))

    fitted(tmp_path, At("on_train_batch_start", look), limit_train_batches=1)
    assert seen == [(False, True, True), (True, False, True)]


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_a_module_is_attached_as_a_fit_attaches_it(package):
    package, done = pytest.importorskip(package), []

    class Module(package.LightningModule):
        def prepare_data(self):
            done.append("prepare_data")

        def setup(self, stage):
            done.append(f"setup {stage}")

        def configure_model(self):
            self.layer = nn.Linear(2, 2)

    class Data(package.LightningDataModule):
        def setup(self, stage):
            done.append(f"data {stage}")

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return batch + 1

    module, data = Module(), Data()
    trainer = package.Trainer(accelerator="cpu", precision="64-true", logger=False, enable_checkpointing=False)
    pl_names.attach_as_in_a_fit(trainer, module, data)
    assert done == ["prepare_data", "data fit", "setup fit"]
    assert (data.trainer, module.trainer, trainer.validating) == (trainer, trainer, True)
    assert module.layer.weight.dtype == torch.float64
    assert pl_names.prepare_batch(module, 1) == 2


class Twin(L.Callback):
    @pl_names.state_key_unchecked
    def state_dict(self):
        return {"a": 1}


class Checked(L.Callback):
    def state_dict(self):
        return {"a": 1}


def test_state_keys_are_unchecked_and_states_are_saved_all_the_same(tmp_path):
    trainer = fitted(tmp_path, Twin(), Twin())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=False)["callbacks"] == {"Twin": {"a": 1}}
    with pytest.raises(RuntimeError, match="state_key"):
        quiet_trainer(tmp_path, callbacks=[Checked(), Checked()])


def test_the_cadence_of_a_checkpoint_is_what_it_was_given(tmp_path):
    assert pl_names.cadence_of(ModelCheckpoint(tmp_path, every_n_train_steps=70)) == 70
    assert pl_names.cadence_of(ModelCheckpoint(tmp_path, every_n_epochs=1)) == 0
    assert pl_names.cadence_of(Twin()) == 0


@pytest.mark.parametrize(("size", "splits"), [("auto", True), (1, False), (2, True)])
def test_what_a_strategy_splits_is_what_it_was_given(size, splits):
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=size)
    strategy.parallel_devices = [torch.device("cpu")] * 2
    assert pl_names.splits_layers(strategy) is splits


@pytest.mark.parametrize("whole", [True, False])
def test_the_form_of_checkpoints_of_a_strategy_is_what_it_was_given(whole):
    strategy = ModelParallelStrategy(save_distributed_checkpoint=whole)
    assert pl_names.writes_distributed_checkpoints(strategy) is whole


def test_changed_methods_of_a_strategy_are_those_that_a_trainer_calls(tmp_path):
    calls = []

    def optimizer_state(optimizer):
        calls.append(type(optimizer))
        return {"mine": True}

    def load_checkpoint(checkpoint_path, weights_only=None):
        calls.append(str(checkpoint_path))
        return torch.load(checkpoint_path, weights_only=False) | {"optimizer_states": []}

    def change(trainer, _):
        pl_names.change_checkpointing(trainer.strategy, optimizer_state, load_checkpoint)

    trainer, path = fitted(tmp_path, At("on_fit_start", change)), tmp_path / "a.ckpt"
    trainer.save_checkpoint(path)
    assert torch.load(path, weights_only=False)["optimizer_states"] == [{"mine": True}]
    assert calls in ([torch.optim.SGD], [LightningOptimizer])
    other = quiet_trainer(tmp_path, max_epochs=2)
    pl_names.change_checkpointing(other.strategy, optimizer_state, load_checkpoint)
    other.fit(Net(), LOADER, ckpt_path=path)
    assert calls[1:] == [str(path)]
    assert other.global_step == 6


def test_hyperparameters_are_written_as_lightning_does(tmp_path):
    pl_names.write_hyperparameters(tmp_path / "mine.yaml", {"a": 1, "b": "two"})
    logger = TensorBoardLogger(tmp_path)
    logger.log_hyperparams({"a": 1, "b": "two"})
    logger.save()
    assert (tmp_path / "mine.yaml").read_text() == next(tmp_path.rglob("hparams.yaml")).read_text()


class Recorded:
    """Stands in for a writer."""

    def __init__(self, **options):
        self.options, self.closed = options, False

    def add_scalar(self, *_):
        pass

    def flush(self):
        pass

    def close(self):
        self.closed = True


class Recording(pl_names.WriterLogger):
    def make_writer(self, options):
        return Recorded(**options)


def test_a_logger_makes_its_own_writer_with_its_options_and_closes_it(tmp_path):
    logger = Recording(tmp_path, max_queue=5)
    logger.set_writer_option("purge_step", 3)
    assert not logger.has_writer
    logger.log_metrics({"a": 1.0}, 1)
    assert logger.has_writer
    assert logger.experiment.options == {"max_queue": 5, "purge_step": 3}
    logger.finalize("success")
    assert logger.experiment.closed
    assert not copy.deepcopy(logger).has_writer


def test_a_logger_counts_its_version_up(tmp_path):
    logger = Recording(tmp_path)
    assert logger.log_dir.endswith("version_0")
    logger.count_version_up()
    assert logger.log_dir.endswith("version_1")


def test_a_progress_bar_says_what_it_counts(tmp_path):
    seen = []

    class Bar(pl_names.DescribedProgressBar):
        def describe_training(self):
            return "Things"

        def on_train_batch_end(self, trainer, *args):
            super().on_train_batch_end(trainer, *args)
            seen.append((self.has_training_bar, [task.description for task in self.progress.tasks]))

    fitted(tmp_path, Bar(), enable_progress_bar=True)
    assert seen == [(True, ["Things"])] * 3
    assert not Bar().has_training_bar


def test_the_configuration_wins_over_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["program"])

    class Sized(Net):
        def __init__(self, size: int = 1):
            super().__init__()
            self.save_hyperparameters()

    trainer = quiet_trainer(tmp_path, max_epochs=0)
    trainer.fit(Sized(5), LOADER)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    words = ["validate", "--model.size=2", f"--ckpt_path={tmp_path}/a.ckpt"]
    sizes = []
    for base in (pl_names.GivenConfigurationCLI, pl_names.LightningCLI):

        class CLI(base):
            def validate(self, *_, **__):
                pass

            def _run_subcommand(self, subcommand):
                sizes.append(self.model.hparams["size"])

        CLI(Sized, save_config_callback=None, seed_everything_default=False, args=words)
    assert sizes == [2, 5]  # Were they equal, the override would not be needed.


# ---------------------------------------------------------------------------------------------------------------- twins

PACKAGES = ["lightning.pytorch", "pytorch_lightning"]


@pytest.fixture(params=PACKAGES)
def package(request):
    return pytest.importorskip(request.param)


def part(package, module, name):
    return getattr(importlib.import_module(f"{package.__name__}.{module}"), name)


def test_classes_of_both_packages_are_known(package):
    module = nn.Sequential(package.LightningModule(), nn.Linear(1, 1))
    assert list(twins.lightning_modules(module)) == [module[0]]
    strategies = importlib.import_module(f"{package.__name__}.strategies")
    assert twins.is_strategy(strategies.FSDPStrategy(), "DeepSpeedStrategy", "FSDPStrategy")
    assert not twins.is_strategy(strategies.DDPStrategy(), "DeepSpeedStrategy", "FSDPStrategy")
    callbacks = importlib.import_module(f"{package.__name__}.callbacks")
    assert twins.is_callback(callbacks.EarlyStopping("loss"), "EarlyStopping")
    assert not twins.is_callback(callbacks.Timer(), "EarlyStopping")
    plugin = part(package, "plugins.io", "TorchCheckpointIO")
    assert twins.is_torch_checkpoint_io(plugin())
    assert not twins.is_torch_checkpoint_io(type("Own", (plugin,), {})())
    assert twins.is_refusal(part(package, "utilities.exceptions", "MisconfigurationException")())
    assert not twins.is_refusal(ValueError())
    assert twins.is_termination(part(package, "utilities.exceptions", "SIGTERMException")())
    assert not twins.is_termination(SystemExit())
    trainer = package.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    assert twins.is_of_twin(trainer) is (package.__name__ == "pytorch_lightning")
    assert type(twins.termination(trainer)) is part(package, "utilities.exceptions", "SIGTERMException")


def test_callbacks_that_only_look_in_both_packages(package):
    callbacks = importlib.import_module(f"{package.__name__}.callbacks")
    plain = callbacks.Callback(), callbacks.Timer(), callbacks.TQDMProgressBar(), callbacks.EarlyStopping("loss")
    for looks in (*plain, NeuralCollapseMonitor()):
        assert twins.only_looks(looks, "on_train_epoch_end")
    own = callbacks.Callback()
    own.on_train_epoch_end = lambda *_: None
    for changes in (
        callbacks.StochasticWeightAveraging(1e-2),
        callbacks.ModelPruning("random_unstructured"),
        callbacks.LambdaCallback(on_train_epoch_end=print),
        type("Own", (callbacks.Timer,), {"on_train_epoch_end": lambda *_: None})(),
        type("Own", (NeuralCollapseMonitor,), {"on_train_epoch_end": lambda *_: None})(),
        own,
    ):
        assert not twins.only_looks(changes, "on_train_epoch_end")


def test_a_callback_runs_last_in_both_packages(package, tmp_path):
    order = []

    class First(part(package, "callbacks", "Callback")):
        def setup(self, trainer, *_, **__):
            twins.run_last(trainer, self)
            order.append("setup of first")

        def on_fit_start(self, *_):
            order.append("first")

    class Second(part(package, "callbacks", "Callback")):
        def setup(self, *_, **__):
            order.append("setup of second")

        def on_fit_start(self, *_):
            order.append("second")

    class Module(package.LightningModule):
        training_step = Net.training_step

        def configure_optimizers(self):
            return torch.optim.SGD([nn.Parameter(torch.ones(1))])

    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = package.Trainer(
        callbacks=[First(), Second()], max_epochs=0, enable_model_summary=False, default_root_dir=tmp_path, **options
    )
    trainer.fit(Module(), LOADER)
    last = ["second", "first"] if twins.is_of_twin(trainer) else ["first", "second"]  # One trainer does it by itself.
    assert order == ["setup of first", "setup of second", *last]


def test_lightning_refuses_by_the_exception_that_is_known(tmp_path):
    with pytest.raises(Exception, match="limit_train_batches") as caught:
        quiet_trainer(tmp_path, limit_train_batches=-1)
    assert twins.is_refusal(caught.value)


def test_lightning_ends_on_sigterm_by_the_exception_that_is_known(tmp_path):
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, *_):
            signal.raise_signal(signal.SIGTERM)

        def on_exception(self, trainer, pl_module, exception):
            seen.append(exception)

    with pytest.raises(SystemExit):
        fitted(tmp_path, Look())
    assert [twins.is_termination(each) for each in seen] == [True]


def test_nothing_is_logged_in_a_block_that_logs_nothing(package, tmp_path):
    came = []

    class Note(DummyLogger):
        def log_metrics(self, metrics, step=None):
            came.append(metrics)

    module, note = package.LightningModule(), Note()
    trainer = SimpleNamespace(loggers=[note, note])
    with twins.logging_nothing(trainer, nn.Sequential(module)):
        module.log("a", 1)
        module.log_dict({"a": 1})
        for logger in trainer.loggers:
            logger.log_metrics({"a": 1}, 1)
            logger.experiment.add_scalar("a", 1)
    assert came == []
    assert trainer.loggers == [note, note]
    assert "log" not in vars(module)


def test_strategies_that_are_asked_for_exist():
    assert issubclass(FSDPStrategy, L.pytorch.strategies.Strategy)
    assert not issubclass(DDPStrategy, FSDPStrategy)
    assert TorchCheckpointIO is not None


# ---------------------------------------------------------------------------------------------------------- tensorboard


class Memory:
    """Stands in for an event file."""

    def __init__(self):
        self.events, self.closed = [], False

    def get_logdir(self):
        return "nowhere"

    def add_event(self, event):
        self.events.append(event)

    def flush(self):
        pass

    def close(self):
        self.closed = True


class Writer(tensorboard.OwnFileWriter):
    def make_event_file(self, max_queue, flush_secs, start):
        self.given = max_queue, flush_secs, start
        return tensorboard.EventFile(Memory())


@pytest.mark.parametrize("start", [None, 7])
def test_a_writer_writes_where_it_is_told_with_its_options(start, tmp_path):
    writer = Writer(str(tmp_path), max_queue=3, flush_secs=4, purge_step=start)
    writer.add_scalar("a", 2.0, 9)
    memory = writer.event_file.event_writer
    assert writer.given == (3, 4, start)
    assert list(tmp_path.iterdir()) == []
    orders = [event.step for event in memory.events if event.session_log.status == tensorboard.SessionLog.START]
    assert orders == ([] if start is None else [start])
    written = [(value.tag, value.simple_value, event.step) for event in memory.events for value in event.summary.value]
    assert written == [("a", 2.0, 9)]
    writer.event_file.add_summary(tensorboard.Summary(value=[tensorboard.Summary.Value(tag="b", simple_value=1)]), 10)
    assert memory.events[-1].step == 10
    writer.close()
    assert memory.closed


def test_events_of_records_are_read_again_in_all_steps(tmp_path):
    records = [tensorboard.Event(wall_time=1.0, file_version="brain.Event:2")]
    for step in range(12_000):
        value = tensorboard.Summary.Value(tag="a", simple_value=step / 2)
        records.append(tensorboard.Event(wall_time=1.0, step=step, summary=tensorboard.Summary(value=[value])))
    with (tmp_path / "events.out.tfevents.1.host").open("wb") as file:
        for record in records:
            tensorboard.RecordWriter(file).write(record.SerializeToString())
    assert recorded.read_scalars(str(tmp_path)) == {"a": [(step, step / 2) for step in range(12_000)]}


def test_hyperparameters_are_what_the_tab_of_tensorboard_reads():
    data = hparams.HParamsPluginData(
        experiment=hparams.Experiment(
            hparam_infos=[hparams.HParamInfo(name="a", type=hparams.DATA_TYPE_FLOAT64, differs=True)],
            metric_infos=[hparams.MetricInfo(name=hparams.MetricName(tag="m"), display_name="M")],
        )
    )
    made = hparams.metadata.create_summary_metadata(data)
    assert hparams.metadata.parse_experiment_plugin_data(made.plugin_data.content).hparam_infos[0].name == "a"
    ended = hparams.SessionEndInfo(status=hparams.STATUS_SUCCESS, end_time_secs=1.0)
    made = hparams.metadata.create_summary_metadata(hparams.HParamsPluginData(session_end_info=ended))
    assert hparams.metadata.parse_session_end_info_plugin_data(made.plugin_data.content).end_time_secs == 1.0
    started = hparams.SessionStartInfo(start_time_secs=2.0)
    started.hparams["a"].string_value = "x"
    made = hparams.metadata.create_summary_metadata(hparams.HParamsPluginData(session_start_info=started))
    assert hparams.metadata.parse_session_start_info_plugin_data(made.plugin_data.content).hparams["a"].string_value
    tags = {hparams.metadata.EXPERIMENT_TAG, hparams.metadata.SESSION_START_INFO_TAG}
    assert len(tags | {hparams.metadata.SESSION_END_INFO_TAG}) == 3
    assert hparams.metadata.NULL_TENSOR is not None
    assert hparams.DATA_TYPE_STRING != hparams.DATA_TYPE_FLOAT64


# -------------------------------------------------------------------------------------------------------------- parsers


def test_options_of_a_parser_are_those_that_it_takes():
    parser = PlainParser(add_help=False)
    parser.add_argument("-a", "--alpha")
    parser.add_argument("name")
    assert parsers.options_of(parser) == ["-a", "--alpha"]


def test_groups_of_a_parser_are_the_sections_of_a_configuration():
    parser = ArgumentParser()
    parser.add_class_arguments(Sum, "metric")
    parser.add_argument("--alone")
    assert list(parsers.groups_of(parser)) == ["metric"]


# ------------------------------------------------------------------------------------------------- loggers of Lightning


def test_prefixes_of_loggers(tmp_path):
    logger = TensorBoardLogger(tmp_path, prefix="mine")
    logger.log_metrics({"a": 1.0}, 0)
    assert experiments.prefixed(logger, "a") == "mine-a"
    logger.finalize("success")
    assert list(recorded.read_scalars(logger.log_dir)) == ["mine-a"]
    assert experiments.prefixed(TensorBoardLogger(tmp_path), "a") == experiments.prefixed(object(), "a") == "a"


def test_options_for_batches_of_mlflow(monkeypatch, tmp_path):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path}/mlruns"
    assert experiments.batch_options(MLFlowLogger(tracking_uri=uri, synchronous=False)) == {"synchronous": False}
    assert experiments.batch_options(MLFlowLogger(tracking_uri=uri)) == {}


# ----------------------------------------------------------------------------------------------------------- accelerate


def test_what_accelerate_has_made_of_a_loader_is_found_again():
    """What each part yields is compared in tests/probe/sweep/test_prepared_loaders.py."""
    library = pytest.importorskip("accelerate.data_loader")
    data = TensorDataset(torch.arange(10))
    loader = DataLoader(data, 2, shuffle=True)
    options = {"num_processes": 2, "process_index": 0, "put_on_device": False}
    made = library.prepare_data_loader(loader, **options, use_seedable_sampler=True)
    origin = accelerate.origin_of(library.skip_first_batches(made, 1))
    assert type(origin.loader) is DataLoader
    assert origin.dataset is data
    assert origin.batch_sampler is loader.batch_sampler
    assert origin.per_step == 2
    assert accelerate.is_seedable_random(origin.batch_sampler.sampler)
    assert not accelerate.is_seedable_random(DataLoader(data, shuffle=True).sampler)
    assert accelerate.num_real_samples(made) == 6
    assert accelerate.origin_of(loader) == accelerate.Origin(loader, data, loader.batch_sampler, loader.sampler, 1, "")
    assert accelerate.origin_of([1]) == ([1], None, None, None, 1, "")


# --------------------------------------------------------------------------------------------------------- transformers


def test_a_callback_finds_the_trainer_that_calls_it(tmp_path):
    """As hooks of a run do in tests/integrations/test_huggingface.py; here the names that they stand on."""
    transformers = pytest.importorskip("transformers")
    found = {}

    class Looks(transformers.TrainerCallback):
        def on_init_end(self, args, state, control, **kwargs):
            found["at init"] = hf_names.calling(transformers.Trainer)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            found["prefix"] = hf_names.prefix_of(metrics, "unknown")

    class Prepares(transformers.Trainer):
        def _prepare_inputs(self, inputs):
            return {**super()._prepare_inputs(inputs), "more": 1}

    args = transformers.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Prepares(Scaled(), args, callbacks=[Looks()])
    trainer.remove_callback(transformers.PrinterCallback)
    assert found["at init"] is trainer
    assert hf_names.calling(transformers.Trainer) is None
    assert hf_names.prepared_inputs(trainer, {"x": 1}) == {"x": 1, "more": 1}
    assert not hf_names.shares_batches(trainer)
    assert {trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size()} == {1}
    trainer.evaluate([{"x": 1.0, "labels": 1.0}], metric_key_prefix="other_set")
    assert found["prefix"] == "other_set"
    assert hf_names.prefix_of({"loss": 1}, "unknown") == "unknown"


class Scaled(nn.Linear):
    def __init__(self):
        super().__init__(1, 1)

    def forward(self, x, labels, more=0):
        return {"loss": ((x * self.weight - labels) ** 2).mean()}
