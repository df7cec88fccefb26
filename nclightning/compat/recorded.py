"""Undocumented names of TensorBoard for reading event files."""

from __future__ import annotations

__all__ = ["read_scalars"]


def read_scalars(folder: str) -> dict[str, list[tuple[int, float]]]:
    """Read all scalars of the event files in a folder.

    Non-public: ``tensorboard.backend.event_processing.event_accumulator`` (tensorboard 2.21). Without it the runs of
    Lightning's own TensorBoard logger could not be drawn.

    Args:
        folder: The run folder.

    Returns:
        Pairs of step and value by tag.
    """
    # Slow to import, and rarely needed.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: PLC0415

    accumulator = EventAccumulator(folder, size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }
