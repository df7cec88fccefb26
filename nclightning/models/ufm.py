"""The unconstrained feature model."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn

from nclightning.arguments import DtypeName, check_scales, check_sizes, resolve_dtype, resolve_lambdas
from nclightning.models.backbones import FeatureTable, undefined_linear
from nclightning.models.classifier import RegularizedClassifier
from nclightning.objective import LossName, Objective
from nclightning.optim import ArmijoGD

__all__ = ["UFM"]


class UFM(RegularizedClassifier):
    r"""The unconstrained feature model: features are free parameters (paper, Problems (5) and (8)).

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
    def features(self) -> nn.Parameter:
        """Free features ``(N, d)``."""
        assert isinstance(self.backbone, FeatureTable)
        return self.backbone.features
