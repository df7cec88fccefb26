"""The options of NeuralCollapseMonitor on modules that know nothing of it."""

import copy
import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nclightning.callbacks import NeuralCollapseMonitor, OptimalityMonitor
from nclightning.callbacks.modules import check_strategy
from nclightning.functional import class_distance_normalized_variance, class_statistics, ood_orthogonality
from nclightning.metrics import MEASURES, NearestClassCentre, NeuralCollapse
from nclightning.probe.batches import RowBuffer
from nclightning.probe.collectors import StatisticsCollector
from nclightning.quantities import DECISION_NAMES
from tests.callbacks.attached import K, N, Net, features_of, fit, hooks_of, loader, measure, metrics
from tests.trainers import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]


class Conv(Net):
    """Maps, and a head behind them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, 1, 5)), nn.Conv2d(1, 4, (1, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(12, 8)
        )
        self.maps = self.body[1]


def test_all_measures_of_train_and_val(tmp_path, samples):
    data = loader(samples), loader(samples, shuffle=False, drop_last=False)
    model, trainer = fit(tmp_path, [NeuralCollapseMonitor(measures=("all",))], data, num_sanity_val_steps=0)
    read = metrics(trainer)
    names = [*MEASURES, *DECISION_NAMES]
    assert read.keys() == {f"{stage}/{name}" for stage in ("train", "val") for name in names}
    features, stats = features_of(model, samples[0]), None
    stats = class_statistics(features, samples[1], K)
    metric = NeuralCollapse(K, 8, model.last, measures=("all",))
    metric.update(features, samples[1])
    decisions = NearestClassCentre(stats, model.last)
    decisions.update(features, samples[1])
    expected = {k: float(v) for k, v in (metric.compute() | decisions.compute()).items()}
    for stage in ("train", "val"):
        # Features are float32 in batches of another size: their own rounding.
        assert {name: read[f"{stage}/{name}"] for name in names} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_every_few_steps(tmp_path, samples):
    logger = CSVLogger(tmp_path)
    monitor = NeuralCollapseMonitor(every_n_steps=4, stages=("train",), every_n_epochs=100)
    model, _ = fit(
        tmp_path, [monitor], loader(samples), logger=logger, max_steps=8, max_epochs=-1, accumulate_grad_batches=2
    )
    logger.save()
    with open(logger.experiment.metrics_file_path) as file:
        rows = [row for row in csv.DictReader(file) if row["nc/train/nc1"]]
    assert [row["step"] for row in rows] == ["4", "8"]
    assert float(rows[-1]["nc/train/nc1"]) == pytest.approx(measure(model, samples)["nc1"], rel=1e-5)


def test_online_reads_the_forwards_of_the_epoch(tmp_path, samples):
    seen = []

    class Recording(Net):
        def forward(self, x):
            out = super().forward(x)
            if self.training:
                seen.append(self._features)
            return out

    model = Recording()
    model.last.register_forward_pre_hook(lambda _, args: setattr(model, "_features", args[0].detach().clone()))
    labels = []

    class Labels(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            labels.append(batch[1])

    monitor = NeuralCollapseMonitor(source="online", head="last")
    data = loader(samples), loader(samples, shuffle=False)
    _, trainer = fit(tmp_path, [monitor, Labels()], data, model, val_check_interval=0.5, num_sanity_val_steps=0)
    per_epoch = len(labels) // 3
    stats = class_statistics(torch.cat(seen[-per_epoch:]), torch.cat(labels[-per_epoch:]), K)
    expected = NeuralCollapse(K, 8, model.last).read(stats)
    read = metrics(trainer, "nc/train/")
    assert read == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-12)
    assert "val/nc1" in metrics(trainer)


def test_several_loaders_and_one_out_of_distribution(tmp_path, samples):
    other = samples[0] + 3, torch.full((N,), 77)
    val = [loader(s, shuffle=False, drop_last=False) for s in (samples, other)]

    class Several(Net):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self(batch[0])

    monitor = NeuralCollapseMonitor(ood=("1",))
    model, trainer = fit(tmp_path, [monitor], (loader(samples), val), Several(), num_sanity_val_steps=0)
    read = metrics(trainer, "nc/val/")
    assert read.keys() == {"0/nc1", "0/nc2", "0/nc3", "1/nc5"}
    stats = class_statistics(features_of(model, samples[0]), samples[1], K)
    expected = float(ood_orthogonality(stats, features_of(model, other[0]).double().mean(0)))
    assert read["1/nc5"] == pytest.approx(expected, rel=1e-6)


def test_further_data_sets(tmp_path, samples):
    half, other = tuple(s[:20] for s in samples), samples[0] + 3
    monitor = NeuralCollapseMonitor(
        datasets={"half": loader(half), "far": loader((other, torch.zeros(N)))},
        ood=("far",),
        measures=("nc1", "accuracy"),
    )
    model, trainer = fit(tmp_path, [monitor], loader(samples))
    read = metrics(trainer)
    assert read.keys() == {"train/nc1", "train/accuracy", "half/nc1", "half/accuracy", "far/nc5"}
    features = features_of(model, samples[0])
    decided = model.last(features).argmax(1) == samples[1]
    assert read["half/accuracy"] == pytest.approx(float(decided[:20].double().mean()))
    assert read["train/accuracy"] == pytest.approx(float(decided.double().mean()))


@pytest.mark.parametrize(("pooling", "width"), [("mean", 4), ("flatten", 12)])
def test_further_layers(pooling, width, tmp_path, samples):
    monitor = NeuralCollapseMonitor(layers=("maps", "body.4"), layer_pooling=pooling)
    data = loader(samples), loader(samples, shuffle=False, drop_last=False)
    model, trainer = fit(tmp_path, [monitor], data, Conv(), num_sanity_val_steps=0)
    read = metrics(trainer, "nc/train/")
    assert read.keys() == {"nc1", "nc2", "nc3"} | {
        f"{layer}/{name}" for layer in ("maps", "body.4") for name in ("nc1", "nc1_cdnv", "ncc_accuracy")
    }
    with torch.no_grad():
        maps = model.body[1](model.body[0](samples[0]))
    rows = maps.mean((2, 3)) if pooling == "mean" else maps.flatten(1)
    assert rows.shape[1] == width
    stats = class_statistics(rows, samples[1], K)
    assert read["maps/nc1_cdnv"] == pytest.approx(float(class_distance_normalized_variance(stats)), rel=1e-5)
    assert read["body.4/nc1"] == pytest.approx(read["nc1"], rel=1e-6)
    assert {k: v for k, v in metrics(trainer, "nc/val/").items() if "nc1" in k} == pytest.approx(
        {k: v for k, v in read.items() if "nc1" in k}, rel=1e-5
    )


def test_batches_of_any_form_by_batch_fn(tmp_path, samples):
    class Triples(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch[1], batch[2]), batch_idx)

    data = DataLoader(TensorDataset(torch.arange(N), *samples), batch_size=8)
    monitor = NeuralCollapseMonitor(batch_fn=lambda batch: (batch[1], batch[2]))
    model, trainer = fit(tmp_path, [monitor], data, Triples())
    assert metrics(trainer, "nc/train/") == pytest.approx(measure(model, samples), rel=1e-5)


def test_labels_by_position(tmp_path):
    """A language model's shape: features (B, T, d), labels (B, T) with some to be ignored."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, 5, generator=generator), torch.randint(K, (12, 4), generator=generator)
    y[:, 0] = -100

    class Positions(Net):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(5, 8)

        def step(self, batch):
            return nn.functional.cross_entropy(self(batch[0]).transpose(1, 2), batch[1])

    model, trainer = fit(tmp_path, [NeuralCollapseMonitor(ignore_index=-100)], loader((x, y)), Positions())
    expected = measure(model, (x[:, 1:].reshape(-1, 5), y[:, 1:].reshape(-1)))
    assert metrics(trainer, "nc/train/") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true", "64-true", "bf16-true"])
