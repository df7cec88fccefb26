"""Curvature of any scalar function of parameters: products with its Hessian, its extreme eigenvalues, all of it."""

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

_OFTEN = 20  # Up to so many vectors convergence is tested after each, from then on after so many.


class ExtremeEigenvalues(NamedTuple):
    """Ends of a spectrum.

    Attributes:
        smallest: Least distinct eigenvalues, ascending, ``(c,)`` with c at most the number asked for; none if only the
            largest were asked for.
        largest: Largest distinct eigenvalues, descending, ``(c,)``.
        residual: Largest distance of any of them from an eigenvalue, guaranteed up to round-off.
        products: Number of products with the Hessian.
        converged: Whether ``residual`` is within the tolerance.
    """

    smallest: Tensor
    largest: Tensor
    residual: float
    products: int
    converged: bool


def hessian_vector_product(value: Value, params: Iterable[Tensor]) -> Product:
    r"""Prepare products of the Hessian with vectors.

    .. math:: v \mapsto \nabla^2 F(x)\, v = \nabla \langle \nabla F(x), v \rangle

    The function is evaluated once, here, and its graph lives as long as the result does. Parameters, their ``.grad``,
    the modes of modules and torch's random states are left as they were; buffers that a forward pass updates, such as
    those of batch norm in train mode, are the function's own business. Pearlmutter (1994).

    Args:
        value: Evaluates F at the current parameters: no ``backward`` and no ``no_grad`` inside.
        params: Those to differentiate with respect to; others are constants.

    Returns:
        From a vector ``(P,)``, all parameters flattened in their order, to the product ``(P,)`` of the same dtype.

    Raises:
        ValueError: If there are no parameters, one does not require a gradient, F is no differentiable scalar, or a
            part of it is known to have no second derivative.
    """
    params = list(params)
    if not params or not all(p.requires_grad for p in params):
        raise UserError(
            f"params must be tensors that require a gradient, got {len(params)} of which "
            f"{sum(not p.requires_grad for p in params)} do not. "
            "Pass [p for p in module.parameters() if p.requires_grad]."
        )
    sizes = [p.numel() for p in params]
    # What F is linear in has a gradient without a graph.
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
    r"""Find the ends of the spectrum of the Hessian by Lanczos' method with full reorthogonalisation.

    It needs a few times as many products as there are well-separated eigenvalues, whatever P, and at most as many as
    there are distinct ones; it keeps one vector ``(P,)`` per product. An eigenvalue of any multiplicity is found once:
    at a minimum with flat directions the smallest ones are 0, then the least curvature across them. Paige (1972).

    Args:
        value: See :func:`hessian_vector_product`.
        params: See :func:`hessian_vector_product`.
        count: How many distinct eigenvalues at each end; those closer than the tolerance count as one.
        tolerance: Of the residual, relative to the largest absolute eigenvalue. Below about a hundred roundings of
            the parameters' dtype it cannot be met and that is taken.
        max_products: End unconverged after this many.
        seed: Of the starting vector, which comes from a generator of its own.
        ends: ``"largest"`` leaves out the smallest eigenvalues, which often take longer.
        scales: For each parameter a number or a tensor of its shape, together the diagonal matrix S: the spectrum is
            that of :math:`S \nabla^2 F S`. Where an optimizer divides the entries of its step by P, the square roots
            of 1/P give the curvature that it sees.

    Returns:
        Eigenvalues in the parameters' dtype (at least float32) on their device; fewer than ``count`` if the Hessian
        has fewer distinct ones. The zero Hessian has 0.

    Raises:
        ValueError: As :func:`hessian_vector_product`, if an option is out of range, or if a product is not finite.
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
        # The new direction is noise: the ones so far span all eigenvectors that the start has a part in.
        exhausted = len(basis) == size or left <= 100 * rounding * scale
        last = exhausted or len(basis) >= max_products
        if last or len(basis) <= _OFTEN or len(basis) % _OFTEN == 0:
            ritz, vectors = torch.linalg.eigh(_tridiagonal(diagonal, off_diagonal))
            errors = torch.zeros_like(ritz) if exhausted else left * vectors[-1].abs()
            allowed = max(tolerance, 100 * rounding) * scale
            low = _distinct(ritz, allowed, count) if ends == "both" else []
            high = _distinct(-ritz.flip(0), allowed, count)
            residual = float(torch.cat([errors[low], errors.flip(0)[high]]).max())
            # Ends that were just born may be others than the extreme ones; a generic start needs a few vectors more.
            enough = (
                len(low if ends == "both" else high) == count and residual <= allowed and len(basis) >= 2 * count + 2
            )
            if last or enough:
                found = ritz.to(basis[0])
                return ExtremeEigenvalues(found[low], found.flip(0)[high], residual, len(basis), residual <= allowed)
        off_diagonal.append(left)
        basis.append(new)


def dense_hessian(value: Value, params: Iterable[Tensor]) -> Tensor:
    """Form the Hessian, column by column.

    Args:
        value: See :func:`hessian_vector_product`.
        params: See :func:`hessian_vector_product`; of at most 10,000 numbers together.

    Returns:
        Symmetric ``(P, P)`` in the parameters' dtype, at least float32, in the order of the flattened parameters.

    Raises:
        ValueError: As :func:`hessian_vector_product`, or if there are more parameters.
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
    """Compute all eigenvalues of the Hessian, with multiplicities.

    Args:
        value: See :func:`hessian_vector_product`.
        params: See :func:`dense_hessian`.

    Returns:
        Ascending ``(P,)``, each right to a few roundings of the largest.

    Raises:
        ValueError: As :func:`dense_hessian`, or if an entry is not finite.
    """
    hessian = dense_hessian(value, params)
    _check_finite(hessian)
    eigenvalues: Tensor = torch.linalg.eigvalsh(hessian)
    return eigenvalues


