"""Linear algebra of long vectors: the only place that contracts over the P parameters.

A basis is stored as contiguous rows (k, P), or as columns (P, k) that are views of such rows.
Products are in the dtype of the vectors, also inside of the user's `torch.autocast`.

Vectors may be sharded, see `sharding.py`: a function takes this process's parts, and all processes
call it at once. What it contracts over P is the sum of theirs, a plain tensor, the same on all.

Example:
    >>> import torch
    >>> inner_products(torch.eye(2, 5), torch.ones(1, 5)).tolist()
    [[1.0], [1.0]]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from thalweg.errors import Diverged, InvalidInput
from thalweg.sharding import ShardedVector, Sharding, plain, sharding_of
from thalweg.surroundings import in_full_precision

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# Columns of a block of rows that fit a core's cache.
CACHED_COLUMNS = 8192


# Columns elsewhere, which bound the memory of what is made of a block.
MOST_COLUMNS = 2**20


# Columns that one multiprocessor of a GPU sums over.
COLUMNS_IN_A_ROW = 2048


# Columns that a core sums at once in single precision. Longer sums lose digits, since each number
# is small beside the sum so far: of float32 vectors norm(v) was off by 1e-5 at 10^6 numbers and by
# 1e-2 at 10^8, <u, v> by 6e-5 and 6e-2.
MOST_SUMMED = 2**18


CPU = torch.device("cpu")


# A random vector is drawn so many numbers at a time, where a process keeps some of them.
DRAWN_AT_ONCE = 2**20


class OfVectors(Protocol):
    """What multiplies long vectors, such as a symmetric operator."""

    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


def contracted(function: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """A function of long vectors that sums over P: of sharded ones the sum of all processes' parts.

    Raises:
        InvalidInput: one vector is sharded and another one is not.
    """

    @functools.wraps(function)
    def summed(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        given = [arg for arg in args if isinstance(arg, Tensor)]
        sharded = [arg for arg in given if isinstance(arg, ShardedVector)]
        if not sharded:
            return function(*args, **kwargs)
        if len(sharded) < len(given):
            raise InvalidInput(
                f"linalg.{function.__name__}: got a plain tensor beside a ShardedVector; a plain"
                " part becomes one by theta.sharding.vector(part)"
            )
        own: Any = [plain(arg) if isinstance(arg, Tensor) else arg for arg in args]
        return sharded[0].sharding.total(function(*own, **kwargs))

    return summed


def mixed(function: Callable[Arguments, Tensor]) -> Callable[Arguments, Tensor]:
    """A function that combines long vectors, each number of them by itself: of parts a part."""

    @functools.wraps(function)
    def of_parts(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Tensor:
        sharding = sharding_of(*args)
        if sharding is None:
            return function(*args, **kwargs)
        own: Any = [plain(arg) if isinstance(arg, Tensor) else arg for arg in args]
        return sharding.vector(function(*own, **kwargs))

    return of_parts


def length(vectors: Tensor, dim: int = -1) -> int:
    """P, the length of long vectors, whose dimension `dim` is that of the parameters."""
    sharding = sharding_of(vectors)
    if sharding is None or vectors.shape[dim] != sharding.length:
        return vectors.shape[dim]
    return sharding.num_parameters


def empty_rows(count: int, like: OfVectors | Tensor) -> Tensor:
    """Rows (count, P), not filled, for the vectors of an operator, or like some rows (..., P)."""
    sharding = sharding_of(like)
    if isinstance(like, Tensor):
        size = like.shape[-1]
    else:
        size = like.shape[0] if sharding is None else sharding.length
    rows = torch.empty(count, size, dtype=like.dtype, device=like.device)
    return rows if sharding is None else sharding.vector(rows)


def column_blocks(rows: Tensor) -> Iterator[slice]:
    """Columns to work on at a time: on a CPU few enough that a block of rows stays in the cache."""
    width = CACHED_COLUMNS if rows.device.type == "cpu" else MOST_COLUMNS
    for begin in range(0, rows.shape[-1], width):
        yield slice(begin, begin + width)


@contracted
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


@contracted
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


def _summed_at_once(rows: Tensor) -> bool:
    """Whether a single sum over the columns of rows (..., P) keeps their precision."""
    return rows.shape[-1] <= MOST_SUMMED or rows.dtype == torch.float64


def _products(first: Tensor, second: Tensor) -> Tensor:
    """A B^T (..., k, b) of rows (..., k, P) and (..., b, P), in their dtype; long rows in parts."""
    if _summed_at_once(first):
        return first @ second.mT
    if first.device.type == "cuda":
        return _in_blocks(first, second, first.shape[-1] // COLUMNS_IN_A_ROW).to(first.dtype)
    pairs = zip(first.split(MOST_SUMMED, -1), second.split(MOST_SUMMED, -1), strict=True)
    return torch.stack([(one @ other.mT).double() for one, other in pairs]).sum(0).to(first.dtype)


def _lengths(rows: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Norms (...,) of rows (..., P), as `torch.linalg.vector_norm`; long ones in parts."""
    if _summed_at_once(rows):
        return torch.linalg.vector_norm(rows, dim=-1, dtype=dtype)
    whole = rows.shape[-1] // CACHED_COLUMNS * CACHED_COLUMNS
    blocks = rows[..., :whole].unflatten(-1, (-1, CACHED_COLUMNS))
    parts = [
        torch.linalg.vector_norm(part, dim=-1).double() for part in (blocks, rows[..., whole:])
    ]
    squares = parts[0].square().sum(-1) + parts[1].square()
    return squares.sqrt().to(dtype or rows.dtype)


