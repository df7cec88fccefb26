"""Optimizers that search along a direction of descent for a step that is good enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nclightning.errors import UserError
from nclightning.optim.backtracking import Found, backtrack
from nclightning.optim.direction import Descent, Direction, Space
from nclightning.optim.evaluation import Carried, Evaluation, parameters_of
from nclightning.optim.iterate import remember
from nclightning.optim.line import ClosureLine, LineObjective
from nclightning.optim.options import check_group, check_options, common_options, vanishing_step
from nclightning.optim.outcome import SearchOutcome, SearchStatus
from nclightning.optim.start import check_parameters, evaluate_start, missing_closure, warn_if_random
from nclightning.ranks import count_over_ranks, world_size
from nclightning.sharding import own_shard, shard_of

__all__ = ["LineSearchOptimizer"]


class LineSearchOptimizer(Optimizer):
    r"""What :class:`ArmijoGD` and the other optimizers with a line search have in common.

    A step goes from x to x - t p. A direction chooses the descent vector p, whose inner product with the gradient g is
    positive; one search for all directions finds the step t, as :class:`ArmijoGD` describes it for p = g: a trial is
    accepted when

    .. math:: F(x - t p) \le F(x) - c_1 t \langle g, p \rangle ,

    or, where the change of F is below its round-off, when

    .. math:: \langle \nabla F(x - t p), p \rangle \ge -(1 - 2 c_1) \langle g, p \rangle .

    Where no step is found along a vector that was learnt from earlier steps, these are forgotten and the gradient is
    tried within the same step.

    Args:
        params: Parameters or parameter groups. Real and dense.
        options: Options by name, the same for all groups.
        direction: Chooses descent vectors. It belongs to this optimizer alone.

    Raises:
        ValueError: If an option is out of range, a group carries options of its own, or a parameter is complex or
            occurs twice in a group.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        options: dict[str, Any],
        direction: Direction,
    ) -> None:
        check_options(options, self._name)
        self._direction = direction
        super().__init__(params, {**options, "lr": float(options["initial_step"])})
        self._options = options  # As the last step read them.
        self._next_step = float(options["initial_step"])  # The lr of all groups, as the last step left it.
        self._outcome: SearchOutcome | None = None
        self._streak = 0
        self._total_evaluations = 0
        self._resumed = False
        self._steps_ran_away = False
        self._failed_with: tuple[Any, ...] | None = None  # First trial and options of a search that found no step.
        self._carried: Carried | None = None  # At the current iterate.
        self._alone = False  # Whether nobody else writes to the parameters.
        self._line: ClosureLine | None = None  # Of the closure, with copies of the parameters.

    @property
    def _name(self) -> str:
        """Name the class that the user took, for messages."""
        return type(self).__name__

    @property
    def outcome(self) -> SearchOutcome | None:
        """What the last step did; None before the first."""
        return self._outcome

    @property
    def total_evaluations(self) -> int:
        """Calls of the closure and products with the Hessian in all steps; what a resume repeats is not counted."""
        return self._total_evaluations

    def evaluation(self) -> Evaluation | None:
        """Return value and gradient at the parameters, if the last step left these as they are; else None.

        On several processes all must ask.
        """
        return self._recall(parameters_of(self))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Promise that nobody else writes to the parameters through ``.data`` between the steps within the block.

        These then leave out the comparison with the last iterate, which takes place once when the block begins and
        once after it. Writes that torch's version counters see are noticed as ever.
        """
        params = parameters_of(self)
        if self._recall(params) is None:
            self._forget()
        self._alone, before = True, self._alone
        try:
            yield
        finally:
            self._alone = before
            carried = self._carried
            if carried is not None and not before:
                carried.compare_with(None)  # Version counters alone have to tell.
                if carried.holds(params):
                    carried.compare_with(remember(params))
                else:
                    self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the joint search direction.

        Args:
            param_group: ``{"params": ...}`` without options: there is one step size for all groups.

        Raises:
            ValueError: If the group carries an option, or a parameter is complex or occurs twice.
        """
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), (Tensor, set, type(None))):
            param_group = {**param_group, "params": list(param_group["params"])}
            check_group(param_group, self.defaults, self._name)
        super().add_param_group(param_group)
        first, new = self.param_groups[0], self.param_groups[-1]
        new.update({name: first[name] for name in self.defaults if name in first})
        self._forget()

    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Search along the descent vector and move.

        Args:
            closure: Clears the gradients, computes the objective at the current parameters, calls ``backward`` and
                returns the value. Called once per trial. Or a :class:`~nclightning.optim.LineObjective`.

        Returns:
            Objective at the iterate that the step leaves behind; :attr:`outcome` has the rest. If nothing was
            accepted the parameters are restored bit for bit.

        Raises:
            ValueError: If the closure is missing, returns no scalar, leaves no gradient or changes a parameter; the
                objective or gradient is not finite at the start; a gradient is sparse, or was accumulated before the
                step; an option or ``lr`` in ``param_groups`` is out of range or not the same in all groups; no
                parameter is trainable.
        """
        if closure is None:
            raise missing_closure(self._name)
        self._read_groups()
        params = parameters_of(self)
        with torch.no_grad():
            return self._search(self._line_of(closure, params), params)

    def _read_groups(self) -> None:
        """Take over what was written to the parameter groups since the last step."""
        options, first = common_options(self.param_groups, self._options, self._name)
        if options == self._options and first == self._next_step:
            return
        check_options(options, self._name)
        if options["initial_step"] != self._options["initial_step"]:
            first = float(options["initial_step"])
        self._options, self._steps_ran_away, self._streak = options, False, 0
        self._set_next_step(first)

    def _set_next_step(self, size: float) -> None:
        self._next_step = size
        for group in self.param_groups:
            group["lr"] = size

    def _line_of(self, closure: Callable[[], Any], params: list[Tensor]) -> LineObjective:
        if isinstance(closure, LineObjective):
            return closure
        if self._line is None or not self._line.has(params):
            self._line = ClosureLine(closure, params, self._name)
        self._line.closure = closure
        return self._line

    def _search(self, line: LineObjective, params: list[Tensor]) -> float:
        carried = self._recall(params)
        spent = 0
        if carried is not None and self._may_search_from(carried):
            start = carried
        else:
            start = self._evaluate_start(line, params)
            spent = 0 if self._resumed else 1
            self._resumed = False
            if carried is not None and self._fails_again(carried, start):
                assert self._outcome is not None
                return self._finish(line, params, start, start, self._outcome.status, 0.0, spent)
        status = self._reason_to_stay(start, params)
        if status is not None:
            return self._finish(line, params, start, start, status, 0.0, spent)

        space = Space(params, self.state, self._options)
        found, evaluations = self._find_step(line, start, space)
        spent += evaluations
        if found.end is None:
            return self._finish(line, params, start, start, found.status, 0.0, spent)
        self._adapt(start, found, line, space)
        return self._finish(line, params, start, found.end, found.status, found.size, spent)

    def _find_step(self, line: LineObjective, start: Evaluation, space: Space) -> tuple[Found, int]:
        """Search along the descent vector, and along the gradient if there is no step along another vector.

        Returns:
            What was found, and how many evaluations that took.
        """
        trials, spent, direction = 0, 0, self._direction
        while True:
            try:
                descent = direction.find(start, line, space)
                line.begin(start, descent.along)
                found = self._search_along(line, start, descent, space)
            except BaseException:
                self._drop_gradients(space.params)
                raise
            trials += found.trials
            spent += descent.evaluations
            if found.end is not None:
                break
            line.reject()
            if not direction.restart():
                break
        return found._replace(trials=trials), trials + spent

    def _search_along(self, line: LineObjective, start: Evaluation, descent: Descent, space: Space) -> Found:
        interpolates = self._direction.interpolates
        try:
            return backtrack(self._options, self._next_step, line, start, descent.slope, space.params, interpolates)
        except BaseException:
            line.reject()
            raise

    def _may_search_from(self, carried: Evaluation) -> bool:
        """Say whether a search from there will have trials: callers may count on one call of their closure a step."""
        accepted = self._outcome is not None and self._outcome.accepted
        return accepted and carried.square > 0 and not self._steps_ran_away

    def _evaluate_start(self, line: LineObjective, params: list[Tensor]) -> Evaluation:
        """Evaluate at the current parameters, and refuse what cannot be searched."""
        own = None if self._carried is None else self._carried.evaluation.gradients
        check_parameters(line, params, own, self._name)
        try:
            return evaluate_start(line, params)
        except BaseException:
            self._drop_gradients(params)
            raise

    def _fails_again(self, known: Evaluation, start: Evaluation) -> bool:
        """Say whether a search must end as the last one did: from the same point, by the same options and closure."""
        warn_if_random(known, start, self._name)
        same = start.value == known.value and start.square == known.square
        return same and self._failed_with == (self._next_step, *self._options.values())

    def _reason_to_stay(self, start: Evaluation, params: list[Tensor]) -> SearchStatus | None:
        """Say why there is nothing to search; None if there is."""
        if start.square == 0.0:
            vanished = self._next_step * self._direction.scale > vanishing_step(params)
            return SearchStatus.UNATTAINED if vanished else SearchStatus.STATIONARY
        return SearchStatus.UNATTAINED if self._steps_ran_away else None

    def _adapt(self, start: Evaluation, found: Found, line: LineObjective, space: Space) -> None:
        """Learn from an accepted step, and choose the next first trial."""
        self._streak = self._streak + 1 if found.trials == 1 else 0
        self._direction.accept(start, found, line, space)
        size, self._steps_ran_away = self._direction.next_trial(found, self._streak, space)
        self._streak = 0 if size > found.size else self._streak
        self._set_next_step(size)

    def _finish(
        self,
        line: LineObjective,
        params: list[Tensor],
        start: Evaluation,
        end: Evaluation,
        status: SearchStatus,
        size: float,
        evaluations: int,
    ) -> float:
        for p, g in zip(params, end.gradients, strict=True):
            p.grad = g
        self._carried = Carried(end, params, None if self._alone else line.iterate(params))
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
        self._failed_with = None if self._outcome.accepted else (self._next_step, *self._options.values())
        return end.value

    def _recall(self, params: list[Tensor]) -> Evaluation | None:
        """Return the carried evaluation, if it still belongs to the parameters, on all processes alike."""
        carried = self._carried if self._options["reuse_gradient"] else None
        lost = carried is None or not carried.holds(params)
        if not self._alone and world_size() > 1:
            lost = count_over_ranks(int(lost), own_shard(params[0]).device) > 0
        return None if lost or carried is None else carried.evaluation

    def _forget(self) -> None:
        """Drop the carried evaluation and the gradients that belong to it."""
        carried, self._carried = getattr(self, "_carried", None), None
        if carried is not None:
            # A group may just have been added, which the evaluation does not know.
            for p, g in zip(parameters_of(self), carried.evaluation.gradients, strict=False):
                p.grad = None if p.grad is g else p.grad

    def _drop_gradients(self, params: Sequence[Tensor]) -> None:
        for p in params:
            p.grad = None
        self._carried = None

    def state_dict(self) -> dict[str, Any]:
        """Return the torch state and the search's own; plain numbers, so that a resumed run continues bit for bit.

        The carried gradient is not stored: the first step after a resume evaluates the closure once more, which no
        count includes.
        """
        state, group, params = super().state_dict(), self.param_groups[0], parameters_of(self)
        options = {name: group[name] for name in self._options}
        as_left = options == self._options and group["lr"] == self._next_step  # Else the next step begins to count.
        saved = {index: self._direction.saved(entries) for index, entries in state["state"].items()}
        state["state"] = {
            index: {name: shard_of(params[index], value) for name, value in entries.items()}
            for index, entries in saved.items()
            if entries
        }
        outcome = self._outcome and asdict(self._outcome) | {"status": self._outcome.status.value}
        state["search"] = {
            "next_step": group["lr" if group["initial_step"] == self._options["initial_step"] else "initial_step"],
            "streak": self._streak if as_left else 0,
            "steps_ran_away": self._steps_ran_away and as_left,
            "total_evaluations": self._total_evaluations,
            "outcome": outcome,
            "direction": {"kind": self._direction.kind, **self._direction.state_dict()},
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore options and search state, made by :meth:`state_dict`; its options win over the constructor's.

        Raises:
            ValueError: If it belongs to another optimizer.
        """
        if "search" not in state_dict:
            raise UserError(f"this state_dict was not made by {self._name}: it has no entry 'search'.")
        search, outcome = state_dict["search"], state_dict["search"]["outcome"]
        learnt = search.get("direction", {"kind": "steepest descent"})  # Older states have no other.
        if learnt["kind"] != self._direction.kind:
            raise UserError(
                f"this state_dict was not made by {self._name}: it searched by {learnt['kind']}, and not by "
                f"{self._direction.kind}."
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "search"})
        options = {name: self.param_groups[0][name] for name in self._options}
        check_options(options, self._name)
        self._options, self._streak, self._failed_with = options, search["streak"], None
        self._steps_ran_away = search.get("steps_ran_away", False)  # Older states have none.
        self._set_next_step(search["next_step"])  # Older states have no lr.
        self._direction.load_state_dict(learnt)
        space = Space(parameters_of(self), self.state, self._options)
        for p in list(self.state):
            entries = {name: own_shard(value) for name, value in self.state[p].items()}
            self.state[p] = self._direction.loaded(entries, space)
        self._total_evaluations = search["total_evaluations"]
        self._outcome = outcome and SearchOutcome(**outcome | {"status": SearchStatus(outcome["status"])})
        self._resumed = self._options["reuse_gradient"] and outcome is not None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # Torch leaves hooks out, and what schedulers do to step, which would still step the original. The carried
        # gradient and the copies of the parameters belong to the original, too.
        resumed = self._options["reuse_gradient"] and self._outcome is not None
        own = ("_options", "_direction", "_outcome", "_next_step", "_streak", "_total_evaluations", "_steps_ran_away")
        state = super().__getstate__() | {name: getattr(self, name) for name in own}
        return state | {"_carried": None, "_line": None, "_alone": False, "_failed_with": None, "_resumed": resumed}
