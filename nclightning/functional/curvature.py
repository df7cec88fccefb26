"""Curvature of any scalar function of parameters: Hessian-vector products, extreme eigenvalues, the full spectrum."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from nclightning.errors import UserError

__all__ = ["ExtremeEigenvalues", "dense_hessian", "dense_spectrum", "extreme_eigenvalues", "hessian_vector_product"]

Value = Callable[[], Tensor]
Product = Callable[[Tensor], Tensor]
_Ends = Literal["both", "largest"]
_MOST_DENSE = 10_000  # 800 MB in float64, and a minute for its eigenvalues.

# Convergence is tested after each of the first 20 Lanczos vectors, and from then on after every 20.
_TEST_EVERY = 20


class ExtremeEigenvalues(NamedTuple):
    """The extreme eigenvalues of a spectrum.

    Attributes:
        smallest: Smallest distinct eigenvalues, ascending, ``(c,)`` with c at most the requested number; empty with
            ``ends="largest"``.
        largest: Largest distinct eigenvalues, descending, ``(c,)``.
        residual: Bound on the distance of any of them from an eigenvalue, guaranteed up to round-off.
        products: Number of Hessian-vector products that were computed.
        converged: Whether ``residual`` is within the tolerance.
    """

    smallest: Tensor
    largest: Tensor
    residual: float
    products: int
    converged: bool


def hessian_vector_product(value: Value, params: Iterable[Tensor]) -> Product:
    r"""Make a function that multiplies the Hessian with a vector.

    .. math:: v \mapsto \nabla^2 F(x)\, v = \nabla \langle \nabla F(x), v \rangle

    Pearlmutter (1994). F is evaluated once, in this call, and its graph is kept as long as the returned function.
    Parameters, their ``.grad``, module modes and torch's random states do not change. Buffers that a forward pass
    updates do change, such as those of batch norm in train mode.

    Args:
        value: Evaluates F at the current parameters. It must not call ``backward`` or use ``no_grad``.
        params: The parameters to differentiate with respect to. Everything else is constant.

    Returns:
        Function from a vector ``(P,)`` to the product ``(P,)`` of the same dtype. P counts the entries of all
        parameters, flattened in order.

    Raises:
        ValueError: If there are no parameters, one of them does not require a gradient, F is not a differentiable
            scalar, or a part of F is known to have no second derivative.

    Example:
        >>> import torch
        >>> from nclightning.functional import hessian_vector_product
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> product = hessian_vector_product(lambda: (x**3).sum(), [x])
        >>> product(torch.tensor([1.0, 1.0]))  # the Hessian is diag(6 x)
        tensor([ 6., 12.])
    """
    params = list(params)
    if not params or not all(p.requires_grad for p in params):
        raise UserError(
            f"params must be tensors that require a gradient, got {len(params)} of which "
            f"{sum(not p.requires_grad for p in params)} do not. "
            "Pass [p for p in module.parameters() if p.requires_grad]."
        )
    sizes = [p.numel() for p in params]
    # Where F is linear in a parameter, the gradient has no graph, and the second derivative is zero.
    curved = {i: g for i, g in enumerate(_gradient(value, params)) if g is not None and g.requires_grad}
    _check_twice_differentiable(curved.values())

    def product(vector: Tensor) -> Tensor:
        if tuple(vector.shape) != (sum(sizes),):
            raise UserError(f"vector must have shape ({sum(sizes)},), got {tuple(vector.shape)}.")
        parts = [v.view_as(p).to(p) for v, p in zip(torch.split(vector, sizes), params, strict=True)]
        if not curved:
            return torch.zeros_like(vector)
        columns = torch.autograd.grad(
            list(curved.values()),
            params,
            [parts[i] for i in curved],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return _flatten(columns, vector)

    return product


def extreme_eigenvalues(
    value: Value,
    params: Iterable[Tensor],
    count: int = 1,
    tolerance: float = 1e-8,
    max_products: int = 500,
    seed: int = 0,
    ends: _Ends = "both",
    scales: Sequence[Tensor | float] | None = None,
) -> ExtremeEigenvalues:
    r"""Compute the extreme eigenvalues of the Hessian by the Lanczos method with full reorthogonalisation.

    .. math:: \nabla^2 F(x)\, v = \lambda v

    Paige (1972). The number of products does not depend on P: it is a few times the number of well-separated
    eigenvalues, and at most the number of distinct ones. One vector ``(P,)`` per product is kept in memory. An
    eigenvalue is returned once, whatever its multiplicity. At a minimum with flat directions the smallest eigenvalue is
    0, and the second smallest is the least curvature across these directions.

    Args:
        value: As for :func:`hessian_vector_product`.
        params: As for :func:`hessian_vector_product`.
        count: Number of distinct eigenvalues at each end. Eigenvalues closer than the tolerance count as one.
        tolerance: Largest residual, relative to the largest absolute eigenvalue. The least possible tolerance is a
            hundred roundings of the parameters' dtype; a smaller one is replaced by it.
        max_products: Stop after this number of products, converged or not.
        seed: Seed of the starting vector, which does not use torch's global random state.
        ends: ``"both"``, or ``"largest"`` to leave out the smallest eigenvalues, which often take longer.
        scales: For each parameter a number or a tensor of its shape; together they are a diagonal matrix S, and the
            spectrum is that of :math:`S \nabla^2 F S`. For an optimizer that divides the entries of its step by P, use
            the square roots of 1/P: this gives the curvature of the preconditioned problem.

    Returns:
        Eigenvalues in the parameters' dtype (at least float32) on their device, in the unit of F over that of the
        parameters squared. There are fewer than ``count`` if the Hessian has fewer distinct ones.

    Raises:
        ValueError: As for :func:`hessian_vector_product`, if an option is out of range, or if a product is not finite.

    Example:
        >>> import torch
        >>> from nclightning.functional import extreme_eigenvalues
        >>> x = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
        >>> found = extreme_eigenvalues(lambda: (x**3).sum(), [x])  # the Hessian is diag(6 x)
        >>> round(float(found.smallest), 6), round(float(found.largest), 6), found.converged
        (6.0, 18.0, True)
    """
    if count < 1 or max_products < 1 or not tolerance > 0:
        raise UserError(
            "count and max_products must be at least 1 and tolerance positive, got "
            f"{count}, {max_products} and {tolerance}."
        )
    if ends not in get_args(_Ends):
        raise UserError(f"ends must be 'both' or 'largest', got {ends!r}.")
    params = list(params)
    product = hessian_vector_product(value, params)
    if scales is not None:
        product = _scaled(product, _flat_scales(scales, params))
    size = sum(p.numel() for p in params)
    draw = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = [(draw / draw.norm()).to(device=params[0].device, dtype=_working_dtype(params))]
    rounding, scale = torch.finfo(basis[0].dtype).eps, 0.0
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    while True:
        new, projection, left = _next_vector(product, basis)
        diagonal.append(projection)
        scale = max(scale, abs(projection) + left)
        # If the rest is noise, the vectors so far span all eigenvectors that the starting vector has a component of.
        exhausted = len(basis) == size or left <= 100 * rounding * scale
        last = exhausted or len(basis) >= max_products
        if last or len(basis) <= _TEST_EVERY or len(basis) % _TEST_EVERY == 0:
            ritz, vectors = torch.linalg.eigh(_tridiagonal(diagonal, off_diagonal))
            errors = torch.zeros_like(ritz) if exhausted else left * vectors[-1].abs()
            allowed = max(tolerance, 100 * rounding) * scale
            low = _distinct(ritz, allowed, count) if ends == "both" else []
            high = _distinct(-ritz.flip(0), allowed, count)
            residual = float(torch.cat([errors[low], errors.flip(0)[high]]).max())
            # The first eigenvalues to converge need not be the extreme ones. A few more vectors separate them.
            enough = (
                len(low if ends == "both" else high) == count and residual <= allowed and len(basis) >= 2 * count + 2
            )
            if last or enough:
                found = ritz.to(basis[0])
                return ExtremeEigenvalues(found[low], found.flip(0)[high], residual, len(basis), residual <= allowed)
        off_diagonal.append(left)
        basis.append(new)


def dense_hessian(value: Value, params: Iterable[Tensor]) -> Tensor:
    r"""Compute the full Hessian :math:`\nabla^2 F(x)`, column by column.

    Args:
        value: As for :func:`hessian_vector_product`.
        params: As for :func:`hessian_vector_product`, with at most 10,000 entries together.

    Returns:
        Symmetric ``(P, P)`` in the parameters' dtype, at least float32, in the order of the flattened parameters.

    Raises:
        ValueError: As for :func:`hessian_vector_product`, or if there are more entries.

    Example:
        >>> import torch
        >>> from nclightning.functional import dense_hessian
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> dense_hessian(lambda: x[0] ** 2 * x[1], [x])
        tensor([[4., 2.],
                [2., 0.]])
    """
    params = list(params)
    product = hessian_vector_product(value, params)
    size = sum(p.numel() for p in params)
    if size > _MOST_DENSE:
        raise UserError(
            f"params must hold at most {_MOST_DENSE} numbers for a dense Hessian, got {size}: use extreme_eigenvalues."
        )
    eye = torch.eye(size, dtype=_working_dtype(params), device=params[0].device)
    hessian = torch.stack([product(row) for row in eye])
    return (hessian + hessian.T) / 2


def dense_spectrum(value: Value, params: Iterable[Tensor]) -> Tensor:
    r"""Compute all eigenvalues of the Hessian :math:`\nabla^2 F(x)`, with multiplicities.

    Args:
        value: As for :func:`hessian_vector_product`.
        params: As for :func:`dense_hessian`.

    Returns:
        Eigenvalues ``(P,)``, ascending. The absolute error of each is a few roundings of the largest.

    Raises:
        ValueError: As for :func:`dense_hessian`, or if an entry is not finite.

    Example:
        >>> import torch
        >>> from nclightning.functional import dense_spectrum
        >>> x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        >>> dense_spectrum(lambda: (x**3).sum(), [x]).round(decimals=6)
        tensor([ 6., 12.], dtype=torch.float64)
    """
    hessian = dense_hessian(value, params)
    _check_finite(hessian)
    eigenvalues: Tensor = torch.linalg.eigvalsh(hessian)
    return eigenvalues


def _scaled(product: Product, scales: Tensor) -> Product:
    """Multiply the Hessian from both sides with a diagonal matrix."""
    return lambda vector: scales * product(scales * vector)


def _flat_scales(scales: Sequence[Tensor | float], params: Sequence[Tensor]) -> Tensor:
    """Concatenate the scales of all parameters to one vector, checked."""
    if len(scales) != len(params):
        raise UserError(f"scales must have one entry for each of the {len(params)} params, got {len(scales)}.")
    dtype = _working_dtype(params)
    return torch.cat(
        [torch.as_tensor(s).to(p.device, dtype).expand_as(p).flatten() for s, p in zip(scales, params, strict=True)]
    )


def _gradient(value: Value, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Evaluate the function and its gradient with a graph, without changing random states."""
    cuda = sorted({p.device.index or 0 for p in params if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), torch.inference_mode(False), torch.enable_grad():
        scalar = value()
        if not isinstance(scalar, Tensor) or scalar.numel() != 1 or not scalar.requires_grad:
            raise UserError(
                "value must return a tensor of one element that depends on params, "
                f"got {tuple(scalar.shape) if isinstance(scalar, Tensor) else type(scalar).__name__}"
                f"{' without a graph' if isinstance(scalar, Tensor) and not scalar.requires_grad else ''}."
            )
        try:
            return torch.autograd.grad(scalar.sum(), params, create_graph=True, allow_unused=True)
        except RuntimeError as error:
            if "second time" in str(error):
                raise UserError(
                    "value must not call backward: return the scalar and leave the derivatives to this function."
                ) from error
            raise


def _check_twice_differentiable(gradients: Iterable[Tensor]) -> None:
    """Refuse functions marked with ``once_differentiable``: the products would omit their part without an error."""
    waiting: list[Any] = [g.grad_fn for g in gradients]
    seen = set(waiting)
    for node in waiting:  # The list grows during the loop.
        if node.name() == "torch::autograd::Error":
            raise UserError(
                "value has no second derivative: a function in it is marked with once_differentiable. Evaluate it with "
                "operations of torch."
            )
        new = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= new
        waiting += new


def _next_vector(product: Product, basis: Sequence[Tensor]) -> tuple[Tensor, float, float]:
    """Multiply the last basis vector with the Hessian and orthogonalise the product against the basis.

    Returns:
        The new unit vector, the component of the product along the last vector, and the norm of the orthogonal part.
    """
    new = product(basis[-1])
    _check_finite(new)
    projection = float(new @ basis[-1])
    for _ in range(2):  # The second time removes the round-off of the first.
        for vector in basis:
            new = new - (new @ vector) * vector
    left = float(new.norm())
    return new / left if left > 0 else new, projection, left


def _tridiagonal(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> Tensor:
    """Make the symmetric tridiagonal matrix of the Lanczos method."""
    side = torch.tensor(off_diagonal, dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(side, 1) + torch.diag(side, -1)


def _distinct(ascending: Tensor, separation: float, count: int) -> list[int]:
    """Indices of the first ``count`` values, from the lower end, that differ by more than ``separation``."""
    values, kept = ascending.tolist(), [0]
    for i, value in enumerate(values):
        if len(kept) < count and value - values[kept[-1]] > separation:
            kept.append(i)
    return kept


def _working_dtype(params: Sequence[Tensor]) -> torch.dtype:
    """Dtype of the Lanczos vectors: at least float32, since half precision would lose their orthogonality."""
    dtype = torch.float32
    for p in params:
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype


def _flatten(parts: Iterable[Tensor], like: Tensor) -> Tensor:
    """Concatenate tensors to one vector."""
    return torch.cat([part.detach().to(like).flatten() for part in parts])


def _check_finite(values: Tensor) -> None:
    """Raise an error if a Hessian-vector product is not finite."""
    if not torch.isfinite(values).all():
        raise UserError("the Hessian is not finite at these parameters: check them and the value there.")
