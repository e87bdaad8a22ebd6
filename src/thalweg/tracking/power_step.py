"""One warm power step of a basis: from U and Y = H U to a basis closer to the top eigenspace.

Twice, side by side, as they differ in what they wait for:

- `power_step`, of one run: k x k matrices are decomposed in float64 on the CPU, where that is
  fastest, and the new basis consists of Ritz vectors.
- `lockstep_power_step`, of R runs in one batched computation: no eigendecomposition, which would
  wait for the device. Whether all went well is a tensor that the caller reads together with others,
  and eigenvalues are computed when somebody asks for them.

Both are accurate with one Cholesky factorization, as the columns that they orthonormalize are
nearly orthonormal already; where they are not, a QR factorization takes its place.

Example:
    >>> import torch
    >>> rows = torch.tensor([[0.8, 0.6, 0.0]])
    >>> step = power_step(rows, rows * torch.tensor([10.0, 1.0, 0.1]), 1)
    >>> [round(x, 3) for x in step.rows[0].tolist()]
    [0.997, 0.075, 0.0]
    >>> runs = torch.stack([rows, rows])
    >>> step = lockstep_power_step(runs, runs * torch.tensor([10.0, 1.0, 0.1]))
    >>> step.rows.shape, [round(x, 3) for x in step.rows[1, 0].tolist()]
    (torch.Size([2, 1, 3]), [0.997, 0.075, 0.0])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import Diverged
from thalweg.linalg import (
    CPU,
    combine,
    combined,
    coordinates,
    flat_product,
    inner_products,
    linear_combination,
    orthonormalize,
    project,
    tall_qr,
)
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.spectrum.subspace import Subspace


@dataclass
class PowerStep:
    """The block of one run after a power step, C = Z^T Y: its basis, and guard vectors beside it.

    Attributes:
        block: C^T, orthonormal Ritz vectors (b, P), of which the first k are the basis.
        values: Ritz values (b,), descending, in float64 on the CPU.
        k: dimension of the basis; 0 for that of the block.
        combination: Z (b, b), in float64; None for a basis without a step.
        stale: U^T, the block before the step, (b, P); None likewise.
    """

    block: Tensor
    values: Tensor
    k: int = 0
    combination: Tensor | None = None
    stale: Tensor | None = None

    def __post_init__(self) -> None:
        self.k = self.k or len(self.block)

    @property
    def rows(self) -> Tensor:
        """The basis, as rows (k, P)."""
        return self.block[: self.k]

    @property
    def eigenvalues(self) -> Tensor:
        """Its Ritz values (k,)."""
        return self.values[: self.k]

    def divided(self, within: Tensor) -> Tensor:
        """M^-1 c (k,) for coordinates c (k,) in the basis, M = C^T A C."""
        return within / self.eigenvalues.to(within)

    def subspace(self) -> Subspace:
        """Basis and eigenvalues, in the dtype and on the device of the basis."""
        return Subspace(self.rows.T, self.eigenvalues.to(self.rows))

    def eigenpairs_by_run(self) -> list[tuple[Tensor, Tensor]]:
        """The one run's Ritz values (k,), and Ritz vectors as rows (k, P)."""
        return [(self.eigenvalues, self.rows)]

    def project(self, vector: Tensor) -> Tensor:
        """P_k v (P,) of a vector (P,)."""
        return project(self.rows, vector)

    def refined_projection(self, operator: SymmetricOperator, vector: Tensor) -> Tensor:
        """P_k v by two products: to second order, a warm power step of the whole basis for one v.

        v_perp = v - C C^T v;  z = A v_perp;  y = A C M^-1 C^T v;
        P_k v = C (C^T v + M^-1 C^T z) + (y - C C^T y), with C the basis and M = diag(eigenvalues)
        close to C^T A C. A step of the whole basis has C (C^T v + M^-1 C^T z) in y as well; what
        that adds outside C is of second order. So z and y are one block.
        """
        rows, values = self.rows, self.eigenvalues.to(self.rows)
        within = coordinates(rows, vector)
        block = torch.stack(
            [
                vector - linear_combination(rows, within),
                linear_combination(rows, within / values),
            ],
            dim=1,
        )
        across, image = (operator @ block).unbind(dim=1)
        within = within + coordinates(rows, across) / values
        return linear_combination(rows, within) + image - project(rows, image)