@in_full_precision
def combined(combination: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Z^T Y (..., k, P), and its Gram matrix in float64 where Z is, from one pass over Y."""
    sharding = sharding_of(images)
    if sharding is not None:
        own, gram = combined(combination, plain(images))
        return sharding.vector(own), sharding.total(gram)
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
    if isinstance(tensor, ShardedVector):
        return not _anywhere(tensor.sharding, not all_finite(plain(tensor)), tensor.device)
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


def equal(first: Tensor, second: Tensor) -> bool:
    """Whether two long vectors, or blocks of them, are the same numbers."""
    sharding = sharding_of(first, second)
    same = torch.equal(plain(first), plain(second))
    return same if sharding is None else not _anywhere(sharding, not same, first.device)


def is_zero(vector: Tensor) -> bool:
    """Whether a vector has no number but 0; one with NaN is not."""
    return float(largest(vector)) == 0


def largest(vector: Tensor) -> Tensor:
    """The largest absolute value (), NaN where there is one."""
    sharding, own = sharding_of(vector), plain(vector).abs()
    if sharding is None:
        return own.max()
    # A process may hold none.
    return sharding.each((own.max() if own.numel() else own.new_zeros(())).reshape(1)).max()


def mean(vector: Tensor) -> Tensor:
    """The mean () of a vector's P numbers."""
    sharding = sharding_of(vector)
    if sharding is None:
        return vector.mean()
    return sharding.total(plain(vector).sum()) / sharding.num_parameters


def anywhere(condition: Tensor) -> bool:
    """Whether a condition holds for any of its numbers, a boolean tensor of any shape."""
    here, sharding = bool(plain(condition).any()), sharding_of(condition)
    return here if sharding is None else _anywhere(sharding, here, condition.device)


def _anywhere(sharding: Sharding, here: bool, device: torch.device) -> bool:
    """Whether something is so on any process."""
    return bool(sharding.total(torch.tensor(float(here), device=device)) > 0)


@in_full_precision
def orthonormalize(block: Tensor) -> Tensor:
    """An orthonormal basis of the columns of `block` (P, m), m <= P, stored column by column.

    In the block's own dtype, by Householder QR. Of a sharded block each process factorizes its
    part, and then all of them the triangles together.

    Raises:
        Diverged: the block holds NaN or Inf (QR would pass them on silently).

    Source: of parts Demmel et al. 2012, "Communication-optimal parallel and sequential QR and LU
    factorizations" (TSQR).
    """
    if not all_finite(block):
        raise Diverged("a basis holds NaN or infinite values: the loss or a product diverged")
    if isinstance(block, ShardedVector):
        return block.sharding.vector(_by_parts(plain(block), block.sharding))
    return tall_qr(block)[0].T.contiguous().T


def tall_qr(block: Tensor) -> tuple[Tensor, Tensor]:
    """Q (..., P, m) and the triangle R (..., m, m) of `block`, plain and without NaN; m <= P.

    Householder QR of parts of long columns, whose sums would lose digits, and then of the triangles
    together, with the signs of Householder QR of the whole.

    Source: Demmel et al. 2012 (TSQR), see `orthonormalize`.
    """
    if _summed_at_once(block.mT):
        return torch.linalg.qr(block)
    parts = [torch.linalg.qr(part) for part in block.split(MOST_SUMMED, -2)]
    together, triangle = torch.linalg.qr(torch.cat([each for _, each in parts], -2))
    tops = together.split([each.shape[-2] for _, each in parts], -2)
    rows = torch.cat(
        [combine(top.mT, basis.mT) for top, (basis, _) in zip(tops, parts, strict=True)], -1
    )
    signs = _signs(rows[..., : block.shape[-1]].mT).unsqueeze(-1)
    return (signs * rows).mT, signs * triangle


def _by_parts(own: Tensor, sharding: Sharding) -> Tensor:
    """This process's part (P_r, m) of an orthonormal basis of the columns."""
    m = own.shape[1]
    basis, triangle = tall_qr(own)
    square = own.new_zeros(m, m)
    square[: len(triangle)] = triangle
    together, _ = torch.linalg.qr(sharding.each(square).flatten(0, 1))
    here = together[sharding.rank * m :][: len(triangle)]
    rows = here.T @ basis.T
    return (rows * _signs(_first_rows(rows, sharding))[:, None]).T


def _first_rows(rows: Tensor, sharding: Sharding) -> Tensor:
    """Of a basis as rows (m, P_r) the first m of its P columns, on all processes, transposed."""
    m, at = len(rows), 0
    first = rows.new_zeros(m, m)
    for begin, end in sharding.segments[sharding.rank]:
        if begin < m:
            first[begin:end] = rows[:, at : at + min(end, m) - begin].T
        at += end - begin
    return sharding.total(first)


def _signs(first: Tensor) -> Tensor:
    """The signs (..., m) by which columns become those that Householder QR of the whole would give.

    Args:
        first: the first m rows of an orthonormal basis (..., P, m).

    Source: Ballard et al. 2014, "Reconstructing Householder vectors from tall-skinny QR".
    """
    left = first.double().cpu().clone()
    signs = torch.ones_like(left[..., 0])
    for i in range(left.shape[-1]):
        corner = left[..., i, i]
        signs[..., i] = torch.where(corner >= 0, -1.0, 1.0)
        below = left[..., i + 1 :, i] / (corner - signs[..., i]).unsqueeze(-1)
        left[..., i + 1 :, :] -= below.unsqueeze(-1) * left[..., i : i + 1, :]
    return signs.to(first)


def random_unit(size: int, generator: torch.Generator, sharding: Sharding | None = None) -> Tensor:
    """A random unit vector (P,), uniform on the sphere; float64 on the CPU: the same anywhere.

    Args:
        size: P.
        generator: moves on alike in all processes.
        sharding: of what it is to be a part; the numbers are those of one process.
    """
    if sharding is None:
        vector = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")
        return vector / vector.norm()
    part = random_part(generator, sharding)
    return part / norm(part)


def random_part(generator: torch.Generator, sharding: Sharding) -> Tensor:
    """This process's numbers of `torch.randn(P)`, float64 on the CPU; see `random_unit`."""
    return sharding.vector(torch.cat([*_drawn(generator, sharding)]))


def _drawn(generator: torch.Generator, sharding: Sharding) -> Iterator[Tensor]:
    """The same, drawn some at a time.

    torch draws 16 at a time, so that blocks of a multiple give the same as all at once; the last
    ones are drawn with the block before.
    """
    at, size = 0, sharding.num_parameters
    yield torch.empty(0, dtype=torch.float64, device="cpu")
    while at < size:
        count = DRAWN_AT_ONCE if size - at >= 2 * DRAWN_AT_ONCE else size - at
        block = torch.randn(count, generator=generator, dtype=torch.float64, device="cpu")
        for begin, end in sharding.segments[sharding.rank]:
            piece = block[max(begin - at, 0) : max(end - at, 0)]
            yield piece.clone()
        at += count


@contracted
@in_full_precision
def gram(first: Tensor, second: Tensor) -> Tensor:
    """A B^T (k, b) of rows (k, P) and (b, P), in their dtype: see `inner_products`."""
    return _products(first, second)


@contracted
@in_full_precision
def coordinates(rows: Tensor, vectors: Tensor) -> Tensor:
    """U^T v (..., k) of vectors (..., P), for bases as rows (..., k, P); one basis takes (P, m)."""
    if rows.dim() == 2:
        if _summed_at_once(rows):
            return rows @ vectors
        return _products(rows, vectors.mT if vectors.dim() == 2 else vectors[None]).reshape(
            len(rows), *vectors.shape[1:]
        )
    # In this order: on a CPU a product with one column is 13 times as slow as one with one row.
    return _products(vectors.unsqueeze(-2), rows).squeeze(-2)


@mixed
@in_full_precision
def linear_combination(rows: Tensor, coefficients: Tensor) -> Tensor:
    """U c (..., P) of rows (..., k, P) with coefficients (..., k); one basis takes (k, m)."""
    if rows.dim() == 2:
        return rows.T @ coefficients
    return (coefficients.unsqueeze(-2) @ rows).squeeze(-2)


@mixed
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


@contracted
@in_full_precision
def dot(first: Tensor, second: Tensor) -> Tensor:
    """<a, b> of two vectors (P,), in their dtype."""
    return first @ second if _summed_at_once(first) else _products(first[None], second[None])[0, 0]


@contracted
def dots(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """<a_i, b_i> of vectors pair by pair, in float64; `dim` is the one of length P."""
    return (first * second).sum(dim=dim, dtype=torch.float64)


def norm(vectors: Tensor, *, dim: int = -1, dtype: torch.dtype | None = None) -> Tensor:
    """The lengths (...,) of vectors (..., P); `dim` is the one of length P."""
    sharding = sharding_of(vectors)
    if sharding is None:
        return _lengths(vectors.movedim(dim, -1), dtype)
    own = _lengths(plain(vectors).movedim(dim, -1), torch.float64)
    return sharding.total(own.square()).sqrt().to(dtype or vectors.dtype)


@contracted
def squared_norm(vectors: Tensor) -> Tensor:
    """The squared lengths (...,) of vectors (..., P)."""
    return vectors.square().sum() if vectors.dim() == 1 else vectors.square().sum(-1)


def residual_products(
    basis: Tensor, images: Tensor, coefficients: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of Ritz vectors U = Z V, their images A U = Z W, and the residuals between them.

    In blocks of columns: the k vectors and their images, whole, would double the memory.

    Args:
        basis: V as rows (m, P).
        images: W = A V as rows (m, P).
        coefficients: Z (k, m).
        values: lambda (k,), float64.

    Returns:
        U W^T (k, m), A U V^T (k, m), norm(A u_i - lambda_i u_i)^2 (k,) and W W^T (m, m), in float64
        on the CPU.
    """
    sharding = sharding_of(basis)
    if sharding is not None:
        parts = residual_products(plain(basis), plain(images), coefficients, values)
        one_way, other_way, squares, between = map(sharding.total, parts)
        return one_way, other_way, squares, between
    (k, m), kind = coefficients.shape, {"dtype": torch.float64, "device": CPU}
    one_way, other_way = torch.zeros(k, m, **kind), torch.zeros(k, m, **kind)
    squares, between = torch.zeros(k, **kind), torch.zeros(m, m, **kind)
    coefficients, factors = coefficients.to(basis), values.to(basis)[:, None]
    for columns in column_blocks(basis):
        v, w = basis[:, columns], images[:, columns]
        u, image = combine(coefficients, v), combine(coefficients, w)
        one_way += gram(u, w).cpu()
        other_way += gram(image, v).cpu()
        squares += squared_norm(image - factors * u).cpu()
        between += gram(w, w).cpu()
    return one_way, other_way, squares, between
