import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects
import pytest
import yaml

from nclightning.cli import main
from nclightning.errors import UserError
from nclightning.figures import read_run
from nclightning.report import read_records, write_report
from nclightning.report.curves import charts_of, thin
from nclightning.report.page import MARK, as_script
from tests.recorded import NC, geometric, record

GAP = "optimality/gap"
NASTY = "</script><img src=x onerror=alert(1)>&amp;'\""
UFM = {"loss": "mse", "lambda_w": 1e-2, "lambda_h": 1e-3}


class Elements(HTMLParser):
    """Names of elements, and attributes that run code or load something."""

    def __init__(self, page):
        super().__init__()
        self.names, self.active = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.active += [
            (tag, name, value) for name, value in attrs if name.startswith("on") or name in ("src", "srcset")
        ]


def without_plotly(page):
    """The page without the script of the library, which holds any text."""
    scripts = list(re.finditer(r"<script>.*?</script>", page, re.DOTALL))
    longest = max(scripts, key=lambda match: len(match.group()))
    return page[: longest.start()] + page[longest.end() :]


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_a_page_needs_nothing_from_elsewhere(tmp_path):
    record(tmp_path / "a", {GAP: geometric(100, 10), NC[0]: geometric(100, 10)}, **UFM)
    page = write_report(tmp_path / "a", tmp_path / "r.html").read_text()
    assert page.count("plotly.js v") == 1
    rest = without_plotly(page)
    assert "http" not in rest
    assert Elements(rest).active == []
    assert not {"link", "iframe", "img", "object", "base"} & set(Elements(rest).names)
    assert MARK in page[:2000]


def test_text_of_others_stays_text(tmp_path):
    """Names of folders and tags, settings, files and measures come from anywhere."""
    folder, other = (tmp_path / name / NASTY.replace("/", "|") for name in "ab")
    folder.parent.mkdir()
    other.parent.mkdir()
    record(other, {GAP: geometric(100, 10)})
    record(folder, {GAP: geometric(100, 10)}, **UFM | {"note": NASTY, NASTY: 1, "学習": "λ = 1 🙂"})
    (folder / "config.yaml").write_text(f"a: {NASTY}\n")
    (folder / "environment.json").write_text(json.dumps({NASTY: NASTY}))
    measured = {"measures": {NASTY: 1.0}, "head": NASTY, "num_classes": NASTY}
    rest = without_plotly(write_report([folder, other, measured], tmp_path / "r.html").read_text(encoding="utf-8"))
    elements = Elements(rest)
    assert elements.active == []
    assert "img" not in elements.names
    assert elements.names.count("script") == 2
    assert "λ = 1 🙂" in rest
    assert data_of(rest)["charts"][0]["curves"][0]["name"] == f"a/{folder.name}"
    assert json.loads(as_script({"a": NASTY}))["a"] == NASTY


def test_plotly_takes_the_charts(tmp_path):
    """Its own schema is asked, with what the page's script makes of a chart."""
    record(tmp_path / "a", {GAP: geometric(100, 10), NC[1]: geometric(100, 10)})
    for chart in charts_of(read_records([tmp_path / "a"])):
        traces = [
            {"type": "scatter", "x": c["x"], "y": c["y"], "line": {"color": c["color"], "dash": c["dash"]}}
            for c in chart["curves"]
        ]
        plotly.graph_objects.Figure(
            {"data": traces, "layout": {"yaxis": {"type": "log" if chart["log"] else "linear"}}}
        )


def test_one_run_shares_charts_and_several_are_compared(tmp_path):
    for name in "ab":
        record(tmp_path / name, {GAP: geometric(100, 10), **{tag: geometric(100, 10) for tag in NC}})
    single = charts_of(read_records([tmp_path / "a"]))
    assert [(chart["title"], len(chart["curves"])) for chart in single] == [("Optimality", 1), ("Neural collapse", 3)]
    both = charts_of(read_records([tmp_path / "a", tmp_path / "b"]))
    assert [chart["title"] for chart in both] == ["gap", "NC1", "NC2", "NC3"]
    assert [curve["name"] for curve in both[0]["curves"]] == ["a", "b"]
    assert len({curve["color"] for curve in both[0]["curves"]}) == 2
    assert all(chart["log"] for chart in both)


def test_zeros_are_named_where_the_axis_has_no_place_for_them(tmp_path):
    iterations, values = geometric(100, 10)
    record(tmp_path / "a", {GAP: (iterations, np.where(iterations > 900, 0.0, values))})
    (chart,) = charts_of(read_records([tmp_path / "a"]))
    hidden = int((iterations > 900).sum())
    assert chart["notes"] == [f"gap: {hidden} values are 0 or negative, and not drawn on the log axis."]
    assert len(chart["curves"][0]["x"]) == len(iterations) - hidden


