"""Eigenpairs of a symmetric operator from scratch: the largest, the smallest, or a band of them.

Block Krylov iteration with Rayleigh-Ritz and thick restart. How it differs from the textbook
Lanczos (Wu and Simon 2000, "Thick-restart Lanczos method for large symmetric eigenvalue problems"):

1. The projected matrix is computed, not assumed tridiagonal, and the products A V are kept. So a
   residual is a difference of actual products, never a recurrence, and an operator that is not
   symmetric is noticed.
2. Full reorthogonalization, twice: copies of converged eigenvalues cannot appear.
3. Products may be inexact (differences of gradients): residuals include their errors, and a solve
   ends where these outweigh what further products would win. At its end one product is made anew in
   a better way, and shows whether they are what they were said to be.
4. One random start vector cannot see repeated eigenvalues. Before the result is accepted, a fresh
   random direction is iterated beside what was found (`check_repeated`), again and again while
   that brings in another copy. From then on the space grows by the residual of the worst pair.
   Curvature of a loss is asked over few samples first, which saves 4 products of 23: see
   `multiplicity.py`.
5. Everything stays in torch on the operator's device. Through SciPy's ARPACK the same products
   took three times as long: copies, float64 round trips and a second thread pool.

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> operator = DenseOperator(torch.diag(torch.tensor([3.0, 1.0, -4.0, 2.0])))
    >>> space = top_eigenpairs(operator, 2)
    >>> [round(value, 4) for value in space.eigenvalues.tolist()], space.converged
    ([3.0, 2.0], True)
    >>> space = eigenpairs(operator, 2, which="magnitude")
    >>> [round(value, 4) for value in space.eigenvalues.tolist()]
    [3.0, -4.0]
    >>> space = eigenpairs(operator, band=(1, 3))
    >>> [round(value, 4) for value in space.eigenvalues.tolist()]
    [2.0, 1.0]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import formerly, invalid, unknown_name
from thalweg.linalg import all_finite, length, orthonormalize
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import as_operator
from thalweg.operators.symmetric import SymmetricOperator, rows_of
from thalweg.spectrum.krylov import WANTED, Krylov, Ritz, Which, random_vector
from thalweg.spectrum.multiplicity import few_samples_see_none
from thalweg.spectrum.progress import SolveClock
from thalweg.spectrum.subspace import Subspace
from thalweg.surroundings import shielded

PATIENCE, NEAR_NOISE = 15, 3.0
"""Products without a lower residual, this many times the products' own errors, end a solve."""
ROUNDING = 10
"""Units of the last place that a residual can be asked to meet."""
CHECK_REPEATED = 4
"""Products spent on a fresh random direction, so that no copy of an eigenvalue is missed."""


class NotConverged(UserWarning):
    """An eigensolve stopped at its limit of products before the residuals met the tolerance.

    Its result comes all the same, with `converged` False and the residuals that were reached.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", NotConverged)  # stop, where that will not do
    """


@formerly(max_products="max_matvecs")
def top_eigenpairs(
    operator: SymmetricOperator | Loss,
    k: int,
    *,
    tolerance: float = 1e-3,
    max_matvecs: int | None = None,
    basis_size: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    check_repeated: int = CHECK_REPEATED,
) -> Subspace:
    """The k algebraically largest eigenvalues of a symmetric operator with their eigenvectors.

    `eigenpairs` with `which="largest"`: arguments, errors and warnings are described there.

    Example:
        >>> from thalweg.operators.symmetric import DenseOperator
        >>> top_eigenpairs(DenseOperator(torch.diag(torch.tensor([1.0, 4.0]))), 1).eigenvalues
        tensor([4.])
    """
    return _solve(
        operator,
        "largest",
        k,
        None,
        tolerance=tolerance,
        max_matvecs=max_matvecs,
        basis_size=basis_size,
        start=start,
        seed=seed,
        check_repeated=check_repeated,
    )


