"""Labels, panels and axes of what is recorded."""

from __future__ import annotations

from nclightning.figures.summary import PREDICTED, QUANTITIES

__all__ = ["NC_STAGES", "label_of", "panel_of"]

# Other sets on which the monitors measure.
NC_STAGES = ("val", "test")
_PANELS = {
    "optimality/gap": "Optimality",
    "optimality/certified_gap": "Optimality",
    "optimality/distance": "Optimality",
    "optimality/relative_distance": "Optimality",
    "optimality/grad_norm": "Optimality",
    PREDICTED: "Optimality",
    "optimality/error_bound_ratio": "Error bound",
}
_LABELS = {
    **QUANTITIES,
    PREDICTED: "decay predicted by the theory",
    "optimality/relative_distance": "relative distance",
    "optimality/error_bound_ratio": "distance / gradient norm",
    "loss": "objective F",
}


def label_of(tag: str) -> str:
    """Name what a tag is of.

    Args:
        tag: As recorded.
    """
    if tag in _LABELS:
        return _LABELS[tag]
    group, _, name = tag.rpartition("/")
    label = _LABELS.get(f"nc/train/{name}", name)
    return f"{label} ({group.removeprefix('nc/')})" if group.startswith("nc/") and group != "nc/train" else label


def panel_of(tag: str) -> str:
    """Return the title of the panel on which a tag is drawn; empty for what is not drawn.

    Args:
        tag: As recorded.
    """
    if tag in _PANELS:
        return _PANELS[tag]
    group, _, name = tag.rpartition("/")
    if group == "nc/train" or group.startswith("nc/"):
        stage = "" if group == "nc/train" else f", {group.removeprefix('nc/')}"
        return f"Neural collapse{stage}" if name in ("nc1", "nc2", "nc3") else f"Further measures{stage}"
    if group.startswith(("nrc", "laws", "line_search")):
        return {"nrc": "Regression collapse", "laws": "Laws of the optimizer"}.get(group.split("/")[0], "Line search")
    return ""