def test_thinning_loses_no_spike_and_no_end():
    values = np.abs(np.random.default_rng(0).normal(size=100_000)) + 1
    values[[12_345, 54_321]] = 1e9, 1e-9
    kept = thin(values, 1000)
    assert len(kept) <= 1002
    assert {0, 12_345, 54_321, 99_999} <= set(kept)
    assert (np.diff(kept) > 0).all()
    assert list(thin(values[:10], 1000)) == list(range(10))


def test_twenty_long_runs_are_a_page_of_a_few_megabytes(tmp_path):
    """A hundred thousand rows each, which is 20 MB of text; one folder stands for all, under several names."""
    iterations = np.arange(100_000.0)
    values = 10.0 ** (-iterations / 10_000 + 0.1 * np.random.default_rng(0).normal(size=100_000))
    run = record(tmp_path / "a", dict.fromkeys((GAP, *NC), (iterations, values)), **UFM)
    page = write_report([run] * 20, tmp_path / "r.html").read_text()
    assert len(without_plotly(page)) < 2.5e6
    assert len(data_of(page)["charts"]) == 4


def test_settings_that_differ_come_first(tmp_path):
    for name, lambda_h in (("a", 1e-3), ("b", 2e-3)):
        record(tmp_path / name, {GAP: geometric(100, 10)}, **UFM | {"lambda_h": lambda_h})
    page = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "r.html").read_text()
    rows = re.findall(r'<tr( class="differs")?><th scope="row">(\w+)</th>', page.split('id="settings"')[1])
    assert [name for mark, name in rows if mark] == [rows[0][1]] == ["lambda_h"]


def test_rates_measured_and_predicted_stand_side_by_side(tmp_path):
    """The distance takes twice the iterations of the gap, whose predicted decay is recorded."""
    curves = {
        GAP: geometric(100, 10),
        "optimality/distance": geometric(200, 5),
        "optimality/predicted_decay": geometric(90, 10),
    }
    curves["optimality/predicted_decay"] = curves[GAP][0], 10.0 ** (-curves[GAP][0] / 90)
    record(tmp_path / "a", curves, **UFM)
    page = write_report(tmp_path / "a", tmp_path / "r.html").read_text()
    rows = re.findall(r'<tr><th scope="row">(gap|distance)</th>(.*?)</tr>', page)
    cells = {name: re.findall(r"<td>(.*?)</td>", row) for name, row in rows}
    assert (cells["gap"][1], cells["gap"][-1]) == ("100", "90")
    assert (cells["distance"][1], cells["distance"][-1]) == ("200", "180")


def test_the_environment_is_not_recorded_in_old_runs_and_is_in_new_ones(finished, tmp_path):
    record(tmp_path / "old", {GAP: geometric(100, 10)})
    old, new = read_records([tmp_path / "old", finished])
    assert old.environment == {}
    assert {"torch", "python", "seed", "device", "default dtype"} <= new.environment.keys()
    assert new.environment["seed"] == "0"
    page = write_report([tmp_path / "old", finished], tmp_path / "r.html").read_text()
    assert "not recorded" in page.split('id="environment"')[1]


def test_the_command_writes_a_page_and_never_over_something_else(tmp_path, monkeypatch, capsys):
    record(tmp_path / "a", {GAP: geometric(100, 10)})
    monkeypatch.chdir(tmp_path)
    main(["report", "a"])
    main(["report", "a"])  # A report may be replaced.
    assert capsys.readouterr().out == "wrote report.html\n" * 2
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(SystemExit, match=r"^error: --out mine\.html exists and is no report"):
        main(["report", "a", "--out", "mine.html"])
    assert (tmp_path / "mine.html").read_text() == "mine"
    main(["report", "a", "--out", "mine.html", "--overwrite"])
    assert MARK in (tmp_path / "mine.html").read_text()


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (".", "is a folder: give the name of a file"),
        ("file/r.html", "Choose another --out"),
        ("z" * 300, "cannot be the name of a file"),
        ("a\0b", "cannot be the name of a file"),
    ],
)
def test_where_a_page_cannot_be_written_is_said(tmp_path, monkeypatch, out, message):
    record(tmp_path / "a", {GAP: geometric(100, 10)})
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        write_report("a", out)


def test_the_command_does_not_load_lightning():
    code = (
        "import sys; from nclightning.cli import main\n"
        "try: main(['report', '--help'])\n"
        "finally: sys.exit('lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_a_run_with_settings_of_any_kind_has_a_page(tmp_path):
    record(tmp_path / "a", {GAP: geometric(100, 10)})
    odd = {"a": {"b": [1, {"c": None}], 3: "x"}, "long": "x" * 1000, "empty": {}, "num_classes": "ten"}
    (tmp_path / "a" / "hparams.yaml").write_text(yaml.safe_dump(odd))
    (tmp_path / "a" / "environment.json").write_text("[")
    page = write_report(read_run(tmp_path / "a"), tmp_path / "r.html").read_text()
    assert '<th scope="row">a.b</th>' in page
    assert "x" * 301 not in page