def test_precisions(precision, tmp_path, samples):
    model, trainer = fit(tmp_path, [NeuralCollapseMonitor()], loader(samples), precision=precision)
    read = metrics(trainer, "nc/train/")
    x = samples[0].to(next(model.parameters()).dtype)
    expected = measure(model, (x, samples[1]))
    assert read == pytest.approx(expected, rel=0.1 if "bf16" in precision else 1e-5)


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
@pytest.mark.parametrize(
    "averaging",
    [lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1, annealing_epochs=1), WeightAveraging],
    ids=["swa", "ema"],
)
def test_weight_averaging(averaging, tmp_path, samples):
    """Training weights in training; the averaged ones where validation runs on them."""
    swept = []

    def note(pl_module, values):
        expected = measure(copy.deepcopy(pl_module), samples)
        swept.append((float(values["nc/train/nc1"]), expected["nc1"]))

    watch = NeuralCollapseMonitor(stages=("train",))
    watch.at_epochs().publish = note
    model = Net()
    model.body[1] = nn.Identity()  # Batch norm is updated by these callbacks in a pass of its own.
    fit(tmp_path, [averaging(), watch], loader(samples), model, max_epochs=3)
    assert len(swept) == 3
    for value, expected in swept:
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_compiled_modules_are_swept_uncompiled(tmp_path, samples):
    model = torch.compile(Net(), backend="eager")
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[NeuralCollapseMonitor(stages=("train",))])
    trainer.fit(model, loader(samples))
    inner = model._orig_mod
    assert metrics(trainer, "nc/train/") == pytest.approx(measure(inner, samples), rel=1e-5)