def power_step(rows: Tensor, images: Tensor, k: int, difference: Tensor | None = None) -> PowerStep:
    """The Ritz directions of span(U) moved by one power step, from U and Y = H U.

    Args:
        rows: U^T, orthonormal rows (b, P).
        images: Y^T (b, P).
        k: dimension of the basis; the other b - k are guard vectors.

    With V, Theta the top eigenpairs of U^T Y and L L^T the Gram matrix of Y V Theta^-1, the new
    basis is C = Y V Theta^-1 L^-T, and C^T H C is L^T Theta L to second order: that is, the Ritz
    values belong to the new basis and not to the old one.

    Raises:
        Diverged: a product is NaN or infinite.
    """
    projected = inner_products(rows, images)
    if not bool(torch.isfinite(projected).all()):
        raise Diverged("a product with the Hessian is NaN or infinite")
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    if not float(values[-1]) > 1e-6 * float(values[0]):
        return _power_step_by_qr(rows, images, values, vectors, k)
    combination = vectors / values
    # Columns of nearly unit length and nearly orthogonal: one Cholesky factorization is accurate,
    # and five times cheaper than a QR of a tall matrix.
    scaled, gram = combined(combination, images)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return _power_step_by_qr(rows, images, values, vectors, k)
    ritz, rotation = torch.linalg.eigh(factor.T @ torch.diag(values) @ factor)
    ritz, rotation = ritz.flip(0), rotation.flip(1)
    to_basis = torch.linalg.solve_triangular(factor.T, rotation, upper=True)
    block = combine(to_basis.T.to(scaled), scaled)
    return PowerStep(block, ritz, k, combination @ to_basis, rows)


def _power_step_by_qr(
    rows: Tensor,
    images: Tensor,
    values: Tensor,
    vectors: Tensor,
    k: int,
) -> PowerStep:
    """The same where a top eigenvalue is not positive, or directions fall together."""
    scaled = combine(vectors.T.to(images), images).T
    basis = orthonormalize(scaled)
    triangle = flat_product(basis.T, scaled.T).double().cpu()
    combination = vectors @ torch.linalg.pinv(triangle)
    return PowerStep(basis.T, values, k, combination, rows)


