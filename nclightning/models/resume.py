"""What a resumed run keeps of its checkpoint."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from nclightning.errors import UserError
from nclightning.optim import ArmijoGD

__all__ = ["warn_of_optimizer_options"]


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
