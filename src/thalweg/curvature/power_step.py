"""One warm power step of a basis: from U and Y = H U to a basis closer to the top eigenspace.

Example:
    >>> import torch
    >>> rows = torch.tensor([[0.8, 0.6, 0.0]])
    >>> step = power_step(rows, rows * torch.tensor([10.0, 1.0, 0.1]), 1)
    >>> [round(x, 3) for x in step.rows[0].tolist()]
    [0.997, 0.075, 0.0]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.curvature.operators import SymmetricOperator
from thalweg.curvature.subspace import Subspace, orthonormalize
from thalweg.errors import Diverged

# Columns of a block of rows that fit a core's cache.
CACHED_COLUMNS = 8192
# Columns elsewhere, which bound the memory of what is made of a block.
MOST_COLUMNS = 2**20
# Columns that one multiprocessor of a GPU sums over.
COLUMNS_IN_A_ROW = 2048
CPU = torch.device("cpu")


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


def column_blocks(rows: Tensor) -> Iterator[slice]:
    """Columns to work on at a time: on a CPU few enough that a block of rows stays in the cache."""
    width = CACHED_COLUMNS if rows.device.type == "cpu" else MOST_COLUMNS
    for begin in range(0, rows.shape[-1], width):
        yield slice(begin, begin + width)


def inner_products(first: Tensor, second: Tensor, device: torch.device = CPU) -> Tensor:
    """A B^T of rows (..., k, P) and (..., b, P), summed over column blocks in float64 (..., k, b).

    2.6 times as fast on 10 rows of 200,000 as one product of matrices that are so flat.

    Args:
        device: where the sum is; on the CPU small matrices are decomposed fastest.
    """
    shape = (*first.shape[:-1], second.shape[-2])
    total = torch.zeros(shape, dtype=torch.float64, device=device)
    for columns in column_blocks(first):
        total += flat_product(first[..., columns], second[..., columns]).to(device)
    return total


def flat_product(first: Tensor, second: Tensor) -> Tensor:
    """A B^T of rows (..., k, P) and (..., b, P): few rows and many columns; (..., k, b).

    On a GPU blocks of columns are a batch, summed in float64: a single product with so few results
    would occupy a few of its multiprocessors (10 rows of 200,000: 1 ms on an H100).
    """
    blocks = first.shape[-1] // COLUMNS_IN_A_ROW
    if first.device.type != "cuda" or blocks < 2:
        return first @ second.mT
    return _in_blocks(first, second, blocks)


def _in_blocks(first: Tensor, second: Tensor, blocks: int) -> Tensor:
    """The same as a batch of products, each over some columns; in float64."""
    whole = blocks * COLUMNS_IN_A_ROW
    one, other = (
        rows[..., :whole].unflatten(-1, (blocks, COLUMNS_IN_A_ROW)).transpose(-3, -2)
        for rows in (first, second)
    )
    rest = first[..., whole:] @ second[..., whole:].mT
    return (one @ other.mT).sum(-3, dtype=torch.float64) + rest


def combined(combination: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Z^T Y (..., k, P), and its Gram matrix in float64 where Z is, from one pass over Y."""
    transposed = combination.mT.to(images)
    result = images.new_empty(*transposed.shape[:-1], images.shape[-1])
    gram = combination.new_zeros(*transposed.shape[:-1], transposed.shape[-2])
    for columns in column_blocks(images):
        block = transposed @ images[..., columns]
        result[..., columns] = block
        gram += flat_product(block, block).to(gram.device)
    return result, gram


def _power_step_indefinite(
    rows: Tensor, images: Tensor, values: Tensor, vectors: Tensor
) -> PowerStep:
    """The same by QR, where a top eigenvalue is not positive or directions fall together."""
    scaled = (vectors.T.to(images) @ images).T
    basis = orthonormalize(scaled)
    triangle = (basis.T @ scaled).double().cpu()
    combination = vectors @ torch.linalg.pinv(triangle)
    return PowerStep(basis.T, values, combination, rows)
