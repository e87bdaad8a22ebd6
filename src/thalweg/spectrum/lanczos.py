"""The Krylov space of some vectors, grown product by product: block Lanczos.

What functions of an operator times a vector need; `krylov.py` is the basis that eigensolvers
restart. Three things are its own:

1. Several vectors share one space: each has at least the accuracy that it would have alone with as
   many block products. A vector that depends on those before it costs nothing.
2. Eigenvectors that are known, nearly, are in the basis from the start, without products: those of
   the others with A tell how they couple to them. The Krylov space has only the rest to find.
3. Without its basis, three blocks of vectors are held, nothing is reorthogonalized, and what is
   combined of the basis is made in a second pass.

Source: Golub, Underwood 1977, "The block Lanczos method for computing eigenvalues".

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> operator = DenseOperator(torch.diag(torch.tensor([5.0, 2.0, 2.0, 1.0]).double()))
    >>> space = LanczosSpace(operator, torch.ones(4, 1).double())
    >>> while not space.is_invariant:
    ...     space.grow()
    >>> nodes, _ = space.compression().quadrature(space.coordinates[:, 0])
    >>> space.num_matvecs, nodes.round().tolist()
    (3, [1.0, 2.0, 5.0])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from thalweg.errors import Diverged, invalid
from thalweg.linalg import combine, coordinates, dot, empty_rows, length, linear_combination, norm
from thalweg.operators.symmetric import SymmetricOperator, checked_product, refuse_asymmetry
from thalweg.spectrum.compression import Compression, continued
from thalweg.spectrum.probe_vectors import known_part
from thalweg.spectrum.subspace import Subspace

# How much u^T A v and v^T A u may differ, relative to the largest product.
ASYMMETRY = 1e-3
# By how many of its last blocks T is continued; one way each.
PATTERNS = (2, 6, 1000)
# It is continued by as many blocks as it has and some more, but by no more than that.
CONTINUED_BY, MOST_CONTINUED = 10, 50
# An error is looked at after each step, and from this one on after each eighth more.
LOOKED_AT_EACH = 16
# Fewer steps do not show how the recurrence goes on.
FEWEST_STEPS = 3
# Vectors that are allocated at a time.
ROWS_AT_A_TIME = 16


class LanczosSpace:
    """An orthonormal basis V of the Krylov space of some vectors, and T = V^T A V.

    Args:
        operator: A, (P, P).
        starts: (P, b), finite and not zero.
        known: eigenpairs that are in the basis from the start; they may be inexact.
        keep_basis: hold all of V, one vector (P,) a product, and reorthogonalize.

    Attributes:
        num_matvecs: vectors multiplied.
        lengths: the norms of the starts, (b,), float64 on the CPU.
        largest: the largest norm of a product with a unit vector: norm(A), from below.
        product_error: the largest error of one, by estimate; 0 where they are exact.

    Raises:
        InvalidInput: a start that is zero or not finite, or of another shape than the operator's;
            known eigenpairs without the basis, or that `known_part` refuses.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        starts: Tensor,
        known: Subspace | None = None,
        *,
        keep_basis: bool = True,
    ) -> None:
        size = operator.shape[0]
        if starts.dim() != 2 or length(starts, 0) != size:
            raise invalid("vector", tuple(starts.shape), f"(P,) or (P, b) with P={size}")
        if known is not None and not keep_basis:
            raise invalid("known", known, "None where the basis is not kept")
        self.operator = operator
        self.keep_basis = keep_basis
        self.num_matvecs = 0
        self.largest = self.product_error = 0.0
        rows = starts.T.to(dtype=operator.dtype, device=operator.device)
        self.lengths = norm(rows, dtype=torch.float64).cpu()
        if not bool(((self.lengths > 0) & torch.isfinite(self.lengths)).all()):
            raise invalid("vector", f"norms {self.lengths.tolist()}", "finite vectors, not zero")
        self._starts = rows / self.lengths[:, None].to(rows)
        self._basis = _Rows(rows[:0])
        before = known_part(operator, known)
        self._basis.append(before.basis.T)
        self._projected = torch.diag(before.eigenvalues.double().cpu())
        # A start that is another one's multiple but for rounding would add the rounding alone.
        alike = torch.finfo(rows.dtype).eps ** 0.5
        self._next, into = _orthonormal(self._starts, self._basis, alike)
        inside = self._basis.coordinates(self._starts.T).double().cpu()
        self._first = torch.cat([inside, into])
        self._coupling = torch.zeros(
            len(self._next), self.dimension, dtype=torch.float64, device="cpu"
        )
        # The widths of the blocks that were multiplied.
        self._widths: list[int] = []

    @property
    def dimension(self) -> int:
        """m, how many vectors V has."""
        return len(self._projected)

    @property
    def is_invariant(self) -> bool:
        """Whether V spans an invariant subspace: there is nothing left to multiply."""
        return len(self._next) == 0

    @property
    def coordinates(self) -> Tensor:
        """The starts in V, each divided by its norm: (m, b), float64 on the CPU."""
        m, (have, b) = self.dimension, self._first.shape
        return torch.cat([self._first, self._first.new_zeros(max(0, m - have), b)])[:m]

    @property
    def rounding(self) -> float:
        """How far rounding, and errors of products, may change an eigenvalue; in its units."""
        if self.product_error:
            return self.product_error
        return 10 * torch.finfo(self._starts.dtype).eps * self.largest

    def grow(self) -> None:
        """Multiply the next block, and take it into the basis.

        Raises:
            Diverged: a product is NaN or infinite.
            InvalidInput: the operator is not symmetric, or gives another shape or dtype.
        """
        block, width = self._next, len(self._next)
        images = self._product(block)
        self._basis.append(block)
        inside = self._basis.coordinates(images.T)
        images = images - self._basis.combination(inside).T
        if self.keep_basis:
            more = self._basis.coordinates(images.T)
            images = images - self._basis.combination(more).T
            inside = inside + more
        self._project(inside.double().cpu(), width)
        if not self.keep_basis:
            self._basis.keep_last(width)
        left = max(0, self.operator.shape[0] - self.dimension)
        self._next, into = _orthonormal(images, self._basis, self.rounding, left)
        self._coupling = torch.zeros(
            len(self._next), self.dimension, dtype=torch.float64, device="cpu"
        )
        self._coupling[:, -width:] = into
        self._widths.append(width)

    def grow_until(
        self, error_of: Callable[[Compression], float], error: float, max_matvecs: int
    ) -> float:
        """Grow until what is made of the space has the target error; the error reached.

        Args:
            error_of: the estimated error of what is made of it.
            error: the target.
            max_matvecs: the most vectors to multiply.
        """
        next_look = FEWEST_STEPS
        while True:
            if not self.is_invariant:
                self.grow()
            is_last = self.is_invariant or self.num_matvecs >= max_matvecs
            steps = len(self._widths)
            if steps < next_look and not is_last:
                continue
            reached = error_of(self.compression())
            if reached <= error or is_last:
                return reached
            # A look costs the cube of the steps.
            next_look = steps + max(1, steps // 8 if steps >= LOOKED_AT_EACH else 1)

    def compression(self) -> Compression:
        """T, S and continuations of T: what `Compression` reads."""
        continuations = tuple(self._continuations())
        return Compression(self._projected, self._coupling, continuations, len(self._widths))

    def rows_and_images(self) -> tuple[Tensor, Tensor]:
        """V and A V as rows, (m, P) each: no product is made. The basis must be kept.

        Of known eigenvectors the image is what their eigenvalues say.
        """
        rows = self._basis.all()
        images = combine(self._projected.to(rows), rows)
        return rows, images + combine(self._coupling.T.to(rows), self._next)

    def combine(self, coefficients: Tensor) -> Tensor:
        """V c (P,) of coefficients (m,); every product once more where the basis is not kept."""
        if self.keep_basis:
            return self._basis.combination(coefficients.to(self._starts))
        again = LanczosSpace(self.operator, self._starts.T, keep_basis=False)
        total = torch.zeros_like(self._starts[0])
        parts = coefficients.to(total).split(self._widths)
        for number, part in enumerate(parts, start=1):
            total += linear_combination(again._next, part)
            if number < len(parts):
                again.grow()
        self.num_matvecs += again.num_matvecs
        return total

    def _product(self, block: Tensor) -> Tensor:
        images, errors = checked_product(self.operator, block.T)
        images = images.T
        largest = float(norm(images, dtype=torch.float64).max())
        if not largest < float("inf"):
            raise Diverged("a product with the operator is NaN or infinite")
        self.largest = max(self.largest, largest)
        if errors is not None:
            self.product_error = max(self.product_error, float(errors.max()))
        self.num_matvecs += len(block)
        return images

    def _project(self, inside: Tensor, width: int) -> None:
        """Take the products' coordinates in the basis held (n, width) into T."""
        m, held = self.dimension, len(inside) - width
        corner = inside[held:]
        across = torch.zeros(m, width, dtype=torch.float64, device="cpu")
        across[m - held :] = inside[:held]
        # Towards the block before, a product says again what that block's own product said.
        others = across[m - held :] - self._coupling.T[m - held :]
        if self._widths:
            known = held - sum(self._widths) if self.keep_basis else 0
            self._require_symmetric(others[known:], corner)
        else:
            self._require_symmetric(across[:0], corner)
        above = torch.cat([self._projected, across], dim=1)
        below = torch.cat([across.T, (corner + corner.T) / 2], dim=1)
        self._projected = torch.cat([above, below])

    def _require_symmetric(self, leaks: Tensor, corner: Tensor) -> None:
        apart = torch.cat([leaks.flatten(), (corner - corner.T).flatten()]).abs().max()
        scale = max(self.largest, torch.finfo(torch.float64).tiny)
        refuse_asymmetry(float(apart) / scale, ASYMMETRY, self.product_error / scale)

    def _continuations(self) -> Iterator[Tensor]:
        r = len(self._next)
        # Blocks that are as wide as the next one: only those can be repeated.
        alike = next(
            (i for i, width in enumerate(reversed(self._widths)) if width != r), len(self._widths)
        )
        steps = min(len(self._widths) + CONTINUED_BY, MOST_CONTINUED)
        for pattern in sorted({min(pattern, alike) for pattern in PATTERNS}) if r else ():
            if pattern:
                yield continued(self._projected, self._coupling, pattern, steps)


class _Rows:
    """Rows (n, P) that are appended to, allocated some at a time: nothing is copied."""

    def __init__(self, empty: Tensor) -> None:
        self._empty = empty
        self._parts: list[Tensor] = []
        self._used = 0

    def append(self, rows: Tensor) -> None:
        """Add rows (b, P)."""
        for row in rows:
            if not self._parts or self._used == len(self._parts[-1]):
                self._parts.append(empty_rows(ROWS_AT_A_TIME, row))
                self._used = 0
            self._parts[-1][self._used] = row
            self._used += 1

    def keep_last(self, count: int) -> None:
        """Forget all but the last rows."""
        last = self.all()[-count:].clone()
        self._parts, self._used = [], 0
        self.append(last)

    def all(self) -> Tensor:
        """All rows in one piece, a copy."""
        return torch.cat([*self._filled()]) if self._parts else self._empty

    def coordinates(self, vectors: Tensor) -> Tensor:
        """U^T v (n, m) of vectors (P, m)."""
        parts = [coordinates(part, vectors) for part in self._filled()]
        return torch.cat(parts) if parts else coordinates(self._empty, vectors)

    def combination(self, coefficients: Tensor) -> Tensor:
        """U c (P, m) of coefficients (n, m), or (P,) of (n,)."""
        total: Tensor | None = None
        begin = 0
        for part in self._filled():
            piece = linear_combination(part, coefficients[begin : begin + len(part)])
            total = piece if total is None else total.add_(piece)
            begin += len(part)
        if total is None:
            return linear_combination(self._empty, coefficients)
        return total

    def _filled(self) -> Iterator[Tensor]:
        for number, part in enumerate(self._parts, start=1):
            yield part[: self._used] if number == len(self._parts) else part


def _orthonormal(
    block: Tensor, basis: _Rows, tolerance: float, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """Orthonormal rows (r, P) for what a block (b, P) has outside of the basis, and R (r, b).

    Args:
        tolerance: what is no longer than that counts as nothing.
        most: the largest r.
    """
    found: list[Tensor] = []
    into = torch.zeros(len(block), len(block), dtype=torch.float64, device="cpu")
    for column, row in enumerate(block):
        vector = row - basis.combination(basis.coordinates(row[:, None]))[:, 0]
        for _ in range(2):
            for number, other in enumerate(found):
                part = dot(other, vector)
                into[number, column] += float(part)
                vector = vector - part * other
        length = norm(vector, dtype=torch.float64)
        if float(length) <= tolerance or (most is not None and len(found) >= most):
            continue
        vector = vector / length.to(vector)
        # Where little was left, rounding in the directions of the basis has grown with it.
        vector = vector - basis.combination(basis.coordinates(vector[:, None]))[:, 0]
        vector = vector / norm(vector)
        into[len(found), column] = float(length)
        found.append(vector)
    rows = torch.stack(found) if found else block[:0]
    return rows, into[: len(found)]
