"""A Trainer that prints nothing and writes where it is told."""

import lightning as L


def quiet_trainer(folder, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return L.Trainer(**(defaults | options))
