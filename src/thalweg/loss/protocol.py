"""What the rest of Thalweg asks of a loss: any class with these members will do.

`Objective` (a model, a loss and data) and `FunctionLoss` (a plain function of theta) are two, and a
`WeightedSum` of losses is one.
Whatever else has a gradient and products with its Hessian, such as a trainer's own loss, a model in
shards or a simulation, is one more: a class of these eleven members.

Example:
    >>> import torch
    >>> class Quadratic:  # L = theta^T A theta / 2
    ...     num_parameters, num_samples = 3, 1
    ...     dtype, device = torch.float32, torch.device("cpu")
    ...
    ...     def __init__(self, matrix):
    ...         self.matrix, self.weights = matrix, torch.ones(3)
    ...
    ...     def parameters(self):
    ...         return [self.weights]
    ...
    ...     def theta(self):
    ...         return self.weights.clone()
    ...
    ...     def write(self, theta):
    ...         self.weights.copy_(theta)
    ...
    ...     def value_and_gradient(self, theta=None, samples=None):
    ...         theta = self.weights if theta is None else theta
    ...         return theta @ self.matrix @ theta / 2, self.matrix @ theta
    ...
    ...     def linearize(self, theta=None, samples=None, *, keep_graph=False):
    ...         return Linear(self.matrix, self.value_and_gradient(theta)[1])
    ...
    ...     def state_dict(self):
    ...         return {}
    ...
    ...     def load_state_dict(self, state):
    ...         pass
    >>> class Linear:
    ...     def __init__(self, matrix, gradient):
    ...         self.matrix, self._gradient = matrix, gradient
    ...
    ...     def gradient(self):
    ...         return self._gradient
    ...
    ...     def multiply(self, rows):
    ...         return rows @ self.matrix
    >>> from thalweg.spectrum.eigensolver import eigenpairs
    >>> eigenpairs(Quadratic(torch.diag(torch.tensor([1.0, 4.0, 2.0]))), 1).eigenvalues
    tensor([4.])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Linearization(Protocol):
    """The gradient of a loss at one point, and products with its Jacobian there, the Hessian.

    How products are made is free: double backward, differences of gradients, a closed form. Where
    they are inexact, one more member says how far: `multiply_with_error(rows, *, measured=False)`,
    the products and the norms of their errors (k,) by estimate, float64 on the CPU, None where they
    are exact but for rounding; `measured` asks for better ones, at a price.
    """

    def gradient(self) -> Tensor:
        """The gradient g at the point, (P,), in units of the loss over theta."""
        ...

    def multiply(self, rows: Tensor) -> Tensor:
        """H times each of k vectors, given and returned as rows (k, P)."""
        ...


def multiplied(
    at: Linearization, rows: Tensor, *, measured: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Products (k, P) and the norms of their errors, see `Linearization`."""
    inexact = getattr(at, "multiply_with_error", None)
    return (at.multiply(rows), None) if inexact is None else inexact(rows, measured=measured)


class Loss(Protocol):
    """A loss L(theta), the mean over N samples; the same number at every call.

    A point theta is a flat vector (P,), None for the parameters as they are now; samples are
    indices, int64 (n,), None for all. Vectors are in `dtype` and on `device`. Example: see the
    module.
    """

    @property
    def num_parameters(self) -> int:
        """P, the length of theta."""
        ...

    @property
    def num_samples(self) -> int:
        """N, the number of samples, over all processes that share the loss; 1 without samples."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of theta."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of theta."""
        ...

    def parameters(self) -> Sequence[Tensor]:
        """The tensors that are trained, in theta's order: theta is all of them, flattened."""
        ...

    def theta(self) -> Tensor:
        """A copy of the parameters as they are now, (P,)."""
        ...

    def write(self, theta: Tensor) -> None:
        """Set the parameters to theta (P,)."""
        ...

    def value_and_gradient(
        self, theta: Tensor | None = None, samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss, a scalar tensor, and its gradient (P,)."""
        ...

    def linearize(
        self,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> Linearization:
        """The gradient and products with the Hessian at theta, over some samples.

        Args:
            keep_graph: many products follow one another: what they share may stay in memory.
        """
        ...

    def state_dict(self) -> Mapping[str, Any]:
        """What was chosen while running that decides the last bits, such as a chunk size.

        Numbers, tensors and dicts of them; empty where there is nothing.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


def value_of(loss: Loss, theta: Tensor | None = None, samples: Tensor | None = None) -> Tensor:
    """The loss alone, a scalar tensor: by the member `value`, where there is a cheaper way."""
    value = getattr(loss, "value", None)
    return loss.value_and_gradient(theta, samples)[0] if value is None else value(theta, samples)