def _scaled(product: Product, scales: Tensor) -> Product:
    return lambda vector: scales * product(scales * vector)


def _flat_scales(scales: Sequence[Tensor | float], params: Sequence[Tensor]) -> Tensor:
    if len(scales) != len(params):
        raise UserError(f"scales must have one entry for each of the {len(params)} params, got {len(scales)}.")
    dtype = _working_dtype(params)
    return torch.cat(
        [torch.as_tensor(s).to(p.device, dtype).expand_as(p).flatten() for s, p in zip(scales, params, strict=True)]
    )


def _gradient(value: Value, params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Evaluate the function and its gradient with a graph, without moving random states."""
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
    """Refuse what is marked with ``once_differentiable``: products would leave its part out, without an error."""
    waiting: list[Any] = [g.grad_fn for g in gradients]
    seen = set(waiting)
    for node in waiting:  # It grows on the way.
        if node.name() == "torch::autograd::Error":
            raise UserError(
                "value has no second derivative: a function in it is marked with once_differentiable. Evaluate it with "
                "operations of torch."
            )
        new = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= new
        waiting += new


def _next_vector(product: Product, basis: Sequence[Tensor]) -> tuple[Tensor, float, float]:
    """Multiply the last vector; return what is new of the product, its part along the last vector, and the norm."""
    new = product(basis[-1])
    _check_finite(new)
    projection = float(new @ basis[-1])
    for _ in range(2):  # Once leaves the cancellation's round-off.
        for vector in basis:
            new = new - (new @ vector) * vector
    left = float(new.norm())
    return new / left if left > 0 else new, projection, left


def _tridiagonal(diagonal: Sequence[float], off_diagonal: Sequence[float]) -> Tensor:
    side = torch.tensor(off_diagonal, dtype=torch.float64)
    return torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + torch.diag(side, 1) + torch.diag(side, -1)


def _distinct(ascending: Tensor, apart: float, count: int) -> list[int]:
    """Indices of the first values, from the lower end, that lie apart by more than the given distance."""
    values, kept = ascending.tolist(), [0]
    for i, value in enumerate(values):
        if len(kept) < count and value - values[kept[-1]] > apart:
            kept.append(i)
    return kept


def _working_dtype(params: Sequence[Tensor]) -> torch.dtype:
    """Precision of vectors: at least float32, where half precision would lose their orthogonality."""
    dtype = torch.float32
    for p in params:
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype


def _flatten(parts: Iterable[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.detach().to(like).flatten() for part in parts])


def _check_finite(values: Tensor) -> None:
    if not torch.isfinite(values).all():
        raise UserError("the Hessian is not finite at these parameters: check them and the value there.")
