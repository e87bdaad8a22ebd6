"""Symmetric operators of a loss: multiply them with `@`, on a vector (P,) or a block (P, k).

The Hessian is never formed: a product is one more backward pass through the gradient. A block
shares the primal pass, chunk by chunk.

Example:
    >>> import torch
    >>> from thalweg.curvature.objective import Objective
    >>> model, data = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
    >>> hessian = Hessian(Objective(model, torch.nn.MSELoss(), data))
    >>> (hessian @ torch.ones(4)).shape, (hessian @ torch.eye(4)).shape, hessian.products
    (torch.Size([4]), torch.Size([4, 4]), 5)
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from thalweg.curvature.evaluation import Evaluation
from thalweg.curvature.finiteness import all_finite
from thalweg.curvature.memory import within_memory
from thalweg.curvature.objective import Objective
from thalweg.curvature.products import Linearization, pull_back
from thalweg.errors import Diverged, invalid

# What a product with the Hessian is counted as, in gradients of the same samples. Measured on an
# MLP, its share of building the graph included: 1.2 to 1.4. Other models differ.
PRODUCT_COST = 1.3

FEWEST = 32
"""Samples that say something about all of them."""


class SymmetricOperator(Protocol):
    """What an eigensolver needs of a matrix A: any class with these members will do.

    Example:
        >>> class Doubling:
        ...     shape, dtype, device = (3, 3), torch.float32, torch.device("cpu")
        ...
        ...     def __matmul__(self, vectors):
        ...         return 2 * vectors
        >>> from thalweg.curvature import top_eigenpairs
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
        ...     from thalweg.curvature import Preconditioned
        ...
        ...     hessian = Hessian(objective, theta, samples, keep_graph=keep_graph)
        ...     return Preconditioned(hessian, torch.full((hessian.shape[0],), 2.0))
        >>> from thalweg.curvature import SubspaceTracker
        >>> data = (torch.randn(8, 3), torch.randn(8, 1))
        >>> objective = Objective(torch.nn.Linear(3, 1), torch.nn.MSELoss(), data)
        >>> SubspaceTracker(objective, k=1, operator=halved).update().k
        1
    """

    def __call__(
        self,
        objective: Objective,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> SymmetricOperator:
        """The operator (P, P).

        Args:
            objective: the loss.
            theta: the point (P,); None for the model's parameters as they are.
            samples: indices of the samples to average over, int64 (n,); None for all.
            keep_graph: many products will follow one another.
        """
        ...


class OperatorAround:
    """What an operator made of another has from it: shape, dtype and device.

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


