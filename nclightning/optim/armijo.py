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

    For a quadratic this is the same condition, and it remains accurate down to the round-off of the gradient. The
    slope also gives the curvature. After a rejected trial the search therefore skips all trials that a quadratic with
    this curvature would reject, too.

    Each trial calls the standard closure once for value and gradient. A :class:`~nclightning.optim.LineObjective` in
    place of the closure computes values only, and the gradient of the accepted trial. The next step starts with the
    gradient of the accepted trial, so that a step costs exactly its trials. The very first step, and the first after a
    resume, costs one evaluation more.

    The gradient is reused only if it still belongs to the parameters. Each step compares the parameters bit for bit
    with those that the last step left, so that it notices any write to them, also through ``.data``. It notices a
    changed ``requires_grad`` and a write to a gradient as well. In each of these cases it evaluates the closure again.
    Everything else that the closure depends on, such as data, buffers and frozen weights, must stay the same; if it
    does not, set ``reuse_gradient=False``. A step after a search that found no step evaluates the closure once, and
    ends in the same way if nothing has changed.

    Options may be changed in ``param_groups`` between steps, in all groups alike, and take effect at the next step. A
    new ``initial_step`` is the first trial of the next search. ``param_groups[i]["lr"]`` is the step that the next
    search tries first: the last step taken, or a longer one when growth is due. ``LearningRateMonitor`` shows it. A
    learning-rate scheduler that writes ``lr`` chooses the first trial of the next search, which shortens the step as
    far as it must; a scheduler that writes it before each step sets an upper bound. Schedulers that cycle the momentum
    as well need ``cycle_momentum=False``. The step that was taken is in ``outcome.step_size``.

    All parameter groups move along one joint direction with one step size, so that the options are common to all
    groups. Parameters with ``requires_grad=False`` stay. On several processes (``torch.distributed`` initialised) the
    closure's value is averaged over the ranks before it is compared, so that all ranks make the same decision. The
    parameters must be the same on each rank, and the closure must synchronise the gradients. Of a parameter that
    ``fully_shard`` splits, each rank moves and measures its own shard.

    Norms and inner products are accumulated in float64 for every dtype of the parameters.

    Args:
        params: Parameters or parameter groups. Real and dense.
        initial_step: First trial of the first step.
        shrink: Factor in (0, 1) applied after a rejected trial.
        grow: Factor of at least 1 applied to the first trial of the next step, once ``patience`` consecutive steps
            accepted their first trial and a quadratic with the curvature of the last step would accept the longer
            step, too.
        patience: Number of consecutive steps after which the step may grow. Growing at every step would waste every
            second evaluation.
        c1: Required fraction of the linear decrease, in (0, 1/2).
        max_trials: Largest number of trials per step.
        noise: Relative change of the objective below which slopes decide instead of values. None means 64 times the
            machine epsilon of the closure's value, or of parameters below float32, but at most 1/32. If the closure
            returns a Python number, its dtype is taken to be that of the parameters. 0 gives plain Armijo
            backtracking.
        reuse_gradient: Whether a step starts with the gradient that the last step accepted. This is right for
            deterministic objectives. Set it to False if the closure's data or dropout masks change from step to step;
            each step then costs one evaluation more. Within one step the closure must always be deterministic.

    Raises:
        ValueError: If an option is out of range, a group sets options of its own, or a parameter is complex or
            occurs twice in a group.

    Example:
        >>> import torch
        >>> from nclightning.optim import ArmijoGD
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
