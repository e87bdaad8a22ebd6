"""A plain function of theta as a loss: for analytic losses, and models that are no module.

Example:
    >>> import torch
    >>> theta = torch.tensor([1.0, 2.0])
    >>> loss = FunctionLoss(lambda t: (t**4).sum(), theta)
    >>> value, gradient = loss.value_and_gradient()
    >>> value.item(), gradient.tolist()
    (17.0, [4.0, 32.0])
    >>> loss.linearize().multiply(torch.eye(2)).tolist()
    [[12.0, 0.0], [0.0, 48.0]]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.errors import invalid
from thalweg.linalg import require_finite
from thalweg.loss.chunk_multiplier import pull_back
from thalweg.loss.evaluation import refuse_constant
from thalweg.loss.guards.differences import is_gradient
from thalweg.loss.guards.failures import OTHERWISE, of_function
from thalweg.loss.guards.generators import begun_at, refuse_other_seed, refuse_unfit_seed
from thalweg.loss.guards.kinks import first_kink
from thalweg.loss.product_choice import Product, ProductChoice
from thalweg.loss.protocol import Linearization
from thalweg.loss.samples import refuse_unfit_indices
from thalweg.surroundings import one_path, shielded

CALLED = (
    "it is called as function(theta), or function(theta, samples) where there are several samples"
)


class FunctionLoss:
    """A twice differentiable function of theta, as a `Loss`.

    Args:
        function: `function(theta) -> scalar`; with several samples `function(theta, samples)`, the
            mean over the samples of these indices, int64 (n,), or over all where they are None.
        theta: the parameters (P,), of a floating-point dtype. They are held, not copied: an
            optimizer of this very tensor moves the loss.
        num_samples: N.
        seed: fixes random numbers of the generators of torch, NumPy and Python that the function
            draws: they begin at this seed at each evaluation. None refuses a function that draws.
        product: how products with the Hessian are made, see `Objective`.
        check: compare a product with differences of gradients, once, before the first one.

    Raises:
        InvalidInput: a theta of another shape or dtype, no sample; when it is evaluated, indices
            that name no samples, or a result that is no scalar or does not depend on theta.
        Diverged: when it is evaluated: the value or the gradient is NaN or infinite.

    Units are those of the function; dtype and device those of theta. Example: see the module.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        theta: Tensor,
        num_samples: int = 1,
        *,
        seed: int | None = None,
        product: Product = "auto",
        check: bool = True,
    ) -> None:
        if theta.dim() != 1 or not len(theta) or not theta.is_floating_point():
            given = f"{theta.dtype} {tuple(theta.shape)}"
            raise invalid("theta", given, "floating-point numbers (P,), P >= 1", "flatten it")
        if num_samples < 1:
            raise invalid("num_samples", num_samples, "an integer >= 1")
        self._function = function
        self._theta = theta
        self._num_samples = num_samples
        self._seed = refuse_unfit_seed(seed)
        self.choice = ProductChoice(product, torch.finfo(theta.dtype).eps)
        self.check = check

    @property
    def product(self) -> Product:
        """How products are made: "exact" or "difference"; "auto" while neither is known to work."""
        return self.choice.taken

    @property
    def num_parameters(self) -> int:
        """P, the length of theta."""
        return len(self._theta)

    @property
    def num_samples(self) -> int:
        """N, the number of samples."""
        return self._num_samples

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of theta."""
        return self._theta.dtype

    @property
    def device(self) -> torch.device:
        """The device of theta."""
        return self._theta.device

    def parameters(self) -> list[Tensor]:
        """The tensor theta itself."""
        return [self._theta]

    def theta(self) -> Tensor:
        """A copy of theta as it is now, (P,)."""
        return self._theta.detach().clone()

    @torch.no_grad()
    def write(self, theta: Tensor) -> None:
        """Set theta to the values (P,)."""
        self._theta.copy_(theta)

    def value(self, theta: Tensor | None = None, samples: Tensor | None = None) -> Tensor:
        """The loss at theta, a scalar tensor."""
        return require_finite(self._value(self._leaf(theta), samples).detach(), "the loss")

    def value_and_gradient(
        self, theta: Tensor | None = None, samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss at theta, a scalar tensor, and its gradient (P,)."""
        leaf = self._leaf(theta)
        value = self._value(leaf, samples)
        with shielded(), self._path(), of_function(self._function, "its derivative", OTHERWISE):
            (gradient,) = torch.autograd.grad(value, leaf)
        return require_finite(value.detach(), "the loss"), require_finite(gradient, "the gradient")

    def linearize(
        self,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> Linearization:
        """The gradient and products with the Hessian at theta; the graph is kept in any case."""

        def exact() -> DoubleBackward:
            leaf = self._leaf(theta)
            value = self._value(leaf, samples)
            require_finite(value.detach(), "the loss")
            return DoubleBackward(value, leaf, self._function)

        def gradient_at(moved: Tensor) -> Tensor:
            # Of a linear function it may be an expanded tensor.
            return self.value_and_gradient(moved, samples)[1].clone()

        point = self._leaf(theta).detach()
        return self.choice.linearization(self, exact, gradient_at, point, checks=samples is None)

    def first_kink(self) -> str:
        """The first operation with a kink, see `guards/kinks.py`; "" where there is none."""
        return first_kink(nn.Module(), lambda: self._value(self._leaf(None), None))

    def has_gradient(self) -> bool:
        """Whether there is a first derivative, and it is that of the function."""
        try:
            return is_gradient(self.unchecked(), None, rough=False)
        except Exception:  # whatever it is, differences would meet it too
            return False

    def state_dict(self) -> dict[str, Any]:
        """The seed, where there is one, and steps, where products are differences."""
        return ({} if self._seed is None else {"seed": self._seed}) | self.choice.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            InvalidInput: the state is that of another seed, or with differences where exact
                products are asked for.
        """
        refuse_other_seed(self._seed, state)
        self.choice.load_state_dict(state)

    def copied(
        self, dtype: torch.dtype, around: Callable[[Any], Any] = lambda function: function
    ) -> FunctionLoss:
        """The same function wrapped by `around`, of a copy of theta in another dtype, unchecked."""
        theta = self.theta().to(dtype)
        return self._alike(around(self._function), theta)

    def unchecked(self) -> FunctionLoss:
        """The same function of the same theta, without checks."""
        return self._alike(self._function, self._theta)

    def _alike(self, function: Callable[..., Tensor], theta: Tensor) -> FunctionLoss:
        """Of another function and theta; in what is tried nothing is chosen."""
        way: Product = "exact" if self.choice.is_exact else "difference"
        options = {"seed": self._seed, "product": way, "check": False}
        return FunctionLoss(function, theta, self._num_samples, **options)

    def _path(self) -> AbstractContextManager[None]:
        return one_path() if self.choice.is_exact else nullcontext()

    def _leaf(self, theta: Tensor | None) -> Tensor:
        if theta is not None and theta.shape != self._theta.shape:
            raise invalid("theta", tuple(theta.shape), f"({self.num_parameters},)")
        with shielded():
            return (self._theta if theta is None else theta).detach().clone().requires_grad_()

    def _value(self, leaf: Tensor, samples: Tensor | None) -> Tensor:
        if samples is not None:
            refuse_unfit_indices(samples, self.num_samples)
        kept = nullcontext() if self._seed is None else begun_at(self.device, self._seed)
        with shielded(), self._path(), kept:
            one = self._num_samples == 1
            with of_function(self._function, "its value", CALLED):
                value = self._function(leaf) if one else self._function(leaf, samples)
            if not isinstance(value, Tensor) or value.numel() != 1:
                given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise invalid("loss", given, "a scalar tensor", "average over the samples")
            refuse_constant(value)
            return value.reshape(())

    def __repr__(self) -> str:
        return f"FunctionLoss(P={self.num_parameters}, N={self.num_samples}{self.choice})"


class DoubleBackward:
    """The gradient of a scalar, and products with its Hessian by one more backward pass each.

    Args:
        value: a scalar tensor with its graph.
        theta: the leaf (P,) of that graph.
        function: whose value it is, for messages.

    Raises:
        InvalidInput: the value cannot be differentiated by theta, or not twice.

    Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """

    def __init__(self, value: Tensor, theta: Tensor, function: object = None) -> None:
        self._theta = theta
        self._function = function
        with shielded(), one_path(), of_function(function, "its derivative", OTHERWISE):
            (self._gradient,) = torch.autograd.grad(value, theta, create_graph=True)

    def gradient(self) -> Tensor:
        """The gradient (P,)."""
        return self._gradient.detach()

    def multiply(self, rows: Tensor) -> Tensor:
        """H times each row of (k, P), as rows."""
        with (
            shielded(),
            one_path(),
            of_function(self._function, "its second derivative", OTHERWISE),
        ):
            parts = [
                pull_back([self._gradient], [self._theta], [row], vectorized=False)[0]
                for row in rows
            ]
        return torch.stack(parts)
