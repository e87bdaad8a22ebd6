"""A subspace that has a part in each block of parameters, such as each tensor, and no part across.

Its basis is block diagonal: (P, k) numbers of which nearly all are zero. They are never written
down unless somebody asks for `basis`; projections go block by block.

Example:
    >>> import torch
    >>> rows = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 5.0], [1.0, -1.0, 0.0]])
    >>> space = principal_directions(rows, k=1, blocks=(2, 1), centered=False)
    >>> space.k, space.project(torch.tensor([3.0, 0.0, 4.0])).round(decimals=4).tolist()[2]
    (2, 4.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.linalg import combine, coordinates, flat_product, orthonormalize, project
from thalweg.spectrum.subspace import Subspace

# Below this part of a block's largest singular value a direction is rounding: the Gram matrix of
# float32 numbers holds squares.
LEAST_SINGULAR_VALUE = 1e-3


class BlockSubspace(Subspace):
    """The sum of subspaces of blocks of parameters; everything that a `Subspace` is.

    Args:
        rows: for each block an orthonormal basis as rows (k_b, n_b); k_b may be 0.
        eigenvalues: for each block (k_b,), descending.

    Attributes:
        rows: as given.
        basis: (P, k), made when first asked for; k the sum of the k_b, block by block.
        eigenvalues: (k,), descending within each block only.

    Dtype and device are those of the rows. Example: see the module.
    """

    def __init__(self, rows: Sequence[Tensor], eigenvalues: Sequence[Tensor]) -> None:
        # A frozen dataclass, whose `basis` is made late here.
        object.__setattr__(self, "rows", tuple(rows))
        object.__setattr__(self, "eigenvalues", torch.cat(list(eigenvalues)))
        object.__setattr__(self, "residuals", None)
        object.__setattr__(self, "num_matvecs", 0.0)
        object.__setattr__(self, "converged", None)

    rows: tuple[Tensor, ...]

    @cached_property
    def basis(self) -> Tensor:  # type: ignore[override]
        """The block-diagonal basis (P, k), stored column by column."""
        return torch.block_diag(*self.rows).T

    @property
    def blocks(self) -> tuple[int, ...]:
        """The number of parameters of each block."""
        return tuple(rows.shape[1] for rows in self.rows)

    @property
    def k(self) -> int:
        """The dimension, of all blocks together."""
        return sum(len(rows) for rows in self.rows)

    def coordinates(self, vector: Tensor) -> Tensor:
        """The coordinates (k,) or (k, m) of a flat vector (P,) or block (P, m).

        Raises:
            InvalidInput: another length than P.
        """
        if vector.shape[0] != sum(self.blocks):
            raise invalid("vector", tuple(vector.shape), f"a length of P = {sum(self.blocks)}")
        parts = vector.to(self.eigenvalues.dtype).split(self.blocks)
        return torch.cat(
            [coordinates(rows, part) for rows, part in zip(self.rows, parts, strict=True)]
        )

    def to(self, device: torch.device | str) -> BlockSubspace:
        """The same subspace on another device, in the same dtype."""
        values = self.eigenvalues.to(device).split([len(rows) for rows in self.rows])
        return BlockSubspace([rows.to(device) for rows in self.rows], values)

    def _project_flat(self, flat: Tensor) -> Tensor:
        parts = flat.to(self.eigenvalues.dtype).split(self.blocks)
        pairs = zip(self.rows, parts, strict=True)
        return torch.cat([project(rows, part) for rows, part in pairs]).to(flat.dtype)

    def __repr__(self) -> str:
        size, k, blocks = sum(self.blocks), self.k, len(self.rows)
        return f"BlockSubspace(P={size}, k={k}, blocks={blocks})"


def principal_directions(
    vectors: Tensor, k: int, *, blocks: Sequence[int] | None = None, centered: bool = True
) -> BlockSubspace:
    """The k directions in which vectors vary most, of each block of their coordinates.

    Args:
        vectors: m of them as rows (m, P).
        k: directions of each block at most. Fewer where the vectors span fewer, or where one varies
            less than 1e-3 times as much as the first.
        blocks: sizes of the blocks, in order, of sum P; None for one block.
        centered: subtract the mean of the vectors first (principal components); False for the
            directions of the vectors themselves.

    Returns:
        The directions, with the variance along them (the mean square, where not centered) as
        eigenvalues. The cost is that of m^2 P multiplications.

    Raises:
        InvalidInput: k < 1, or blocks that do not sum up to P.

    Example: see the module.
    """
    blocks = (vectors.shape[1],) if blocks is None else tuple(blocks)
    if k < 1:
        raise invalid("k", k, "an integer >= 1")
    if sum(blocks) != vectors.shape[1]:
        raise invalid("blocks", blocks, f"sizes of sum P = {vectors.shape[1]}")
    if centered:
        vectors = vectors - vectors.mean(dim=0)
    parts = vectors.split(blocks, dim=1)
    # The Gram matrices of the few vectors: all blocks' small problems in one call.
    grams = torch.stack([flat_product(part, part).double() for part in parts])
    squares, mixing = torch.linalg.eigh(grams)
    found = [
        _directions(*one, k) for one in zip(parts, squares.flip(1), mixing.flip(2), strict=True)
    ]
    return BlockSubspace([rows for rows, _ in found], [values for _, values in found])


def _directions(vectors: Tensor, squares: Tensor, mixing: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows (k', n) and mean squares (k',) of one block, from its Gram matrix's eigenpairs."""
    squares, mixing = squares[:k], mixing[:, :k]
    first = float(squares[0])
    kept = int((squares > LEAST_SINGULAR_VALUE**2 * first).sum()) if first > 0 else 0
    squares, mixing = squares[:kept], mixing[:, :kept]
    rows = combine((mixing / squares.sqrt()).T.to(vectors.dtype), vectors)
    # The directions of the least squares are orthogonal up to rounding over their small size.
    rows = orthonormalize(rows.T).T if kept else rows
    return rows.contiguous(), (squares / len(vectors)).to(vectors.dtype)
