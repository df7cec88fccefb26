"""What the benchmarks share: a process that says nothing but its tables, and a trainer that does not either."""

import logging
import warnings

import lightning as L
import torch


def settle():
    """Take one thread, on which ratios are steadiest, and silence Lightning."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)


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


def show(lines):
    """Print the lines of a table as they come."""
    settle()
    for line in lines:
        print(line, flush=True)
