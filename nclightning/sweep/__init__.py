"""Looking at a model over a data set without a trace."""

from nclightning.sweep.loaders import (
    known_indices,
    limited_batches,
    num_own_samples,
    num_planned_batches,
    sequential_loader,
)
from nclightning.sweep.traces import compiled_parts, eager, fingerprint, frozen, shared_buffers, untouched

__all__ = [
    "compiled_parts",
    "eager",
    "fingerprint",
    "frozen",
    "known_indices",
    "limited_batches",
    "num_own_samples",
    "num_planned_batches",
    "sequential_loader",
    "shared_buffers",
    "untouched",
]
