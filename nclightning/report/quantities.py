"""Labels, panels and axes of recorded tags, from the registry of quantities."""

from __future__ import annotations

from nclightning.quantities import NC, NC1, NC2, NC3, NRC, parse_tag, quantity_of

__all__ = ["OF_COLLAPSE", "falls_to_zero", "is_log", "label_of", "panel_of"]

OF_COLLAPSE = (NC1.name, NC2.name, NC3.name)
_TRAIN = "train"


def label_of(tag: str) -> str:
    """Name what a tag is of, and where it was measured if that is not the training set.

    Args:
        tag: As recorded.
    """
    _, place, name, _ = parse_tag(tag)
    quantity = quantity_of(tag)
    return (quantity.text if quantity is not None else name) + _place(place)


def panel_of(tag: str) -> str:
    """Return the title of the panel on which a tag is drawn; empty for what is not drawn.

    Args:
        tag: As recorded.
    """
    group, place, name, is_log10 = parse_tag(tag)
    quantity = quantity_of(tag)
    if is_log10 or (quantity is None and group not in (NC, NRC)):
        return ""
    if group == NC and name not in OF_COLLAPSE and (quantity is None or quantity.maker == "measure"):
        return f"Further measures{_place(place)}"
    return f"{quantity.chart if quantity is not None else group}{_place(place)}"


def is_log(tag: str) -> bool | None:
    """Whether a tag is drawn on a logarithmic axis; None where that is not known.

    Args:
        tag: As recorded.
    """
    quantity = quantity_of(tag)
    return None if quantity is None else quantity.axis == "log"


def falls_to_zero(tag: str) -> bool:
    """Whether a tag is of NC1, NC2 or NC3 of some set, which are zero at collapse.

    Args:
        tag: As recorded.
    """
    group, _, name, is_log10 = parse_tag(tag)
    return group == NC and name in OF_COLLAPSE and not is_log10


def _place(place: str) -> str:
    """Stage, loader and layer behind a label; the training set goes without saying."""
    shown = place.removeprefix(_TRAIN).removeprefix("/")
    return f" ({shown})" if shown else ""
