"""What a resumed run keeps of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from nclightning.errors import UserError
from nclightning.optim import ArmijoGD

__all__ = ["check_problem", "check_resumable", "warn_of_optimizer_options"]

# What a resumed fit takes from Lightning's checkpoint, and of what kind it is.
_NEEDED = {
    "global_step": int,
    "state_dict": Mapping,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
}


def check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that lacks what a fit goes on from, as one saved with ``save_weights_only=True`` does.

    Args:
        checkpoint: Lightning's.

    Raises:
        ValueError: Naming what is missing, or that the counts in it disagree.
    """
    missing = [name for name, kind in _NEEDED.items() if not isinstance(checkpoint.get(name), kind)]
    if missing or not checkpoint["optimizer_states"]:
        raise UserError(
            f"the checkpoint cannot be resumed, as it has no {', '.join(missing or ['optimizer_states'])}: it was "
            "saved with save_weights_only=True, or edited. Resume from a whole one, such as the last.ckpt that "
            "LastCheckpoint saves; the weights alone can be looked at with validate and test."
        )
    try:
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.manual_optimization.optim_step_progress"]
        done = progress["total"]["completed"]
    except (KeyError, TypeError) as error:
        raise UserError(f"the checkpoint cannot be resumed: its loops have no {error}, so it was edited.") from error
    if done != checkpoint["global_step"]:
        raise UserError(
            f"the checkpoint cannot be resumed: it is at global_step {checkpoint['global_step']} and has done {done} "
            "iterations, so it was edited, or another loop wrote it."
        )


def check_problem(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another problem, whose curves would be continued under a wrong name.

    Args:
        checkpoint: Lightning's.
        settings: Hyperparameters that say which problem it is, by name.

    Raises:
        ValueError: Naming the hyperparameters that differ.
    """
    stored = checkpoint.get("hyper_parameters", {})
    different = {
        name: (stored[name], value) for name, value in settings.items() if name in stored and stored[name] != value
    }
    if different:
        listed = ", ".join(f"{name}: {old!r} there, {new!r} here" for name, (old, new) in different.items())
        raise UserError(f"the checkpoint belongs to another problem ({listed}). Resume it with its own settings.")


def warn_of_optimizer_options(optimizer: Optimizer, stored_states: list[dict[str, Any]]) -> None:
    """Say which options of the optimizer a resume keeps from the checkpoint, as torch does without a word.

    Args:
        optimizer: As the run would make it now.
        stored_states: Lightning's, of the checkpoint.

    Raises:
        ValueError: If the checkpoint is that of another optimizer.
    """
    ignored: list[str] = []
    for given, stored in zip(optimizer.param_groups, stored_states[0]["param_groups"], strict=False):
        # What a scheduler or a line search writes is where the run was, and no option of it.
        scheduled = "initial_lr" in stored or isinstance(optimizer, ArmijoGD)
        state = ("lr", "initial_lr") if scheduled else ()
        missing, extra = given.keys() - stored.keys(), stored.keys() - given.keys()
        if missing and extra:  # One of them alone may be another version of torch.
            raise UserError(
                f"the checkpoint was not written by {type(optimizer).__name__}: its optimizer has no option "
                f"{', '.join(sorted(missing))}. Resume it with its own optimizer."
            )
        ignored += [
            f"{k}={v!r} (kept: {stored[k]!r})"
            for k, v in given.items()
            if k in stored and k not in ("params", *state) and stored[k] != v
        ]
    if ignored:
        listed = ", ".join(dict.fromkeys(ignored))
        rank_zero_warn(f"A resumed run keeps the optimizer options of its checkpoint. Ignored: {listed}.")
