"""Finding and reading configurations."""

from pathlib import Path

import pytest

from nclightning.configurations import find_configuration, model_arguments, read_configuration, shipped_configs


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


@pytest.mark.parametrize("text", ["model: {init_args: {lambda: 0.5}}", "fit: {model: {init_args: {lambda: 0.5}}}"])
def test_lambda_becomes_an_argument(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    assert model_arguments(read_configuration(tmp_path / "a.yaml")) == {"lambda_": 0.5}


@pytest.mark.parametrize("text", ["{}", "model: null", "model: UFM", "fit: 3", "model: {init_args: [1]}"])
def test_without_a_model_there_are_no_arguments(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    assert model_arguments(read_configuration(tmp_path / "a.yaml")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1", "expected a mapping of options, got list"), ("a: [", "--config .*a.yaml"), ("", "got NoneType")],
)
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_configuration(tmp_path / "a.yaml")


def test_what_is_nowhere_is_named():
    with pytest.raises(ValueError, match=r"--config nowhere: no such file.*Shipped are: .*ufm_ce"):
        find_configuration("nowhere")
