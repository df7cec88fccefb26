"""Files that appear whole or not at all, checkpoints that are checked, and folders with one writer."""

import errno
import itertools
import os
import pickle
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch

from nclightning import files
from nclightning.errors import UserError
from nclightning.files import WriteError, replaced

ROOT = Path(__file__).resolve().parents[1]


def test_the_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with replaced(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.suffix == ".csv"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def write(path, text):
    with replaced(path) as partial:
        partial.write_text(text)


def save(path, value):
    files.save_checkpoint({"a": value}, path)


def write_half(path):
    with replaced(path) as partial:
        partial.write_text("half")
        raise OSError("full")


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(OSError, match="full"):
        write_half(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# Each changes "file" or makes it, if all goes well.
ACTIONS = {
    "replaced": lambda path: write(path, "new"),
    "append": lambda path: files.append(path, b" and new"),
    "delete": files.delete,
    "delete_folder": lambda path: files.delete_folder(path.parent),
    "keep_as": lambda path: files.keep_as(path.with_name("other"), path),
    "create": lambda path: files.create(path.with_name("fresh"), b"new"),
    "make_folder": lambda path: files.make_folder(path.with_name("folder")),
    "save_checkpoint": lambda path: save(path, 1),
    "sync": files.sync,
    "lock": lambda path: files.FolderLock(path.parent).acquire(),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "file").write_text("old")
    (tmp_path / "run" / "other").write_text("other")
    return tmp_path / "run"


@pytest.fixture
def seen():
    """What is announced."""
    operations = []
    files.observers.append(operations.append)
    yield operations
    files.observers.remove(operations.append)


@pytest.mark.parametrize("action", ACTIONS)
def test_each_operation_is_announced_before_and_after(action, folder, seen):
    ACTIONS[action](folder / "file")
    assert seen
    started = []
    for each in seen:  # Operations do not overlap but for what fills a file that is to replace another.
        if each.done:
            assert started.pop() == each[:2]
        else:
            started.append(each[:2])
    assert started == []


def failure(action):
    try:
        action()
    except WriteError as error:
        return error
    return None


@pytest.mark.parametrize("action", ACTIONS)
def test_a_disk_that_refuses_any_operation_leaves_all_as_it_was(action, folder):
    """Before the first operation that cannot be undone, no file has changed; each error names file and reason."""
    path = folder / "file"

    def refuse(operation):
        nonlocal moved
        started.append(operation)
        if operation.done:
            moved |= operation.name not in ("sync", "write")
        elif sum(not each.done for each in started) == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for at in itertools.count(1):
        started, moved = [], False
        files.observers.append(refuse)
        try:
            error = failure(lambda: ACTIONS[action](path))
        finally:
            files.observers.remove(refuse)
        if sum(not each.done for each in started) < at:
            break
        assert str(error).startswith(f"cannot write {folder}")
        assert str(error).endswith("No space left on device")
        if not moved:
            assert {p.name: p.read_text() for p in folder.iterdir()} == {"file": "old", "other": "other"}
    assert at > 1


def test_a_write_error_is_one_for_users_and_travels_between_processes():
    error = pickle.loads(pickle.dumps(WriteError(errno.ENOSPC, "full", "/a/b")))
    assert isinstance(error, UserError)
    assert str(error) == "cannot write /a/b: full"
    assert error.errno == errno.ENOSPC


def test_appending_is_all_or_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "a.csv"
    path.write_bytes(b"row\n")
    code = (
        "import resource, signal, sys; from pathlib import Path; from nclightning.files import append, WriteError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (6, 6))\n"
        "try: append(Path(sys.argv[1]), b'another row')\n"
        "except WriteError as error: print(error)"
    )
    assert resource.RLIMIT_FSIZE is not None
    said = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    assert said == f"cannot write {path}: File too large\n"
    assert path.read_bytes() == b"row\n"


def test_nothing_is_appended_to_a_file_that_is_gone(tmp_path):
    with pytest.raises(WriteError, match="No such file"):
        files.append(tmp_path / "a.csv", b"row")
    assert list(tmp_path.iterdir()) == []


def test_a_second_name_outlives_the_first(tmp_path):
    first, second = tmp_path / "last", tmp_path / "previous"
    for text in ("a", "b", "c"):
        if first.exists():
            files.keep_as(first, second)
            files.keep_as(first, second)
        write(first, text)
    assert (first.read_text(), second.read_text()) == ("c", "b")
    assert len(list(tmp_path.iterdir())) == 2


def test_a_second_name_is_a_copy_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    test_a_second_name_outlives_the_first(tmp_path)


def test_a_folder_has_one_writer(tmp_path):
    """Until it lets go, or is killed."""
    code = (
        "import sys; from pathlib import Path; from nclightning.files import FolderLock; "
        "lock = FolderLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    lock = files.FolderLock(tmp_path)
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"another process is writing {tmp_path}"):
            lock.acquire()
        holder.kill()
    lock.acquire()
    lock.acquire()
    other = files.FolderLock(tmp_path)
    with pytest.raises(UserError, match="another process is writing"):
        other.acquire()
    assert not hasattr(pickle.loads(pickle.dumps(lock))._lock, "release")
    lock.release()
    lock.release()
    other.acquire()
    other.release()


FLIPS = int(os.environ.get("NCLIGHTNING_FAULTS", "200"))


@pytest.fixture
def checkpoint(tmp_path):
    content = {
        "state_dict": {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()},
        "optimizer_states": [{"state": {0: {"step_size": 0.25, "evaluations": 120}}, "param_groups": [{"lr": 0.1}]}],
        "global_step": 500,
        "callbacks": {"a": [1.0, None, "b"]},
    }
    path = tmp_path / "last.ckpt"
    files.save_checkpoint(content, path)
    return path


SHAPES = {"head.weight": (10, 20), "backbone.features": (30, 20), "head.bias": (10,)}


def load(path):
    return torch.load(path, weights_only=True)


def flipped(whole, bit):
    content = bytearray(whole)
    content[bit // 8] ^= 1 << bit % 8
    return bytes(content)


def outcome(path, good):
    """What becomes of a file that may be damaged."""
    try:
        files.check_checkpoint(path)
    except UserError:
        return "refused"
    try:
        return "equal" if bits_of(load(path)) == good else "wrong"
    except Exception:
        return "unreadable"


def bits_of(content):
    return {k: v.numpy().tobytes() for k, v in content["state_dict"].items()}, {**content, "state_dict": None}


def test_no_flipped_bit_is_loaded(checkpoint):
    whole, good = checkpoint.read_bytes(), bits_of(load(checkpoint))
    count = Counter()
    draw = random.Random(0)
    for _ in range(FLIPS):
        checkpoint.write_bytes(flipped(whole, draw.randrange(8 * len(whole))))
        count[outcome(checkpoint, good)] += 1
    assert count["wrong"] == 0
    assert count["refused"] > FLIPS / 2


def test_no_flipped_bit_of_the_table_of_contents_is_loaded(checkpoint):
    """Checksums do not cover it; of a part that is marked as a folder the reader of torch returns anything."""
    whole, good = checkpoint.read_bytes(), bits_of(load(checkpoint))
    with zipfile.ZipFile(checkpoint) as archive:
        start, marks = archive.start_dir, []
        for part in archive.infolist():
            entry = whole.index(b"PK\x01\x02", marks[-1] // 8 if marks else start)
            marks.append(8 * (entry + 38) + 4)
            assert part.filename.encode() == whole[entry + 46 : entry + 46 + len(part.filename)]
    others = random.Random(0).sample(range(8 * start, 8 * len(whole)), FLIPS)
    for bit in (*marks, *others):
        checkpoint.write_bytes(flipped(whole, bit))
        assert outcome(checkpoint, good) != "wrong", bit


@pytest.mark.parametrize("length", [0, 1, 100, -1, -100])
def test_a_torn_checkpoint_is_refused(checkpoint, length):
    checkpoint.write_bytes(checkpoint.read_bytes()[:length])
    with pytest.raises(UserError, match=r"last\.ckpt: not a readable checkpoint .* Take another"):
        files.check_checkpoint(checkpoint)


def test_the_good_checkpoint_beside_a_damaged_one_is_named(checkpoint):
    files.keep_as(checkpoint, checkpoint.with_name("previous.ckpt"))
    checkpoint.unlink()
    checkpoint.write_bytes(b"junk")
    with pytest.raises(UserError, match=r"--ckpt_path a: not a readable .*previous\.ckpt, is good\.$"):
        files.check_checkpoint(checkpoint, "--ckpt_path a")


def test_archives_that_torch_did_not_write_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(UserError, match=r"torch\.save did not write it"):
        files.check_checkpoint(tmp_path / "a.ckpt")


def test_a_checkpoint_that_the_disk_does_not_take_leaves_the_one_before(tmp_path):
    pytest.importorskip("resource")
    path = tmp_path / "last.ckpt"
    path.write_bytes(b"before")
    code = (
        "import resource, signal, sys, torch; from pathlib import Path; from nclightning.files import save_checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
        "try: save_checkpoint({'a': torch.zeros(10**5)}, Path(sys.argv[1]))\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("cannot write")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
