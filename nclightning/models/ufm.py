"""The unconstrained feature model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from nclightning.arguments import DtypeName, check_memory, check_scales, resolve_dtype
from nclightning.compat.lightning import trainer_of
from nclightning.compat.torch import has_hooks, leave_out_of_ddp, sees_gradients, version_of
from nclightning.errors import UserError
from nclightning.models.backbones import FeatureTable, undefined_linear
from nclightning.models.classifier import Batch, RegularizedClassifier
from nclightning.models.closed_form import UFMObjective
from nclightning.models.known import check_known
from nclightning.models.schedules import only_optimizer
from nclightning.models.settings import Settings
from nclightning.objective import LossName
from nclightning.optim import ArmijoGD, LineObjective, LineSearchOptimizer
from nclightning.optim.evaluation import parameters_of
from nclightning.problems import Problem
from nclightning.ranks import own_rows
from nclightning.theory import UFMProblem

__all__ = ["UFM"]

_DRAWN_AT_A_TIME = 2**16
_OPTIMIZERS_OF_SHARED_FEATURES = (
    LineSearchOptimizer,
    *(getattr(torch.optim, name) for name in ("SGD", "ASGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam")),
    *(getattr(torch.optim, name) for name in ("RMSprop", "Rprop", "Adagrad", "Adadelta")),
)


class UFM(RegularizedClassifier):
    r"""The unconstrained feature model, whose features are free parameters (paper, Problems (5) and (8)).

    All sizes and penalties are given here once; :class:`~nclightning.data.IndexDataModule` takes them from the model.
    They are those of one of the paper's two problems, balanced MSE with a free bias or balanced cross-entropy without
    one; or those of any :class:`nclightning.problems.Problem`, with any convex loss, targets, counts and bias. Labels
    in batches are the groups of the problem; for hard labels these are the classes.

    With several processes (``trainer.strategy=ddp``) each process has some rows of the features, and the whole head.

    Args:
        num_classes: K, at least 2.
        samples_per_class: n, at least 1.
        feature_dim: d, at least 1.
        loss: ``"mse"`` or ``"ce"``.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        lambda_: The paper's single lambda, from which missing penalties are set: ``lambda_w = n * lambda_`` and
            ``lambda_h = lambda_``. In a configuration it may be spelt ``lambda``.
        init_scale: Standard deviation of the initial entries of head and features, which are normally distributed. The
            bias starts at 0.
        dtype: ``"float64"`` or ``"float32"``, the precision of parameters, training and checkpoints.
        optimizer: Function from the parameters to the optimizer.
        iterations_per_step: Optimizer iterations per Lightning step.
        problem: The problem to train, instead of sizes, loss and penalties; or its description, the result of
            :meth:`nclightning.problems.Problem.describe`.

    Raises:
        ValueError: If an argument is out of range, a size or a penalty is missing, or differs from the problem's.

    Example:
        >>> from nclightning.models import UFM
        >>> from nclightning.problems import unbalanced_ce
        >>> model = UFM(problem=unbalanced_ce([20, 5, 1], feature_dim=4, lambda_w=1e-2, lambda_h=1e-3))
        >>> model.features.shape
        torch.Size([26, 4])
    """

    _problem_hparams = (
        "num_classes",
        "samples_per_class",
        "feature_dim",
        "loss",
        "lambda_w",
        "lambda_h",
        "dtype",
        "problem",
    )
    _is_unconstrained = True

    def __init__(
        self,
        num_classes: int | None = None,
        samples_per_class: int | None = None,
        feature_dim: int | None = None,
        loss: LossName | None = None,
        lambda_w: float | None = None,
        lambda_h: float | None = None,
        lambda_: float | None = None,
        init_scale: float = 1.0,
        dtype: DtypeName = "float64",
        optimizer: OptimizerCallable = ArmijoGD,
        iterations_per_step: int = 100,
        problem: Problem | None = None,
    ) -> None:
        check_scales(init_scale=init_scale)
        torch_dtype = resolve_dtype(dtype)
        given = {
            "num_classes": num_classes,
            "samples_per_class": samples_per_class,
            "feature_dim": feature_dim,
            "loss": loss,
            "lambda_w": lambda_w,
            "lambda_h": lambda_h,
            "lambda_": lambda_,
        }
        settings = Settings.of_the_paper(given) if problem is None else Settings.of_problem(problem, given)
        K, N, d = settings.num_classes, settings.num_samples, settings.feature_dim
        check_memory("this UFM", (N + K) * d, torch_dtype)
        super().__init__(
            backbone=FeatureTable(N, d, torch_dtype),
            head=undefined_linear(d, K, torch_dtype, bias=settings.has_bias),
            objective=settings.objective,
            num_samples=N,
            optimizer=optimizer,
            iterations_per_step=iterations_per_step,
        )
        leave_out_of_ddp(self, ["backbone.features"])  # Processes have different rows, which must not be averaged.
        self._settings = settings
        # The tensor of indices that was last found to be all rows in order, and its version counter.
        self._all_rows: tuple[Tensor, int] | None = None
        self.save_hyperparameters(ignore=["optimizer", "problem"])
        self.save_hyperparameters(settings.hyperparameters())  # Resolved, so that a checkpoint says what was trained.
        self.reset_parameters(init_scale)

    @property
    def problem(self) -> UFMProblem | Problem:
        """The problem that was given; otherwise the paper's problem, as in :attr:`RegularizedClassifier.problem`."""
        given = self._settings.problem
        if given is None:
            return super().problem
        check_known(self, self._is_unconstrained)
        if self.objective is not self._settings.objective:
            raise UserError(
                "objective is not that of the problem that the UFM was made with: make a UFM with the problem to "
                "train, or override the property problem."
            )
        return given

    @torch.no_grad()
    def reset_parameters(self, init_scale: float) -> None:
        """Draw head and features from the global generator, in float64 for every dtype, and set the bias to zero.

        Args:
            init_scale: Standard deviation.
        """
        for p in (self.head.weight, self.features):
            # In parts: drawn at once in float64, they could need several times the memory of the features.
            for part in torch.split(p.view(-1), _DRAWN_AT_A_TIME):
                part.copy_(init_scale * torch.randn(part.shape, dtype=torch.float64))
        if self.head.bias is not None:
            self.head.bias.zero_()

    def configure_model(self) -> None:
        """Keep only the rows of this process."""
        super().configure_model()
        if trainer_of(self) is None or self.trainer.world_size == 1:
            return
        if not self._is_shared and isinstance(self.backbone, FeatureTable):
            self._table.keep_rows(*own_rows(self.num_samples, self.trainer.global_rank, self.trainer.world_size))

    def on_fit_start(self) -> None:
        """Refuse optimizers that would treat the rows of one process as all rows."""
        super().on_fit_start()
        optimizer = self.optimizers(use_pl_optimizer=False)
        if self._is_shared and not isinstance(optimizer, _OPTIMIZERS_OF_SHARED_FEATURES):
            raise UserError(
                f"{type(optimizer).__name__} may combine numbers that are on different processes: use ArmijoGD, "
                "ArmijoLBFGS or an optimizer that treats each number by itself, such as SGD and Adam, or set "
                "trainer.devices=1."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Gather the rows of the optimizer's state from all processes, as is done for the features."""
        super().on_save_checkpoint(checkpoint)
        self._each_row(checkpoint, self.optimizers(use_pl_optimizer=False), FeatureTable.gather)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check the checkpoint, and keep only the rows of this process in the optimizer's state."""
        super().on_load_checkpoint(checkpoint)
        self._each_row(checkpoint, None, FeatureTable.narrow)

    def _each_row(
        self, checkpoint: dict[str, Any], optimizer: Any, change: Callable[[FeatureTable, Tensor], Tensor]
    ) -> None:
        """Apply a function to the entries of the optimizer's state that have one row per sample.

        Args:
            checkpoint: The checkpoint, which is changed.
            optimizer: The optimizer; None if it does not exist yet.
            change: The function of the table and of an entry.
        """
        if not self._is_shared or "optimizer_states" not in checkpoint:
            return
        table, optimizer = self._table, optimizer or only_optimizer(self.configure_optimizers())
        index = next((i for i, p in enumerate(parameters_of(optimizer)) if p is self.features), None)
        for state in checkpoint.get("optimizer_states", []):
            if index not in state["state"]:
                continue
            # A new mapping, since the old one belongs to the optimizer.
            state["state"] = state["state"] | {
                index: {
                    name: change(table, value) if isinstance(value, Tensor) and value.ndim == 2 else value
                    for name, value in state["state"][index].items()
                }
            }

    def count_free_parameters(self) -> int:
        """Count the trainable parameters of the whole model, as numbers, over all processes."""
        rows = self.num_samples - len(self.features) if self._is_shared else 0
        return super().count_free_parameters() + (
            rows * self.features[0].numel() * self.features.requires_grad if rows else 0
        )

    def make_closure(self, batch: Batch, params: Sequence[Tensor], *, measuring: bool = False) -> LineObjective:
        """Make the closure of F, without autograd unless head or backbone were changed.

        Arguments and result as for :meth:`RegularizedClassifier.make_closure`.

        Raises:
            ValueError: If processes share the features and autograd would be needed.
        """
        # Hooks may change the objective, so that autograd is needed. On shared features hooks are refused for training,
        # and those that only observe need not run for a measurement.
        passes_hooks = measuring and self._is_shared
        closed = self._closed_form(batch, params) if passes_hooks or not self._is_hooked() else None
        if closed is None and self._is_shared:
            raise UserError(
                "features shared by processes need head and features as UFM makes them, all trainable and without "
                "hooks, and a batch of all their rows: set trainer.devices=1."
            )
        return closed or super().make_closure(batch, params)

    def _closed_form(self, batch: Batch, params: Sequence[Tensor]) -> UFMObjective | None:
        """Make the closure without autograd; None if the objective is not exactly Problem (2) on all rows."""
        index, labels = batch
        if not self._is_plain():
            return None
        features, head = self.features, [p for p in (self.head.weight, self.head.bias) if p is not None]
        if {id(p) for p in params} != {id(p) for p in (features, *head)}:
            return None
        if not self._is_all_rows(index):
            if not self._table.has_all_rows(index):
                return None
            self._all_rows = index, version_of(index)
        return UFMObjective(self.objective, features, head, labels, params, self.num_samples, self._is_shared)

    def features_of(self, x: Tensor) -> Tensor:
        """Return the features of samples. For the whole training set they are not copied.

        Args:
            x: Sample indices.

        Returns:
            ``(B, d)``.
        """
        known = self._is_all_rows(x) and self._is_plain() and not self._is_hooked()
        return self.features if known else super().features_of(x)

    def _is_all_rows(self, index: Tensor) -> bool:
        """Whether this tensor of indices was found to be all rows in order, and has not been changed since."""
        return self._all_rows is not None and self._all_rows[0] is index and self._all_rows[1] == version_of(index)

    def _is_plain(self) -> bool:
        """Whether the objective is exactly Problem (2)."""
        try:
            check_known(self, unconstrained=True)
        except UserError:
            return False
        return True

    def _is_hooked(self) -> bool:
        """Whether there are hooks on the head, the backbone or gradients, which autograd would run."""
        return has_hooks((self, self.head, self.backbone)) or any(sees_gradients(p) for p in self.parameters())

    @property
    def _is_shared(self) -> bool:
        return isinstance(self.backbone, FeatureTable) and self.backbone.is_shared

    @property
    def _table(self) -> FeatureTable:
        assert isinstance(self.backbone, FeatureTable)
        return self.backbone

    @property
    def features(self) -> nn.Parameter:
        """Free features ``(N, d)``; only the rows of this process if several share them."""
        return self._table.features