def test_an_iterable_data_set(tmp_path, samples):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(zip(*samples, strict=True))

    model, trainer = fit(tmp_path, [NeuralCollapseMonitor()], DataLoader(Stream(), batch_size=8))
    assert metrics(trainer, "nc/train/") == pytest.approx(measure(model, samples), rel=1e-5)


def test_early_stopping_can_monitor_it(tmp_path, samples):
    stop = EarlyStopping(monitor="nc/train/nc1", mode="min", stopping_threshold=1e9)
    _, trainer = fit(tmp_path, [NeuralCollapseMonitor(), stop], loader(samples), max_epochs=9)
    assert trainer.current_epoch == 1


def test_the_last_readings_are_there_after_a_resume(tmp_path, samples):
    _, trainer = fit(tmp_path, [NeuralCollapseMonitor(every_n_epochs=2)], loader(samples), max_epochs=2)
    before = metrics(trainer)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    seen = {}

    class Look(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.update(metrics(trainer))

    again = quiet_trainer(tmp_path, max_epochs=3, callbacks=[NeuralCollapseMonitor(every_n_epochs=2), Look()])
    again.fit(Net(), loader(samples), ckpt_path=tmp_path / "last.ckpt")
    assert seen == before


def test_pictures_reach_tensorboard(tmp_path, samples):
    logger = TensorBoardLogger(tmp_path)
    monitor = NeuralCollapseMonitor(pictures_every_n_epochs=2)
    fit(tmp_path, [monitor], loader(samples), logger=logger, max_epochs=4)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir).Reload()
    assert [event.step for event in events.Images("nc/train/angles")] == [12, 24]


def test_pictures_that_nobody_takes_are_said(tmp_path, samples):
    monitor = NeuralCollapseMonitor(pictures_every_n_epochs=2)
    with pytest.warns(UserWarning, match="pictures_every_n_epochs=2 draws nothing, since the trainer has CSVLogger"):
        fit(tmp_path, [monitor], loader(samples), logger=CSVLogger(tmp_path), max_epochs=1)
    with pytest.warns(UserWarning, match="the trainer has no logger"):
        fit(tmp_path, [monitor], loader(samples), max_epochs=1)


SET = loader((torch.ones(8, 5), torch.arange(8)))


