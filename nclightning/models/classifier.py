"""The regularised classifier: a backbone and a linear head, trained on Problem (2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import Optimizer

from nclightning.compat.lightning import count_iterations, trainer_of
from nclightning.errors import UserError
from nclightning.interrupts import HeldInterrupts, deferred_interrupt
from nclightning.models.graph import AutogradObjective
from nclightning.models.known import check_known, features_are_free
from nclightning.models.resumable import ResumableModule
from nclightning.models.schedules import check_optimization
from nclightning.models.sharded import (
    ShardedObjective,
    check_sharding,
    keep_optimizers_whole,
    shard_weights,
)
from nclightning.models.trainers import check_trainer
from nclightning.models.tuning import tuned
from nclightning.objective import Objective
from nclightning.optim import ArmijoGD, LineObjective, LineSearchOptimizer
from nclightning.optim.evaluation import parameters_of
from nclightning.optim.outcome import failure_of
from nclightning.probe.features import capture_features
from nclightning.problems import Problem
from nclightning.ranks import count_over_ranks, sum_over_ranks, world_size
from nclightning.sharding import is_sharded, own_shard, reshard
from nclightning.theory import UFMProblem

__all__ = ["Penalty", "RegularizedClassifier"]

Batch = tuple[Tensor, Tensor]
Penalty = Literal["features", "weights"]
# Loss and bias.
_OF_THE_PAPER = {("mse", "free"), ("ce", "none")}


class RegularizedClassifier(ResumableModule):
    """A backbone and a linear head, trained on Problem (2) by full-batch iterations.

    One ``training_step`` runs many optimizer iterations on the batch, so that the overhead of a Lightning step is paid
    once for all of them. ``trainer.max_steps`` and ``trainer.global_step`` count iterations. Callbacks that define
    ``on_iteration_end(trainer, pl_module, batch, iteration)`` are called after each iteration. Training ends early when
    a line search finds no step, or when the objective under another optimizer is no longer finite.

    ``configure_optimizers`` of a subclass may return a scheduler with its one optimizer. The scheduler is stepped every
    ``frequency`` iterations, whatever its interval: an iteration uses the whole training set, so that it is both a step
    and an epoch. ``ReduceLROnPlateau``, which needs a metric each time, is refused.

    Batches are pairs ``(x, y)``. The backbone is called with ``x``, and the head with the output of the backbone.

    Several processes share the samples. With ``trainer.strategy=ddp`` each process has all weights. With
    ``ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1, save_distributed_checkpoint=False)`` each
    process has a shard of them. Checkpoints are the same as those of a single process.

    Args:
        backbone: Module from ``x`` to features ``(B, d)``.
        head: Last layer; ``head.in_features`` is d.
        objective: Loss and penalties.
        num_samples: N, the size of the training set. The feature penalty of a smaller batch is scaled by it.
        optimizer: Function from the parameters to the optimizer, whose ``step`` is called with a closure.
        iterations_per_step: Optimizer iterations per ``training_step``. Checkpoints are saved, and training stops, at
            multiples of it.
        penalty: What ``objective.lambda_h`` penalises: ``"features"``, as in Problem (2), or ``"weights"``, all
            parameters of the backbone, as in Problem (1) with weight decay. The latter has no closed form.

    Raises:
        ValueError: If an option is out of range. Also raised at the start of a fit, if a parameter is not finite, the
            trainer's options do not fit, or a checkpoint of another problem is resumed.

    Example:
        >>> import torch
        >>> from nclightning.models import RegularizedClassifier
        >>> from nclightning.objective import Objective
        >>> backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, 5), torch.nn.ReLU())
        >>> objective = Objective("ce", lambda_w=1e-3, lambda_h=1e-3)
        >>> model = RegularizedClassifier(backbone, torch.nn.Linear(5, 3, bias=False), objective, num_samples=30)
        >>> x, y = torch.randn(30, 2, 4), torch.arange(30) % 3
        >>> model.features_of(x).shape, model.evaluate_objective((x, y)).shape
        (torch.Size([30, 5]), torch.Size([]))
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Linear,
        objective: Objective,
        num_samples: int,
        optimizer: OptimizerCallable = ArmijoGD,
        iterations_per_step: int = 100,
        penalty: Penalty = "features",
    ) -> None:
        super().__init__()
        if iterations_per_step < 1:
            raise UserError(f"iterations_per_step must be at least 1, got {iterations_per_step}.")
        if penalty not in get_args(Penalty):
            raise UserError(f"penalty must be 'features' or 'weights', got {penalty!r}.")
        self.automatic_optimization = False
        self.backbone = backbone
        self.head = head
        self.objective = objective
        self.num_samples = num_samples
        self.iterations_per_step = iterations_per_step
        self.penalty = penalty
        self._make_optimizer = optimizer
        self._interrupts = HeldInterrupts()
        self._begins = True  # Whether a fit has made no iteration yet.
        self._trained: tuple[Any, ...] = ()  # Objective, head and backbone of a fit.
        self._dtype_of_head = head.weight.dtype  # Before a trainer's precision converts it.

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits ``(B, K)``."""
        logits: Tensor = self.head(self.backbone(x))
        return logits

    def evaluate_objective(self, batch: Batch) -> Tensor:
        """Evaluate F on a batch.

        Args:
            batch: Pair ``(x, y)``.

        Returns:
            Scalar with its graph.
        """
        x, labels = batch
        features = self.backbone(x)
        logits, weight, bias = self.head(features), self.head.weight, self.head.bias
        if self.penalty == "weights":
            return self.objective.from_logits(
                logits, weight, parameters_to_vector(self.backbone.parameters()), labels, bias
            )
        return self.objective.from_logits(logits, weight, features, labels, bias, self.num_samples)

    def features_of(self, x: Tensor) -> Tensor:
        """Compute the features, the input of the head.

        Args:
            x: Input of a batch.

        Returns:
            ``(B, d)``.
        """
        reshard(self)
        try:
            return capture_features(self, self.head, x)
        finally:
            if not torch.is_grad_enabled():
                reshard(self)

    def count_free_parameters(self) -> int:
        """Count the trainable parameters of the whole model, as numbers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def value_and_grad_norm(self, batch: Batch) -> tuple[Tensor | float, Tensor | float]:
        """Evaluate F and the norm of its gradient over all trainable parameters, without changing their ``.grad``.

        Args:
            batch: The samples of this process.

        Returns:
            F and the norm for the whole training set: numbers from the last optimizer step if they are still valid,
            otherwise scalars on the device.
        """
        fitting = trainer_of(self) is not None and self.trainer.training
        optimizer = self.optimizers(use_pl_optimizer=False) if fitting else None
        reshard(self)
        params = [p for p in self.parameters() if p.requires_grad]
        if isinstance(optimizer, LineSearchOptimizer):
            moved = {id(p) for p in parameters_of(optimizer)}
            known = optimizer.evaluation() if moved == {id(p) for p in params} else None
            if known is not None:
                return known.value, math.sqrt(known.square)
        gradients = [p.grad for p in params]
        try:
            value, square = self.make_closure(batch, params, measuring=True).measure()
        finally:
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient
        return value, square.sqrt()

    @property
    def problem(self) -> UFMProblem | Problem:
        """The unconstrained feature model with this head and objective, on balanced groups.

        For a network its minimum is a lower bound. A subclass that trains another problem may override this property.

        Raises:
            ValueError: If this module is not known to train Problem (2) with a free linear head on balanced data, or if
                a penalty is zero or on weights.
        """
        check_known(self, self._is_unconstrained)
        objective, head = self.objective, self.head
        groups = head.out_features if objective.targets is None else len(objective.targets)
        count, rest = divmod(self.num_samples, groups)
        if rest:
            raise UserError(
                f"num_samples must be a multiple of the number of classes, got {self.num_samples} samples of {groups} "
                "classes: the known minimum is that of balanced data. Train on as many samples of each class, or "
                "override the property problem."
            )
        bias: Literal["none", "free"] | float = "none" if head.bias is None else objective.lambda_b or "free"
        penalties = objective.lambda_w, objective.lambda_h
        # With a free bias the minimum of balanced cross-entropy is the same, but its optimal set is not.
        kind = objective.loss, "none" if objective.loss == "ce" and not self.features_are_free else bias
        # With fewer features than a simplex ETF needs, cross-entropy has no known optimum, only a lower bound.
        fits = objective.loss == "mse" or head.in_features >= groups - 1
        if objective.targets is None and kind in _OF_THE_PAPER and fits:
            return UFMProblem(objective.loss, groups, count, head.in_features, *penalties)  # type: ignore[arg-type]
        return Problem(objective.function, objective.targets, [count] * groups, head.in_features, *penalties, bias=bias)

    @property
    def features_are_free(self) -> bool:
        """Whether the features are parameters that enter the head unchanged."""
        return features_are_free(self)

    def configure_model(self) -> None:
        """Shard the weights under ``ModelParallelStrategy``."""
        if trainer_of(self) is not None and isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard_weights(self, self.trainer.strategy)

    def configure_optimizers(self) -> Optimizer:
        """Make the optimizer of all parameters. If it needs mu and L, they are those of the problem."""
        return tuned(self._make_optimizer(self.parameters()), self)

    def on_fit_start(self) -> None:
        """Refuse options that would make the run wrong or useless, and find the callbacks that follow iterations."""
        if self._ending is None:  # Otherwise no iteration follows, and parameters need not be finite.
            self.check_parameters()
        self.check_trainer(self.trainer)
        self._begins = True
        self._trained = self.objective, self.head, self.backbone
        self._interrupts = HeldInterrupts()
        if self.trainer.world_size > 1:
            self._interrupts.hold()
        check_optimization(self.trainer)
        self._schedules = self.trainer.lr_scheduler_configs
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy):
            check_sharding(self, self.optimizers(use_pl_optimizer=False))
            keep_optimizers_whole(strategy)
        followers = [callback for callback in self.trainer.callbacks if hasattr(callback, "on_iteration_end")]  # type: ignore[attr-defined]
        self._iteration_hooks: list[Callable[..., None]] = [callback.on_iteration_end for callback in followers]
        # The callbacks of this package do not change parameters; others may.
        self._is_followed_by_others = any(
            type(callback).__module__.partition(".")[0] != __name__.partition(".")[0] for callback in followers
        )

    def check_trainer(self, trainer: L.Trainer) -> None:
        """Raise an error unless the trainer's options fit the full-batch loop.

        Args:
            trainer: A trainer before or at the start of a fit.

        Raises:
            ValueError: If an option does not fit; the message names it.
        """
        check_trainer(trainer, self, self._dtype_of_head)

    def check_parameters(self) -> None:
        """Raise an error unless all parameters are finite. All processes raise the same error.

        Raises:
            ValueError: If a parameter is not finite; the message names it.
        """
        named = [(name, own_shard(p.detach())) for name, p in self.named_parameters()]
        # The largest absolute entry is finite only if all are, and needs no copy. A shard may be empty.
        greatest = [torch.linalg.vector_norm(p, math.inf).double() if p.numel() else p.sum().double() for _, p in named]
        invalid = torch.stack(greatest).isfinite().logical_not().long() if named else torch.zeros(0)
        for (name, _), count in zip(named, sum_over_ranks(invalid).tolist(), strict=True):
            if count:
                raise UserError(f"{name} has entries that are not finite before training. Check its initialisation.")

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """End a resumed run at once if its line search had ended before."""
        if self._begins and self._ending is not None:
            self.print(self._ending)
            self.trainer.should_stop = True

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Run iterations up to the next multiple of ``iterations_per_step`` or ``max_steps``."""
        trainer, optimizer = self.trainer, self.optimizers(use_pl_optimizer=False)
        assert isinstance(optimizer, Optimizer)
        self._check_unchanged()
        begins, self._begins = self._begins, False
        if begins and trainer.should_stop:
            return  # This run is resumed from the iteration at which it had stopped.
        start = trainer.global_step
        count = self.iterations_per_step - start % self.iterations_per_step
        if trainer.max_steps >= 0:
            count = min(count, trainer.max_steps - start)
        params = parameters_of(optimizer)
        closure: Any = self.make_closure(batch, params)
        trainable = [p.requires_grad for p in params]
        alone = isinstance(optimizer, LineSearchOptimizer) and not self._is_followed_by_others
        done = 0
        # An interrupt between a step and the update of its count would shift all iterations of a resumed run.
        with deferred_interrupt() as interrupt, optimizer.alone() if alone else nullcontext():  # type: ignore[attr-defined]
            try:
                for _ in range(count):
                    if not alone and trainable != [p.requires_grad for p in params]:  # A hook froze or unfroze some.
                        closure, trainable = self.make_closure(batch, params), [p.requires_grad for p in params]
                    value = optimizer.step(closure)
                    done += 1
                    self._step_schedulers(start + done)
                    for hook in self._iteration_hooks:
                        hook(trainer, self, batch, start + done)
                    failure = failure_of(optimizer, value)
                    if failure is not None:
                        self.failure = {"iteration": start + done} | asdict(failure)
                        self.print(f"Iteration {start + done}: {failure.sentence}")
                        trainer.should_stop = True
                    # All processes must run the same iterations: one that was interrupted alone finishes this call.
                    if trainer.should_stop or (interrupt.waiting and trainer.world_size == 1):
                        break
                interrupted = self._any_interrupt(interrupt.waiting)
            finally:
                count_iterations(trainer, done, start + done)
        if interrupted:
            self._interrupts.release()
            raise KeyboardInterrupt

    def _check_unchanged(self) -> None:
        """Raise an error if a part was replaced during a fit: optimizer and monitors still refer to the old one."""
        for name, part in zip(("objective", "head", "backbone"), self._trained, strict=True):
            if getattr(self, name) is not part:
                raise UserError(
                    f"{name} was replaced during the fit, but the optimizer and the monitors refer to the old one: end "
                    "the fit, replace it, and fit again."
                )

    def _step_schedulers(self, iteration: int) -> None:
        """Step each scheduler that is due after an iteration."""
        for config in self._schedules:
            if iteration % config.frequency == 0:
                self.lr_scheduler_step(config.scheduler, None)

    def _any_interrupt(self, here: bool) -> bool:
        """Whether any of several processes was interrupted. A single process raises by itself."""
        if self.trainer.world_size == 1:
            return False
        return count_over_ranks(int(here or self._interrupts.waiting), self.device) > 0

    def teardown(self, stage: str) -> None:
        """Stop deferring interrupts."""
        self._interrupts.release()
        self._ending, self._trained = None, ()

    def make_closure(self, batch: Batch, params: Sequence[Tensor], *, measuring: bool = False) -> LineObjective:
        """Make the closure that evaluates F on the training set, for optimizers and line searches.

        Args:
            batch: The samples of this process.
            params: The parameters that an optimizer moves.
            measuring: Whether the closure is used only to measure, between the steps of an optimizer.

        Returns:
            F as a closure, also along directions, summed over processes.
        """
        # F on the samples of one process is an estimate of F. The mean over processes, weighted by samples, is F.
        count = len(batch[1])
        share = 1.0 if world_size() == 1 else count / max(count_over_ranks(count, self.device), 1)

        def objective() -> Tensor:
            return share * self.evaluate_objective(batch)

        return ShardedObjective(objective, params, self) if is_sharded(self) else AutogradObjective(objective, params)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log F as ``loss``."""
        self._log_objective(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log F as ``loss``."""
        self._log_objective(batch)

    def _log_objective(self, batch: Batch) -> None:
        """Evaluate F on a batch and log it as ``loss``."""
        reshard(self)
        # In inference mode, sharded weights would be gathered into tensors that cannot be trained later.
        with torch.inference_mode(False), torch.no_grad():
            value = self.evaluate_objective(batch)
        # Lightning averages over samples, but rounds the mean number of samples per process down.
        self.log("loss", value, sync_dist=True, batch_size=len(batch[1]) * self.trainer.world_size)

    _is_unconstrained = False  # Whether the class promises that features are free parameters.
