"""What a measurement shows of itself."""

import copy
import html.parser
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from nclightning import measure
from nclightning.metrics import MEASURES
from nclightning.probe.results import Measurement
from nclightning.quantities import measure_named


def etf(num_classes, dim):
    rows = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    basis = torch.linalg.qr(torch.randn(dim, num_classes, dtype=torch.float64))[0] if dim >= num_classes else None
    return rows @ basis.T if basis is not None else torch.linalg.svd(rows)[0][:, :dim] * torch.ones(1, dim)


def data(num_classes=4, per_class=6, dim=8, noise=0.1, **options):
    torch.manual_seed(0)
    means, labels = torch.randn(num_classes, dim), torch.arange(num_classes * per_class) % num_classes
    features = means[labels] + noise * torch.randn(len(labels), dim)
    return {"features": features, "labels": labels, "weight": means - means.mean(0), "bias": torch.zeros(num_classes)}


ALL = ("all",)


@pytest.mark.parametrize(("num_classes", "dim"), [(2, 2), (4, 8), (5, 4)])
def test_the_value_at_collapse_is_that_of_collapsed_features(num_classes, dim):
    torch.manual_seed(0)
    rows = etf(num_classes, dim)
    labels = torch.arange(3 * num_classes) % num_classes
    found = measure(
        features=2 * rows[labels], labels=labels, weight=3 * rows, bias=torch.zeros(num_classes).double(), measures=ALL
    )
    for row in found.rows():
        if row.collapsed is not None:
            assert row.value == pytest.approx(row.collapsed, abs=1e-7), row.name
    unknown = {row.name for row in found.rows() if row.collapsed is None}
    assert unknown == {"mse_nc2_nc3", "mse_perpendicular"}


def test_more_classes_than_an_etf_has_room_for_have_no_value_at_collapse():
    found = measure(**data(num_classes=8, dim=3), measures=("nc1", "nc1_rank", "nc2", "nc3", "cosine_margin"))
    collapsed = {row.name: row.collapsed for row in found.rows()}
    assert collapsed == {"nc1": 0, "nc1_rank": 3, "nc2": None, "nc3": None, "cosine_margin": None}


def test_every_name_that_is_logged_has_a_meaning():
    names = [*MEASURES, "ncc_accuracy", "ncc_mismatch", "accuracy", "cosine_margin", "nc5"]
    texts = [measure_named(name).meaning for name in names]
    assert all(texts)
    assert len(set(texts)) == len(texts)
    assert max(map(len, texts)) <= 80
    unknown = measure_named("of_the_user")
    assert (unknown.meaning, unknown.collapsed) == ("", None)


def test_is_an_immutable_mapping_of_floats():
    given = data()
    found = measure(**given)
    assert list(found) == ["nc1", "nc2", "nc3"]
    assert {type(value) for value in found.values()} == {float}
    assert found.get("nothing") is None
    assert "nc1" in found
    with pytest.raises(KeyError, match="'nothing' was not measured; there are nc1, nc2, nc3"):
        found["nothing"]
    with pytest.raises(TypeError):
        found["nc1"] = 0.0
    for change in (lambda: setattr(found, "rank", 1), lambda: delattr(found, "rank")):
        with pytest.raises(AttributeError, match="cannot be changed"):
            change()
    found.counts[0] = 100
    found.per_class()["variance"][:] = 0
    found.to_dict()["measures"]["nc1"] = 5
    assert found == measure(**given)


def test_says_what_was_measured():
    found = measure(**data(), measures=ALL)
    assert (found.num_samples, found.num_classes, found.feature_dim, found.rank) == (24, 4, 8, 3)
    assert found.counts.tolist() == [6] * 4
    assert found.head == "weight"
    assert found.layers == found.left_out == ()
    assert 0 < found.seconds < 60
    assert measure(**data(), measures=("nc2",)).rank is None


