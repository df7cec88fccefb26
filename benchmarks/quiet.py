"""What the benchmarks share: a process that says nothing but its tables, such a trainer, and an account of memory."""

import logging
import os
import sys
import warnings
from pathlib import Path

import lightning as L
import torch


def settle():
    """Take one thread, on which ratios are steadiest, and silence Lightning."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


def keep_memory():
    """Start this program again with a C library that keeps freed memory.

    By default it returns large blocks to the kernel and asks for them again at the next step, and whether it does
    depends on what else lies in memory: two equal training steps then differ by 5 %.
    """
    kept = {"MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_MMAP_THRESHOLD_": str(2**32)}
    if not kept.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | kept)


def trainer(**options):
    """Make a trainer on the CPU without bar, summary, logger and checkpoints unless they are among the options."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**(defaults | options))


class Memory:
    """What this process takes from here on, by the kernel's account: that of ``resource`` begins with the parent's."""

    def __init__(self):
        Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
        self._before = self._read("VmRSS")

    @property
    def growth(self):
        """Bytes that the peak is above the start."""
        return self._read("VmHWM") - self._before

    @staticmethod
    def _read(name):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def show(lines):
    """Print the lines of a table as they come."""
    settle()
    for line in lines:
        print(line, flush=True)
