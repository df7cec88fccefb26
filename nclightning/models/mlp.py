"""The paper's network on synthetic data."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable

from nclightning.arguments import DtypeName, check_memory, check_scales, check_sizes, resolve_dtype, resolve_lambdas
from nclightning.models.backbones import ActivationName, InitName, TwoLayerBody, initialize, undefined_linear
from nclightning.models.classifier import Penalty, RegularizedClassifier
from nclightning.objective import LossName, Objective
from nclightning.optim import ArmijoGD

__all__ = ["TwoLayerMLP"]


class TwoLayerMLP(RegularizedClassifier):
    r"""The paper's network: two affine layers and a linear head, with the penalties of Problem (2) (Sec. 3).

    .. math:: h = \sigma'(W_2\, \sigma(W_1 x + b_1) + b_2), \qquad z = W h + b

    with :math:`W_1` of shape (m, D), :math:`W_2` (d, m) and W (K, d). The head has a bias for MSE and none for
    cross-entropy, as in the unconstrained feature model, whose optimal value is a lower bound on the objective.
    Non-negative features, such as those after a ReLU, cannot reach this bound: their class means cannot form a simplex
    around zero.

    The tangent kernel of a ReLU network with the usual initialisation has a few eigenvalues, along the mean activation,
    that are much larger than all others and force a small step. ``first_layer_scale=0.1`` removes them.

    Args:
        num_classes: K, at least 2.
        samples_per_class: n, at least 1.
        feature_dim: d, at least 1.
        loss: ``"mse"`` or ``"ce"``.
        lambda_w: Penalty on the head.
        lambda_h: Penalty on the features, summed over all samples; with ``penalty="weights"`` on the backbone.
        lambda_: The paper's single lambda, from which missing penalties are set: ``lambda_w = n * lambda_`` and
            ``lambda_h = lambda_``. In a configuration it may be spelt ``lambda``.
        input_dim: D.
        hidden_dim: m.
        activation: Activation of the hidden layer.
        feature_activation: Activation of the features.
        init: ``"he"`` or ``"xavier"`` (normal weights, zero biases) or ``"torch"`` (the default of ``nn.Linear``).
        first_layer_scale: Factor on the initial weight of the first layer.
        head_scale: Factor on the initial weight of the head.
        penalty: What ``lambda_h`` penalises: ``"features"`` or ``"weights"``, all weights and biases before the head.
        dtype: ``"float64"`` or ``"float32"``, the precision of parameters, training and checkpoints.
        optimizer: Function from the parameters to the optimizer.
        iterations_per_step: Optimizer iterations per Lightning step.

    Raises:
        ValueError: If an argument is out of range or unknown, or a penalty is missing.

    Example:
        >>> from nclightning.models import TwoLayerMLP
        >>> model = TwoLayerMLP(3, 10, 4, loss="ce", lambda_=1e-4, input_dim=20, hidden_dim=16)
        >>> model.objective.lambda_w, model.objective.lambda_h, model.count_free_parameters()
        (0.001, 0.0001, 416)
    """

    _problem_hparams = (
        "num_classes",
        "samples_per_class",
        "feature_dim",
        "loss",
        "lambda_w",
        "lambda_h",
        "input_dim",
        "hidden_dim",
        "activation",
        "feature_activation",
        "penalty",
        "dtype",
    )

    def __init__(
        self,
        num_classes: int,
        samples_per_class: int,
        feature_dim: int,
        loss: LossName,
        lambda_w: float | None = None,
        lambda_h: float | None = None,
        lambda_: float | None = None,
        input_dim: int = 1000,
        hidden_dim: int = 256,
        activation: ActivationName = "relu",
        feature_activation: ActivationName = "identity",
        init: InitName = "he",
        first_layer_scale: float = 1.0,
        head_scale: float = 1.0,
        penalty: Penalty = "features",
        dtype: DtypeName = "float64",
        optimizer: OptimizerCallable = ArmijoGD,
        iterations_per_step: int = 100,
    ) -> None:
        check_sizes(
            num_classes=num_classes,
            samples_per_class=samples_per_class,
            feature_dim=feature_dim,
            input_dim=input_dim,
            hidden_dim=hidden_dim,
        )
        check_scales(first_layer_scale=first_layer_scale, head_scale=head_scale)
        torch_dtype = resolve_dtype(dtype)
        lambda_w, lambda_h = resolve_lambdas(lambda_w, lambda_h, lambda_, samples_per_class)
        weights = input_dim * hidden_dim + hidden_dim * feature_dim + feature_dim * num_classes
        check_memory("this network", weights + num_classes * samples_per_class * input_dim, torch_dtype)
        body = TwoLayerBody(input_dim, hidden_dim, feature_dim, activation, feature_activation, torch_dtype)
        head = undefined_linear(feature_dim, num_classes, torch_dtype, bias=loss == "mse")
        super().__init__(
            backbone=body,
            head=head,
            objective=Objective(loss, lambda_w, lambda_h),
            num_samples=num_classes * samples_per_class,
            optimizer=optimizer,
            iterations_per_step=iterations_per_step,
            penalty=penalty,
        )
        lambda_ = None  # Hyperparameters store the resolved penalties, so that a checkpoint says what was trained.
        self.save_hyperparameters(ignore=["optimizer"])
        body.reset_parameters(init, first_layer_scale)
        initialize(head, init, head_scale)
