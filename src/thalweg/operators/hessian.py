"""Symmetric operators of a loss: multiply them with `@`, on a vector (P,) or a block (P, k).

The Hessian is never formed: a product is one more backward pass through the gradient. A block
shares the primal pass, chunk by chunk.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> model, data = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
    >>> hessian = Hessian(Objective(model, torch.nn.MSELoss(), data))
    >>> (hessian @ torch.ones(4)).shape, (hessian @ torch.eye(4)).shape, hessian.num_matvecs
    (torch.Size([4]), torch.Size([4, 4]), 5)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor

from thalweg.errors import DifferentiableOnce, InvalidInput
from thalweg.loss.gradient_differences import GradientDifferences
from thalweg.loss.product_choice import ProductChoice, Tried
from thalweg.loss.protocol import Linearization, Loss
from thalweg.operators.loss_operator import LossOperator
from thalweg.operators.symmetric import SymmetricOperator

# What a product with the Hessian is counted as, in gradients of the same samples. Measured on an
# MLP, its part in building the graph included: 1.2 to 1.4. Other models differ.
PRODUCT_COST = 1.3


class Hessian(LossOperator):
    """H, the Hessian of the mean loss at theta: in units of the loss over theta squared.

    Arguments, attributes and errors are those of `LossOperator`. Dtype and device are those of the
    parameters. Of an `Objective` a product is a backward pass through the gradient's graph, exact
    but for rounding, or a difference of gradients, see its `product`.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian". Example: see the module.
    """

    def _linearize(self) -> Linearization:
        return self.objective.linearize(self.theta, self.samples, keep_graph=self.keep_graph)

    def product_with_error(
        self, vectors: Tensor, *, measured: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """H V of (P,) or (P, k), and the norms of its columns' errors: see `SymmetricOperator`.

        Args:
            measured: of differences of gradients: by a second step too, and extrapolation.
        """
        return self._product(vectors, measured=measured)

    @property
    def is_checked(self) -> bool:
        """Whether products are compared with differences, once; not where they are differences."""
        return getattr(self.objective, "product", "exact") != "difference"

    def refuse(self, fault: str) -> None:
        """Take differences where exact products are wrong, or raise: see `ProductChoice`."""
        choice = getattr(self.objective, "choice", None)
        if not isinstance(choice, ProductChoice):
            raise InvalidInput(fault)
        choice.fall_back(cast("Tried", self.objective), DifferentiableOnce(fault))
        if not isinstance(self._linearize(), GradientDifferences):
            # A class of the user's own that makes them in its own way.
            choice.taken = "auto"
            raise InvalidInput(fault)

    def by_differences(
        self, vector: Tensor, step: float, begin: Callable[[], object] = lambda: None
    ) -> Tensor:
        """(g(theta + step v) - g(theta - step v)) / (2 step): see `LossOperator`."""
        ends = []
        for moved in (self.theta + step * vector, self.theta - step * vector):
            begin()
            ends.append(self.objective.value_and_gradient(moved, self.samples)[1])
        return (ends[0] - ends[1]) / (2 * step)


def as_operator(given: SymmetricOperator | Loss) -> SymmetricOperator:
    """The operator itself; of a loss its Hessian at the parameters, its graph kept for products."""
    if hasattr(given, "__matmul__"):
        return cast("SymmetricOperator", given)
    return Hessian(cast("Loss", given), keep_graph=True)
