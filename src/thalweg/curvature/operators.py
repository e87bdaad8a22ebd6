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

from typing import Protocol

import torch
from torch import Tensor

from thalweg.curvature.objective import Objective
from thalweg.curvature.products import Linearization
from thalweg.errors import Diverged, invalid

# What a product with the Hessian is counted as, in gradients of the same samples. Measured on an
# MLP, its share of building the graph included: 1.2 to 1.4. Other models differ.
PRODUCT_COST = 1.3


class SymmetricOperator(Protocol):
    """What an eigensolver needs: shape (P, P), dtype, device, and a product with a block."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __matmul__(self, vectors: Tensor) -> Tensor: ...


class DenseOperator:
    """A symmetric matrix as an operator: for tests, and for what is small enough to write down."""

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
        """The product with (P,) or (P, k)."""
        self.products += 1 if vectors.dim() == 1 else vectors.shape[1]
        return self.matrix @ vectors


class Hessian:
    """H, the Hessian of the mean loss at theta, over all samples or some.

    Args:
        objective: the loss.
        theta: the point (P,); None for the model's parameters as they are now (copied).
        samples: indices of the samples to average over, int64 (n,); None for all.
        keep_graph: keep the gradient graphs of all chunks between products: right for many
            products one after another (an eigensolver), at the price of holding them in memory.

    Attributes:
        products: how many vectors were multiplied.
        gradient: the gradient at theta (P,), known after the first product.
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
        self.samples = samples
        self.keep_graph = keep_graph
        self.products = 0
        self.gradient: Tensor | None = None
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

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """H v for (P,), or H V for the columns of (P, k), stored column by column.

        Raises:
            InvalidInput: the first dimension is not P.
            Diverged: the loss or the product is NaN or infinite.
        """
        if vectors.dim() not in (1, 2) or vectors.shape[0] != self.shape[0]:
            raise invalid("vector", tuple(vectors.shape), f"(P,) or (P, k) with P={self.shape[0]}")
        rows = vectors.reshape(1, -1) if vectors.dim() == 1 else vectors.T
        rows = rows.contiguous()
        result: Tensor | None = None
        gradient = None if self.gradient is not None else torch.zeros_like(self.theta)
        kept: list[Linearization] = []
        for chunk in self._kept or self.objective.linearizations(self.theta, self.samples):
            part = self.objective.multiply(chunk, rows)
            # In place: on small chunks the passes over (k, P) cost more than the arithmetic.
            if chunk.share != 1:
                part.mul_(chunk.share)
            result = part if result is None else result.add_(part)
            if gradient is not None:
                parts = [g.detach() for g in chunk.gradient]
                gradient += chunk.share * self.objective.layout.flatten(parts)
            if self.keep_graph and self._kept is None:
                kept.append(chunk)
        if kept:
            self._kept = kept
        if gradient is not None:
            self.gradient = gradient
        self.products += rows.shape[0]
        assert result is not None
        # One sum, since it is NaN or infinite if an element is: `isfinite` takes 25 times as long.
        if not bool(torch.isfinite(result.sum())):
            raise Diverged("a product with the Hessian is NaN or infinite")
        return result[0] if vectors.dim() == 1 else result.T
