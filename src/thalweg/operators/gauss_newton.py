"""Hessian = Gauss-Newton + residual: curvature of the loss seen through outputs, and the rest.

With z the model's outputs, J = dz / dtheta and H_L the Hessian of the loss with respect to z:

    G = mean of J^T H_L J           R = H - G = mean of sum_o (dL / dz_o) d^2 z_o / dtheta^2

Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent";
Sagun et al. 2016 (arXiv 1611.07476) for the split of the spectrum.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> model, data = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
    >>> objective = Objective(model, torch.nn.MSELoss(), data)
    >>> vector = torch.ones(4)  # a linear model has no other curvature
    >>> torch.allclose(GaussNewton(objective) @ vector, Hessian(objective) @ vector, atol=1e-6)
    True
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import InvalidInput
from thalweg.loss.chunk_multiplier import ChunkGraph, pull_back
from thalweg.loss.evaluation import Evaluation
from thalweg.loss.outputs import read_by
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import Hessian
from thalweg.operators.loss_operator import ChunkedOperator
from thalweg.operators.symmetric import CountsMatvecs


class GaussNewton(ChunkedOperator):
    """G, the generalized Gauss-Newton matrix of the mean loss at theta.

    Positive semidefinite where the loss is convex in the outputs. Arguments, attributes and errors
    are those of `LossOperator`, units, dtype and device those of `Hessian`.

    Of several outputs those count that the loss reads itself, each on its own: features that the
    logits were computed from change nothing, unless the loss reads them too.

    Raises:
        InvalidInput: a loss that is no `Objective`; at the first product: the model returns its
            loss and no outputs; the loss depends on the parameters by another road than the
            outputs; the model's own loss reads two outputs of which one is computed from the other.

    Source: Schraudolph 2002. Example: see the module.
    """

    _needs = "the outputs of a model"

    def _evaluations(self, weight: float) -> Iterator[Evaluation]:
        return self.objective.evaluations(self.theta, self.samples, apart=True, weight=weight)

    def _graph_of(self, evaluation: Evaluation) -> ChunkGraph:
        """The outputs of the chunk with their graph, and the loss as a function of them."""
        if not evaluation.outputs:
            raise InvalidInput(
                "GaussNewton: the model returns a loss and no outputs; let it return an object with"
                " .loss and .logits, or give the loss apart"
            )
        read = read_by(evaluation.loss, evaluation.outputs, evaluation.leaves)
        gradient = self.objective.gradient_of(evaluation, retain_graph=True)
        return _OutputGraph.of(evaluation._replace(outputs=read), gradient)

    def by_differences(
        self, vector: Tensor, step: float, begin: Callable[[], object] = lambda: None
    ) -> Tensor:
        """J^T (dL/dz at theta + step v - dL/dz at theta - step v) / (2 step): see `LossOperator`.

        The gradients of the loss by the outputs change by H_L J v.
        """

        def by_outputs(
            theta: Tensor,
        ) -> list[tuple[Evaluation, Sequence[Tensor], Sequence[Tensor]]]:
            begin()
            found = []
            for evaluation in self.objective.evaluations(theta, self.samples, apart=True):
                read = read_by(evaluation.loss, evaluation.outputs, evaluation.leaves)
                one = torch.ones_like(evaluation.loss)
                with evaluation.at:
                    slopes = pull_back([evaluation.loss], read, [one], vectorized=False)
                found.append((evaluation, read, slopes))
            return found

        above, below = (
            by_outputs(self.theta + step * vector),
            by_outputs(self.theta - step * vector),
        )
        total = torch.zeros_like(vector)
        there = by_outputs(self.theta)
        for (evaluation, read, _), (_, _, up), (_, _, down) in zip(
            there, above, below, strict=True
        ):
            along = [(a - b) / (2 * step) for a, b in zip(up, down, strict=True)]
            with evaluation.at:
                parts = pull_back(read, evaluation.leaves, along, vectorized=False)
            flat = torch.cat([part.reshape(-1) for part in parts])
            total.add_(flat, alpha=evaluation.fraction)
        return total


class ResidualHessian(CountsMatvecs):
    """R = H - G, the curvature of the outputs weighted by the residuals; also "functional" Hessian.

    Arguments and errors are those of `Hessian` and `GaussNewton`; a product costs both. Not
    definite in general.

    Raises:
        InvalidInput: theta does not fit; the model returns its loss and no outputs.

    Source: Sagun et al. 2016 (arXiv 1611.07476).

    Example:
        >>> from thalweg.loss.objective import Objective
        >>> model, data = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
        >>> residual = ResidualHessian(Objective(model, torch.nn.MSELoss(), data))
        >>> float((residual @ torch.ones(4)).norm()) < 1e-5  # of a linear model
        True
    """

    def __init__(
        self,
        objective: Loss,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> None:
        theta = objective.theta() if theta is None else theta
        self.hessian = Hessian(objective, theta, samples, keep_graph=keep_graph)
        self.gauss_newton = GaussNewton(objective, theta, samples, keep_graph=keep_graph)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P)."""
        return self.hessian.shape

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""
        return self.hessian.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self.hessian.device

    @property
    def num_matvecs(self) -> int:  # type: ignore[override]
        """How many vectors were multiplied."""
        return self.hessian.num_matvecs

    @property
    def gradient(self) -> Tensor:
        """The gradient at theta (P,): see `LossOperator`."""
        return self.hessian.gradient

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """R v for (P,), or R V for the columns of (P, k)."""
        return self.product_with_error(vectors)[0]

    def product_with_error(
        self, vectors: Tensor, *, measured: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `SymmetricOperator`."""
        images, errors = self.hessian.product_with_error(vectors, measured=measured)
        return images - self.gauss_newton @ vectors, errors


@dataclass(frozen=True)
class _OutputGraph:
    """The outputs z of a chunk, J^T w as a function of a dummy w, and dL / dz as one of z.

    J v is then the derivative of J^T w by w, along v: two backward passes for one forward
    derivative, but right for every layer that can be differentiated twice (J. Townsend 2017,
    "A new trick for calculating Jacobian vector products").
    """

    fraction: float
    samples: int
    leaves: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    loss_gradient: tuple[Tensor, ...]
    dummies: tuple[Tensor, ...]
    pulled_back: tuple[Tensor, ...]
    at: AbstractContextManager[object]

    @classmethod
    def of(cls, evaluation: Evaluation, gradient: tuple[Tensor, ...]) -> _OutputGraph:
        fraction, samples, leaves, outputs, loss, at = evaluation
        with at:
            loss_gradient = pull_back(
                [loss], outputs, [torch.ones_like(loss)], vectorized=False, create_graph=True
            )
            dummies = tuple(torch.ones_like(z, requires_grad=True) for z in outputs)
            pulled_back = pull_back(outputs, leaves, dummies, vectorized=False, create_graph=True)
        return cls(
            fraction,
            samples,
            leaves,
            gradient,
            outputs,
            tuple(loss_gradient),
            dummies,
            tuple(pulled_back),
            at,
        )

    def multiply(self, vectors: Sequence[Tensor], *, vectorized: bool) -> list[Tensor]:
        moved = pull_back(self.pulled_back, self.dummies, vectors, vectorized=vectorized)
        curved = pull_back(self.loss_gradient, self.outputs, moved, vectorized=vectorized)
        return pull_back(self.outputs, self.leaves, curved, vectorized=vectorized)
