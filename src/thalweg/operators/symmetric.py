"""Protocol of a symmetric operator: what solvers need of a matrix that is never formed.

Example:
    >>> import torch
    >>> DenseOperator(torch.eye(2)) @ torch.ones(2)
    tensor([1., 1.])
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from thalweg.errors import invalid, warn_of_former_name
from thalweg.linalg import length
from thalweg.loss.protocol import Loss
from thalweg.sharding import Sharding, sharding_of

# Two products' errors, and what turning a basis adds up.
ERRORS_OF_BOTH = 4.0


class SymmetricOperator(Protocol):
    """What an eigensolver needs of a matrix A: any class with these members will do.

    Where products are inexact, as differences of gradients are, one more member says how far:
    `product_with_error(vectors, *, measured=False)`, what `@` gives and the norms of its columns'
    errors (b,) by estimate, float64 on the CPU, None where they are exact but for rounding. With
    `measured` the products are better ones, at a price.

    Example:
        >>> class Doubling:
        ...     shape, dtype, device = (3, 3), torch.float32, torch.device("cpu")
        ...
        ...     def __matmul__(self, vectors):
        ...         return 2 * vectors
        >>> from thalweg.spectrum.eigensolver import top_eigenpairs
        >>> top_eigenpairs(Doubling(), k=1).eigenvalues.tolist()
        [2.0]
    """

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the vectors it takes and gives."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the vectors it takes and gives."""
        ...

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """A v for (P,), or A V for the columns of (P, b), a tensor of the same shape.

        It must be linear and symmetric; solvers notice one that is not.
        """
        ...


class OperatorAt(Protocol):
    """Builds a symmetric operator of a loss at theta (P,), over some samples or all.

    What a `SubspaceTracker` follows: the class of an operator, or a function with its arguments.

    Example:
        >>> def halved(objective, theta=None, samples=None, *, keep_graph=False):
        ...     from thalweg.operators import Hessian, Preconditioned
        ...
        ...     hessian = Hessian(objective, theta, samples, keep_graph=keep_graph)
        ...     return Preconditioned(hessian, torch.full((hessian.shape[0],), 2.0))
        >>> from thalweg.loss.objective import Objective
        >>> from thalweg.tracking.tracker import SubspaceTracker
        >>> data = (torch.randn(8, 3), torch.randn(8, 1))
        >>> objective = Objective(torch.nn.Linear(3, 1), torch.nn.MSELoss(), data)
        >>> SubspaceTracker(objective, k=1, operator=halved).update().k
        1
    """

    def __call__(
        self,
        objective: Loss,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> SymmetricOperator:
        """The operator (P, P).

        Args:
            objective: the loss.
            theta: the point (P,); None for the parameters as they are.
            samples: indices of the samples to average over, int64 (n,); None for all.
            keep_graph: many products will follow one another.
        """
        ...


class OperatorAround:
    """Base of operators that wrap another one: its shape, dtype and device.

    Attributes:
        operator: the one inside.
    """

    operator: SymmetricOperator

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P) of the operator inside."""
        return self.operator.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the operator inside."""
        return self.operator.dtype

    @property
    def device(self) -> torch.device:
        """The device of the operator inside."""
        return self.operator.device

    @property
    def sharding(self) -> Sharding | None:
        """Of the vectors of the operator inside; None where they are whole."""
        return sharding_of(self.operator)


class CountsMatvecs:
    """Base of what counts the vectors that were multiplied, an operator or a result.

    Attributes:
        num_matvecs: how many there were.
    """

    num_matvecs: Any

    @property
    def products(self) -> Any:
        """The former name of `num_matvecs`."""
        warn_of_former_name("products", "num_matvecs")
        return self.num_matvecs


