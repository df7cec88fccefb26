"""Gradient descent with a backtracking line search that keeps working below the round-off of the objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from nclightning.optim.evaluation import Carried, Evaluation, parameters_of
from nclightning.optim.line import ClosureLine, LineObjective
from nclightning.optim.outcome import SearchOutcome, SearchStatus

__all__ = ["ArmijoGD"]


class ArmijoGD(Optimizer):
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
    The reuse is dropped by itself when a parameter or its gradient was changed in place between two steps; writes
    through ``.data`` escape torch's version counters, so that they need ``zero_grad`` and a new optimizer.

    All parameter groups move along one joint direction with one step size; the options are therefore common to all
    groups. On several processes (``torch.distributed`` initialised) the closure's value is averaged over the ranks
    before it is compared, so that all take the same decision; gradients must be synchronised by the closure.
    Parameters that ``fully_shard`` shares out are moved and measured in their shards.

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
            epsilon of the closure's value; 0 gives plain Armijo backtracking.
        reuse_gradient: Open a step with the accepted gradient of the last one. Right for deterministic objectives.
            Set it to False when the closure's data or dropout masks change from step to step; each step then costs
            one evaluation more. Within one step the closure must be deterministic in any case.

    Raises:
        ValueError: If an option is out of range, a group carries options of its own, or a parameter is complex.

    Example:
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
        _check_options(options)
        super().__init__(params, options)
        self._options = dict(options)  # Torch adds entries of its own to its copy.
        self._outcome: SearchOutcome | None = None
        self._next_step = float(initial_step)
        self._streak = 0
        self._total_evaluations = 0
        self._resumed = False
        self._carried: Carried | None = None  # At the current iterate.

    @property
    def outcome(self) -> SearchOutcome | None:
        """What the last step did; None before the first."""
        return self._outcome

    @property
    def total_evaluations(self) -> int:
        """Calls of the closure in all steps so far; the one that a resume repeats is not counted."""
        return self._total_evaluations

    def evaluation(self) -> Evaluation | None:
        """Return value and gradient at the parameters, if the last step left these as they are; else None."""
        return self._recall(parameters_of(self))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the joint search direction.

        Args:
            param_group: ``{"params": ...}`` without options: there is one step size for all groups.

        Raises:
            ValueError: If the group carries an option or a complex parameter.
        """
        own = sorted(set(param_group) & set(self.defaults))
        if own:
            raise ValueError(
                f"parameter groups of ArmijoGD share one search, so a group cannot set {', '.join(own)}. "
                "Pass it to ArmijoGD(...) instead."
            )
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                raise ValueError(f"ArmijoGD needs real parameters, got one of dtype {p.dtype}.")
        self._forget()

    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Search along the negative gradient and move.

        Args:
            closure: Clears the gradients, computes the objective at the current parameters, calls ``backward`` and
                returns the value. Called once per trial. Or a :class:`~nclightning.optim.LineObjective`.

        Returns:
            Objective at the iterate that the step leaves behind; :attr:`outcome` has the rest. If nothing was
            accepted the parameters are restored bit for bit.

        Raises:
            ValueError: If the closure is missing or returns no scalar, the objective or gradient is not finite at
                the start, a gradient is sparse, or gradients were accumulated before the step.
        """
        if closure is None:
            raise ValueError(
                "ArmijoGD.step needs a closure that evaluates the objective; it was called without one. Under "
                "Lightning this is what precision='16-mixed' does (its gradient scaler steps alone): use "
                "precision='32-true', '64-true' or 'bf16-mixed'."
            )
        params = parameters_of(self)
        line = closure if isinstance(closure, LineObjective) else ClosureLine(closure, params)
        with torch.no_grad():
            return self._search(line, params)

    def _search(self, line: LineObjective, params: list[Tensor]) -> float:
        start = self._recall(params)
        evaluations = 0
        if start is None:
            self._refuse_foreign_gradients(params)
            start = line.evaluate()
            evaluations = 0 if self._resumed else 1
            self._resumed = False
            if not start.finite:
                raise ValueError(
                    f"the objective at the start of the step is {start.value} with gradient norm "
                    f"{math.sqrt(start.square)}: both must be finite. Check the initial parameters and the data."
                )
        elif self._outcome is not None and not self._outcome.accepted:
            # Same point, same deterministic closure: the search would fail in the same way.
            return self._finish(params, start, start, self._outcome.status, 0.0, 0)
        if start.square == 0.0:
            return self._finish(params, start, start, SearchStatus.STATIONARY, 0.0, evaluations)

        size, status = self._next_step, SearchStatus.EXHAUSTED
        line.begin(start)
        try:
            for number in range(self._options["max_trials"]):
                value = line.trial(size)
                evaluations += 1
                # A second look costs a pass over the parameters: only where it may show something.
                if number > 0 and (number > 1 or value == start.value) and line.stands_still():
                    status = SearchStatus.STALLED
                    break
                verdict = self._judge(start, value, size, line)
                end = None if verdict.status is None else line.accept()
                if verdict.status is not None and end is not None and end.finite:
                    self._adapt(size, verdict.bend, first_trial=number == 0)
                    return self._finish(params, start, end, verdict.status, size, evaluations)
                for _ in range(verdict.shrinks):  # One by one: the steps are those of plain backtracking, bit for bit.
                    size *= self._options["shrink"]
        except BaseException:
            line.reject()
            for p in params:
                p.grad = None
            self._carried = None
            raise
        line.reject()
        return self._finish(params, start, start, status, 0.0, evaluations)

    def _judge(self, start: Evaluation, value: float, size: float, line: LineObjective) -> _Verdict:
        if not math.isfinite(value):
            return _Verdict(None, math.inf)
        c1, change = self._options["c1"], value - start.value
        noise = self._noise(start)
        if noise > 0 and abs(change) <= noise * abs(start.value):  # Zero is plain Armijo: no change, no step.
            slope = line.slope()
            accepted = slope >= -(1 - 2 * c1) * start.square
            bend = 1 - slope / start.square
            return _Verdict(SearchStatus.ACCEPTED_BY_SLOPE if accepted else None, bend, self._shrinks(bend))
        linear = size * start.square
        bend = 2 * (1 + change / linear) if linear > 0 else math.inf
        return _Verdict(SearchStatus.ACCEPTED if change <= -c1 * linear else None, bend)

    def _shrinks(self, bend: float) -> int:
        """Count the rejections in a row that a quadratic is due from one with this bend on, up to ``max_trials``."""
        excess = bend / (2 * (1 - self._options["c1"]))
        if not 1 < excess < math.inf:
            return 1
        limit: int = self._options["max_trials"]
        return min(max(1, math.ceil(math.log(excess) / -math.log(self._options["shrink"]))), limit)

    def _noise(self, start: Evaluation) -> float:
        noise = self._options["noise"]
        return 64 * start.epsilon if noise is None else noise

    def _adapt(self, size: float, bend: float, first_trial: bool) -> None:
        """Choose the next first trial after an accepted step."""
        options = self._options
        self._streak = self._streak + 1 if first_trial else 0
        self._next_step = size
        due = self._streak >= options["patience"] and math.isfinite(size * options["grow"])
        if due and options["grow"] * bend <= 2 * (1 - options["c1"]):
            self._next_step = size * options["grow"]
            self._streak = 0

    def _finish(
        self,
        params: list[Tensor],
        start: Evaluation,
        end: Evaluation,
        status: SearchStatus,
        size: float,
        evaluations: int,
    ) -> float:
        for p, g in zip(params, end.gradients, strict=True):
            p.grad = g
        self._carried = Carried(end, params)
        self._total_evaluations += evaluations
        self._outcome = SearchOutcome(
            status=status,
            objective=end.value,
            previous_objective=start.value,
            grad_norm=math.sqrt(end.square),
            previous_grad_norm=math.sqrt(start.square),
            step_size=size,
            evaluations=evaluations,
        )
        return end.value

    def _recall(self, params: list[Tensor]) -> Evaluation | None:
        """Return the carried evaluation, if it still belongs to the parameters."""
        carried = self._carried
        if carried is None or not self._options["reuse_gradient"] or not carried.holds(params):
            return None
        return carried.evaluation

    def _forget(self) -> None:
        """Drop the carried evaluation and the gradients that belong to it."""
        carried, self._carried = getattr(self, "_carried", None), None
        if carried is not None:
            # A group may just have been added, which the evaluation does not know.
            for p, g in zip(parameters_of(self), carried.evaluation.gradients, strict=False):
                p.grad = None if p.grad is g else p.grad

    def _refuse_foreign_gradients(self, params: list[Tensor]) -> None:
        own = [None] * len(params) if self._carried is None else self._carried.evaluation.gradients
        for p, g in zip(params, own, strict=True):
            if p.grad is not None and p.grad is not g:
                raise ValueError(
                    "a parameter had a gradient before ArmijoGD.step: the search evaluates the objective itself and "
                    "cannot add to accumulated gradients. Set accumulate_grad_batches=1 (Lightning), or call "
                    "zero_grad() before the first step."
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the torch state and the search's own; plain numbers, so that a resumed run continues bit for bit.

        The carried gradient is not stored: the first step after a resume evaluates the closure once more, which no
        count includes.
        """
        state = super().state_dict()
        outcome = None if self._outcome is None else asdict(self._outcome) | {"status": self._outcome.status.value}
        state["search"] = {
            "next_step": self._next_step,
            "streak": self._streak,
            "total_evaluations": self._total_evaluations,
            "outcome": outcome,
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore options and search state; options of the stored run win over those of the constructor.

        Args:
            state_dict: Made by :meth:`state_dict`.

        Raises:
            ValueError: If it belongs to another optimizer.
        """
        if "search" not in state_dict:
            raise ValueError("this state_dict was not made by ArmijoGD: it has no entry 'search'.")
        search, outcome = state_dict["search"], state_dict["search"]["outcome"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "search"})
        self._options = {name: self.param_groups[0][name] for name in self._options}
        self._next_step, self._streak = search["next_step"], search["streak"]
        self._total_evaluations = search["total_evaluations"]
        self._outcome = outcome and SearchOutcome(**outcome | {"status": SearchStatus(outcome["status"])})
        self._resumed = self._options["reuse_gradient"] and outcome is not None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # Torch copies and pickles its own three attributes only. The carried gradient belongs to the original.
        return self.__dict__ | {
            "_carried": None,
            "_resumed": self._options["reuse_gradient"] and self._outcome is not None,
        }


class _Verdict(NamedTuple):
    """What a trial showed.

    Attributes:
        status: None rejects it.
        bend: The step times the curvature along it. A quadratic is accepted up to 2 (1 - c1) by either condition.
        shrinks: How often to shrink a rejected step before the next trial.
    """

    status: SearchStatus | None
    bend: float
    shrinks: int = 1


def _check_options(options: dict[str, Any]) -> None:
    rules: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
        ("initial_step", "positive and finite", lambda v: 0 < v < math.inf),
        ("shrink", "between 0 and 1", lambda v: 0 < v < 1),
        ("grow", "at least 1 and finite", lambda v: 1 <= v < math.inf),
        ("patience", "an integer of at least 1", lambda v: isinstance(v, int) and v >= 1),
        ("c1", "between 0 and 1/2", lambda v: 0 < v < 0.5),
        ("max_trials", "an integer of at least 1", lambda v: isinstance(v, int) and v >= 1),
        ("noise", "None or between 0 and 1", lambda v: v is None or 0 <= v < 1),
    )
    for name, expectation, holds in rules:
        value = options[name]
        number = value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
        if not (number and (value is None) <= (name == "noise") and holds(value)):
            raise ValueError(f"ArmijoGD({name}=...) must be {expectation}, got {value!r}.")