@formerly(max_products="max_matvecs")
def eigenpairs(
    operator: SymmetricOperator | Loss,
    k: int | None = None,
    *,
    which: Which = "largest",
    band: tuple[int, int] | None = None,
    tolerance: float = 1e-3,
    max_matvecs: int | None = None,
    basis_size: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    check_repeated: int = CHECK_REPEATED,
) -> Subspace:
    """Some eigenvalues of a symmetric operator with their eigenvectors: the first k, or a band.

    Args:
        operator: anything with `shape`, `dtype`, `device` and `@` on a block (P, b); or a loss, for
            its Hessian at the parameters.
        k: how many, 1 <= k <= P.
        which: the order of the eigenvalues: "largest" counts from lambda_1 down, "smallest" from
            lambda_P up, "magnitude" by absolute value down. (In `scipy.sparse.linalg.eigsh`:
            "LA", "SA", "LM".)
        band: (i, j) in place of k, 0 <= i < j <= P: those from position i to before position j of
            that order, counted from 0. It costs what the first j cost: it is found with them.
        tolerance: largest accepted norm(A u - lambda u) / abs(lambda) over the first k or j pairs,
            lambda in the divisor being the first of the order: lambda_1 for "largest", lambda_P
            for "smallest", that of size norm(A) for "magnitude". Where abs(lambda) is below
            norm(A) / 100, as for the smallest of a semidefinite matrix, this takes its place.
        max_matvecs: give up after multiplying so many vectors, >= k; default max(20 k, 200). For a
            band, here and below, k is j.
        basis_size: vectors kept before a restart, at least k + 2; default 2 k + 20, at most P.
            Memory is twice this many vectors.
        start: one vector (P,) or a block (P, b) to start from, on the operator's device; a block
            of b vectors makes every round b products. Default: one random vector from `seed`.
        seed: of the start and of the check.
        check_repeated: products spent on a fresh random direction before the result is accepted,
            so that a repeated eigenvalue is not missed; over a sixteenth of the samples first,
            where the operator has samples, and over all where those show a reason. It is a
            chance, not a proof: with 4 a copy was missed in about one of 2,000 random matrices of
            few, highly repeated eigenvalues; where multiplicities matter, take 10 or more. 0
            leaves the check out. (A start block of b vectors sees up to b copies without it.)

    Returns:
        A `Subspace` with residuals, the number of products, and whether it converged, in the
        operator's dtype and on its device. Its eigenvalues, in units of the operator, descend
        algebraically, whatever the order they were counted in.

    Raises:
        InvalidInput: k, the band, a limit or the start do not fit the operator; it is not
            symmetric, or its products are not of the shape, dtype and device that it states.
        Diverged: a product is NaN or infinite.

    Warns:
        NotConverged: the limit of products, or that of rounding, was reached first.

    Source: Wu, Simon 2000, and what the module says of the differences. Example: see the module.
    """
    return _solve(
        operator,
        which,
        k,
        band,
        tolerance=tolerance,
        max_matvecs=max_matvecs,
        basis_size=basis_size,
        start=start,
        seed=seed,
        check_repeated=check_repeated,
    )


def _positions(
    operator: SymmetricOperator, k: int | None, band: tuple[int, int] | None
) -> tuple[int, int]:
    """The positions (i, j) asked for in the order of the eigenvalues."""
    size = operator.shape[0]
    if operator.shape != (size, size):
        raise invalid("operator", f"shape {tuple(operator.shape)}", "a square shape (P, P)")
    if band is None:
        if k is None or k not in range(1, size + 1):
            allowed = f"an integer from 1 to the number of parameters, {size}"
            raise invalid("k", k, allowed, "" if k is not None else "or give a band (i, j)")
        return 0, k
    if k is not None:
        raise invalid("k", k, f"None beside the band {band}")
    if not (len(band) == 2 and 0 <= band[0] < band[1] <= size):
        raise invalid("band", band, f"(i, j) with 0 <= i < j <= {size}, the number of parameters")
    return band