class DenseOperator(CountsMatvecs):
    """A symmetric matrix as an operator: for tests, and for what is small enough to write down.

    Args:
        matrix: (P, P), symmetric, of a floating-point dtype. (That it is symmetric is not checked
            here; an eigensolver notices.)

    Attributes:
        num_matvecs: how many vectors were multiplied.

    Raises:
        InvalidInput: the matrix is not square.

    Example:
        >>> (DenseOperator(torch.diag(torch.tensor([3.0, 1.0]))) @ torch.ones(2)).tolist()
        [3.0, 1.0]
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise invalid("matrix", tuple(matrix.shape), "a square shape (P, P)")
        self.matrix = matrix
        self.num_matvecs = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the matrix."""
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        """The device of the matrix."""
        return self.matrix.device

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with (P,) or the columns of (P, k).

        Raises:
            InvalidInput: the first dimension is not P, or another device than the matrix's.
        """
        rows_of(vectors, self)
        self.num_matvecs += 1 if vectors.dim() == 1 else vectors.shape[1]
        return self.matrix @ vectors


def rows_of(vectors: Tensor, operator: SymmetricOperator) -> Tensor:
    """A vector (P,) or the columns of (P, k) as contiguous rows, fit for the operator.

    Raises:
        InvalidInput: another shape, or another device than the operator's.
    """
    size = operator.shape[0]
    if vectors.dim() not in (1, 2) or length(vectors, 0) != size:
        raise invalid("vector", tuple(vectors.shape), f"(P,) or (P, k) with P={size}")
    if vectors.device != operator.device:
        raise invalid("vector", f"on {vectors.device}", f"on {operator.device}, like the operator")
    refuse_other_kind(vectors, operator)
    rows = vectors.reshape(1, -1) if vectors.dim() == 1 else vectors.T
    return rows.contiguous()


def refuse_other_kind(vectors: Tensor, operator: SymmetricOperator) -> None:
    """Refuse whole vectors for an operator on sharded ones, and the other way about.

    Raises:
        InvalidInput: they are.
    """
    if sharding_of(vectors) is not sharding_of(operator):
        own = sharding_of(operator)
        raise invalid(
            "vector",
            type(vectors).__name__,
            "a Tensor" if own is None else f"a ShardedVector of {own}",
            "" if own is None else "operator.sharding.part_of(whole) makes one",
        )


def product(operator: SymmetricOperator, block: Tensor) -> Tensor:
    """A V of the columns of a block (P, b), of the block's own kind.

    Raises:
        InvalidInput: it has another shape, dtype or device than the operator states.
    """
    return checked_product(operator, block)[0]


def product_with_error(
    operator: SymmetricOperator, block: Tensor, *, measured: bool = False
) -> tuple[Tensor, Tensor | None]:
    """A V of the columns of a block (P, b), and the norms of their errors: see the protocol."""
    inexact = getattr(operator, "product_with_error", None)
    return (operator @ block, None) if inexact is None else inexact(block, measured=measured)


def checked_product(
    operator: SymmetricOperator, block: Tensor, *, measured: bool = False
) -> tuple[Tensor, Tensor | None]:
    """What `product_with_error` gives, of the block's own kind.

    Raises:
        InvalidInput: it has another shape, dtype or device than the operator states.
    """
    images, errors = product_with_error(operator, block, measured=measured)
    if _description(images) != _description(block):
        raise invalid(
            "operator",
            f"a product of {_description(images)}",
            f"{_description(block)}, as its shape, dtype and device say",
        )
    return images, errors


def refuse_asymmetry(asymmetry: float, allowed: float, error: float = 0.0) -> None:
    """Refuse an operator whose u^T A v and v^T A u differ too much.

    Args:
        asymmetry: their difference, relative to norm(A).
        allowed: of exact products.
        error: of inexact ones, relative to norm(A).

    Raises:
        InvalidInput: it is larger than allowed.
    """
    if asymmetry > allowed + ERRORS_OF_BOTH * error:
        raise invalid(
            "operator",
            f"u^T A v and v^T A u that differ by {asymmetry:.1e} of its norm",
            "a symmetric operator, the same at every product",
        )


def _description(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
