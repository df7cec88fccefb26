"""Checks of the checkpoint of a resumed run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from nclightning.compat.lightning import iterations_done
from nclightning.errors import UserError
from nclightning.optim import LineSearchOptimizer

__all__ = ["check_problem", "check_resumable", "check_weights", "warn_of_optimizer_options"]

# Entries of a Lightning checkpoint that a resumed fit needs, and their types.
_NEEDED = {
    "global_step": int,
    "state_dict": Mapping,
    "loops": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
}


# Largest number of characters of a value in a message.
_MOST_SHOWN = 60


def check_resumable(checkpoint: Mapping[str, Any], weights_in_place: bool = False) -> None:
    """Refuse a checkpoint that is not complete, such as one saved with ``save_weights_only=True``.

    Args:
        checkpoint: A Lightning checkpoint.
        weights_in_place: Whether its weights have been loaded and removed already, as Lightning does for shards.

    Raises:
        ValueError: If an entry is missing or the counts in it disagree; the message says which.
    """
    needed = {name: kind for name, kind in _NEEDED.items() if not (weights_in_place and name == "state_dict")}
    missing = [name for name, kind in needed.items() if not isinstance(checkpoint.get(name), kind)]
    if missing or not checkpoint["optimizer_states"]:
        raise UserError(
            f"the checkpoint cannot be resumed, since it has no {', '.join(missing or ['optimizer_states'])}: it was "
            "saved with save_weights_only=True, or edited. Resume from a complete one, such as the last.ckpt that "
            "LastCheckpoint saves. The weights alone can be used with validate and test."
        )
    try:
        done = iterations_done(checkpoint)
    except (KeyError, TypeError) as error:
        raise UserError(f"the checkpoint cannot be resumed: its loops have no {error}, so it was edited.") from error
    if done != checkpoint["global_step"]:
        raise UserError(
            f"the checkpoint cannot be resumed: it is at global_step {checkpoint['global_step']} and has done {done} "
            "iterations, so it was edited, or another loop wrote it."
        )


def check_weights(checkpoint: Mapping[str, Any], model: nn.Module) -> None:
    """Refuse a checkpoint whose weights differ from those of a module in name or shape.

    Args:
        checkpoint: A Lightning checkpoint.
        model: The module, in a single process, so that it has whole weights.

    Raises:
        ValueError: If they differ; the message names one.
    """
    stored = checkpoint.get("state_dict")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if not isinstance(stored, Mapping):
        raise UserError("the checkpoint has no state_dict: there are no weights in it.")
    there = {name: tuple(getattr(value, "shape", ())) for name, value in stored.items()}
    different = sorted(name for name in shapes.keys() | there.keys() if shapes.get(name) != there.get(name))
    if different:
        name = different[0]
        raise UserError(
            f"the weights of the checkpoint are not those of this {type(model).__name__}: {name} has shape "
            f"{there.get(name, 'none')} there and {shapes.get(name, 'none')} here. Take a checkpoint of this model."
        )


def check_problem(checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another problem: a resumed run would mix two problems in one curve.

    Args:
        checkpoint: A Lightning checkpoint.
        settings: Hyperparameters that determine the problem, by name.

    Raises:
        ValueError: If hyperparameters differ; the message names them.
    """
    stored = _unfolded(checkpoint.get("hyper_parameters", {}))
    different = {
        name: (stored[name], value)
        for name, value in _unfolded(settings).items()
        if name in stored and stored[name] != value
    }
    if different:
        listed = ", ".join(_differ(name, f"{old!r}", f"{new!r}") for name, (old, new) in different.items())
        raise UserError(f"the checkpoint belongs to another problem ({listed}). Resume it with its own settings.")


def _differ(name: str, old: str, new: str) -> str:
    """Describe a hyperparameter that differs, without values if they are long."""
    longest = max(len(old), len(new))
    return f"{name}: {old} there, {new} here" if longest <= _MOST_SHOWN else f"{name}, of which each is long"


def _unfolded(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with each argument of a problem under its own name."""
    found = dict(settings)
    problem = found.get("problem")
    if isinstance(problem, Mapping):
        found |= {f"problem.{name}": value for name, value in problem.get("init_args", {}).items()}
        del found["problem"]
    return found


def warn_of_optimizer_options(optimizer: Optimizer, stored_states: list[dict[str, Any]]) -> None:
    """Warn of optimizer options that are ignored because torch takes those of the checkpoint.

    Args:
        optimizer: The optimizer with the options of the resumed run.
        stored_states: Optimizer states of the checkpoint.

    Raises:
        ValueError: If the checkpoint is that of another optimizer.
    """
    ignored: list[str] = []
    groups = stored_states[0]["param_groups"]
    if len(stored_states) != 1 or len(groups) != len(optimizer.param_groups):
        raise UserError(
            f"the checkpoint has {len(stored_states)} optimizers, the first with {len(groups)} groups of parameters, "
            f"and {type(optimizer).__name__} has {len(optimizer.param_groups)}. Resume it with its own optimizer."
        )
    for given, stored in zip(optimizer.param_groups, groups, strict=True):
        # A scheduler or a line search changes these entries during a run, so that they are not options.
        scheduled = "initial_lr" in stored or isinstance(optimizer, LineSearchOptimizer)
        state = ("lr", "initial_lr") if scheduled else ()
        missing, extra = given.keys() - stored.keys(), stored.keys() - given.keys()
        if missing and extra:  # Only one of them may be due to another version of torch.
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
