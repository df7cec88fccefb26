"""Full-batch data on the training device."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from nclightning.arguments import check_sizes
from nclightning.errors import UserError
from nclightning.ranks import own_rows

__all__ = ["FullBatchDataModule", "FullBatchLoader", "GaussianDataModule", "IndexDataModule"]


class FullBatchLoader:
    """A loader that yields the same batch again and again, without workers, copies or random numbers.

    Args:
        batch: The batch ``(x, labels)``.
        length: Number of batches per epoch.

    Example:
        >>> import torch
        >>> from nclightning.data import FullBatchLoader
        >>> batch = torch.arange(4), torch.tensor([0, 0, 1, 1])
        >>> [len(labels) for x, labels in FullBatchLoader(batch, length=3)]
        [4, 4, 4]
    """

    def __init__(self, batch: tuple[Tensor, Tensor], length: int) -> None:
        self.batch = batch
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.length):
            yield self.batch

    # All batches are equal, so that there is no position within an epoch to save.
    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept an empty state."""


class FullBatchDataModule(L.LightningDataModule):
    """A training set that is one batch ``(x, labels)`` on the device, sorted by class.

    Each class has exactly n samples. If the model was made with a problem, each group has the count of the problem.
    ``validate`` and ``test`` use the same batch once; there is no other data. With several processes, each has its
    share of the rows. Sizes that are None are taken from the hyperparameters of the model. A size that differs from
    the model's is an error.

    Args:
        steps_per_epoch: Lightning steps per epoch. It only sets how often epoch hooks run.
        sizes: Sizes by name, such as ``num_classes``, which the model has as hyperparameters.

    Raises:
        ValueError: If a size is missing or differs from the model's.

    Example:
        >>> import torch
        >>> from nclightning.data import FullBatchDataModule
        >>> class Ramp(FullBatchDataModule):
        ...     def inputs(self, device):
        ...         return torch.linspace(0, 1, self.num_samples, device=device)
        >>> data = Ramp(steps_per_epoch=1, num_classes=2, samples_per_class=2)
        >>> data.adopt(None)  # without a model
        >>> data.batch()[1]
        tensor([0, 0, 1, 1])
    """

    def __init__(self, steps_per_epoch: int, **sizes: int | None) -> None:
        super().__init__()
        if steps_per_epoch < 1:
            raise UserError(f"steps_per_epoch must be at least 1, got {steps_per_epoch}.")
        self.steps_per_epoch = steps_per_epoch
        self._given = sizes
        self._sizes: dict[str, int] = {}
        self._counts: list[int] = []  # Samples of each group.

    def setup(self, stage: str) -> None:
        """Take the sizes from the model, or check them against it."""
        self.adopt(None if self.trainer is None else self.trainer.lightning_module)

    def adopt(self, model: L.LightningModule | None) -> None:
        """Take the sizes from a model, or check them against it.

        Args:
            model: A model with the sizes among its hyperparameters; None without a model.

        Raises:
            ValueError: If a size is missing, out of range or differs from the model's.
        """
        hparams = {} if model is None else model.hparams
        counts = _counts_in(hparams.get("problem"))
        if counts is None:
            self._sizes = {name: self._size(name, given, hparams) for name, given in self._given.items()}
            self._counts = [self._sizes["samples_per_class"]] * self._sizes["num_classes"]
            return
        self._sizes, self._counts = {}, counts
        for name, given in self._given.items():
            if name not in ("num_classes", "samples_per_class"):
                self._sizes[name] = self._size(name, given, hparams)
            elif given is not None and given != hparams.get(name):
                raise UserError(
                    f"{type(self).__name__}({name}={given}) differs from the model's problem, whose counts are "
                    f"{counts}. Leave it out."
                )

    def _size(self, name: str, given: int | None, hparams: Mapping[str, Any]) -> int:
        expected: int | None = hparams.get(name)
        if given is None and expected is None:
            raise UserError(
                f"{type(self).__name__}({name}=...) is missing, and the model has no hyperparameter {name!r}."
            )
        if given is not None and expected is not None and given != expected:
            raise UserError(
                f"{type(self).__name__}({name}={given}) differs from the model's {expected}. Set it on the model only."
            )
        size = expected if given is None else given
        assert size is not None
        check_sizes(**{name: size})
        return size

    @property
    def num_classes(self) -> int:
        """K; for a problem M, the number of groups of samples with the same target."""
        return len(self._counts)

    @property
    def samples_per_class(self) -> int | None:
        """n, the number of samples of each class; None if classes differ."""
        return self._counts[0] if len(set(self._counts)) == 1 else None

    @property
    def num_samples(self) -> int:
        """N."""
        return sum(self._counts)

    @abstractmethod
    def inputs(self, device: torch.device | str | None) -> Tensor:
        """Build the inputs ``(N, ...)``."""

    def batch(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Build the training set.

        Args:
            device: Device of the tensors.

        Returns:
            Inputs ``(N, ...)`` and labels ``(N,)``, int64.
        """
        counts = torch.tensor(self._counts, device=device)
        labels = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=self.num_samples)
        return self.inputs(device), labels

    def _loader(self, length: int) -> FullBatchLoader:
        assert self.trainer is not None
        device, world = self.trainer.strategy.root_device, self.trainer.world_size
        if world == 1:
            return FullBatchLoader(self.batch(device), length)
        x, labels = self.batch("cpu")
        rows = own_rows(len(labels), self.trainer.global_rank, world)
        return FullBatchLoader((x.narrow(0, *rows).to(device), labels.narrow(0, *rows).to(device)), length)

    def train_dataloader(self) -> FullBatchLoader:
        """Return the full batch, once per Lightning step."""
        return self._loader(self.steps_per_epoch)

    def val_dataloader(self) -> FullBatchLoader | list[Any]:
        """Return the full batch once; during a fit nothing, since the readings cover the training set already."""
        assert self.trainer is not None
        return [] if self.trainer.state.fn == "fit" else self._loader(1)

    def test_dataloader(self) -> FullBatchLoader:
        """Return the full batch once."""
        return self._loader(1)


def _counts_in(problem: Any) -> list[int] | None:
    """Return the counts of a problem in a model's hyperparameters; None if there is no such problem."""
    arguments = problem.get("init_args") if isinstance(problem, Mapping) else None
    counts = arguments.get("counts") if isinstance(arguments, Mapping) else None
    return list(counts) if isinstance(counts, list) else None


class IndexDataModule(FullBatchDataModule):
    """Sample indices and labels: the training set of the unconstrained feature model.

    Args:
        num_classes: K; None takes it from the model.
        samples_per_class: n; None takes it from the model.
        steps_per_epoch: Lightning steps per epoch. It only sets how often epoch hooks run.

    Raises:
        ValueError: If a size is missing or differs from the model's.

    Example:
        >>> from nclightning.data import IndexDataModule
        >>> from nclightning.models import UFM
        >>> data = IndexDataModule()
        >>> data.adopt(UFM(num_classes=2, samples_per_class=3, feature_dim=2, loss="mse", lambda_=0.01))
        >>> data.batch()
        (tensor([0, 1, 2, 3, 4, 5]), tensor([0, 0, 0, 1, 1, 1]))
    """

    def __init__(
        self, num_classes: int | None = None, samples_per_class: int | None = None, steps_per_epoch: int = 10
    ) -> None:
        super().__init__(steps_per_epoch, num_classes=num_classes, samples_per_class=samples_per_class)

    def inputs(self, device: torch.device | str | None) -> Tensor:
        """Return indices ``(N,)``, int64."""
        return torch.arange(self.num_samples, device=device)


class GaussianDataModule(FullBatchDataModule):
    r"""Normally distributed inputs, with labels that are independent of them (paper, Sec. 3).

    .. math:: x \sim N(0, \mathrm{variance} \cdot I_D)

    The paper draws labels uniformly. Here each class has exactly n samples, which its closed forms require (erratum
    E9). Inputs are drawn in float64 from a separate generator, so that different initialisations can be compared on the
    same data.

    Args:
        num_classes: K; None takes it from the model.
        samples_per_class: n; None takes it from the model.
        input_dim: D; None takes it from the model.
        variance: Variance of each coordinate.
        seed: Seed of the inputs.
        steps_per_epoch: Lightning steps per epoch. It only sets how often epoch hooks run.

    Raises:
        ValueError: If the variance is not positive, or a size is missing or differs from the model's. When a run is
            resumed, also if the checkpoint was trained on other data.

    Example:
        >>> from nclightning.data import GaussianDataModule
        >>> data = GaussianDataModule(num_classes=2, samples_per_class=50, input_dim=3, seed=1)
        >>> data.adopt(None)  # without a model
        >>> x, labels = data.batch()
        >>> x.shape, labels.bincount()
        (torch.Size([100, 3]), tensor([50, 50]))
    """

    def __init__(
        self,
        num_classes: int | None = None,
        samples_per_class: int | None = None,
        input_dim: int | None = None,
        variance: float = 0.25,
        seed: int = 0,
        steps_per_epoch: int = 10,
    ) -> None:
        super().__init__(
            steps_per_epoch, num_classes=num_classes, samples_per_class=samples_per_class, input_dim=input_dim
        )
        if not (math.isfinite(variance) and variance > 0):
            raise UserError(f"variance must be finite and positive, got {variance!r}.")
        if not -(2**63) <= seed < 2**63:
            raise UserError(f"seed must be between -2**63 and 2**63 - 1, got {seed}.")
        self.variance = variance
        self.seed = seed
        self._dtype = torch.float64

    def adopt(self, model: L.LightningModule | None) -> None:
        """Take sizes and dtype from a model.

        Args:
            model: A model with the sizes and ``dtype`` among its hyperparameters; None means float64.

        Raises:
            ValueError: If a size is missing, out of range or differs from the model's.
        """
        super().adopt(model)
        self._dtype = getattr(torch, ({} if model is None else model.hparams).get("dtype", "float64"))

    def inputs(self, device: torch.device | str | None) -> Tensor:
        """Draw ``(N, D)`` in the model's dtype."""
        shape = (self.num_samples, self._sizes["input_dim"])
        generator = torch.Generator().manual_seed(self.seed)  # On the host, so that all devices have the same data.
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(math.sqrt(self.variance))
        return drawn.to(device, self._dtype)

    def state_dict(self) -> dict[str, Any]:
        """Return what the data depend on besides the sizes."""
        return {"variance": self.variance, "seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of other data: a resumed run would mix two training sets in one curve."""
        if state_dict != self.state_dict():
            raise UserError(
                f"the checkpoint was trained on data with {state_dict}, not {self.state_dict()}. Resume it with its "
                "own settings."
            )
