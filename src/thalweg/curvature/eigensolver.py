"""Top eigenpairs of a symmetric operator from scratch.

Block Krylov iteration with Rayleigh-Ritz and thick restart. How it differs from the textbook
Lanczos (Wu and Simon 2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems"):

1. The projected matrix is computed, not assumed tridiagonal, and the products A V are kept. So a
   residual is a difference of actual products, never a recurrence, and an operator that is not
   symmetric is noticed.
2. Full reorthogonalization, twice: copies of converged eigenvalues cannot appear.
3. One random start vector cannot see repeated eigenvalues. Before the result is accepted, a fresh
   random direction is iterated beside what was found (`check_repeated`), again and again while
   that brings in another copy. From then on the space grows by the residual of the worst pair.
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
        tolerance: largest accepted norm(A u - lambda u) / abs(lambda_1) over the k pairs. Where
            lambda_1 is below sqrt(eps) norm(A), eps that of the dtype, this takes its place.
        max_products: give up after so many products, >= k; default max(20 k, 200).
        basis_size: vectors kept before a restart, at least k + 2; default 2 k + 20, at most P.
            Memory is twice this many vectors.
        start: one vector (P,) or a block (P, b) to start from; a block of b vectors makes every
            round b products. Default: one random vector from `seed`.
        seed: of the start and of the check.
        check_repeated: products spent on a fresh random direction before the result is accepted,
            so that a repeated eigenvalue is not missed; 0 leaves the check out.

    Returns:
        A `Subspace` with residuals, the number of products, and whether it converged.

    Raises:
        InvalidInput: k, a limit or the start do not fit the operator; it is not symmetric.
        Diverged: a product is NaN or infinite.

    Warns:
        NotConverged: the limit of products, or that of rounding, was reached first.
    """
    size = operator.shape[0]
    generator = torch.Generator().manual_seed(seed)
    block = _start_block(operator, start, generator)
    least = min(size, k + block.shape[1] + 1)
    limit = max(20 * k, 200) if max_products is None else max_products
    room = 2 * k + max(20, block.shape[1]) if basis_size is None else basis_size
    if not 1 <= k <= size:
        raise invalid("k", k, f"an integer from 1 to the number of parameters, {size}")
    if not tolerance > 0:
        raise invalid("tolerance", tolerance, "a number > 0")
    if limit < k:
        raise invalid("max_products", max_products, f"an integer >= k = {k}")
    if room < least:
        raise invalid("basis_size", basis_size, f"an integer >= {least}, the result and a block")
    if check_repeated < 0:
        raise invalid("check_repeated", check_repeated, "an integer >= 0")
    krylov = _Krylov(operator, min(size, room))
    checks_left = check_repeated
    settled_at: Tensor | None = None
    while True:
        krylov.expand(block)
        complete = krylov.dimension == size
        found = krylov.ritz(k, tolerance, exact=complete or settled_at is not None)
        settled = found.k == k and found.residual <= tolerance
        if settled and settled_at is not None and found.rose_from(settled_at, tolerance):
            # The fresh direction brought in another copy: there may be more.
            checks_left = check_repeated
        if complete or (settled and checks_left == 0) or krylov.products >= limit:
            if found.residuals is None:
                found = krylov.ritz(k, tolerance, exact=True)
            return _result(krylov, found, tolerance)
        if settled and checks_left == check_repeated:
            settled_at = found.values
            block = _random_vector(operator, generator)
        elif settled or found.worst is None:
            block = krylov.remainder()
        else:
            # Beside a second Krylov space the last product no longer points to what is missing.
            block = found.worst
        checks_left -= int(settled)
        krylov.make_room(k, block.shape[1])
        block = krylov.outside(block, generator)


def _start_block(
    operator: SymmetricOperator, start: Tensor | None, generator: torch.Generator
) -> Tensor:
    size = operator.shape[0]
    if start is None:
        return orthonormalize(_random_vector(operator, generator))
    if start.dim() not in (1, 2) or start.shape[0] != size:
        raise invalid("start", tuple(start.shape), f"(P,) or (P, b), P={size}")
    return orthonormalize(start.reshape(size, -1).to(operator.dtype))


def _result(krylov: _Krylov, found: _Ritz, tolerance: float) -> Subspace:
    converged = found.residual <= tolerance
    if not converged:
        complete = krylov.dimension == krylov.operator.shape[0]
        mend = "rounding allows no better" if complete else "raise max_products or the tolerance"
        warnings.warn(
            f"{krylov.products} products were not enough: residual {found.residual:.1e}, wanted"
            f" {tolerance:.1e}; {mend}",
            NotConverged,
            stacklevel=3,
        )
    return krylov.subspace(found, converged=converged)


@dataclass(frozen=True)
class _Ritz:
    """Rayleigh-Ritz pairs: coefficients in the Krylov basis, and the largest residual.

    `residuals` (k,) and the residual vector of the worst pair (P, 1) are those of actual products.
    """

    values: Tensor
    coefficients: Tensor
    residual: float
    residuals: Tensor | None = None
    worst: Tensor | None = None

    @property
    def k(self) -> int:
        return len(self.values)

    def rose_from(self, values: Tensor, tolerance: float) -> bool:
        """Whether an eigenvalue is larger than it was by more than convergence explains."""
        return bool(((self.values - values) > 2 * tolerance * self.values.abs().max()).any())


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
        self.norm = 0.0

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
        self.norm = max(self.norm, float(values.abs().max()))
        count = min(k, m)
        values = values.flip(0)[:count]
        vectors = vectors.flip(1)[:, :count]
        # Rounding is relative to the norm: relative to lambda_1 near 0 nothing would converge.
        least = torch.finfo(self.basis.dtype).eps ** 0.5 * self.norm
        scale = max(float(values[0].abs()), least, torch.finfo(torch.float64).tiny)
        if not exact:
            tail = torch.linalg.vector_norm(self.remainder(), dim=0).double().cpu()
            estimates = (tail[:, None] * vectors[self.last :]).norm(dim=0)
            estimate = float(estimates.max()) / scale
            if count < k or estimate > tolerance:
                return _Ritz(values, vectors, estimate)
        vectors_of_residuals = self._residuals(values, vectors)
        residuals = vectors_of_residuals.norm(dim=1).double().cpu() / scale
        worst = vectors_of_residuals[int(residuals.argmax())][:, None]
        return _Ritz(values, vectors, float(residuals.max()), residuals, worst)

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
        """A u - value u of each pair as rows (k, P), from the products themselves."""
        basis = self._combine(self.basis, vectors)
        images = self._combine(self.images, vectors)
        one_way = basis @ self.images[: self.dimension].T
        other_way = images @ self.basis[: self.dimension].T
        asymmetry = float((one_way - other_way).abs().max()) / max(self.norm, 1e-300)
        if asymmetry > 1e-3:
            raise invalid(
                "operator",
                f"u^T A v and v^T A u that differ by {asymmetry:.1e} of its norm",
                "a symmetric operator, the same at every product",
            )
        return images - values.to(images)[:, None] * basis

    def _combine(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        return coefficients.T.to(rows) @ rows[: self.dimension]

    def _reject(self, vectors: Tensor) -> Tensor:
        basis = self.basis[: self.dimension]
        return vectors - basis.T @ (basis @ vectors)


def _random_vector(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    vector = torch.randn(operator.shape[0], 1, generator=generator, dtype=torch.float64)
    return (vector / vector.norm()).to(dtype=operator.dtype, device=operator.device)
