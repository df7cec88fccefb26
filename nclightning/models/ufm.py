"""The unconstrained feature model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from nclightning.arguments import DtypeName, check_scales, check_sizes, resolve_dtype, resolve_lambdas
from nclightning.models.backbones import FeatureTable, undefined_linear
from nclightning.models.classifier import Batch, RegularizedClassifier
from nclightning.models.closed_form import UFMLine
from nclightning.objective import LossName, Objective
from nclightning.optim import ArmijoGD, LineObjective
from nclightning.ranks import own_rows, sum_over_ranks

__all__ = ["UFM"]


class UFM(RegularizedClassifier):
    r"""The unconstrained feature model: features are free parameters (paper, Problems (5) and (8)).

    On several processes (``trainer.strategy=ddp``) each holds rows of its own of the features, and the head as a whole.

    MSE comes with a free bias, cross-entropy without one, as in the paper. All sizes and penalties are given here
    once; :class:`~nclightning.data.IndexDataModule` takes them over.

    Args:
        num_classes: K, at least 2.
        samples_per_class: n, at least 1.
        feature_dim: d, at least 1.
        loss: ``"mse"`` or ``"ce"``.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features.
        lambda_: The paper's single lambda: what is not given of ``lambda_w`` and ``lambda_h`` becomes
            ``lambda_w = n * lambda_`` and ``lambda_h = lambda_``. A configuration may spell it ``lambda``.
        init_scale: Standard deviation of the normal entries that head and features start from; the bias starts at 0.
        dtype: ``"float64"`` or ``"float32"``, the precision of parameters, training and checkpoints.
        optimizer: Makes the optimizer from the parameters.
        iterations_per_step: Optimizer iterations per Lightning step.

    Raises:
        ValueError: If an argument is out of range, or a penalty is missing.
    """

    _problem_hparams = ("num_classes", "samples_per_class", "feature_dim", "loss", "lambda_w", "lambda_h", "dtype")

    def __init__(
        self,
        num_classes: int,
        samples_per_class: int,
        feature_dim: int,
        loss: LossName,
        lambda_w: float | None = None,
        lambda_h: float | None = None,
        lambda_: float | None = None,
        init_scale: float = 1.0,
        dtype: DtypeName = "float64",
        optimizer: OptimizerCallable = ArmijoGD,
        iterations_per_step: int = 100,
    ) -> None:
        check_sizes(num_classes=num_classes, samples_per_class=samples_per_class, feature_dim=feature_dim)
        check_scales(init_scale=init_scale)
        torch_dtype = resolve_dtype(dtype)
        lambda_w, lambda_h = resolve_lambdas(lambda_w, lambda_h, lambda_, samples_per_class)
        num_samples = num_classes * samples_per_class
        super().__init__(
            backbone=FeatureTable(num_samples, feature_dim, torch_dtype),
            head=undefined_linear(feature_dim, num_classes, torch_dtype, bias=loss == "mse"),
            objective=Objective(loss, lambda_w, lambda_h),
            num_samples=num_samples,
            optimizer=optimizer,
            iterations_per_step=iterations_per_step,
        )
        self._all_rows: Tensor | None = None  # Indices that were seen to be those of all rows.
        lambda_ = None  # Stored resolved, so that a checkpoint carries what was trained.
        self.save_hyperparameters(ignore=["optimizer"])
        self.reset_parameters(init_scale)

    @torch.no_grad()
    def reset_parameters(self, init_scale: float) -> None:
        """Draw head and features from the global generator, in float64 for every dtype; zero the bias.

        Args:
            init_scale: Standard deviation.
        """
        for p in (self.head.weight, self.features):
            p.copy_(init_scale * torch.randn(p.shape, dtype=torch.float64))
        if self.head.bias is not None:
            self.head.bias.zero_()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Each process has rows of its own: DistributedDataParallel must not make them equal."""
        return ["backbone.features"]

    def configure_model(self) -> None:
        """Keep the rows of this process."""
        if self._trainer is None or self.trainer.world_size == 1:
            return
        table = self.backbone
        assert isinstance(table, FeatureTable)
        if not table.is_shared:
            table.keep_rows(*own_rows(self.num_samples, self.trainer.global_rank, self.trainer.world_size))

    def count_free_parameters(self) -> int:
        """Count the trainable numbers of the whole model, over all processes."""
        rows = self.num_samples - len(self.features)
        return super().count_free_parameters() + rows * self.features.shape[1] * self.features.requires_grad

    def line(self, batch: Batch, params: Sequence[Tensor]) -> LineObjective:
        """Make F a closure and a line for optimizers, in closed form unless head or backbone were changed.

        Args:
            batch: The samples of this process.
            params: The parameters that an optimizer moves.

        Returns:
            As :meth:`RegularizedClassifier.line`.
        """
        index, labels = batch
        features, head = self.features, list(self.head.parameters())
        table = self.backbone
        assert isinstance(table, FeatureTable)
        plain = self._is_plain() and {id(p) for p in params} == {id(p) for p in (features, *head)}
        if plain and index is not self._all_rows and table.holds(index):
            self._all_rows = index
        if not plain or index is not self._all_rows:
            if table.is_shared:
                raise ValueError(
                    "features shared by processes are trained in closed form only, which needs head and features as "
                    "they come, all trainable and without hooks, and a batch of all their rows: set trainer.devices=1."
                )
            return super().line(batch, params)
        return UFMLine(
            self.objective,
            features,
            head,
            labels,
            params,
            self.num_samples,
            sum_over_ranks if table.is_shared else None,
        )

    def features_of(self, x: Tensor) -> Tensor:
        """Return the features of samples; those of the training set are not copied.

        Args:
            x: Sample indices.

        Returns:
            ``(B, d)``.
        """
        return self.features if x is self._all_rows and self._is_plain() else super().features_of(x)

    def _is_plain(self) -> bool:
        """Whether what autograd would differentiate is Problem (2) as it stands, with no hook to miss a call."""
        methods = all(
            getattr(type(self), name) is getattr(RegularizedClassifier, name)
            for name in ("evaluate_objective", "forward")
        )
        modules = type(self.head) is nn.Linear and type(self.backbone) is FeatureTable
        hooks = any(m._forward_hooks or m._forward_pre_hooks for m in (self.head, self.backbone))
        free = all(p.requires_grad for p in self.parameters()) and self.objective.lambda_b == 0.0
        return methods and modules and free and not hooks

    @property
    def features(self) -> nn.Parameter:
        """Free features ``(N, d)``."""
        assert isinstance(self.backbone, FeatureTable)
        return self.backbone.features
