"""Symmetric operators of a loss: multiply them with `@`, on a vector (P,) or a block (P, k).

The Hessian is never formed: a product is one more backward pass through the gradient. A block
shares the primal pass, chunk by chunk.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> model, data = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
    >>> hessian = Hessian(Objective(model, torch.nn.MSELoss(), data))
    >>> (hessian @ torch.ones(4)).shape, (hessian @ torch.eye(4)).shape, hessian.products
    (torch.Size([4]), torch.Size([4, 4]), 5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from thalweg.loss.evaluation import Evaluation
from thalweg.loss.multiplication import Linearization, pull_back
from thalweg.operators.loss_operator import LossOperator

# What a product with the Hessian is counted as, in gradients of the same samples. Measured on an
# MLP, its share of building the graph included: 1.2 to 1.4. Other models differ.
PRODUCT_COST = 1.3


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
