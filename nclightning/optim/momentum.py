"""SGD with momentum whose constants come from the curvature at the optimum."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import SGD

from nclightning.errors import UserError
from nclightning.problems.rates import Momentum, Rates

__all__ = ["HeavyBall", "MomentumFromCurvature", "Nesterov"]


class MomentumFromCurvature(SGD):
    """Base class of :class:`HeavyBall` and :class:`Nesterov`: SGD whose step and momentum :meth:`tune` sets.

    Args:
        params: Parameters or parameter groups. All groups have the same step and momentum.
        mu: Least nonzero eigenvalue of the Hessian at the optimum.
        smoothness: Largest eigenvalue L of the Hessian at the optimum. Without ``mu`` and ``smoothness``, :meth:`tune`
            must be called before the first step.

    Raises:
        ValueError: If only one of ``mu`` and ``smoothness`` is given, ``0 < mu <= smoothness`` does not hold, or a
            group sets options of its own.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        mu: float | None = None,
        smoothness: float | None = None,
    ) -> None:
        super().__init__(params, lr=math.nan)
        self.register_step_pre_hook(_refuse_without_constants)
        if (mu is None) != (smoothness is None):
            raise UserError(f"mu and smoothness must be given together, got {mu!r} and {smoothness!r}.")
        if mu is not None and smoothness is not None:
            self.tune(mu, smoothness)

    @staticmethod
    @abstractmethod
    def constants(rates: Rates) -> Momentum:
        """Return the step and momentum with the fastest local convergence."""

    @property
    def is_tuned(self) -> bool:
        """Whether step and momentum have been set."""
        return not any(math.isnan(group["lr"]) for group in self.param_groups)

    def tune(self, mu: float, smoothness: float) -> None:
        """Set step and momentum of all groups, and keep the momentum buffers.

        Args:
            mu: Least nonzero eigenvalue of the Hessian at the optimum.
            smoothness: Largest eigenvalue L.

        Raises:
            ValueError: If ``0 < mu <= smoothness`` does not hold.
        """
        found = self.constants(Rates(mu, smoothness))
        options = {"lr": found.step, "momentum": found.momentum, "nesterov": found.nesterov}
        for each in (self.defaults, *self.param_groups):
            each.update(options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with the same step and momentum as the others.

        Args:
            param_group: ``{"params": ...}`` without options.

        Raises:
            ValueError: If the group sets an option.
        """
        own = sorted(set(param_group) & set(self.defaults)) if isinstance(param_group, dict) else []
        if own:
            raise UserError(
                f"parameter groups of {type(self).__name__} share one step and momentum, so a group cannot set "
                f"{', '.join(own)}: leave it out, or use torch.optim.SGD."
            )
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if "defaults" in state:  # A new copy has no hooks yet. load_state_dict, which passes no defaults, keeps them.
            self.register_step_pre_hook(_refuse_without_constants)


class HeavyBall(MomentumFromCurvature):
    r"""Polyak's heavy ball with the step and momentum of the fastest local convergence.

    .. math::
        x_{k+1} = x_k - t \nabla F(x_k) + \beta (x_k - x_{k-1}), \quad
        t = \frac4{(\sqrt L + \sqrt\mu)^2}, \quad
        \beta = \Big(\frac{\sqrt L - \sqrt\mu}{\sqrt L + \sqrt\mu}\Big)^2

    Near an optimum the distance falls by :math:`\sqrt\beta` per iteration
    (:meth:`nclightning.problems.Rates.heavy_ball`). Far from it, where F is not quadratic, it may cycle or diverge:
    let the step grow from a hundredth with :class:`torch.optim.lr_scheduler.LinearLR`, or descend with
    :class:`~nclightning.optim.ArmijoGD` first.

    Without ``mu`` and ``smoothness``, a fit of :class:`nclightning.models.UFM` takes both from its problem. The
    optimizer is :class:`torch.optim.SGD` with ``lr = t`` and ``momentum = beta``, which schedulers may change. Polyak
    (1964).

    Args:
        params: Parameters or parameter groups. All groups have the same step and momentum.
        mu: Least nonzero eigenvalue of the Hessian at the optimum.
        smoothness: Largest eigenvalue L of the Hessian at the optimum. Without ``mu`` and ``smoothness``, :meth:`tune`
            must be called before the first step.

    Raises:
        ValueError: If only one of ``mu`` and ``smoothness`` is given, ``0 < mu <= smoothness`` does not hold, or a
            group sets options of its own.

    Example:
        >>> import torch
        >>> from nclightning.functional import extreme_eigenvalues
        >>> from nclightning.optim import HeavyBall
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        >>> value = lambda: (x.square() * torch.tensor([0.01, 1.0])).sum() / 2
        >>> found = extreme_eigenvalues(value, [x])
        >>> optimizer = HeavyBall([x], mu=float(found.smallest[0]), smoothness=float(found.largest[0]))
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     value().backward()
        ...     optimizer.step()
        >>> bool(x.norm() < 1e-14)  # 200 iterations of gradient descent leave 0.05 at best.
        True
    """

    @staticmethod
    def constants(rates: Rates) -> Momentum:
        """Return the step and momentum with the fastest local convergence."""
        return rates.heavy_ball()


class Nesterov(MomentumFromCurvature):
    r"""Nesterov's method with the step and constant momentum of the fastest local convergence.

    .. math::
        x_{k+1} = y_k - t \nabla F(y_k), \quad y_{k+1} = x_{k+1} + \beta (x_{k+1} - x_k), \quad
        t = \frac4{3L + \mu}, \quad \beta = \frac{1 - \sqrt{t\mu}}{1 + \sqrt{t\mu}}

    The parameters are the extrapolated points y, as in :class:`torch.optim.SGD`. Near an optimum the distance falls by
    the factor :math:`1 - \sqrt{t\mu}` per iteration (:meth:`nclightning.problems.Rates.nesterov`). This takes less
    than twice the iterations of :class:`HeavyBall`, and is more robust away from the optimum. Everything else is as for
    :class:`HeavyBall`. Nesterov (2004), Sec. 2.2; the constants are those of Lessard, Recht and Packard (2016).

    Args:
        params: Parameters or parameter groups. All groups have the same step and momentum.
        mu: Least nonzero eigenvalue of the Hessian at the optimum.
        smoothness: Largest eigenvalue L of the Hessian at the optimum. Without ``mu`` and ``smoothness``, :meth:`tune`
            must be called before the first step.

    Raises:
        ValueError: If only one of ``mu`` and ``smoothness`` is given, ``0 < mu <= smoothness`` does not hold, or a
            group sets options of its own.

    Example:
        >>> import torch
        >>> from nclightning.optim import Nesterov
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
        >>> optimizer = Nesterov([x], mu=0.01, smoothness=1.0)
        >>> for _ in range(400):
        ...     optimizer.zero_grad()
        ...     value = (x.square() * torch.tensor([0.01, 1.0])).sum() / 2
        ...     value.backward()
        ...     optimizer.step()
        >>> bool(x.norm() < 1e-14)
        True
    """

    @staticmethod
    def constants(rates: Rates) -> Momentum:
        """Return the step and momentum with the fastest local convergence."""
        return rates.nesterov()


def _refuse_without_constants(optimizer: MomentumFromCurvature, *_: Any) -> None:
    """Raise before a step if step and momentum have not been set."""
    if not optimizer.is_tuned:
        raise UserError(
            f"{type(optimizer).__name__} has no step and momentum: pass mu and smoothness, or call "
            "tune(mu, smoothness) before the first step."
        )
