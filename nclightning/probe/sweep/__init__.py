"""Looking at a model over a data set without a trace."""

from nclightning.probe.sweep.checksums import fingerprint, fingerprint_together
from nclightning.probe.sweep.loaders import (
    known_indices,
    limited_batches,
    num_own_samples,
    num_planned_batches,
    sequential_loader,
)
from nclightning.probe.sweep.online import or_online, without_online
from nclightning.probe.sweep.snapshot import TraceError, has_lazy_parts
from nclightning.probe.sweep.states import generators_kept
from nclightning.probe.sweep.traces import compiled_parts, eager, frozen, shared_buffers, untouched

__all__ = [
    "TraceError",
    "compiled_parts",
    "eager",
    "fingerprint",
    "fingerprint_together",
    "frozen",
    "generators_kept",
    "has_lazy_parts",
    "known_indices",
    "limited_batches",
    "num_own_samples",
    "num_planned_batches",
    "or_online",
    "sequential_loader",
    "shared_buffers",
    "untouched",
    "without_online",
]