class TestErrors:
    @pytest.mark.parametrize("monitor", [NeuralCollapseMonitor, OptimalityMonitor])
    def test_a_class_in_the_place_of_a_callback(self, monitor, tmp_path, samples):
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[monitor])
        for call in (trainer.fit, trainer.validate):
            with pytest.raises(
                TypeError, match=rf"got the class {monitor.__name__}: write {monitor.__name__}\(\.\.\.\)"
            ):
                call(Net(), loader(samples))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"every_n_epochs": 0}, "every_n_epochs must be at least 1, got 0"),
            ({"every_n_steps": 0}, "every_n_steps must be at least 1"),
            ({"source": "offline"}, "source must be among sweep, online"),
            ({"stages": ("fit",)}, "stages must be among train, val, test"),
            ({"stages": ()}, "stages must be among"),
            ({"on_error": "ignore"}, "on_error must be among"),
            ({"measures": ("nc9",)}, "measures must be different names out of nc0.*Further names are ncc_accuracy"),
            ({"measures": ("nc1", "nc_2")}, r"nc0, .* and \d+ more; got \['nc1', 'nc_2'\].*Did you mean nc2\?"),
            ({"measures": ("acuracy",)}, r"Did you mean accuracy\?"),
            ({"measures": "nc1"}, r"write \('nc1',\)"),
            ({"measures": ("accuracy", "accuracy")}, "measures must be different names"),
            ({"measures": ("ncc_accuracy",), "source": "online"}, "need fixed class means: use source='sweep'"),
            ({"source": "online", "every_n_steps": 3}, "reads once an epoch"),
            ({"datasets": {"val": []}}, "datasets must not be named like a stage"),
            ({"datasets": [SET]}, r"mapping from names to loaders, got a list: write datasets=\{'name': loader\}"),
            ({"datasets": SET}, "mapping from names to loaders, got a DataLoader: write"),
        ],
        ids=lambda o: str(o).partition(" object at ")[0],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            NeuralCollapseMonitor(**options)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"layers": ("body.9",)}, "layer 'body.9' does not exist in Net; it has: body, body.0"),
            ({"layers": ("bodi",)}, r"'bodi' does not exist in Net; it has: body, body.0, .*\. Did you mean body\?"),
            ({"head": "lats"}, r"no layer named head='lats' in Net\. Did you mean last\? Layers"),
            ({"batch_fn": lambda batch: (batch[0], batch[1].float())}, "labels must be integers, got torch.float32"),
            ({"batch_fn": lambda batch: (batch[0], batch[1][:-1])}, "one label per feature row, got features of shape"),
            ({"batch_fn": lambda batch: (batch[0], batch[1] + 1)}, r"labels must be within 0\.\.2"),
            ({"head": "fc"}, "no layer named head='fc'"),
        ],
        ids=lambda o: str(o)[:12],
    )
    def test_what_a_sweep_meets(self, options, message, tmp_path, samples):
        with pytest.raises(Exception, match=message):
            fit(tmp_path, [NeuralCollapseMonitor(**options)], loader(samples))
        with pytest.warns(UserWarning, match=f"no reading of neural collapse: .*{message}"):
            model, trainer = fit(tmp_path, [NeuralCollapseMonitor(**options, on_error="warn")], loader(samples))
        assert trainer.current_epoch == 3
        assert hooks_of(model) == 0
        assert not metrics(trainer)

    def test_a_model_without_a_linear_layer(self, tmp_path, samples):
        class Bilinear(Net):
            def __init__(self):
                super().__init__()
                self.body, self.auxiliary, self.last = nn.Identity(), nn.Identity(), nn.Bilinear(5, 5, K)

            def forward(self, x):
                return self.last(x, x)

        with pytest.raises(
            ValueError, match=r"no layer of Bilinear was seen to be the head.*Layers with a weight that ran are: none"
        ):
            fit(tmp_path, [NeuralCollapseMonitor()], loader(samples), Bilinear())

    def test_features_that_are_not_finite_are_logged_as_nan(self, tmp_path, samples):
        x = samples[0].clone()
        x[7] = torch.nan

        class Plain(Net):
            def training_step(self, batch, batch_idx):
                return self(torch.nan_to_num(batch[0])).square().mean()

        _, trainer = fit(tmp_path, [NeuralCollapseMonitor()], loader((x, samples[1])), Plain())
        assert torch.tensor(metrics(trainer)["train/nc1"]).isnan()

    def test_features_changed_in_place_are_noticed(self, tmp_path, samples):
        class InPlace(Net):
            def forward(self, x):
                h = self.body(x)
                with torch.no_grad():
                    out = self.last(h)
                    h.mul_(2)
                return out + self.last(h.clone())

        model = InPlace()
        model.last = nn.Linear(8, K)
        with pytest.raises(ValueError, match="the head 'last' of InPlace ran 2 times in one forward"):
            fit(tmp_path, [NeuralCollapseMonitor(head="last")], loader(samples), model)

    def test_no_training_centres(self, tmp_path, samples):
        trainer = quiet_trainer(tmp_path, callbacks=[NeuralCollapseMonitor(measures=("ncc_accuracy",))])
        with pytest.raises(ValueError, match="need the class means of the training set, and the monitor has seen none"):
            trainer.validate(Net(), loader(samples, shuffle=False), verbose=False)

    def test_sharded_weights_are_refused(self):
        class Stub:
            strategy = FSDPStrategy()

        with pytest.raises(ValueError, match="FSDPStrategy shards the weights"):
            check_strategy(Stub())


def test_the_path_of_a_batch_makes_no_host_transfer():
    """Fake CUDA tensors raise on a host sync and on a mix of devices."""
    head = nn.Linear(6, 4)
    collection = StatisticsCollector(head, NeuralCollapse(4, 6, head), True, -100)
    buffer = RowBuffer(collection.add)
    with FakeTensorMode():
        for metric in collection._metrics.values():
            for name in set(metric._names) - {"kept"}:
                state = getattr(metric, name)
                setattr(metric, name, torch.empty(state.shape, dtype=state.dtype, device="cuda"))
        for _ in range(40):
            kept = {"": torch.empty(64, 6, device="cuda", dtype=torch.bfloat16)}
            buffer.add(kept, torch.zeros(64, dtype=torch.int64, device="cuda"))
        buffer.flush()
        assert collection._metrics[""].means.device.type == "cuda"
    assert buffer.seen == 40 * 64
