"""Gradient descent with a backtracking line search that keeps working below the round-off of the objective."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from nclightning.optim.direction import SteepestDescent
from nclightning.optim.line_search import LineSearchOptimizer

__all__ = ["ArmijoGD"]


class ArmijoGD(LineSearchOptimizer):
    r"""Gradient descent whose step is found by backtracking on the Armijo condition.

    A trial step t along the negative gradient g is accepted when

    .. math:: F(x - t g) \le F(x) - c_1 t \|g\|^2 .

    Near a minimum the change of F drops below the round-off of F and this comparison becomes noise: plain
    backtracking stops at a gradient norm of about :math:`\sqrt\epsilon`. There, where
    :math:`|F(x - tg) - F(x)| \le \mathrm{noise}\,|F(x)|`, the same decrease is tested through the slopes
    (approximate Armijo condition; Hager and Zhang 2005, Sec. 2):

    .. math:: \langle \nabla F(x - t g), g \rangle \ge -(1 - 2 c_1) \|g\|^2 ,

    which for a quadratic is the same condition, and which is good down to the round-off of the gradient. A slope also
    tells the curvature, so that the trials between a rejected one and the first that a quadratic would accept are left
    out.

    Each trial calls the standard closure (value and gradient); a :class:`~nclightning.optim.LineObjective` in its place
    is asked for values only and for the gradient of what was accepted. The gradient of the accepted trial opens the
    next step, so that a step costs exactly its trials; the very first, and the first after a resume, costs one more.

    The gradient is reused only where it still belongs to the parameters. Each step compares them bit for bit with the
    iterate that the last one left behind, so that a write to them is noticed, through ``.data`` as well, and so are a
    changed ``requires_grad`` and a write to a gradient. The step then evaluates the closure anew. What else the closure
    depends on, such as data, buffers and frozen weights, must stay the same (or set ``reuse_gradient=False``). A step
    after a search that found no step evaluates the closure once: if nothing has changed it ends in the same way.

    Options may be written to ``param_groups`` between steps, the same to all groups, and hold from the next step on; a
    new ``initial_step`` is where the next search begins. ``param_groups[i]["lr"]`` is the step that the next search
    tries first: the last step taken, or longer when growth is due. ``LearningRateMonitor`` shows it. A learning-rate
    scheduler that writes it chooses where the next search begins, from where it shortens the step as far as it must and
    may lengthen it later; a schedule that is written before each step is an upper bound. Schedulers that cycle the
    momentum as well need ``cycle_momentum=False``. What was taken is in ``outcome.step_size``.

    All parameter groups move along one joint direction with one step size; the options are therefore common to all
    groups. Parameters with ``requires_grad=False`` stay. On several processes (``torch.distributed`` initialised) the
    closure's value is averaged over the ranks before it is compared, so that all take the same decision; parameters
    must be the same on each, and gradients must be synchronised by the closure. Parameters that ``fully_shard`` shares
    out are moved and measured in their shards.

    Norms and inner products are accumulated in float64 whatever the dtype of the parameters.

    Args:
        params: Parameters or parameter groups. Real and dense.
        initial_step: First trial of the first step.
        shrink: Factor in (0, 1) applied after a rejected trial.
        grow: Factor of at least 1 applied to the next first trial once ``patience`` first trials in a row were
            accepted and a quadratic with the curvature that the last step met would accept the larger one too.
        patience: How many; growing at every step would waste every second evaluation.
        c1: Fraction of the linear decrease that is asked for, in (0, 1/2).
        max_trials: Trials per step before the search gives up.
        noise: Relative round-off of the objective below which slopes decide. None means 64 times the machine
            epsilon of the closure's value, or of parameters below float32, but at most 1/32; of a value that is a
            plain number the dtype is taken to be that of the parameters. 0 gives plain Armijo backtracking.
        reuse_gradient: Open a step with the accepted gradient of the last one. Right for deterministic objectives.
            Set it to False when the closure's data or dropout masks change from step to step; each step then costs
            one evaluation more. Within one step the closure must be deterministic in any case.

    Raises:
        ValueError: If an option is out of range, a group carries options of its own, or a parameter is complex or
            occurs twice in a group.

    Example:
        >>> import torch
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        >>> optimizer = ArmijoGD([x], initial_step=1.0)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     value = x.square().sum() / 2
        ...     value.backward()
        ...     return value
        >>> optimizer.step(closure)
        0.0
        >>> optimizer.outcome.step_size, optimizer.outcome.evaluations
        (1.0, 2)
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        initial_step: float = 1.0,
        shrink: float = 0.5,
        grow: float = 4.0,
        patience: int = 2,
        c1: float = 0.3,
        max_trials: int = 60,
        noise: float | None = None,
        reuse_gradient: bool = True,
    ) -> None:
        options: dict[str, Any] = {
            "initial_step": initial_step,
            "shrink": shrink,
            "grow": grow,
            "patience": patience,
            "c1": c1,
            "max_trials": max_trials,
            "noise": noise,
            "reuse_gradient": reuse_gradient,
        }
        super().__init__(params, options, SteepestDescent())
