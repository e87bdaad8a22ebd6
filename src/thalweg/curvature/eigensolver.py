"""Top eigenpairs of a symmetric operator from scratch.

Block Krylov iteration with Rayleigh-Ritz and thick restart. How it differs from the textbook
Lanczos (Wu and Simon 2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems"):

1. The projected matrix is computed, not assumed tridiagonal, and the products A V are kept. So a
   residual is a difference of actual products, never a recurrence, and an operator that is not
   symmetric is noticed.
2. Full reorthogonalization, twice: copies of converged eigenvalues cannot appear.
3. One random start vector cannot see repeated eigenvalues. Before the result is accepted, a fresh
   random direction is iterated beside what was found (`check_repeated`).
4. Everything stays in torch on the operator's device. Through SciPy's ARPACK the same products
   took three times as long: copies, float64 round trips and a second thread pool.

Example:
    >>> import torch
    >>> from thalweg.curvature.operators import DenseOperator
    >>> space = top_eigenpairs(DenseOperator(torch.diag(torch.tensor([3.0, 1.0, 2.0]))), 2)
    >>> [round(value, 4) for value in space.eigenvalues.tolist()], space.converged
    ([3.0, 2.0], True)
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.curvature.operators import SymmetricOperator
from thalweg.curvature.subspace import Subspace, orthonormalize
from thalweg.errors import Diverged, invalid


class NotConverged(UserWarning):
    """An eigensolve stopped at its limit of products before the residuals met the tolerance."""


def top_eigenpairs(
    operator: SymmetricOperator,
    k: int,
    *,
    tolerance: float = 1e-3,
    max_products: int | None = None,
    basis_size: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    check_repeated: int = 4,
) -> Subspace:
    """The k algebraically largest eigenvalues of a symmetric operator with their eigenvectors.

    Args:
        operator: anything with `shape`, `dtype`, `device` and `@` on a block (P, b).
        k: how many, 1 <= k <= P.
        tolerance: largest accepted norm(A u - lambda u) / abs(lambda_1) over the k pairs.
        max_products: give up after so many products; default max(20 k, 200).
        basis_size: vectors kept before a restart; default 2 k + 20, at most P. Memory is twice
            this many vectors.
        start: one vector (P,) or a block (P, b) to start from; a block of b vectors makes every
            round b products. Default: one random vector from `seed`.
        seed: of the start and of the check.
        check_repeated: products spent on a fresh random direction before the result is accepted,
            so that a repeated eigenvalue is not missed; 0 leaves the check out.

    Returns:
        A `Subspace` with residuals, the number of products, and whether it converged.

    Raises:
        InvalidInput: k or the start do not fit the operator; the operator is not symmetric.
        Diverged: a product is NaN or infinite.

    Warns:
        NotConverged: the limit of products was reached first.
    """
    size = operator.shape[0]
    if not 1 <= k <= size:
        raise invalid("k", k, f"an integer from 1 to the number of parameters, {size}")
    if not tolerance > 0:
        raise invalid("tolerance", tolerance, "a number > 0")
    generator = torch.Generator().manual_seed(seed)
    block = _random_vector(operator, generator) if start is None else start.reshape(len(start), -1)
    if block.shape[0] != size:
        raise invalid(
            "start", tuple(start.shape if start is not None else ()), f"(P,) or (P, b), P={size}"
        )
    block = orthonormalize(block.to(operator.dtype))
    limit = max_products or max(20 * k, 200)
    krylov = _Krylov(operator, min(size, basis_size or 2 * k + max(20, block.shape[1])))
    checks_left = check_repeated
    while True:
        krylov.expand(block)
        complete = krylov.dimension == size
        found = krylov.ritz(k, tolerance, exact=complete or checks_left < check_repeated)
        settled = found.k == k and (complete or found.residual <= tolerance)
        if settled and (complete or checks_left == 0):
            return krylov.subspace(found, converged=found.residual <= tolerance)
        if krylov.products >= limit:
            found = krylov.ritz(k, tolerance, exact=True)
            warnings.warn(
                f"{krylov.products} products were not enough: residual {found.residual:.1e}, wanted"
                f" {tolerance:.1e}; raise max_products or the tolerance",
                NotConverged,
                stacklevel=2,
            )
            return krylov.subspace(found, converged=False)
        if settled and checks_left == check_repeated:
            block = _random_vector(operator, generator)
        else:
            block = krylov.remainder()
        checks_left -= int(settled)
        krylov.make_room(k, block.shape[1])
        block = krylov.outside(block, generator)


@dataclass(frozen=True)
class _Ritz:
    """Rayleigh-Ritz pairs: coefficients in the Krylov basis, and the largest residual."""

    values: Tensor
    coefficients: Tensor
    residual: float
    residuals: Tensor | None = None

    @property
    def k(self) -> int:
        return len(self.values)


class _Krylov:
    """An orthonormal basis V, its products W = A V (both as rows), and V^T A V in float64."""

    def __init__(self, operator: SymmetricOperator, room: int) -> None:
        size = operator.shape[0]
        self.operator = operator
        self.basis = torch.empty(room, size, dtype=operator.dtype, device=operator.device)
        self.images = torch.empty_like(self.basis)
        self.projected = torch.zeros(room, room, dtype=torch.float64)
        self.dimension = 0
        self.last = 0
        self.products = 0

    def expand(self, block: Tensor) -> None:
        """Append an orthonormal block (P, b), orthogonal to the basis, and its products."""
        images = self.operator @ block
        if not bool(torch.isfinite(images).all()):
            raise Diverged("a product with the operator is NaN or infinite")
        begin, end = self.dimension, self.dimension + block.shape[1]
        self.basis[begin:end] = block.T
        self.images[begin:end] = images.T
        columns = (self.basis[:end] @ images).double().cpu()
        corner = columns[begin:end]
        columns[begin:end] = (corner + corner.T) / 2
        self.projected[:end, begin:end] = columns
        self.projected[begin:end, :end] = columns.T
        self.dimension, self.last = end, begin
        self.products += block.shape[1]

    def remainder(self) -> Tensor:
        """The products of the last block, minus their part in the basis: (P, b)."""
        return self._reject(self.images[self.last : self.dimension].T)

    def outside(self, block: Tensor, generator: torch.Generator) -> Tensor:
        """An orthonormal block orthogonal to the basis that spans `block` as far as it can.

        Where nothing is left (an invariant subspace was found), random directions take over.
        """
        width = min(block.shape[1], self.operator.shape[0] - self.dimension)
        columns: list[Tensor] = []
        scale = float(self.images[: self.dimension].norm(dim=1).max())
        for column in block.T[:width]:
            found = self._outside_one(column, columns, scale)
            while found is None:
                fresh = _random_vector(self.operator, generator)[:, 0]
                found = self._outside_one(fresh, columns, 0.0)
            columns.append(found)
        return torch.stack(columns).T

    def _outside_one(self, column: Tensor, chosen: list[Tensor], scale: float) -> Tensor | None:
        tiny = 10 * torch.finfo(column.dtype).eps
        vector = column
        for _ in range(3):
            before = vector.norm()
            vector = self._reject(vector)
            for other in chosen:
                vector = vector - other * (other @ vector)
            norm = vector.norm()
            if norm <= tiny * scale or norm == 0:
                return None
            vector = vector / norm
            if norm > 0.5 * before:
                return vector
        return vector

    def ritz(self, k: int, tolerance: float, *, exact: bool) -> _Ritz:
        """The top k Ritz pairs (fewer where the basis is smaller).

        The residual is the recurrence's cheap estimate, and the actual one once that is good
        enough, or where the recurrence does not hold (`exact`).
        """
        m = self.dimension
        values, vectors = torch.linalg.eigh(self.projected[:m, :m])
        count = min(k, m)
        values = values.flip(0)[:count]
        vectors = vectors.flip(1)[:, :count]
        scale = max(float(values[0].abs()), torch.finfo(torch.float64).tiny)
        if not exact:
            tail = torch.linalg.vector_norm(self.remainder(), dim=0).double().cpu()
            estimates = (tail[:, None] * vectors[self.last :]).norm(dim=0)
            estimate = float(estimates.max()) / scale
            if count < k or estimate > tolerance:
                return _Ritz(values, vectors, estimate)
        residuals = self._residuals(values, vectors) / scale
        return _Ritz(values, vectors, float(residuals.max()), residuals)

    def subspace(self, found: _Ritz, *, converged: bool) -> Subspace:
        """The found pairs as a subspace."""
        assert found.residuals is not None
        basis = orthonormalize(self._combine(self.basis, found.coefficients).T)
        return Subspace(
            basis,
            found.values.to(self.basis),
            found.residuals.to(self.basis),
            products=self.products,
            converged=converged,
        )

    def make_room(self, k: int, width: int) -> None:
        """Thick restart: keep the best Ritz vectors where `width` more would not fit."""
        m, room = self.dimension, self.basis.shape[0]
        if m + min(width, self.operator.shape[0] - m) <= room:
            return
        keep = max(1, min(k + max(4, k // 2), room - width - 1))
        values, vectors = torch.linalg.eigh(self.projected[:m, :m])
        values, vectors = values.flip(0)[:keep], vectors.flip(1)[:, :keep]
        self.basis[:keep] = self._combine(self.basis, vectors)
        self.images[:keep] = self._combine(self.images, vectors)
        self.projected.zero_()
        self.projected[:keep, :keep] = torch.diag(values)
        self.dimension = self.last = keep

    def _residuals(self, values: Tensor, vectors: Tensor) -> Tensor:
        """norm(A u - value u) of each pair, from the products themselves."""
        basis = self._combine(self.basis, vectors)
        images = self._combine(self.images, vectors)
        gram = (basis @ images.T).double().cpu()
        asymmetry = float((gram - gram.T).abs().max()) / max(float(gram.abs().max()), 1e-300)
        if asymmetry > 1e-3:
            raise invalid(
                "operator",
                f"u_i^T A u_j and u_j^T A u_i that differ by {asymmetry:.1e} of the largest",
                "a symmetric operator, the same at every product",
            )
        return (images - values.to(images)[:, None] * basis).norm(dim=1).double().cpu()

    def _combine(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        return coefficients.T.to(rows) @ rows[: self.dimension]

    def _reject(self, vectors: Tensor) -> Tensor:
        basis = self.basis[: self.dimension]
        return vectors - basis.T @ (basis @ vectors)


def _random_vector(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    vector = torch.randn(operator.shape[0], 1, generator=generator, dtype=torch.float64)
    return (vector / vector.norm()).to(dtype=operator.dtype, device=operator.device)
