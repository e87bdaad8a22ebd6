"""One warm power step of the bases of R runs, and what its error is estimated by.

As `power_step.py`, without an eigendecomposition, which would wait for the device: from U and
Y = H U the columns of Y M^-1, M = U^T Y, are nearly orthonormal as long as U is near an eigenspace,
so that one Cholesky factorization is accurate. Eigenvalues are computed when they are asked for.

Example:
    >>> import torch
    >>> rows = torch.tensor([[[0.8, 0.6, 0.0]], [[0.0, 0.6, 0.8]]])
    >>> step = lockstep_power_step(rows, rows * torch.tensor([10.0, 1.0, 0.1]))
    >>> step.rows.shape, [round(x, 3) for x in step.rows[0, 0].tolist()]
    (torch.Size([2, 1, 3]), [0.997, 0.075, 0.0])
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import Diverged
from thalweg.linalg import CPU, combined, inner_products


@dataclass
class LockstepStep:
    """The bases after a power step, C = Z^T Y as rows (R, k, P).

    Attributes:
        rows: C^T of each run.
        ritz: C^T H C to second order (R, k, k), in float64.
        combination: Z (R, k, k), in float64.
        stale: U^T, the bases before the step.
        sound: (R,), whether M could be inverted and Y M^-1 orthonormalized.
        difference: half the difference that the halves of a subset make to Y, as rows; None where
            all samples were used.
    """

    rows: Tensor
    ritz: Tensor
    combination: Tensor
    stale: Tensor
    sound: Tensor
    difference: Tensor | None = None

    def eigenvalues(self) -> Tensor:
        """Ritz values (R, k), descending."""
        return torch.linalg.eigvalsh(self.ritz).flip(-1).to(self.rows)

    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Ritz values (R, k), descending, and Ritz vectors as rows (R, k, P), of all runs."""
        values, vectors = torch.linalg.eigh(self.ritz)
        rotated = vectors.flip(-1).mT.to(self.rows) @ self.rows
        return values.flip(-1).to(self.rows), rotated

    def project(self, vectors: Tensor) -> Tensor:
        """P_k v of each run, (R, P), for vectors (R, P)."""
        return _combine(self.rows, _coordinates(self.rows, vectors))

    def errors(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """What the projections of vectors (R, P) may be off by, relative to them; both (R,).

        Returns:
            The sampling error by the halves of the subset, see `Reference.deviation`; and how far
            the power step has moved the projection, see `PowerStep.movement`.
        """
        lengths = vectors.norm(dim=1).clamp(min=torch.finfo(vectors.dtype).tiny)
        coordinates = _coordinates(self.rows, vectors)
        dominant = _combine(self.rows, coordinates)
        before = _combine(self.stale, _coordinates(self.stale, vectors))
        moved = (dominant - before).norm(dim=1)
        sampling = torch.zeros_like(lengths)
        if self.difference is not None:
            combination = self.combination.to(vectors)
            across = _combine(self.difference, _coordinates(combination, coordinates))
            inside = _coordinates(self.rows, across)
            away = across.square().sum(1) - inside.square().sum(1)
            turned = _coordinates(self.difference, vectors - dominant)
            within = _combine(combination, turned)
            sampling = (away.clamp(min=0) + within.square().sum(1)).sqrt()
        return sampling / lengths, moved / lengths


def lockstep_power_step(
    rows: Tensor, images: Tensor, difference: Tensor | None = None
) -> LockstepStep:
    """The span of U of each run moved by one power step, from U and Y = H U.

    Args:
        rows: U^T, orthonormal rows (R, k, P).
        images: Y^T (R, k, P).
        difference: kept in the result.

    With M = U^T Y and L L^T the Gram matrix of Y M^-1, the new basis is C = Y M^-1 L^-T, and
    C^T H C is L^T M L to second order. Whether all was well is in `sound`, unlooked at.
    """
    projected = inner_products(rows, images, _small(rows))
    projected = (projected + projected.mT) / 2
    inverse, singular = torch.linalg.inv_ex(projected)
    scaled, gram = combined(inverse, images)
    factor, failed = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(rows.shape[1], dtype=factor.dtype, device=factor.device)
    turn = torch.linalg.solve_triangular(factor, identity.expand_as(factor), upper=False)
    ritz = factor.mT @ projected @ factor
    sound = (singular == 0) & (failed == 0) & ritz.sum((1, 2)).isfinite()
    moved = turn.to(scaled) @ scaled
    return LockstepStep(moved, ritz, inverse @ turn.mT, rows, sound.to(rows.device), difference)


def power_step_by_qr(
    rows: Tensor, images: Tensor, difference: Tensor | None = None
) -> LockstepStep:
    """The same where an eigenvalue among the top k vanishes, or directions fall together.

    Raises:
        Diverged: a product is NaN or infinite; the message names the runs.
    """
    refuse_divergence(images, "a product with the Hessian")
    projected = inner_products(rows, images, _small(rows))
    values, vectors = torch.linalg.eigh((projected + projected.mT) / 2)
    values, vectors = values.flip(-1), vectors.flip(-1)
    basis, triangle = torch.linalg.qr((vectors.mT.to(images) @ images).mT)
    combination = vectors @ torch.linalg.pinv(triangle.to(vectors))
    # A step behind: the Ritz values of U.
    ritz = torch.diag_embed(values)
    sound = rows.new_ones(len(rows), dtype=torch.bool)
    return LockstepStep(basis.mT.contiguous(), ritz, combination, rows, sound, difference)


def refuse_divergence(values: Tensor, what: str) -> None:
    """Raise where a number of (R, ...) is NaN or infinite, naming the runs.

    Raises:
        Diverged: see above.
    """
    finite = values.flatten(1).isfinite().all(dim=1)
    if not bool(finite.all()):
        runs = ", ".join(str(run) for run, fine in enumerate(finite.tolist()) if not fine)
        raise Diverged(f"{what} is NaN or infinite in run {runs}")


def _small(rows: Tensor) -> torch.device:
    """Where matrices of k x k live: on a GPU with the rest, so that nobody waits for it."""
    return rows.device if rows.device.type == "cuda" else CPU


def _coordinates(rows: Tensor, vectors: Tensor) -> Tensor:
    """The coordinates (R, k) of vectors (R, P) along rows (R, k, P)."""
    # In this order: on a CPU a product with one column is 13 times as slow as one with one row.
    return (vectors.unsqueeze(1) @ rows.mT).squeeze(1)


def _combine(rows: Tensor, coordinates: Tensor) -> Tensor:
    """The sums (R, P) of rows (R, k, P) with coefficients (R, k)."""
    return (coordinates.unsqueeze(1) @ rows).squeeze(1)
