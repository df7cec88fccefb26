"""What the command takes, refuses and keeps."""

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import nclightning
from nclightning.cli import main
from nclightning.figures import read_readings
from nclightning.files import FolderLock
from nclightning.series.source import steps_in_names
from tests.series.training import WORDS, Net, samples, train

pytestmark = pytest.mark.filterwarnings("ignore")  # Of few workers.
TWO = ["--model", "tests.series.training:NeedsMore", *WORDS[2:]]


def with_changes(source, target, **changes):
    content = torch.load(source, weights_only=True)
    torch.save(content | {name: change(content[name]) for name, change in changes.items()}, target)


def with_a_flipped_bit(path):
    """The content of a checkpoint with a weight that is another one: only its checksum tells."""
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["state_dict"]["fc.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 1
    return content


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Good files and bad ones."""
    folder = tmp_path_factory.mktemp("files")
    generator, y = np.random.default_rng(0), np.repeat(np.arange(3), 8)
    h, weight = generator.normal(size=(3, 4))[y] + generator.normal(size=(24, 4)) / 9, generator.normal(size=(3, 4))
    nan, one = h.copy(), np.repeat(0, 24)
    nan[3, 2] = np.nan
    arrays = {
        "good": {"H": h, "y": y, "W": weight, "b": np.zeros(3)}, "unlabelled": {"h": h},
        "unequal": {"h": h, "y": y[:9]},
        "several": {"h": h, "embeddings": h, "y": y}, "nan": {"h": nan, "y": y}, "float": {"h": h, "y": y * 1.0},
        "pickled": {"h": h, "y": np.array([str(each) for each in y], dtype=object)}, "one": {"h": h, "y": one},
        "named": {"h": h, "y": y, "w": weight, "names": np.array(["a", None], dtype=object)},
        "unnamed": {"arr_0": h, "arr_1": y}, "headless": {"h": h, "y": y},
    }  # fmt: skip
    for name, content in arrays.items():
        np.savez(folder / f"{name}.npz", **content)
    for name, content in (("h", h), ("y", y), ("w", weight)):
        np.save(folder / f"{name}.npy", content)
    tensors = {"h": torch.tensor(h), "y": torch.tensor(y)}
    torch.save(tensors, folder / "tensors.pt")
    torch.save({"h": h, "y": y}, folder / "numpy.pt")
    save_file(tensors, folder / "tensors.safetensors")
    train(folder / "run", 2)
    good = folder / "good.ckpt"
    shutil.copy(folder / "run" / "checkpoints" / "epoch=0.ckpt", good)
    for name in ("good.npz", "good.ckpt"):
        content = (folder / name).read_bytes()
        (folder / f"cut{name[4:]}").write_bytes(content[: len(content) // 2])
        (folder / f"zero{name[4:]}").touch()
    (folder / "flipped.ckpt").write_bytes(with_a_flipped_bit(good))
    (folder / "text.ckpt").write_text("no checkpoint")
    (folder / "folder.ckpt").mkdir()
    (folder / "empty").mkdir()
    (folder / "file").touch()
    state = "state_dict"
    compiled = {state: lambda s: {k.replace(".", "._orig_mod.", 1): v for k, v in s.items()}}
    with_changes(good, folder / "compiled.ckpt", **compiled)
    with_changes(good, folder / "wrapped.ckpt", **{state: lambda s: {f"module.{k}": v for k, v in s.items()}})
    with_changes(good, folder / "other.ckpt", **{state: lambda s: {k.replace("fc", "head"): v for k, v in s.items()}})
    with_changes(good, folder / "shape.ckpt", **{state: lambda s: s | {"fc.weight": torch.zeros(5, 6)}})
    with_changes(good, folder / "bare.ckpt", hyper_parameters=lambda h: {})
    with_changes(good, folder / "objects.ckpt", hyper_parameters=lambda h: h | {"more": argparse.Namespace(a=1)})
    with_changes(good, folder / "average.ckpt", **{state: lambda s: {k: v * 2 for k, v in s.items()}})
    (folder / "broken.py").write_text("import no_such_module\n")
    whole = "{model: {class_path: tests.series.training.Net, init_args: %s}, data: {class_path: %s}}\n"
    (folder / "full.yaml").write_text(whole % ("{lr: 0.1}", "tests.series.training.Data"))
    (folder / "linked.yaml").write_text(
        "{model: {class_path: tests.series.training.Wide}, data: {class_path: tests.series.training.Data}}"
    )
    (folder / "bare.yaml").write_text("model: {width: 6}\n")
    (folder / "wrong.yaml").write_text(whole % ("{width: 6, depth: 3}", "tests.series.training.Data"))
    return folder


@pytest.fixture
def here(files, monkeypatch, tmp_path):
    monkeypatch.chdir(files)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "PATH must be given"),
        (["nowhere.npz"], "nowhere.npz: no such file or folder"),
        (["*.xyz"], r"\*.xyz: no file matches the pattern"),
        (["file"], "file: its kind is not known"),
        (["empty"], "empty has nothing to measure: no checkpoints"),
        (
            ["unlabelled.npz"],
            "unlabelled.npz has no labels: looked for labels, label, y, .*, it has 'h'. Give",
        ),
        (["unequal.npz"], r"unequal.npz: there must be one label for each row of features, got .*\(24, 4\)"),
        (["several.npz"], "several.npz has several arrays that may be the features, h and embeddings: give --features"),
        (["nan.npz"], "nan.npz: features have numbers that are not finite in 1 of 24 rows"),
        (["float.npz"], "float.npz: labels must be integers, got"),
        (["one.npz"], "one.npz: neural collapse compares classes, and there is only one"),
        (["pickled.npz"], "pickled.npz contains pickled objects, which can run any code"),
        (["unnamed.npz"], "unnamed.npz has no features: .* it has 'arr_0', 'arr_1'"),
        (["numpy.pt"], "numpy.pt contains an object of numpy.* Give --weights_only false if you trust"),
        (["zero.npz"], "zero.npz is empty"),
        (["cut.npz"], "cut.npz is cut off"),
        (["good.npz", "--labels", "lost.npy"], "--labels lost.npy: no such file, and good.npz has no array of that"),
        (["good.npz", "--labels", "./broken.py"], "--labels ./broken.py: files are .npy, .npz, .*, and good.npz has"),
        (["good.npz", "--ignore_index", "x"], "--ignore_index: 'x' is no integer, and not none"),
        (["good.npz", "--features", "z"], "good.npz has no array 'z' for --features, it has 'H', 'y', 'W', 'b'"),
        (
            ["good.npz", "--head", "fc"],
            "--head applies to checkpoints of Lightning and models of Hugging Face",
        ),
        (["good.npz", "--measures", "nc9"], "good.npz: measures must be different names out of"),
        (["good.npz", "--measures", "nc1,nc_2"], r"got \['nc1', 'nc_2'\].*Did you mean nc2\?"),
        (["headless.npz", "--measures", "nc3"], "headless.npz: measures .'nc3'. need the head: pass weight="),
        (["h.npy", "w.npy"], "h.npy has no number in its name, which is needed to order several files"),
        (["good.npz", "good.ckpt"], "good.npz has saved features and good.ckpt has checkpoints"),
        (["good.npz", "--jobs", "0"], "--jobs, --limit and --batch_size must be at least 1"),
        (["good.npz", "--nope", "1"], "--nope: no such option"),
        (["good.npz", "--out", "file"], "cannot write file: File exists. Choose another folder with --out"),
        (["good.npz", "--out", "file/x"], "cannot write file/x: Not a directory. Choose another"),
        (["good.npz", "--out", "/proc/nowhere"], "cannot write /proc/nowhere: No such file"),
        (["good.npz", "--out", ""], "--out needs a folder"),
        (["good.ckpt"], "the class of the model is not known: give --model module:Class, or a --config"),
        (["good.ckpt", *WORDS[:2]], "the data are not known: give --data module:Class"),
        (["good.ckpt", "--model", "Net"], "--model Net: expected module:Class"),
        (["good.ckpt", "--model", "nowhere:Net"], "--model nowhere:Net: there is no Python module 'nowhere'"),
        (["good.ckpt", "--model", "broken:Net"], "--model broken:Net: broken cannot be imported: No module named"),
        (["good.ckpt", "--model", "tests.series.training:Nett"], "there is no 'Nett' in .*training. Did you mean Net?"),
        (
            ["good.ckpt", "--model", "tests.series.training:samples", *WORDS[2:]],
            "samples needs count, seed",
        ),
        (
            ["good.ckpt", "--model", "tests.series.training:loaders", *WORDS[2:]],
            "the model must be a LightningModule, got a dict",
        ),
        (["good.ckpt", *TWO], "NeedsMore needs 'depth', which good.ckpt does not have as hyperparameters"),
        (["bare.ckpt", *WORDS], "Net needs 'width', which bare.ckpt does not have as hyperparameters"),
        (["bare.ckpt", "--config", "full.yaml"], "--config full.yaml: model: width must be given"),
        (["good.ckpt", "--config", "wrong.yaml"], "--config wrong.yaml: model: depth: no such option"),
        (
            ["good.ckpt", "--config", "bare.yaml"],
            "the model is not known, --config bare.yaml .* give --model module:Class together with --config bare.yaml",
        ),
        (["good.ckpt", "--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["good.ckpt", *WORDS, "--head", "nope"], "good.ckpt: no layer named head='nope' in Net"),
        (["good.ckpt", *WORDS, "--text", "x"], "--text applies to models of Hugging Face, but good.ckpt has"),
        (["good.ckpt", *WORDS, "--device", "nope"], "--device nope: "),
        (["good.ckpt", *WORDS, "--precision", "9"], "--precision 9: "),
        (["good.ckpt", *WORDS, "--state_dict", "ema"], "good.ckpt has no weights under --state_dict ema"),
        (["good.ckpt", *WORDS, "--stages", "test"], "the data have no loader for --stages test, only for train"),
        (["zero.ckpt", *WORDS], "zero.ckpt is empty"),
        (["cut.ckpt", *WORDS], "cut.ckpt is cut off"),
        (["text.ckpt", *WORDS], "text.ckpt is damaged, or torch.save did not write it"),
        (["flipped.ckpt", *WORDS], r"flipped.ckpt: not a readable checkpoint .its part data/\d+ is damaged"),
        (["good.ckpt", *WORDS[:3], "tests.series.training:three"], "must return a loader, .train, val., .* 3 of them"),
        (["good.ckpt", *WORDS[:3], "tests.series.training:misnamed"], "mapping of .*; got the names train, validation"),
        (["folder.ckpt", *WORDS], "folder.ckpt must be a file, but is a folder"),
        (
            ["objects.ckpt", *WORDS],
            "objects.ckpt contains an object of argparse.Namespace, .* Give --weights_only false",
        ),
        (["other.ckpt", *WORDS], "other model: it has no fc.weight, fc.bias; the model has no head.weight, head.bias"),
        (["shape.ckpt", *WORDS], r"other model: its fc.weight has shape \(5, 6\), that of the model \(3, 6\)"),
        (["average.ckpt", "good.ckpt", *WORDS], "average.ckpt and good.ckpt both have step 4, and differ"),
    ],
    ids=lambda value: " ".join(value[:3]) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_one_sentence_and_writes_nothing(words, message, here, files):
    before = [path for path in sorted(files.rglob("*.*")) if path.suffix != ".pyc"]
    with pytest.raises(SystemExit, match=message) as caught:
        main(["measure", *words, *([] if "--out" in words else ["--out", str(here / "a" / "b")])])
    assert str(caught.value).startswith("error: ")
    assert "\n" not in str(caught.value)
    assert not any(here.iterdir())
    assert [path for path in sorted(files.rglob("*.*")) if path.suffix != ".pyc"] == before


def measured(words, out):
    main(["measure", *words, "--out", str(out)])
    readings = read_readings(out)
    return {tag: values[-1] for tag, values in readings.values.items()}


@pytest.mark.parametrize(
    "words",
    [
        ["good.npz"],
        ["good.npz", "--features", "H", "--labels", "y", "--weight", "W", "--bias", "b"],
        ["tensors.pt", "--weight", "w.npy"],
        ["tensors.safetensors", "--weight", "w.npy"],
        ["h.npy", "--labels", "y.npy", "--weight", "w.npy"],
        ["numpy.pt", "--weight", "w.npy", "--weights_only", "false"],
        ["named.npz"],
        ["unnamed.npz", "--features", "arr_0", "--labels", "arr_1", "--weight", "w.npy"],
    ],
    ids=lambda words: words[0],
)
def test_all_forms_of_saved_features_give_what_measure_gives(words, here, files):
    content = np.load("good.npz")
    expected = nclightning.measure(features=content["H"], labels=content["y"], weight=content["W"])
    assert measured([*words, "--set", "test"], here / "out") == {f"nc/test/{k}": v for k, v in expected.items()}


@pytest.mark.parametrize(
    "words",
    [
        ["objects.ckpt", *WORDS, "--weights_only", "false"],
        ["compiled.ckpt", *WORDS],
        ["wrapped.ckpt", *WORDS],
        ["good.ckpt", *WORDS[:2], "--data", "tests.series.training:loaders"],
        ["good.ckpt", "--config", "full.yaml"],
        ["bare.ckpt", "--config", "bare.yaml", *WORDS],
        ["good.ckpt", "--config", "linked.yaml"],
        ["run/checkpoints/epoch=0.ckpt", *WORDS],
    ],
    ids=lambda words: " ".join(words[:3:2]),
)
def test_all_forms_of_a_checkpoint_give_the_same(words, here):
    assert measured(words, here / "one") == measured(["good.ckpt", *WORDS], here / "other")


def test_a_run_of_the_unconstrained_model_needs_no_option_and_refuses_weights_of_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ("--model.init_args.num_classes", "3", "--model.init_args.samples_per_class", "4", "--lambda", "5e-3")
    quiet = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false")
    main(["fit", "--config", "ufm_ce", *sizes, "--trainer.max_steps", "20", *quiet])
    run = tmp_path / "lightning_logs" / "version_0"
    values = read_readings(run).values
    assert measured([str(run)], tmp_path / "out") == {
        f"nc/train/nc{i}": values[f"nc/train/nc{i}"][-1] for i in (1, 2, 3)
    }
    changed = {"state_dict": lambda s: s | {"head.weight": s["head.weight"][:, :-1].clone()}}
    with_changes(run / "checkpoints" / "last.ckpt", run / "checkpoints" / "last.ckpt", **changed)
    refused(["measure", str(run), "--out", "other"], "last.ckpt.*head.weight")
    assert not (tmp_path / "other").exists()


def test_a_diverged_checkpoint_is_a_row_of_nan_that_is_told(here, capsys):
    with_changes("good.ckpt", here / "nan.ckpt", state_dict=lambda s: s | {"fc.weight": torch.full((3, 6), torch.nan)})
    assert np.isnan(measured([str(here / "nan.ckpt"), *WORDS], here / "out")["nc/train/nc2"])
    assert "nan.ckpt: nc/train/nc2 and 3 others are nan." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["feat_0010", "feat_0200"], [10, 200]),
        (["e1_s200", "e2_s100"], [200, 100]),
        (["f_500", "f_1k", "f_2M", "f_1e4"], [500, 1000, 2 * 10**6, 10**4]),
        (["vit16_epoch5", "vit16_epoch10"], [5, 10]),
        (["split0_5", "split0_10"], [5, 10]),
        (["step=100_acc=0.95", "step=200_acc=0.97"], [100, 200]),
        (["100_acc0.95", "200_acc0.97"], [100, 200]),
        (["epoch=3-step=40", "epoch=4-step=50"], [40, 50]),
        (["3_d_512", "4_d_512"], [3, 4]),
        (["2024-01-05_e3", "2024-01-05_e4"], [3, 4]),
        (["a", "b_1"], [None, 1]),
        (["float16"], [None]),
        (["vit_b_16_epoch5"], [5]),
    ],
)
def test_the_step_is_the_number_that_counts(names, steps):
    assert steps_in_names([Path(f"{name}.npz") for name in names]) == steps


def test_a_step_that_a_table_cannot_tell_from_the_next_is_refused(here):
    shutil.copy("good.npz", here / f"step_{2**53}.npz")
    refused(["measure", str(here), "--out", str(here / "out")], r"has step 9007199254740992: steps must be from 0 to 2")
    assert not (here / "out").exists()


def test_the_batches_that_a_run_was_made_to_overfit_are_measured(here):
    options = {
        "model": {"class_path": "tests.series.training.Wide"},
        "data": {"class_path": "tests.series.training.Data"},
    }
    (here / "over.yaml").write_text(json.dumps(options | {"trainer": {"overfit_batches": 2}}))
    values = measured(["good.ckpt", "--config", str(here / "over.yaml")], here / "over")
    model = Net(6)
    model.load_state_dict(torch.load("good.ckpt", weights_only=True)["state_dict"])
    x, y = samples(70, 0)[:32]
    expected = nclightning.measure(model, [(x, y)], measures=["nc1"])
    assert values["nc/train/nc1"] == pytest.approx(expected["nc1"], rel=1e-5)


def test_a_link_to_a_checkpoint_that_is_gone_is_refused(here):
    (here / "a").mkdir()
    (here / "a" / "last.ckpt").symlink_to("nowhere.ckpt")
    refused(["measure", str(here / "a"), *WORDS, "--out", str(here / "out")], "last.ckpt: No such file or directory")


# A series that goes on.


@pytest.fixture
def series(here, capsys):
    """Two files that were measured, and the words for that."""
    folder = here / "dumps"
    folder.mkdir()
    for step in (10, 20):
        shutil.copy("good.npz", folder / f"a_{step}.npz")
    words = ["measure", str(folder), "--out", str(here / "out")]
    main(words)
    capsys.readouterr()
    return words, folder, here / "out"


def refused(words, message):
    with pytest.raises(SystemExit, match=message):
        main(words)


def test_new_files_are_added_and_those_that_are_gone_keep_their_rows(series, capsys):
    words, folder, out = series
    before = (out / "readings.csv").read_text()
    shutil.copy("headless.npz", folder / "a_30.npz")
    (folder / "a_10.npz").unlink()
    main(words)
    assert (out / "readings.csv").read_text().startswith(before)
    assert read_readings(out).iterations.tolist() == [10, 20, 30]
    told = capsys.readouterr().err
    assert "measured files that no longer exist: 1; their rows are kept." in told
    assert "existing rows: 2, files to measure: 1." in told


def test_a_series_goes_on_whatever_its_files_are_called_by(series, monkeypatch, capsys):
    _, folder, out = series
    shutil.copy("headless.npz", folder / "a_30.npz")
    main(["measure", *map(str, sorted(folder.glob("*.npz"))), "--out", str(out)])
    assert "existing rows: 2, files to measure: 1." in capsys.readouterr().err
    monkeypatch.chdir(folder)
    for path in (".", "../dumps/", "*.npz", "a_20.npz"):
        main(["measure", path, "--out", "../out"])
    assert read_readings(out).iterations.tolist() == [10, 20, 30]


def test_files_of_another_series_are_not_added(series, here):
    _, _, out = series
    (here / "others").mkdir()
    shutil.copy("good.npz", here / "others" / "a_40.npz")
    refused(["measure", str(here / "others"), "--out", str(out)], "has the series of .*a_20.npz, to which .*a_40")


def test_other_settings_changed_files_and_earlier_ones_are_refused_until_overwritten(series):
    words, folder, out = series
    before = {path: path.read_bytes() for path in out.iterdir()}
    refused(
        [*words, "--measures", "nc1"], r'has a series with measures=null, and this one has measures=\["nc1"\]: --ov'
    )
    shutil.copy("headless.npz", folder / "a_15.npz")
    refused(words, "a_15.npz has step 15, which is before that of the last row in .*, 20: --overwrite")
    (folder / "a_15.npz").unlink()
    shutil.copy("headless.npz", folder / "a_20.npz")
    refused(words, "a_20.npz has changed since .*a_20.npz was measured .step 20.: --overwrite measures all files again")
    shutil.copy("zero.npz", folder / "a_15.npz")
    refused([*words, "--overwrite"], "a_15.npz is empty")
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (folder / "a_15.npz").unlink()
    main([*words, "--overwrite", "--measures", "nc1,nc1_cdnv"])
    assert list(read_readings(out).values) == ["nc/train/nc1", "nc/train/nc1_cdnv"]


def test_a_folder_that_is_in_use_or_holds_something_else_is_refused(series, here):
    words, _, out = series
    lock = FolderLock(out)
    lock.acquire()
    refused(words, "another process is writing .*out. Wait until it ends, or choose another folder")
    lock.release()
    (out / "measured.json").unlink()
    for more in ([], ["--overwrite"]):
        refused([*words, *more], "readings.csv is not the table of a series, but perhaps of a training run")
    (out / "measured.json").write_text("{")
    refused(words, "measured.json is damaged: --overwrite measures all files again")
    (out / "measured.json").write_text(json.dumps({"settings": {}, "rows": {}}))
    refused(words, "has a series with kind=null")


def test_a_read_only_folder_is_refused(here):
    if os.geteuid() == 0:
        pytest.skip("nothing is read-only to root")
    here.chmod(0o500)
    refused(["measure", "good.npz", "--out", str(here / "out")], "cannot write .*out: Permission denied")


def test_rows_before_a_damaged_checkpoint_stay_and_the_next_start_goes_on(here):
    """Damage that only measuring shows. What has no readable step is refused before anything is written."""
    folder = here / "checkpoints"
    folder.mkdir()
    for step in (1, 2, 3, 4):
        with_changes("good.ckpt", folder / f"{step}.ckpt", global_step=lambda _, step=step: step)
    whole = (folder / "3.ckpt").read_bytes()
    (folder / "3.ckpt").write_bytes(with_a_flipped_bit(folder / "3.ckpt"))
    words = ["measure", str(folder), *WORDS, "--out", str(here / "out")]
    refused(words, r"3.ckpt: not a readable checkpoint .its part data/\d+ is damaged")
    assert read_readings(here / "out").iterations.tolist() == [1, 2]
    (folder / "3.ckpt").write_bytes(whole)
    main(words)
    assert read_readings(here / "out").iterations.tolist() == [1, 2, 3, 4]


def test_weights_that_a_checkpoint_leaves_out_are_not_those_of_the_one_before(here):
    place = here / "partial"
    place.mkdir()
    for step, left_out in ((1, "none"), (2, "body")):
        trained = {"state_dict": lambda s, name=left_out: {k: v for k, v in s.items() if not k.startswith(name)}}
        with_changes("good.ckpt", place / f"{step}.ckpt", global_step=lambda _, step=step: step, **trained)
    words = ["--model", "tests.series.training:Partial", *WORDS[2:], "--stages", "train"]
    main(["measure", str(place / "2.ckpt"), *words, "--out", str(here / "alone")])
    main(["measure", str(place), *words, "--out", str(here / "both")])
    alone, both = (read_readings(here / name).values["nc/train/nc1"] for name in ("alone", "both"))
    assert both[1] == alone[0] != both[0]


def test_checkpoints_in_double_precision_are_measured_in_it(here):
    model = Net(6).double()
    content = torch.load("good.ckpt", weights_only=True) | {"state_dict": model.state_dict()}
    torch.save(content, here / "double.ckpt")
    words = [str(here / "double.ckpt"), *WORDS]
    assert measured(words, here / "a") == measured([*words, "--precision", "64-true"], here / "b")
    assert measured(words, here / "a") != measured([*words, "--precision", "32-true"], here / "c")
