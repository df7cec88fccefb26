"""The base class of the optimizers with a line search."""

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
from nclightning.optim.backtracking import SearchResult, backtrack
from nclightning.optim.direction import Descent, Direction, Space
from nclightning.optim.evaluation import Evaluation, StoredEvaluation, parameters_of
from nclightning.optim.objectives import ClosureObjective, LineObjective
from nclightning.optim.options import check_group, check_options, common_options, vanishing_step
from nclightning.optim.outcome import SearchOutcome, SearchStatus
from nclightning.optim.start import check_parameters, evaluate_start, missing_closure_error, warn_if_random
from nclightning.optim.unchanged import remember
from nclightning.ranks import count_over_ranks, world_size
from nclightning.sharding import own_shard, shard_of

__all__ = ["LineSearchOptimizer"]


class LineSearchOptimizer(Optimizer):
    r"""Base class of :class:`ArmijoGD` and the other optimizers with a line search.

    A step goes from x to x - t p. A direction chooses the descent vector p, whose inner product with the gradient g is
    positive. A line search, the same for all directions, chooses the step t as :class:`ArmijoGD` describes it for
    p = g: a trial is accepted when

    .. math:: F(x - t p) \le F(x) - c_1 t \langle g, p \rangle ,

    or, where the change of F is below its round-off, when

    .. math:: \langle \nabla F(x - t p), p \rangle \ge -(1 - 2 c_1) \langle g, p \rangle .

    If no step is found along a vector that depends on earlier steps, these are forgotten, and the same step searches
    along the gradient.

    Args:
        params: Parameters or parameter groups. Real and dense.
        options: Options by name, the same for all groups.
        direction: The object that chooses descent vectors. It must not be shared with another optimizer.

    Raises:
        ValueError: If an option is out of range, a group sets options of its own, or a parameter is complex or
            occurs twice in a group.

    Example:
        >>> import torch
        >>> from nclightning.optim import ArmijoGD, LineSearchOptimizer
        >>> optimizer: LineSearchOptimizer = ArmijoGD([torch.nn.Parameter(torch.ones(2))], c1=0.2)
        >>> optimizer.param_groups[0]["c1"], optimizer.total_evaluations, optimizer.outcome
        (0.2, 0, None)
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
        self._options = options  # As the last step read them from the groups.
        self._next_step = float(options["initial_step"])  # As the last step wrote it to the lr of all groups.
        self._outcome: SearchOutcome | None = None
        self._streak = 0
        self._total_evaluations = 0
        self._resumed = False
        self._steps_ran_away = False
        self._failed_with: tuple[Any, ...] | None = None  # First trial and options of the last search, if it failed.
        self._stored: StoredEvaluation | None = None  # Value and gradient at the current iterate.
        self._alone = False  # Whether only this optimizer writes to the parameters.
        self._closure_objective: ClosureObjective | None = None  # Kept for its copies of the parameters.

    @property
    def _name(self) -> str:
        """Name of the user's class, for messages."""
        return type(self).__name__

    @property
    def outcome(self) -> SearchOutcome | None:
        """Result of the last step; None before the first."""
        return self._outcome

    @property
    def total_evaluations(self) -> int:
        """Calls of the closure and products with the Hessian in all steps, without the one that a resume repeats."""
        return self._total_evaluations

    def evaluation(self) -> Evaluation | None:
        """Return value and gradient if the parameters are those of the last step, else None. All ranks must call it."""
        return self._recall(parameters_of(self))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Promise that no other code writes to the parameters through ``.data`` between the steps within the block.

        The comparison with the last iterate, which costs time, is then made only at the beginning and after the end of
        the block. Writes that torch's version counters see are still noticed.
        """
        params = parameters_of(self)
        if self._recall(params) is None:
            self._forget()
        self._alone, before = True, self._alone
        try:
            yield
        finally:
            self._alone = before
            stored = self._stored
            if stored is not None and not before:
                stored.compare_with(None)  # Was any parameter written to within the block?
                if stored.is_valid(params):
                    stored.compare_with(remember(params))
                else:
                    self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the joint search direction.

        Args:
            param_group: ``{"params": ...}`` without options, because all groups have the same step size.

        Raises:
            ValueError: If the group sets an option, or a parameter is complex or occurs twice.
        """
        if isinstance(param_group, dict) and not isinstance(param_group.get("params"), (Tensor, set, type(None))):
            param_group = {**param_group, "params": list(param_group["params"])}
            check_group(param_group, self.defaults, self._name)
        super().add_param_group(param_group)
        first, new = self.param_groups[0], self.param_groups[-1]
        new.update({name: first[name] for name in self.defaults if name in first})
        self._forget()

    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Search along the descent vector, and move the parameters to the accepted trial.

        Args:
            closure: Function that clears the gradients, computes the objective at the current parameters, calls
                ``backward`` and returns the value. It is called once per trial. A
                :class:`~nclightning.optim.LineObjective` will do as well.

        Returns:
            Objective after the step; :attr:`outcome` has more. If no trial was accepted, the parameters are restored
            bit for bit.

        Raises:
            ValueError: If the closure is missing, returns no scalar, leaves no gradient or changes a parameter; if the
                objective or its gradient is not finite at the start; if a gradient is sparse, or was accumulated
                before the step; if an option or ``lr`` in ``param_groups`` is out of range or not the same in all
                groups; if no parameter is trainable.
        """
        if closure is None:
            raise missing_closure_error(self._name)
        self._read_groups()
        params = parameters_of(self)
        with torch.no_grad():
            return self._search(self._objective_of(closure, params), params)

    def _read_groups(self) -> None:
        """Apply changes that were made in the parameter groups since the last step."""
        options, first = common_options(self.param_groups, self._options, self._name)
        if options == self._options and first == self._next_step:
            return
        check_options(options, self._name)
        if options["initial_step"] != self._options["initial_step"]:
            first = float(options["initial_step"])
        self._options, self._steps_ran_away, self._streak = options, False, 0
        self._set_next_step(first)

    def _set_next_step(self, size: float) -> None:
        """Set the first trial of the next search, in the groups as well."""
        self._next_step = size
        for group in self.param_groups:
            group["lr"] = size

    def _objective_of(self, closure: Callable[[], Any], params: list[Tensor]) -> LineObjective:
        """Return the objective of a closure, which keeps its copies of the parameters."""
        if isinstance(closure, LineObjective):
            return closure
        if self._closure_objective is None or not self._closure_objective.has(params):
            self._closure_objective = ClosureObjective(closure, params, self._name)
        self._closure_objective.closure = closure
        return self._closure_objective

    def _search(self, objective: LineObjective, params: list[Tensor]) -> float:
        """Take a step: evaluate the start if needed, search, and record the outcome."""
        stored = self._recall(params)
        spent = 0
        if stored is not None and self._may_search_from(stored):
            start = stored
        else:
            start = self._evaluate_start(objective, params)
            spent = 0 if self._resumed else 1
            self._resumed = False
            if stored is not None and self._fails_again(stored, start):
                assert self._outcome is not None
                return self._finish(objective, params, start, start, self._outcome.status, 0.0, spent)
        status = self._reason_to_stay(start, params)
        if status is not None:
            return self._finish(objective, params, start, start, status, 0.0, spent)

        space = Space(params, self.state, self._options)
        found, evaluations = self._find_step(objective, start, space)
        spent += evaluations
        if found.end is None:
            return self._finish(objective, params, start, start, found.status, 0.0, spent)
        self._adapt(start, found, objective, space)
        return self._finish(objective, params, start, found.end, found.status, found.size, spent)

    def _find_step(self, objective: LineObjective, start: Evaluation, space: Space) -> tuple[SearchResult, int]:
        """Search along the descent vector, then along the gradient. Return the result and the number of evaluations."""
        trials, spent, direction = 0, 0, self._direction
        while True:
            try:
                descent = direction.find(start, objective, space)
                objective.begin(start, descent.along)
                found = self._search_along(objective, start, descent, space)
            except BaseException:
                self._drop_gradients(space.params)
                raise
            trials += found.trials
            spent += descent.evaluations
            if found.end is not None:
                break
            objective.reject()
            if not direction.restart():
                break
        return found._replace(trials=trials), trials + spent

    def _search_along(
        self, objective: LineObjective, start: Evaluation, descent: Descent, space: Space
    ) -> SearchResult:
        """Search along a descent vector, and restore the parameters after an exception."""
        interpolates = self._direction.interpolates
        try:
            return backtrack(
                self._options, self._next_step, objective, start, descent.slope, space.params, interpolates
            )
        except BaseException:
            objective.reject()
            raise

    def _may_search_from(self, stored: Evaluation) -> bool:
        """Return whether a search from here calls the closure. If not, it is called anyway: at least once per step."""
        accepted = self._outcome is not None and self._outcome.accepted
        return accepted and stored.square > 0 and not self._steps_ran_away

    def _evaluate_start(self, objective: LineObjective, params: list[Tensor]) -> Evaluation:
        """Check the parameters, and evaluate the objective there."""
        own = None if self._stored is None else self._stored.evaluation.gradients
        check_parameters(objective, params, own, self._name)
        try:
            return evaluate_start(objective, params)
        except BaseException:
            self._drop_gradients(params)
            raise

    def _fails_again(self, known: Evaluation, start: Evaluation) -> bool:
        """Return whether the search would repeat the last one, which failed: same point, options and values."""
        warn_if_random(known, start, self._name)
        same = start.value == known.value and start.square == known.square
        return same and self._failed_with == (self._next_step, *self._options.values())

    def _reason_to_stay(self, start: Evaluation, params: list[Tensor]) -> SearchStatus | None:
        """Return why the parameters stay where they are, or None if there is a step to search for."""
        if start.square == 0.0:
            vanished = self._next_step * self._direction.scale > vanishing_step(params)
            return SearchStatus.UNATTAINED if vanished else SearchStatus.STATIONARY
        return SearchStatus.UNATTAINED if self._steps_ran_away else None

    def _adapt(self, start: Evaluation, found: SearchResult, objective: LineObjective, space: Space) -> None:
        """Update the direction after an accepted step, and choose the first trial of the next one."""
        self._streak = self._streak + 1 if found.trials == 1 else 0
        self._direction.accept(start, found, objective, space)
        size, self._steps_ran_away = self._direction.next_trial(found, self._streak, space)
        self._streak = 0 if size > found.size else self._streak
        self._set_next_step(size)

    def _finish(
        self,
        objective: LineObjective,
        params: list[Tensor],
        start: Evaluation,
        end: Evaluation,
        status: SearchStatus,
        size: float,
        evaluations: int,
    ) -> float:
        """Set gradients, stored evaluation, counts and outcome at the end of a step; return the objective."""
        for p, g in zip(params, end.gradients, strict=True):
            p.grad = g
        self._stored = StoredEvaluation(end, params, None if self._alone else objective.iterate(params))
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
        """Return the stored evaluation if it is valid on all processes, else None."""
        stored = self._stored if self._options["reuse_gradient"] else None
        lost = stored is None or not stored.is_valid(params)
        if not self._alone and world_size() > 1:
            lost = count_over_ranks(int(lost), own_shard(params[0]).device) > 0
        return None if lost or stored is None else stored.evaluation

    def _forget(self) -> None:
        """Drop the stored evaluation, and the gradients that belong to it."""
        stored, self._stored = getattr(self, "_stored", None), None
        if stored is not None:
            # The evaluation has no gradients for a group that was just added.
            for p, g in zip(parameters_of(self), stored.evaluation.gradients, strict=False):
                p.grad = None if p.grad is g else p.grad

    def _drop_gradients(self, params: Sequence[Tensor]) -> None:
        """Drop all gradients after an exception."""
        for p in params:
            p.grad = None
        self._stored = None

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state and that of the line search, so that a resumed run continues bit for bit.

        The gradient is not saved. The first step after a resume therefore evaluates the closure once more; no count
        includes this evaluation.
        """
        state, group, params = super().state_dict(), self.param_groups[0], parameters_of(self)
        options = {name: group[name] for name in self._options}
        as_left = (
            options == self._options and group["lr"] == self._next_step
        )  # If not, the next step resets the streak.
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
        """Restore the state of :meth:`state_dict`. Its options replace those of the constructor.

        Raises:
            ValueError: If it was made by another optimizer.
        """
        if "search" not in state_dict:
            raise UserError(f"this state_dict was not made by {self._name}: it has no entry 'search'.")
        search, outcome = state_dict["search"], state_dict["search"]["outcome"]
        saved_direction = search.get("direction", {"kind": "steepest descent"})  # Older states have no direction.
        if saved_direction["kind"] != self._direction.kind:
            raise UserError(
                f"this state_dict was not made by {self._name}: it is a state of {saved_direction['kind']}, not of "
                f"{self._direction.kind}."
            )
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "search"})
        options = {name: self.param_groups[0][name] for name in self._options}
        check_options(options, self._name)
        self._options, self._streak, self._failed_with = options, search["streak"], None
        self._steps_ran_away = search.get("steps_ran_away", False)  # Older states have none.
        self._set_next_step(search["next_step"])  # Older states have no lr.
        self._direction.load_state_dict(saved_direction)
        space = Space(parameters_of(self), self.state, self._options)
        for p in list(self.state):
            entries = {name: own_shard(value) for name, value in self.state[p].items()}
            self.state[p] = self._direction.loaded(entries, space)
        self._total_evaluations = search["total_evaluations"]
        self._outcome = outcome and SearchOutcome(**outcome | {"status": SearchStatus(outcome["status"])})
        self._resumed = self._options["reuse_gradient"] and outcome is not None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        # As in torch, a copy has neither hooks nor the wrapper that schedulers put around step, which would step the
        # original. The stored gradient and the copies of the parameters belong to the original, too.
        resumed = self._options["reuse_gradient"] and self._outcome is not None
        own = ("_options", "_direction", "_outcome", "_next_step", "_streak", "_total_evaluations", "_steps_ran_away")
        state = super().__getstate__() | {name: getattr(self, name) for name in own}
        return state | {
            "_stored": None,
            "_closure_objective": None,
            "_alone": False,
            "_failed_with": None,
            "_resumed": resumed,
        }
