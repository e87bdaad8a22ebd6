"""Linear algebra of long vectors: the only place that contracts over the P parameters.

A basis is stored as contiguous rows (k, P), or as columns (P, k) that are views of such rows.
Products are in the dtype of the vectors, also inside of the user's `torch.autocast`.

Example:
    >>> import torch
    >>> inner_products(torch.eye(2, 5), torch.ones(1, 5)).tolist()
    [[1.0], [1.0]]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from thalweg.errors import Diverged
from thalweg.surroundings import in_full_precision

# Columns of a block of rows that fit a core's cache.
CACHED_COLUMNS = 8192


# Columns elsewhere, which bound the memory of what is made of a block.
MOST_COLUMNS = 2**20


# Columns that one multiprocessor of a GPU sums over.
COLUMNS_IN_A_ROW = 2048


CPU = torch.device("cpu")


def column_blocks(rows: Tensor) -> Iterator[slice]:
    """Columns to work on at a time: on a CPU few enough that a block of rows stays in the cache."""
    width = CACHED_COLUMNS if rows.device.type == "cpu" else MOST_COLUMNS
    for begin in range(0, rows.shape[-1], width):
        yield slice(begin, begin + width)


@in_full_precision
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


@in_full_precision
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


@in_full_precision
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


def all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, of a floating-point tensor of any shape.

    A finite sum says so, and takes a 25th of the time of `isfinite`. One that is not can come from
    large but finite elements, whose sum overflows: then they are looked at one by one.
    """
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def require_finite(tensor: Tensor, what: str) -> Tensor:
    """The tensor itself, where every number is finite.

    Raises:
        Diverged: "{what} is NaN or infinite".
    """
    if not all_finite(tensor):
        raise Diverged(f"{what} is NaN or infinite")
    return tensor


def bits_of(tensor: Tensor) -> str:
    """A text that differs where a bit of a floating-point tensor does, but for rare chances."""
    words = tensor.detach().contiguous().view(torch.int32)
    return f"{tuple(tensor.shape)} {tensor.dtype} {int(words.sum(dtype=torch.int64))}"


@in_full_precision
def orthonormalize(block: Tensor) -> Tensor:
    """An orthonormal basis of the columns of `block` (P, m), m <= P, stored column by column.

    In the block's own dtype, by Householder QR.

    Raises:
        Diverged: the block holds NaN or Inf (QR would pass them on silently).
    """
    if not bool(torch.isfinite(block).all()):
        raise Diverged("a basis holds NaN or infinite values: the loss or a product diverged")
    basis, _ = torch.linalg.qr(block)
    return basis.T.contiguous().T


def random_unit(size: int, generator: torch.Generator) -> Tensor:
    """A random unit vector (P,), uniform on the sphere; float64 on the CPU: the same anywhere."""
    vector = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
    return vector / vector.norm()


@in_full_precision
def gram(first: Tensor, second: Tensor) -> Tensor:
    """A B^T (k, b) of rows (k, P) and (b, P), in their dtype and at once: see `inner_products`."""
    return first @ second.mT


@in_full_precision
def coordinates(rows: Tensor, vectors: Tensor) -> Tensor:
    """U^T v (..., k) of vectors (..., P), for bases as rows (..., k, P); one basis takes (P, m)."""
    if rows.dim() == 2:
        return rows @ vectors
    # In this order: on a CPU a product with one column is 13 times as slow as one with one row.
    return (vectors.unsqueeze(-2) @ rows.mT).squeeze(-2)


@in_full_precision
def linear_combination(rows: Tensor, coefficients: Tensor) -> Tensor:
    """U c (..., P) of rows (..., k, P) with coefficients (..., k); one basis takes (k, m)."""
    if rows.dim() == 2:
        return rows.T @ coefficients
    return (coefficients.unsqueeze(-2) @ rows).squeeze(-2)


@in_full_precision
def combine(coefficients: Tensor, rows: Tensor) -> Tensor:
    """C R (..., m, P), as rows: linear combinations (..., m, k) of rows (..., k, P)."""
    return coefficients @ rows


def project(rows: Tensor, vectors: Tensor) -> Tensor:
    """U U^T v (..., P) of vectors (..., P), for orthonormal bases as rows (..., k, P)."""
    return linear_combination(rows, coordinates(rows, vectors))


def reject(rows: Tensor, vectors: Tensor) -> Tensor:
    """v - U U^T v: what `project` leaves."""
    return vectors - project(rows, vectors)


@in_full_precision
def dot(first: Tensor, second: Tensor) -> Tensor:
    """<a, b> of two vectors (P,), in their dtype."""
    return first @ second


def dots(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """<a_i, b_i> of vectors pair by pair, in float64; `dim` is the one of length P."""
    return (first * second).sum(dim=dim, dtype=torch.float64)


def norm(vectors: Tensor, *, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """The lengths (...,) of vectors (..., P); `dim` is the one of length P."""
    return torch.linalg.vector_norm(vectors, dim=dim, dtype=dtype)


def squared_norm(vectors: Tensor) -> Tensor:
    """The squared lengths (...,) of vectors (..., P)."""
    return vectors.square().sum() if vectors.dim() == 1 else vectors.square().sum(-1)
