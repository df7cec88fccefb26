"""Backbones: modules that compute features from a batch."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from nclightning.compat.torch import OwnEntries
from nclightning.errors import UserError
from nclightning.ranks import gather_rows

__all__ = ["ActivationName", "FeatureTable", "InitName", "TwoLayerBody"]

ActivationName = Literal["identity", "relu", "leaky_relu", "gelu", "tanh", "sigmoid"]
InitName = Literal["he", "xavier", "torch"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class FeatureTable(OwnEntries):
    """Free features, one row per sample, looked up by sample index: the backbone of the UFM.

    Several processes can share the table, each with some of the rows. A ``state_dict`` contains the whole table. All
    processes must then call ``state_dict`` together; the first one gets the table, on the host. Any number of processes
    can load it.

    Args:
        num_samples: N.
        feature_dim: d.
        dtype: Dtype of the table.

    Example:
        >>> import torch
        >>> from nclightning.models import FeatureTable
        >>> table = FeatureTable(num_samples=5, feature_dim=2, dtype=torch.float64)
        >>> table(torch.tensor([4, 0, 0])).shape
        torch.Size([3, 2])
    """

    def __init__(self, num_samples: int, feature_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_samples = num_samples
        self.first_row = 0
        self.features = nn.Parameter(torch.zeros(num_samples, feature_dim, dtype=dtype))

    @property
    def is_shared(self) -> bool:
        """Whether other processes have some of the rows."""
        return len(self.features) < self.num_samples

    def forward(self, index: Tensor) -> Tensor:
        """Look up rows.

        Args:
            index: Sample indices ``(B,)``, int64, of rows that this process has.

        Returns:
            Features ``(B, d)``.
        """
        return self.features.index_select(0, index - self.first_row if self.first_row else index)

    def has_all_rows(self, index: Tensor) -> bool:
        """Return whether the indices are all rows of this process, in order, with one transfer to the host."""
        own = torch.arange(self.first_row, self.first_row + len(self.features), device=index.device)
        return torch.equal(index, own)

    @torch.no_grad()
    def keep_rows(self, first: int, count: int) -> None:
        """Keep some rows, and leave all others to other processes.

        Args:
            first: Index of the first row to keep.
            count: Number of rows to keep.
        """
        self.features.data = self.features.data.narrow(0, first - self.first_row, count).clone()
        self.first_row = first

    def narrow(self, table: Tensor) -> Tensor:
        """Return the rows of this process from a whole table. A tensor with another number of rows is unchanged."""
        if len(table) == self.num_samples and self.is_shared:
            return table.narrow(0, self.first_row, len(self.features))
        return table

    def gather(self, rows: Tensor) -> Tensor:
        """Gather the rows of all processes where they are shared out, else return them."""
        return gather_rows(rows, self.num_samples) if self.is_shared else rows

    def change_saved(self, entries: dict[str, Any], prefix: str) -> None:
        """Save the rows of all processes; see :class:`nclightning.compat.torch.OwnEntries`."""
        key = prefix + "features"
        if key in entries:  # The key is missing if the table is parametrised.
            entries[key] = self.gather(entries[key])

    def change_loaded(self, entries: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Load the rows of this process."""
        key = prefix + "features"
        return entries | {key: self.narrow(entries[key])} if key in entries else entries


class TwoLayerBody(nn.Sequential):
    """Two affine layers, ``x -> hidden -> features``: the backbone of the paper's network.

    Args:
        input_dim: D.
        hidden_dim: m.
        feature_dim: d.
        activation: Activation of the hidden layer.
        feature_activation: Activation of the features.
        dtype: Dtype of the parameters. Their values are undefined until :meth:`reset_parameters` is called.

    Raises:
        ValueError: If an activation is unknown.

    Example:
        >>> import torch
        >>> from nclightning.models import TwoLayerBody
        >>> body = TwoLayerBody(
        ...     input_dim=6, hidden_dim=4, feature_dim=3, activation="relu", feature_activation="identity",
        ...     dtype=torch.float32,
        ... )
        >>> body.reset_parameters("he")
        >>> body(torch.randn(5, 6)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        feature_dim: int,
        activation: ActivationName,
        feature_activation: ActivationName,
        dtype: torch.dtype,
    ) -> None:
        for name, value in (("activation", activation), ("feature_activation", feature_activation)):
            if value not in _ACTIVATIONS:
                raise UserError(f"{name} must be one of {', '.join(get_args(ActivationName))}, got {value!r}.")
        super().__init__(
            undefined_linear(input_dim, hidden_dim, dtype),
            _ACTIVATIONS[activation](),
            undefined_linear(hidden_dim, feature_dim, dtype),
            _ACTIVATIONS[feature_activation](),
        )

    def reset_parameters(self, init: InitName, first_layer_scale: float = 1.0) -> None:
        """Draw both layers.

        Args:
            init: ``"he"``, ``"xavier"`` or ``"torch"``; see :class:`TwoLayerMLP`.
            first_layer_scale: Factor on the weight of the first layer.

        Raises:
            ValueError: If ``init`` is unknown.
        """
        layers = [layer for layer in self if isinstance(layer, nn.Linear)]
        for layer, scale in zip(layers, (first_layer_scale, 1.0), strict=True):
            initialize(layer, init, scale)


def undefined_linear(in_features: int, out_features: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    """Make a linear layer with undefined entries, without using the global random generator."""
    layer: nn.Linear = skip_init(  # type: ignore[no-untyped-call]
        nn.Linear, in_features, out_features, bias=bias, dtype=dtype
    )
    return layer


@torch.no_grad()
def initialize(layer: nn.Linear, init: InitName, scale: float = 1.0) -> None:
    r"""Draw a layer from the global generator, in float64 for every dtype.

    With fan-in p and fan-out q: ``"he"`` draws normal weights of variance 2/p and zero biases, ``"xavier"`` normal
    weights of variance 2/(p + q) and zero biases, ``"torch"`` weights and biases uniform within
    :math:`\pm 1/\sqrt p`, as ``nn.Linear`` does.

    Args:
        layer: The layer, which is changed in place.
        init: One of the three names.
        scale: Factor on the weight.

    Raises:
        ValueError: If ``init`` is unknown.
    """
    fan_out, fan_in = layer.weight.shape
    if init not in get_args(InitName):
        raise UserError(f"init must be one of {', '.join(get_args(InitName))}, got {init!r}.")
    if init == "torch":
        for p, factor in zip(layer.parameters(), (scale, 1.0), strict=False):
            p.copy_(factor / math.sqrt(fan_in) * (2 * torch.rand(p.shape, dtype=torch.float64) - 1))
        return
    variance = 2 / fan_in if init == "he" else 2 / (fan_in + fan_out)
    layer.weight.copy_(scale * math.sqrt(variance) * torch.randn(layer.weight.shape, dtype=torch.float64))
    for bias in list(layer.parameters())[1:]:
        bias.zero_()
