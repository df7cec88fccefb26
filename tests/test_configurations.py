"""Finding and reading configurations."""

from pathlib import Path

import pytest

from nclightning.configurations import find_configuration, model_arguments, read_configuration, shipped_configs
from nclightning.errors import UserError


def test_shipped_ones_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(shipped_configs()) >= {"ufm_mse", "ufm_ce"}
    for name, path in shipped_configs().items():
        assert find_configuration(name) == find_configuration(f"{name}.yaml") == path


def test_a_file_here_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("ufm_ce.yaml").write_text("model: {}")
    assert find_configuration("ufm_ce.yaml") == Path("ufm_ce.yaml")
    assert find_configuration("ufm_ce") == shipped_configs()["ufm_ce"]


@pytest.mark.parametrize("section", ["", "fit: ", "validate: "])
@pytest.mark.parametrize("name", ["lambda", "lambda_"])
def test_lambda_becomes_an_argument_that_sets_both_penalties(tmp_path, section, name):
    inner = f"model: {{init_args: {{{name}: 0.5}}}}"
    (tmp_path / "a.yaml").write_text(f"{section}{{{inner}}}" if section else inner)
    assert model_arguments(tmp_path / "a.yaml") == {"lambda_": 0.5, "lambda_w": None, "lambda_h": None}


def test_a_model_in_a_file_beside_the_configuration(tmp_path):
    (tmp_path / "model.yaml").write_text("init_args: {lambda_w: 1, lambda_h: 2, lambda_: null}")
    (tmp_path / "a.yaml").write_text("model: model.yaml")
    assert model_arguments(tmp_path / "a.yaml") == {"lambda_w": 1, "lambda_h": 2, "lambda_": None}


@pytest.mark.parametrize("text", ["{}", "model: null", "model: UFM", "fit: 3", "model: {init_args: [1]}"])
def test_without_a_model_there_are_no_arguments(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    assert model_arguments(tmp_path / "a.yaml") == {}


BOMB = "a: &a [1, 2, 3, 4, 5, 6, 7, 8, 9]\n" + "".join(
    f"{x}: &{x} [{', '.join(['*' + y] * 9)}]\n" for y, x in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "line [1-9] has too many entries or levels once its aliases are expanded"),
        ("a: &a [*a]", "line 1 contains an alias of itself"),
        ("a: &a {b: *a}", "line 1 contains an alias of itself"),
        ("a: " + "[" * 100_000, "line 1 is nested more than 50 levels deep|maximum nesting depth"),
        ("a: " + "{b: " * 100_000, "line 1 is nested more than 50 levels deep"),
        ("".join(f"a{i}: &a{i} [*a{i - 1}]\n" if i else "a0: &a0 [1]\n" for i in range(100)), "too many .* levels"),
        ("a: 1\nb: 2\na: 3", "line 3 repeats the key 'a'"),
        ("b: {a: 1, 'a': 2}", "line 1 repeats the key 'a'"),
        ("a: !!python/object:os.system {}", "line 1 has the tag .*Use plain values"),
        ("a: !mine 3", "line 1 has the tag '!mine'"),
        (b"\x00\x01\xff\xfe", "not text in UTF-8"),
        (b"a: 1\x00", "zero bytes"),
        ("a: 1".encode("utf-16"), "not text in UTF-8"),
        ("ä: 1".encode("latin-1"), "not text in UTF-8"),
        (b"a" * 2**21, "larger than 1,048,576 bytes"),
        ("a: b: c", "not YAML .*line 1"),
        ("a: 2026-02-30", "a.yaml: "),
        ("a: \x07", "not YAML"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_plain_yaml_is_refused_at_once(tmp_path, content, message):
    (tmp_path / "a.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read_configuration(tmp_path / "a.yaml")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_plain_aliases_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("\ufeffa: &a [1, 2]\nb: *a\nc: {<<: {d: 1}, e: 2}\n", encoding="utf-8")
    assert read_configuration(tmp_path / "a.yaml") == {"a": [1, 2], "b": [1, 2], "c": {"d": 1, "e": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1", "expected a mapping of options, got list"), ("a: [", "--config .*a.yaml"), ("", "got NoneType")],
)
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_configuration(tmp_path / "a.yaml")


def test_what_is_nowhere_is_named():
    with pytest.raises(ValueError, match=r"--config nowhere: no such file.*Shipped configurations: .*ufm_ce"):
        find_configuration("nowhere")
