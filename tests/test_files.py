"""Files that appear whole or not at all."""

import pytest

from nclightning.files import replaced


def test_the_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with replaced(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.suffix == ".csv"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


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