def rotate_to_ritz(rows: Tensor, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U V and A U V, V the eigenvectors of U^T A U: the same span by its Ritz vectors.

    Args:
        rows: U^T, orthonormal rows (..., b, P).
        images: (A U)^T (..., b, P).

    Returns:
        Both as rows, and the Ritz values (..., b), descending, in float64 on the CPU.

    Raises:
        Diverged: a product is NaN or infinite.
    """
    projected = inner_products(rows, images)
    if not bool(torch.isfinite(projected).all()):
        if projected.dim() == 3:
            refuse_divergence(projected, "a product with the Hessian")
        raise Diverged("a product with the Hessian is NaN or infinite")
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    turn = vectors.flip(-1).mT.to(rows)
    return combine(turn, rows), combine(turn, images), values.flip(-1)


@dataclass
class LockstepPowerStep:
    """The bases of R runs after a power step, C = Z^T Y.

    Attributes:
        rows: C^T of each run, orthonormal (R, k, P).
        ritz: C^T H C to second order (R, k, k), in float64.
        combination: Z (R, k, k), in float64; None for bases that were solved for.
        stale: U^T, the bases before the step, (R, k, P); None likewise.
        sound: (R,), whether M could be inverted and Y M^-1 orthonormalized; None likewise.
        difference: half the difference that the halves of a subset make to Y, as rows (R, k, P);
            None where all samples were used.
    """

    rows: Tensor
    ritz: Tensor
    combination: Tensor | None = None
    stale: Tensor | None = None
    sound: Tensor | None = None
    difference: Tensor | None = None

    @property
    def block(self) -> Tensor:
        """The bases: there are no guard vectors in lockstep."""
        return self.rows

    def divided(self, within: Tensor) -> Tensor:
        """M^-1 c (R, k) for coordinates c (R, k) in the bases, M = C^T A C."""
        solved, _ = torch.linalg.solve_ex(self.ritz, within.to(self.ritz))
        return solved.to(within)

    def eigenvalues(self) -> Tensor:
        """Ritz values (R, k), descending."""
        return torch.linalg.eigvalsh(self.ritz).flip(-1).to(self.rows)

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Ritz values (R, k), descending, and Ritz vectors as rows (R, k, P), of all runs."""
        values, vectors = torch.linalg.eigh(self.ritz)
        rotated = combine(vectors.flip(-1).mT.to(self.rows), self.rows)
        return values.flip(-1).to(self.rows), rotated

    def eigenpairs_by_run(self) -> list[tuple[Tensor, Tensor]]:
        """Each run's Ritz values (k,), and Ritz vectors as rows (k, P)."""
        return list(zip(*self.eigenpairs(), strict=True))

    def project(self, vectors: Tensor) -> Tensor:
        """P_k v of each run, (R, P), for vectors (R, P)."""
        return project(self.rows, vectors)


def lockstep_power_step(
    rows: Tensor, images: Tensor, difference: Tensor | None = None
) -> LockstepPowerStep:
    """The span of U of each run moved by one power step, from U and Y = H U.

    Args:
        rows: U^T, orthonormal rows (R, k, P).
        images: Y^T (R, k, P).
        difference: kept in the result.

    With M = U^T Y and L L^T the Gram matrix of Y M^-1, the new basis is C = Y M^-1 L^-T, and
    C^T H C is L^T M L to second order. Whether all went well is in `sound`, not looked at here.
    """
    projected = inner_products(rows, images, _device_of_small(rows))
    projected = (projected + projected.mT) / 2
    inverse, singular = torch.linalg.inv_ex(projected)
    scaled, gram = combined(inverse, images)
    factor, failed = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(rows.shape[1], dtype=factor.dtype, device=factor.device)
    turn = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    ritz = factor.mT @ projected @ factor
    sound = (singular == 0) & (failed == 0) & ritz.sum((1, 2)).isfinite()
    moved = combine(turn.to(scaled), scaled)
    return LockstepPowerStep(
        moved, ritz, inverse @ turn.mT, rows, sound.to(rows.device), difference
    )


def lockstep_power_step_by_qr(
    rows: Tensor, images: Tensor, difference: Tensor | None = None
) -> LockstepPowerStep:
    """The same where an eigenvalue among the top k vanishes, or directions fall together.

    Raises:
        Diverged: a product is NaN or infinite; the message names the runs.
    """
    refuse_divergence(images, "a product with the Hessian")
    projected = inner_products(rows, images, _device_of_small(rows))
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    values, vectors = values.flip(-1), vectors.flip(-1)
    basis, triangle = tall_qr(combine(vectors.mT.to(images), images).mT)
    combination = vectors @ torch.linalg.pinv(triangle.to(vectors))
    # A step behind: the Ritz values of U.
    ritz = torch.diag_embed(values)
    sound = rows.new_ones(len(rows), dtype=torch.bool)
    return LockstepPowerStep(basis.mT.contiguous(), ritz, combination, rows, sound, difference)


def refuse_divergence(values: Tensor, what: str) -> None:
    """Raise where a number of (R, ...) is NaN or infinite, naming the runs.

    Raises:
        Diverged: see above.
    """
    finite = values.flatten(1).isfinite().all(dim=1)
    if not bool(finite.all()):
        runs = ", ".join(str(run) for run, fine in enumerate(finite.tolist()) if not fine)
        raise Diverged(f"{what} is NaN or infinite in run {runs}")


def _device_of_small(rows: Tensor) -> torch.device:
    """Where matrices of k x k live: on a GPU with the rest, so that nobody waits for it."""
    return rows.device if rows.device.type == "cuda" else CPU
