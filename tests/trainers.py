"""A Trainer that prints nothing and writes where it is told, and a way back from accelerate's."""

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


def forget_accelerator():
    """Let the next ``Accelerator`` of this process have another device, precision and number of processes."""
    from accelerate.state import AcceleratorState, GradientState  # noqa: PLC0415

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