def test_is_copied_pickled_and_compared():
    given = data()
    found = measure(**given, measures=ALL)
    for other in (
        copy.copy(found),
        copy.deepcopy(found),
        pickle.loads(pickle.dumps(found)),
        measure(**given, measures=ALL),
    ):
        assert other == found
        assert (other != found) is False
    assert found == dict(found)
    assert found != measure(**data(noise=0.2), measures=ALL)
    assert found != measure(**given)
    assert found != 3
    nan = measure(**(given | {"weight": torch.zeros(4, 8)}))
    assert math.isnan(nan["nc2"])
    assert nan == copy.deepcopy(nan)


def test_json_has_all_digits_and_is_valid_with_nan_and_inf():
    features = torch.tensor([[0.0], [1.0], [1.0], [0.0]])  # Class means coincide.
    found = measure(features=features, labels=[0, 0, 1, 1], weight=[[0.0], [0.0]])

    def refuse(name):
        raise AssertionError(name)

    read = json.loads(found.to_json(), parse_constant=refuse)
    values = {name: float(value) for name, value in read["measures"].items()}
    assert values == pytest.approx(dict(found), nan_ok=True, abs=0, rel=0)
    assert values["nc1"] == math.inf
    assert math.isnan(values["nc2"])
    assert read["per_class"]["count"] == [2, 2]
    plain = measure(**data(), measures=ALL)
    assert json.loads(plain.to_json(indent=1)) == plain.to_dict()
    assert list(plain.to_dict()["per_class"]) == list(plain.per_class())


def test_json_is_written_to_the_file_that_is_named(tmp_path):
    found = measure(**data(), measures=ALL)
    for path in (tmp_path / "x.json", str(tmp_path / "y.json")):
        for indent in (None, 1):  # The second time it is there.
            text = found.to_json(path, indent=indent)
            assert text == found.to_json(indent=indent)
            assert Path(path).read_text(encoding="utf-8") == text
    assert sorted(each.name for each in tmp_path.iterdir()) == ["x.json", "y.json"]
    with pytest.raises(TypeError, match=r"got 2: write to_json\(indent=2\)\."):
        found.to_json(2)
    with pytest.raises(OSError, match="none"):
        found.to_json(tmp_path / "none" / "x.json")


def test_columns_class_by_class_are_by_the_book():
    given = data()
    table = measure(**given, measures=("nc1", "accuracy", "ncc_accuracy")).per_class()
    h, y, w = given["features"].double(), given["labels"], given["weight"].double()
    means = torch.stack([h[y == k].mean(0) for k in range(4)])
    centred = means - means.mean(0)
    assert table["class"].tolist() == [0, 1, 2, 3]
    assert table["count"].dtype == np.int64
    right = {
        "variance": [float((h[y == k] - means[k]).square().sum(1).mean()) for k in range(4)],
        "mean_norm": centred.norm(dim=1).tolist(),
        "head_norm": w.norm(dim=1).tolist(),
        "nc3_cosine": torch.cosine_similarity(centred, w).tolist(),
        "accuracy": [float(((h @ w.T).argmax(1) == y)[y == k].double().mean()) for k in range(4)],
    }
    for name, column in right.items():
        assert table[name] == pytest.approx(column, rel=1e-12), name
    assert set(table) == {"class", "count", "cdnv", "equiangularity", "ncc_accuracy", *right}
    with pytest.raises(ValueError, match="layer='body' was not measured: pass it in layers"):
        measure(**given).per_class("body")


def test_many_classes_are_not_compared_in_pairs_unasked():
    given = data(num_classes=2100, per_class=1, dim=4)
    assert "cdnv" not in measure(**given, measures=("nc1",)).per_class()
    assert "cdnv" in measure(**given, measures=("nc1_cdnv",)).per_class()


TAGS = {"nc1": 0.5, "nc2": 1e-9, "body.3/nc1": 2.0, "body.3/ncc_accuracy": 0.75, "val/nc1": math.inf, "mine": 3.0}


