"""A growing orthonormal basis with its products by a symmetric operator, and Ritz pairs from it.

What `eigensolver` iterates on; its documentation says how this differs from textbook Lanczos.

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> matrix = torch.diag(torch.tensor([1.0, -3.0, 2.0]))
    >>> krylov = Krylov(DenseOperator(matrix), room=2, which="magnitude")
    >>> krylov.expand(torch.eye(3)[:, :2])
    >>> krylov.ritz(2, 1e-3, exact=True).values.tolist()
    [-3.0, 1.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from thalweg.errors import Diverged
from thalweg.linalg import (
    combine,
    coordinates,
    dot,
    empty_rows,
    linear_combination,
    norm,
    orthonormalize,
    random_unit,
    reject,
    residual_products,
)
from thalweg.operators.symmetric import SymmetricOperator, checked_product, refuse_asymmetry
from thalweg.sharding import sharding_of
from thalweg.spectrum.subspace import Subspace

Which = Literal["largest", "smallest", "magnitude"]
"""Which eigenvalues come first: lambda_1, lambda_2, ...; lambda_P, lambda_{P-1}, ...; by size."""

# The key that is largest for the eigenvalue that comes first.
WANTED: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda values: values,
    "smallest": torch.neg,
    "magnitude": torch.abs,
}

# What residuals are relative to is at least this part of norm(A).
LEAST_SCALE = 0.01

# How much u^T A v and v^T A u may differ, relative to norm(A). From the second product on
# only what is gross counts, for norm(A) is not known yet and rounding weighs more.
GROSS_ASYMMETRY = 0.1
SLIGHT_ASYMMETRY = 1e-3


@dataclass(frozen=True)
class Ritz:
    """Rayleigh-Ritz pairs, most wanted first: what is known of them without a further product.

    Attributes:
        values: (k,), float64.
        coefficients: (m, k), the vectors in the basis of dimension m.
        residual: the largest residual, relative to the scale that `Krylov.ritz` states, the
            products' own errors included.
        residuals: (k,), all of them, from actual products; None where only estimated.
        worst: (P, 1), the residual vector of the worst pair; None where only estimated.
        angles: (k,), see `Krylov.ritz`; None where only estimated.
        value_errors: (k,), of the values; None where only estimated.
        mixing: (k, k), the angle by which pair i is turned towards pair j; None likewise.
        within: what is left of the tolerance, the products' errors taken off: see `Krylov.ritz`.
        noise: the largest of those errors, relative to the same scale; 0 of exact products.
    """

    values: Tensor
    coefficients: Tensor
    residual: float
    residuals: Tensor | None = None
    worst: Tensor | None = None
    angles: Tensor | None = None
    value_errors: Tensor | None = None
    mixing: Tensor | None = None
    within: bool = False
    noise: float = 0.0

    @property
    def k(self) -> int:
        """How many pairs."""
        return len(self.values)


class Krylov:
    """An orthonormal basis V, its products W = A V (both as rows), and V^T A V in float64.

    Args:
        operator: A (P, P).
        room: most vectors held at once; memory is 2 * room * P numbers.
        which: the eigenvalues that Ritz pairs and restarts are about.

    Attributes:
        dimension: vectors in the basis.
        num_matvecs: vectors multiplied; a part of one where some samples alone were asked.
        errors: norms of the errors of the products (room,), float64 on the CPU, by estimate.
    """

    def __init__(self, operator: SymmetricOperator, room: int, which: Which) -> None:
        self.operator = operator
        self.which: Which = which
        self.basis = empty_rows(room, operator)
        self.images = torch.empty_like(self.basis)
        self.projected = torch.zeros(room, room, dtype=torch.float64, device="cpu")
        self.errors = torch.zeros(room, dtype=torch.float64, device="cpu")
        self.dimension = 0
        self.last = 0
        self.num_matvecs = 0.0
        self.operator_norm = 0.0
        self._remainder = self.basis[:0].T

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space."""
        return self.dimension == self.operator.shape[0]

    def expand(self, block: Tensor) -> None:
        """Append an orthonormal block (P, b), orthogonal to the basis, and its products.

        Raises:
            Diverged: a product is NaN or infinite.
            InvalidInput: a product has another shape, dtype or device than the operator states;
                u^T A v is not v^T A u.
        """
        images, errors = self._product(block)
        begin, end = self.dimension, self.dimension + block.shape[1]
        self.errors[begin:end] = 0.0 if errors is None else errors
        self.basis[begin:end] = block.T
        self.images[begin:end] = images.T
        coefficients = coordinates(self.basis[:end], images)
        self._remainder = images - linear_combination(self.basis[:end], coefficients)
        columns = coefficients.double().cpu()
        # Residuals are formed late, where they are small; this tells from the second product on.
        back = coordinates(self.images[self.last : end], block)
        self._require_symmetric(back, columns[self.last :], GROSS_ASYMMETRY)
        corner = columns[begin:end]
        columns[begin:end] = (corner + corner.T) / 2
        self.projected[:end, begin:end] = columns
        self.projected[begin:end, :end] = columns.T
        self.dimension, self.last = end, begin
        self.num_matvecs += block.shape[1]

    def _product(self, block: Tensor) -> tuple[Tensor, Tensor | None]:
        images, errors = checked_product(self.operator, block)
        # The largest norm of a product bounds that of A from below, and shows NaN and Inf as well.
        largest = float(norm(images, dim=0).max())
        if not largest < float("inf"):
            raise Diverged("a product with the operator is NaN or infinite")
        self.operator_norm = max(self.operator_norm, largest)
        return images, errors

    def _require_symmetric(self, one_way: Tensor, other_way: Tensor, allowed: float) -> None:
        difference = float((one_way.cpu() - other_way.cpu()).abs().max())
        scale = max(self.operator_norm, torch.finfo(torch.float64).tiny)
        refuse_asymmetry(difference / scale, allowed, float(self.errors.max()) / scale)

    def remainder(self) -> Tensor:
        """The products of the block appended last, minus their part in the basis: (P, b)."""
        return self._remainder

    def outside(self, block: Tensor, generator: torch.Generator) -> Tensor:
        """An orthonormal block orthogonal to the basis that spans `block` as far as it can.

        Where nothing is left (an invariant subspace was found), random directions take over.
        """
        width = min(block.shape[1], self.operator.shape[0] - self.dimension)
        columns: list[Tensor] = []
        scale = self.operator_norm
        for column in block.T[:width]:
            found = self._outside_one(column, columns, scale)
            while found is None:
                fresh = random_vector(self.operator, generator)[:, 0]
                found = self._outside_one(fresh, columns, 0.0)
            columns.append(found)
        return torch.stack(columns).T

    def _outside_one(self, column: Tensor, chosen: list[Tensor], scale: float) -> Tensor | None:
        tiny = 10 * torch.finfo(column.dtype).eps
        vector = column
        for _ in range(3):
            before = norm(vector)
            vector = reject(self.basis[: self.dimension], vector)
            for other in chosen:
                vector = vector - other * dot(other, vector)
            length = norm(vector)
            if length <= tiny * scale or length == 0:
                return None
            vector = vector / length
            if length > 0.5 * before:
                return vector
        return vector

    def ritz(self, k: int, tolerance: float, *, exact: bool) -> Ritz:
        """The k most wanted Ritz pairs (fewer where the basis is smaller).

        The residual is the recurrence's cheap estimate, and the actual one once that is within
        `tolerance`, or where the recurrence does not hold (`exact`). It is relative to the most
        wanted eigenvalue's absolute value, or to `LEAST_SCALE` norm(A) where that is larger.

        Of inexact products it includes their own errors, which no further products would lower: the
        part that they would is `within` what is left of the tolerance, or of those errors.

        Raises:
            InvalidInput: u^T A v and v^T A u differ by more than `tolerance` and 1e-3 of norm(A).
        """
        values, vectors = self._most_wanted(k)
        # Relative to an eigenvalue near 0, as the smallest of a Gauss-Newton matrix, nothing would
        # converge: rounding is relative to the norm.
        least = max(LEAST_SCALE * self.operator_norm, torch.finfo(torch.float64).tiny)
        scale = max(float(values[0].abs()), least)
        noise = self.noise_of(vectors)
        loudest = float(noise.max()) / scale
        reach = max((tolerance**2 - min(loudest, tolerance) ** 2) ** 0.5, loudest)
        if not loudest:
            reach = tolerance
        if not exact:
            tail = norm(self.remainder(), dim=0).double().cpu()
            estimates = (tail[:, None] * vectors[self.last :]).norm(dim=0)
            estimate = float(estimates.max()) / scale
            if len(values) < k or estimate > reach:
                return Ritz(values, vectors, math.hypot(estimate, loudest), noise=loudest)
        norms, inner = self._residuals(values, vectors, max(tolerance, SLIGHT_ASYMMETRY))
        at = int(norms.argmax())
        worst = self._residual_vector(values[at], vectors[:, at : at + 1])
        within = len(values) == k and float(norms.max()) / scale <= reach
        if loudest:
            norms = torch.hypot(norms, noise)
        angles, errors, mixing = self._errors(norms, inner)
        residuals = norms / scale
        found = Ritz(values, vectors, float(residuals.max()), residuals, worst, angles)
        # An eigenvalue is off by what a product is off along its vector.
        errors = errors + noise if loudest else errors
        return replace(found, value_errors=errors, mixing=mixing, within=within, noise=loudest)

    def _errors(self, norms: Tensor, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far the most wanted Ritz pairs are from eigenpairs.

        With r_i = A u_i - theta_i u_i, which is orthogonal to the basis, an eigenvector has the
        part r_i / (theta_i - s) outside of the basis, s being where the eigenvalues lie that were
        not seen. Through it u_i mixes with the Ritz vector u_j by the angle
        <r_i, r_j> / ((theta_i - s) (theta_i - theta_j)). Taken over the u_j beyond the first k,
        this is the angle between u_i and the eigenspace. An eigenvalue is off by
        norm(r_i)^2 / (theta_i - s), and by theta_i - theta_j times the square of that angle, at
        most norm(r_i). For s stands three quarters of the next value, counted from the last one
        seen or, between values of both signs, from zero, where the bulk of a Hessian lies: what a
        solve leaves is mostly near it. theta_j is taken from above, for Ritz values
        approach eigenvalues from below.

        Args:
            norms: norm(r_i), (k,).
            inner: <r_i, r_j> for all m Ritz pairs, most wanted first, (m, m).

        Returns:
            Angles and errors of values, (k,) each, and the mixing among these pairs, (k, k).

        Source: first-order perturbation of A in the basis and its complement (Parlett 1998, "The
        Symmetric Eigenvalue Problem", sections 11.7 and 13.2 for the bounds that it sharpens).
        """
        k, m = len(norms), self.dimension
        keys = WANTED[self.which](self._most_wanted(m)[0])
        tiny = torch.finfo(keys.dtype).tiny
        if k == m:
            # Nothing is known of the rest: as if it were zero.
            angles = (norms / keys.abs().clamp(min=tiny)).clamp(max=1.0)
            return angles, norms, norms.new_zeros(k, k)
        # A far end of the other sign, as early in a training, says nothing of what is near.
        bulk = keys[-1].clamp(min=0.0) if keys[k] > 0 else keys[-1]
        away = (keys[:k] - (3 * keys[k] + bulk) / 4).clamp(min=tiny)
        lengths = inner.diagonal().clamp(min=0.0).sqrt()[k:]
        above = (keys[k:] - bulk).clamp(min=tiny)
        below = keys[:k, None] - (keys[k:] + torch.minimum(lengths, lengths**2 / above))
        gaps = torch.cat([(keys[:k, None] - keys[:k]).abs(), below], dim=1)
        mixing = (inner[:k] / away[:, None] / gaps.clamp(min=tiny)).clamp(-1, 1)
        outside = (norms / away).clamp(max=1.0)
        angles = (outside.square() + mixing[:, k:].square().sum(dim=1)).sqrt().clamp(max=1.0)
        turned = (mixing[:, k:].square() * below.clamp(min=0)).sum(dim=1)
        return angles, torch.minimum(norms, norms**2 / away + turned), mixing[:, :k]

    def rose(self, found: Ritz, earlier: Ritz, tolerance: float) -> bool:
        """Whether an eigenvalue is now more wanted by more than convergence explains."""
        key = WANTED[self.which]
        rise = key(found.values) - key(earlier.values)
        tolerance = max(tolerance, found.noise)
        return bool((rise > 2 * tolerance * found.values.abs().max()).any())

    def measured(self, found: Ritz, tolerance: float) -> Ritz:
        """The same pairs, products with some of them made anew in a better way, where there is one.

        What that shows of the errors of all products is taken as theirs, where it is more.
        """
        if not found.noise:
            return found
        some = sorted({0, found.k // 2, found.k - 1})
        coefficients = found.coefficients[:, some]
        images, _ = checked_product(
            self.operator, self._combine(self.basis, coefficients).T, measured=True
        )
        self.num_matvecs += len(some)
        seen = norm(images - self._combine(self.images, coefficients).T, dim=0).double().cpu()
        self.errors *= max(1.0, float((seen / self.noise_of(coefficients)).max()))
        return self.ritz(found.k, tolerance, exact=True)

    def subspace(self, found: Ritz, first: int, *, converged: bool) -> Subspace:
        """The found pairs but the first few as a subspace, eigenvalues descending; the last call.

        Basis and products are given up before the vectors are orthonormalized, which copies them.
        """
        assert found.residuals is not None
        assert found.angles is not None
        assert found.value_errors is not None
        assert found.mixing is not None
        # A band turns towards the pairs before it as well.
        angles = found.angles.square() + found.mixing[:, :first].square().sum(dim=1)
        chosen = found.values[first:].argsort(descending=True) + first
        rows = self._combine(self.basis, found.coefficients[:, chosen])
        self.basis, self.images = self.basis[:0].clone(), self.images[:0].clone()
        return Subspace(
            orthonormalize(rows.T),
            found.values[chosen].to(rows),
            found.residuals[chosen].to(rows),
            num_matvecs=self.num_matvecs,
            converged=converged,
            angles=angles[chosen].sqrt().clamp(max=1.0).to(rows),
            eigenvalue_errors=found.value_errors[chosen].to(rows),
        )

    def block(self, width: Callable[[Tensor], int]) -> tuple[Tensor, Tensor, Tensor]:
        """The most wanted Ritz vectors and their products; the last call.

        Args:
            width: how many, given all Ritz values, most wanted first.

        Returns:
            Vectors and products as rows (b, P), Ritz values (b,) in float64.
        """
        values, vectors = self._most_wanted(self.dimension)
        b = width(values)
        rows = self._combine(self.basis, vectors[:, :b])
        self.basis = self.basis[:0].clone()
        images = self._combine(self.images, vectors[:, :b])
        self.images = self.images[:0].clone()
        return rows, images, values[:b]

    def make_room(self, k: int, width: int) -> None:
        """Thick restart: keep the most wanted Ritz vectors where `width` more would not fit."""
        m, room = self.dimension, self.basis.shape[0]
        if m + min(width, self.operator.shape[0] - m) <= room:
            return
        keep = max(1, min(k + max(4, k // 2), room - width - 1))
        values, vectors = self._most_wanted(keep)
        self.basis[:keep] = self._combine(self.basis, vectors)
        self.images[:keep] = self._combine(self.images, vectors)
        self.errors[:keep] = self.noise_of(vectors)
        self.projected.zero_()
        self.projected[:keep, :keep] = torch.diag(values)
        self.dimension = self.last = keep

    def _most_wanted(self, k: int) -> tuple[Tensor, Tensor]:
        m = self.dimension
        values, vectors = torch.linalg.eigh(self.projected[:m, :m])
        self.operator_norm = max(self.operator_norm, float(values.abs().max()))
        order = WANTED[self.which](values).argsort(descending=True, stable=True)[:k]
        return values[order], vectors[:, order]

    def _residuals(
        self, values: Tensor, vectors: Tensor, asymmetry: float
    ) -> tuple[Tensor, Tensor]:
        """norm(A u - value u) of each pair (k,), float64 on the CPU, from the products themselves.

        Returns:
            The norms (k,), and inner products of the residuals of all Ritz pairs (m, m).
        """
        m = self.dimension
        one_way, other_way, squares, between = residual_products(
            self.basis[:m], self.images[:m], vectors.T, values
        )
        self._require_symmetric(one_way, other_way, asymmetry)
        every, turn = self._most_wanted(m)
        inner = turn.T @ between @ turn - torch.diag(every.square())
        return squares.sqrt(), inner

    def _residual_vector(self, value: Tensor, coefficients: Tensor) -> Tensor:
        """A u - value u of one pair, (P, 1)."""
        image, vector = (self._combine(r, coefficients) for r in (self.images, self.basis))
        return (image - value.to(vector) * vector).T

    def noise_of(self, coefficients: Tensor) -> Tensor:
        """Norms (k,) of the errors of combinations (m, k) of the products, as independent."""
        return norm(coefficients.T * self.errors[: self.dimension])

    def _combine(self, rows: Tensor, coefficients: Tensor) -> Tensor:
        return combine(coefficients.T.to(rows), rows[: self.dimension])


def random_vector(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """A random unit vector (P, 1), drawn on the CPU in float64: the same on every device."""
    vector = random_unit(operator.shape[0], generator, sharding_of(operator))[:, None]
    return vector.to(dtype=operator.dtype, device=operator.device)