def _solve(
    given: SymmetricOperator | Loss,
    which: Which,
    k: int | None,
    band: tuple[int, int] | None,
    *,
    tolerance: float,
    max_matvecs: int | None,
    basis_size: int | None,
    start: Tensor | None,
    seed: int,
    check_repeated: int,
) -> Subspace:
    operator = as_operator(given)
    size, (first, k) = operator.shape[0], _positions(operator, k, band)
    if which not in WANTED:
        raise unknown_name("which", which, WANTED)
    generator = torch.Generator().manual_seed(seed)
    block = _start_block(operator, start, generator)
    least = min(size, k + block.shape[1] + 1)
    limit = max(20 * k, 200) if max_matvecs is None else max_matvecs
    room = 2 * k + max(20, block.shape[1]) if basis_size is None else basis_size
    if not tolerance > 0:
        raise invalid("tolerance", tolerance, "a number > 0")
    if limit < k:
        raise invalid("max_matvecs", max_matvecs, f"an integer >= k = {k}")
    if room < least:
        raise invalid("basis_size", basis_size, f"an integer >= {least}, the result and a block")
    if check_repeated < 0:
        raise invalid("check_repeated", check_repeated, "an integer >= 0")
    with shielded():
        krylov = Krylov(operator, min(size, room), which)
        found = _iterate(krylov, block, k, tolerance, limit, check_repeated, generator)
        subspace = krylov.subspace(found, first, converged=found.residual <= tolerance)
    _warn_unless_converged(krylov, found, tolerance)
    return subspace


@dataclass(frozen=True)
class SolvedBlock:
    """The top Ritz vectors of a solve with their products: what a tracker begins from.

    Attributes:
        rows: orthonormal, (b, P); the first k converged, those beside them as far as they came.
        images: their products with the operator, (b, P).
        angles: of the first k, (k,), and
        num_matvecs: as for `Subspace`.
        cut: whether `max_matvecs` ended it before the first k converged.
        product_error: the largest error of the first k images, relative to their norms; 0 where
            products are exact but for rounding.
    """

    rows: Tensor
    images: Tensor
    angles: Tensor
    num_matvecs: float
    cut: bool = False
    product_error: float = 0.0


def solve_block(
    operator: SymmetricOperator,
    k: int,
    width: Callable[[Tensor], int],
    *,
    tolerance: float,
    finer: Callable[[Tensor], float] | None = None,
    max_matvecs: float = math.inf,
) -> SolvedBlock:
    """The k largest eigenpairs as `top_eigenpairs` finds them, and Ritz vectors beside them.

    Args:
        operator: symmetric, (P, P).
        k: how many have to converge.
        width: how many are wanted in all, given the Ritz values (m,) in descending order.
        tolerance: as for `eigenpairs`.
        finer: of the first k Ritz values (k,), a tolerance to go on to where it is smaller and
            `max_matvecs` allows.
        max_matvecs: as for `eigenpairs`; at least k are made.

    Warns:
        NotConverged: as for `eigenpairs`, but not of what `max_matvecs` ends.
    """
    generator = torch.Generator().manual_seed(0)
    krylov = Krylov(operator, min(operator.shape[0], 2 * k + 20), "largest")
    with shielded():
        start = _start_block(operator, None, generator)
        usual = max(20 * k, 200)
        limit = max(k, int(min(max_matvecs, usual)))
        found = _iterate(krylov, start, k, tolerance, limit, CHECK_REPEATED, generator, finer)
        noise = krylov.noise_of(found.coefficients) / found.values.abs() if found.noise else None
        rows, images, _ = krylov.block(width)
    assert found.angles is not None
    cut = limit < usual and found.residual > tolerance and not krylov.complete
    if not cut:
        _warn_unless_converged(krylov, found, tolerance)
    product_error = 0.0 if noise is None else float(noise.max())
    return SolvedBlock(rows, images, found.angles, krylov.num_matvecs, cut, product_error)