def with_layers(name="body.3", **changes):
    of_head = measure(**data()).per_class()
    tags = {tag.replace("body.3", name): value for tag, value in TAGS.items()}
    return Measurement(
        tags,
        {"": of_head, name: of_head},
        **{"num_samples": 24, "feature_dim": 8, "head": "fc", "seconds": 1.5} | changes,
    )


def test_prints_a_table_of_ascii_letters():
    assert repr(with_layers()) == (
        "Measurement of 24 samples, 4 classes, 8 features, head 'fc', 1.5 s\n"
        "                value  at collapse  meaning\n"
        "  nc1             0.5            0  within-class relative to between-class variability, tr(S_W S_B^+)/K\n"
        "  nc2           1e-09            0  distance of the head from a simplex ETF\n"
        "  mine              3\n"
        "  layer body.3:\n"
        "  nc1               2            0  within-class relative to between-class variability, tr(S_W S_B^+)/K\n"
        "  ncc_accuracy   0.75            1  share of samples whose nearest class mean is that of their own class\n"
        "  val:\n"
        "  nc1             inf            0  within-class relative to between-class variability, tr(S_W S_B^+)/K"
    )
    full = repr(measure(**data(), measures=ALL))
    assert full.isascii()
    assert all(f"  {name} " in full for name in MEASURES)
    assert with_layers().layers == ("body.3",)


def test_notes_say_what_is_missing():
    given = data()
    kept = given["labels"] != 2
    found = measure(features=given["features"][kept], labels=given["labels"][kept], weight=given["weight"])
    assert "1 of 4 classes have no samples; measures of class means leave them out." in repr(found)
    assert "Class means spread along 2 of at most 2 directions." in repr(found)
    assert "Left out because they need the head: nc2, nc3." in repr(
        measure(features=given["features"], labels=given["labels"])
    )


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.cells.append(text)


def test_a_notebook_shows_the_same_table_with_names_escaped():
    reader = Reader()
    reader.feed(with_layers("<script>alert(1)</script>&", head="<b>", left_out=("nc3",))._repr_html_())
    assert reader.open == []
    assert "layer <script>alert(1)</script>&" in reader.cells
    assert "Measurement of 24 samples, 4 classes, 8 features, head '<b>', 1.5 s" in reader.cells
    assert "Left out because they need the head: nc3." in reader.cells
    assert {"nc1", "0.5", "1e-09", "inf"} <= set(reader.cells)


@pytest.mark.parametrize("num_classes", [2, 10, 40, 1500])
def test_draws_bars_and_cosines(num_classes, tmp_path):
    measures = ("nc1", "nc2", "nc3_cosine", "gnc2_energy", "nc1_rank", "accuracy")
    found = measure(**data(num_classes, 2, 8), measures=measures)
    figure = found.plot()
    bars, cosines, _ = figure.axes
    names = [label.get_text() for label in bars.get_yticklabels()]
    energy = "|gnc2_energy + 0.6931|" if num_classes == 2 else "gnc2_energy"
    assert names == ["nc1", "nc2", "|nc3_cosine - 1|", energy, "|accuracy - 1|"]
    (image,) = cosines.images
    assert image.get_array().shape == ((750, 750) if num_classes == 1500 else (num_classes, num_classes))
    assert ("every 2th class" in cosines.get_title()) == (num_classes == 1500)
    assert len(cosines.texts) == (num_classes**2 if num_classes <= 12 else 0)
    figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "values",
    [{}, {"nc1": 0.0}, {"nc1": math.nan, "nc2": math.inf}, {"nc1": 1e-300, "nc2": 1e300}, TAGS, {"nc1_rank": 1.0}],
)
def test_draws_whatever_was_measured(values, tmp_path):
    table = measure(**data()).per_class()
    found = Measurement(values, {"": table, "body.3": table}, num_samples=1, feature_dim=2)
    found.plot().savefig(tmp_path / "figure.png")
    assert repr(found)
    assert found._repr_html_()


def test_a_figure_is_not_registered_with_pyplot():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    before = pyplot.get_fignums()
    measure(**data()).plot()
    assert pyplot.get_fignums() == before
