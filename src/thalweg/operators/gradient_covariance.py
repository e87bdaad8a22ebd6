"""Covariance of the gradients of single samples, or of mini-batches: the noise of SGD.

C = mean over i of (g_i - g)(g_i - g)^T, where g_i is the gradient of sample (or batch) i and g
their mean, with the weights that the loss gives them. A product needs two passes over the gradients
as a linear map, and none of them is ever stored.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> model, data = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
    >>> covariance = GradientCovariance(Objective(model, torch.nn.MSELoss(), data))
    >>> (covariance @ torch.ones(4)).shape
    torch.Size([4])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.linalg import coordinates, linear_combination, require_finite
from thalweg.loss.chunk_multiplier import ChunkGraph, pull_back
from thalweg.loss.evaluation import Evaluation
from thalweg.loss.protocol import Loss
from thalweg.operators.loss_operator import ChunkedOperator
from thalweg.operators.symmetric import rows_of


class GradientCovariance(ChunkedOperator):
    """C, the covariance of the gradients of samples or of batches at theta.

    Args:
        objective: the loss, a mean over samples.
        theta: the point (P,); None for the model's parameters as they are now (copied).
        samples: indices of the samples, int64 (n,); None for all.
        batch_size: b; 1 for the gradients of single samples. Otherwise those of the mean loss over
            the first b samples, the next b, and so on.
        centered: subtract the mean gradient; False for the second moment.
        keep_graph: keep the graphs of all chunks between products.

    Attributes:
        num_matvecs: how many vectors were multiplied.
        gradient: the mean gradient at theta (P,), known after the first product.

    Raises:
        InvalidInput: a loss that is no `Objective`; a batch size that does not divide the number of
            samples.

    In units of the loss squared over theta squared; positive semidefinite; dtype and device are
    those of the parameters. Example: see the module.
    """

    _needs = "the losses of single samples"
    _of_each = True

    def __init__(
        self,
        objective: Loss,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        batch_size: int = 1,
        centered: bool = True,
        keep_graph: bool = False,
    ) -> None:
        super().__init__(objective, theta, samples, keep_graph=keep_graph)
        count = objective.num_samples if samples is None else len(samples)
        if batch_size < 1 or count % batch_size:
            raise invalid("batch_size", batch_size, f"a divisor of the {count} samples")
        self.batch_size = batch_size
        self.centered = centered

    def subsampled(self, fraction: float, generator: torch.Generator) -> Self | None:
        """See `LossOperator`; None where batches are the samples: a part of them is no batch."""
        return super().subsampled(fraction, generator) if self.batch_size == 1 else None

    def _evaluations(self, weight: float) -> Iterator[Evaluation]:
        """The losses of each chunk's samples, or batches, with their graph."""
        return self.objective.evaluations_of_each(
            self.theta, self.samples, self.batch_size, weight=weight
        )

    def _graph_of(self, evaluation: Evaluation) -> ChunkGraph:
        """The losses of the chunk as a function of the parameters: the Jacobian has rows g_i."""
        gradient = self.objective.gradient_of(evaluation, retain_graph=True)
        return _LossesGraph.of(evaluation, gradient)

    def by_differences(
        self, vector: Tensor, step: float, begin: Callable[[], object] = lambda: None
    ) -> Tensor | None:
        """The sum over the samples' own gradients, each by one backward pass: no step is needed."""
        if self.batch_size != 1:
            return None
        count = self.objective.num_samples
        chosen = torch.arange(count, device="cpu") if self.samples is None else self.samples
        gradients, weights = [], []
        for sample in chosen.split(1):
            begin()
            weights.append(self.objective.weight(sample))
            gradients.append(self.objective.gradient(self.theta, sample))
        rows = torch.stack(gradients)
        fractions = torch.tensor(weights, dtype=rows.dtype, device=rows.device) / sum(weights)
        if self.centered:
            rows = rows - linear_combination(rows, fractions)
        return linear_combination(rows, fractions * coordinates(rows, vector))

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """C v for (P,), or C V for the columns of (P, k). See `LossOperator`."""
        moment = super().__matmul__(vectors)
        if not self.centered:
            return moment
        rows = rows_of(vectors, self)
        mean = self.gradient
        mean_part = mean[:, None] * coordinates(rows, mean)
        result = moment - (mean_part[:, 0] if vectors.dim() == 1 else mean_part)
        return require_finite(result, "a product with the GradientCovariance")


@dataclass(frozen=True)
class _LossesGraph:
    """Losses l (n,) and weights (n,) of a chunk's samples; J^T w as a function of a dummy w."""

    fraction: float
    samples: int
    leaves: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]
    losses: Tensor
    weights: Tensor
    dummy: Tensor
    pulled_back: tuple[Tensor, ...]
    at: AbstractContextManager[object]

    @classmethod
    def of(cls, evaluation: Evaluation, gradient: tuple[Tensor, ...]) -> _LossesGraph:
        fraction, samples, leaves, (losses, weights), _, at = evaluation
        with at:
            dummy = torch.ones_like(losses, requires_grad=True)
            pulled_back = pull_back([losses], leaves, [dummy], vectorized=False, create_graph=True)
        return cls(
            fraction, samples, leaves, gradient, losses, weights, dummy, tuple(pulled_back), at
        )

    def multiply(self, vectors: Sequence[Tensor], *, vectorized: bool) -> list[Tensor]:
        (along,) = pull_back(self.pulled_back, [self.dummy], vectors, vectorized=vectorized)
        return pull_back([self.losses], self.leaves, [along * self.weights], vectorized=vectorized)
