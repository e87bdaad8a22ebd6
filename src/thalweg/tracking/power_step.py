"""One warm power step of a basis: from U and Y = H U to a basis closer to the top eigenspace.

Example:
    >>> import torch
    >>> rows = torch.tensor([[0.8, 0.6, 0.0]])
    >>> step = power_step(rows, rows * torch.tensor([10.0, 1.0, 0.1]), 1)
    >>> [round(x, 3) for x in step.rows[0].tolist()]
    [0.997, 0.075, 0.0]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import Diverged
from thalweg.linalg import combined, inner_products, orthonormalize
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.spectrum.subspace import Subspace


@dataclass
class PowerStep:
    """The basis after a power step, C = Z^T Y as rows (k, P), and what its error is estimated by.

    `combination` is Z (b, k); `stale` is U^T, the basis before the step.
    """

    rows: Tensor
    eigenvalues: Tensor
    combination: Tensor | None = None
    stale: Tensor | None = None
    estimated: tuple[Tensor, float, float] | None = None

    def subspace(self) -> Subspace:
        return Subspace(self.rows.T, self.eigenvalues.to(self.rows))

    def project(self, vector: Tensor) -> Tensor:
        return self.rows.T @ (self.rows @ vector)

    def refined_projection(self, operator: SymmetricOperator, vector: Tensor) -> Tensor:
        """P_k v by two products: to second order, a warm power step of the whole basis for one v.

        v_perp = v - C C^T v;  z = A v_perp;  y = A C M^-1 C^T v;
        P_k v = C (C^T v + M^-1 C^T z) + (y - C C^T y), with C the basis and M = diag(eigenvalues)
        close to C^T A C. A step of the whole basis has C (C^T v + M^-1 C^T z) in y as well; its
        share of the part outside C is of second order. So z and y are one block.
        """
        rows, values = self.rows, self.eigenvalues.to(self.rows)
        coordinates = rows @ vector
        within = rows.T @ (coordinates / values)
        block = torch.stack([vector - rows.T @ coordinates, within], dim=1)
        across, image = (operator @ block).unbind(dim=1)
        coordinates = coordinates + (rows @ across) / values
        return rows.T @ coordinates + image - rows.T @ (rows @ image)

    def movement(self, vector: Tensor) -> Tensor:
        """norm of the change of the projection of v by this power step."""
        if self.stale is None:
            return vector.new_zeros(())
        return (self.project(vector) - self.stale.T @ (self.stale @ vector)).norm()

    def state_dict(self) -> dict[str, Tensor | None]:
        return {name: value for name, value in vars(self).items() if name != "estimated"}


def power_step(rows: Tensor, images: Tensor, k: int) -> PowerStep:
    """The top-k Ritz directions of span(U) moved by one power step, from U and Y = H U.

    Args:
        rows: U^T, orthonormal rows (b, P).
        images: Y^T (b, P).
        k: how many to keep.

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
    values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    if not float(values[-1]) > 1e-6 * float(values[0]):
        return _power_step_indefinite(rows, images, values, vectors)
    combination = vectors / values
    # Columns of nearly unit length and nearly orthogonal: one Cholesky factorization is accurate,
    # and five times cheaper than a QR of a tall matrix.
    scaled, gram = combined(combination, images)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        return _power_step_indefinite(rows, images, values, vectors)
    ritz, rotation = torch.linalg.eigh(factor.T @ torch.diag(values) @ factor)
    ritz, rotation = ritz.flip(0), rotation.flip(1)
    to_basis = torch.linalg.solve_triangular(factor.T, rotation, upper=True)
    return PowerStep(to_basis.T.to(scaled) @ scaled, ritz, combination @ to_basis, rows)


def _power_step_indefinite(
    rows: Tensor, images: Tensor, values: Tensor, vectors: Tensor
) -> PowerStep:
    """The same by QR, where a top eigenvalue is not positive or directions fall together."""
    scaled = (vectors.T.to(images) @ images).T
    basis = orthonormalize(scaled)
    triangle = (basis.T @ scaled).double().cpu()
    combination = vectors @ torch.linalg.pinv(triangle)
    return PowerStep(basis.T, values, combination, rows)