def _warn_unless_converged(krylov: Krylov, found: Ritz, tolerance: float) -> None:
    if found.residual > tolerance:
        hint = "raise max_matvecs or the tolerance"
        if found.noise > tolerance / 2:
            hint = f"its products are off by {found.noise:.1e}: raise the tolerance"
        elif krylov.complete:
            hint = "rounding allows no better"
        warnings.warn(
            f"{krylov.num_matvecs:g} products were not enough: residual {found.residual:.1e},"
            f" wanted {tolerance:.1e}; {hint}",
            NotConverged,
            stacklevel=5,
        )


def _start_block(
    operator: SymmetricOperator, start: Tensor | None, generator: torch.Generator
) -> Tensor:
    size = operator.shape[0]
    if start is None:
        return orthonormalize(random_vector(operator, generator))
    if start.dim() not in (1, 2) or length(start, 0) != size or 0 in start.shape[1:]:
        raise invalid("start", tuple(start.shape), f"(P,) or (P, b), P={size}, b >= 1")
    # An empty tensor knows which device "cuda" stands for.
    device = torch.empty(0, device=operator.device).device
    if start.device != device:
        raise invalid(
            "start", f"a tensor on {start.device}", f"one on the operator's device, {device}"
        )
    if not all_finite(start):
        raise invalid("start", "NaN or infinite values", "finite ones")
    return orthonormalize(rows_of(start.detach(), operator).T.to(operator.dtype))


def _iterate(
    krylov: Krylov,
    block: Tensor,
    k: int,
    tolerance: float,
    limit: int,
    check_repeated: int,
    generator: torch.Generator,
    finer: Callable[[Tensor], float] | None = None,
) -> Ritz:
    """Grow the space from `block` until the first k pairs converged, or the limit of products."""
    checks_left = check_repeated
    settled_at: Ritz | None = None
    clock = SolveClock(f"{k} {krylov.which} eigenpairs", limit, tolerance)
    stalled = _Stalled()
    while True:
        krylov.expand(block)
        exact = krylov.complete or settled_at is not None
        found = krylov.ritz(k, tolerance, exact=exact)
        if found.within and finer is not None:
            rounding = ROUNDING * torch.finfo(krylov.basis.dtype).eps
            needed, finer = max(finer(found.values), rounding), None
            if needed < tolerance:
                clock.tolerance = tolerance = needed
                found = krylov.ritz(k, tolerance, exact=exact)
        settled = found.within
        clock.note(krylov.num_matvecs, found.residual if found.k == k else math.inf)
        if settled and settled_at is not None and krylov.rose(found, settled_at, tolerance):
            # The fresh direction brought in another copy: there may be more.
            checks_left = check_repeated
        done = krylov.complete or (settled and checks_left == 0) or krylov.num_matvecs >= limit
        done = done or stalled.after(found, krylov.num_matvecs)
        if settled and settled_at is None and not done:
            done = few_samples_see_none(krylov, found, check_repeated, generator)
        if done:
            if found.residuals is None:
                found = krylov.ritz(k, tolerance, exact=True)
            return krylov.measured(found, tolerance)
        if settled and checks_left == check_repeated:
            settled_at = found
            block = random_vector(krylov.operator, generator)
        elif settled or found.worst is None:
            block = krylov.remainder()
        else:
            # Beside a second Krylov space the last product no longer points to what is missing.
            block = found.worst
        checks_left -= int(settled)
        krylov.make_room(k, block.shape[1])
        block = krylov.outside(block, generator)


@dataclass
class _Stalled:
    """Whether the errors of inexact products keep residuals from falling any further."""

    least: float = math.inf
    since: float = 0.0

    def after(self, found: Ritz, num_matvecs: float) -> bool:
        reached = math.sqrt(max(found.residual**2 - found.noise**2, 0.0))
        if reached < 0.9 * self.least:
            self.least, self.since = reached, num_matvecs
        return reached < NEAR_NOISE * found.noise and num_matvecs - self.since >= PATIENCE