class DenseOperator:
    """A symmetric matrix as an operator: for tests, and for what is small enough to write down.

    Args:
        matrix: (P, P), symmetric, of a floating-point dtype. (That it is symmetric is not checked
            here; an eigensolver notices.)

    Attributes:
        products: how many vectors were multiplied.

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
        self.products = 0

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
        self.products += 1 if vectors.dim() == 1 else vectors.shape[1]
        return self.matrix @ vectors


class LossOperator(ABC):
    """A curvature of the mean loss at theta, over all samples or some; the sum of its chunks.

    Args:
        objective: the loss.
        theta: the point (P,); None for the model's parameters as they are now (copied).
        samples: indices of the samples to average over, int64 (n,); None for all.
        keep_graph: keep the graphs of all chunks between products: right for many products one
            after another (an eigensolver), at the price of holding them in memory.

    Attributes:
        products: how many vectors were multiplied.

    Raises:
        InvalidInput: theta has another length than P, or is on another device than the model.
    """

    def __init__(
        self,
        objective: Objective,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> None:
        self.objective = objective
        self.theta = objective.theta() if theta is None else theta
        if self.theta.shape != (objective.num_parameters,):
            raise invalid("theta", tuple(self.theta.shape), f"({objective.num_parameters},)")
        if self.theta.device != objective.device:
            raise invalid(
                "theta", f"on {self.theta.device}", f"on {objective.device}, like the model"
            )
        self.samples = samples
        self.keep_graph = keep_graph
        self.products = 0
        self._gradient: Tensor | None = None
        self._kept: list[Linearization] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.objective.num_parameters, self.objective.num_parameters

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.theta.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.theta.device

    @property
    def gradient(self) -> Tensor:
        """The gradient over the operator's samples at theta (P,), in units of the loss over theta.

        Every product finds it on the way. Before the first one this is a pass of its own, whose
        graphs serve the products that follow where `keep_graph` says so.

        Raises:
            Diverged: the loss or the gradient is NaN or infinite.
        """
        if self._gradient is None:
            within_memory(self.objective, lambda: self._pass(None))
        assert self._gradient is not None
        if not all_finite(self._gradient):
            raise Diverged("the gradient is NaN or infinite")
        return self._gradient

    @abstractmethod
    def linearize(self, evaluation: Evaluation) -> Linearization:
        """The graph of one chunk that the operator's products go through."""

    def evaluations(self) -> Iterator[Evaluation]:
        """Each chunk, evaluated at theta."""
        return self.objective.evaluations(self.theta, self.samples)

    def linearizations(self) -> Iterator[Linearization]:
        """The graph of each chunk; drop one before the next to free its memory."""
        return map(self.linearize, self.evaluations())

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """A v for (P,), or A V for the columns of (P, k), stored column by column.

        Raises:
            InvalidInput: the first dimension is not P, or another device than the model's.
            Diverged: the loss or the product is NaN or infinite.
        """
        rows = rows_of(vectors, self)
        result = within_memory(self.objective, lambda: self._pass(rows))
        assert result is not None
        self.products += rows.shape[0]
        if not all_finite(result):
            name = type(self).__name__
            raise Diverged(f"a product with the {name} is NaN or infinite")
        return result[0] if vectors.dim() == 1 else result.T

    def thinned(self, share: float, generator: torch.Generator) -> Self | None:
        """The same operator over a random part of its samples: see `thinned`."""
        objective = self.objective
        samples = torch.arange(objective.num_samples) if self.samples is None else self.samples
        count = math.ceil(share * len(samples))
        if count < FEWEST:
            return None
        few = copy.copy(self)
        few.samples = samples[torch.randperm(len(samples), generator=generator)[:count]]
        few.products, few._gradient, few._kept = 0, None, None
        return few

    def _pass(self, rows: Tensor | None) -> Tensor | None:
        """A times each row of (k, P), as rows; None for None, which leaves the gradient known."""
        objective = self.objective
        shaped = None if rows is None else objective.layout.unflatten(rows)
        result: Tensor | None = None
        gradient = None if self._gradient is not None else torch.zeros_like(self.theta)
        chunks = self._kept or self.linearizations()
        # Given up until all is done: where memory runs out, what is kept must not stay.
        self._kept, kept = None, []
        for chunk in chunks:
            if shaped is not None:
                part = objective.products.multiply(chunk, shaped)
                # In place: on small chunks the passes over (k, P) cost more than the arithmetic.
                if chunk.share != 1:
                    part.mul_(chunk.share)
                result = part if result is None else result.add_(part)
            if gradient is not None:
                parts = [g.detach() for g in chunk.gradient]
                gradient.add_(objective.layout.flatten(parts), alpha=chunk.share)
            if self.keep_graph:
                kept.append(chunk)
        self._kept = kept or None
        if gradient is not None:
            self._gradient = gradient
        return result


class Hessian(LossOperator):
    """H, the Hessian of the mean loss at theta: in units of the loss over theta squared.

    Arguments, attributes and errors are those of `LossOperator`. Dtype and device are those of the
    parameters. A product is a backward pass through the gradient's graph: exact but for rounding.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian". Example: see the module.
    """

    def linearize(self, evaluation: Evaluation) -> Linearization:
        """The gradient of the chunk with its graph."""
        gradient = self.objective.gradient_of(evaluation, create_graph=True)
        return _GradientGraph(evaluation.share, evaluation.samples, evaluation.leaves, gradient)


@dataclass(frozen=True)
class _GradientGraph:
    """The gradient of a chunk as a function of the parameters: its Jacobian is H."""

    share: float
    samples: int
    leaves: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]

    def multiply(self, vectors: Sequence[Tensor], *, vectorized: bool) -> list[Tensor]:
        return pull_back(self.gradient, self.leaves, vectors, vectorized=vectorized)


def thinned(
    operator: SymmetricOperator, share: float, generator: torch.Generator
) -> SymmetricOperator | None:
    """The same operator over a random share of its samples: what costs that share of a product.

    None for one that is not made of samples, or where they would be fewer than `FEWEST`.
    """
    if isinstance(operator, OperatorAround):
        inside = thinned(operator.operator, share, generator)
        if inside is None:
            return None
        around = copy.copy(operator)
        around.operator = inside
        return around
    return operator.thinned(share, generator) if isinstance(operator, LossOperator) else None


def rows_of(vectors: Tensor, operator: SymmetricOperator) -> Tensor:
    """A vector (P,) or the columns of (P, k) as contiguous rows, fit for the operator.

    Raises:
        InvalidInput: another shape, or another device than the operator's.
    """
    size = operator.shape[0]
    if vectors.dim() not in (1, 2) or vectors.shape[0] != size:
        raise invalid("vector", tuple(vectors.shape), f"(P,) or (P, k) with P={size}")
    if vectors.device != operator.device:
        raise invalid("vector", f"on {vectors.device}", f"on {operator.device}, like the operator")
    rows = vectors.reshape(1, -1) if vectors.dim() == 1 else vectors.T
    return rows.contiguous()
