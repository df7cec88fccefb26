"""Evaluation passes without a trace.

An evaluation pass, in short a *sweep*, runs a model over a data set to collect features. Afterwards the model, all that
it refers to, and all random states are as before.
"""

from nclightning.probe.sweep.checksums import fingerprint, fingerprint_together
from nclightning.probe.sweep.loaders import (
    known_indices,
    limited_batches,
    num_own_samples,
    num_planned_batches,
    sequential_loader,
)
from nclightning.probe.sweep.messages import online_hint, without_online_hint
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
    "online_hint",
    "sequential_loader",
    "shared_buffers",
    "untouched",
    "without_online_hint",
]
