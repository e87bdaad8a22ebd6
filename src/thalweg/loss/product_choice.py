"""Exact products with the Hessian or differences of gradients: which, and why.

Exact products (double backward) are right to rounding, and no dearer. They need a second derivative
of every operation, which some kernels, compiled functions and custom functions do not have. Then
`auto` takes differences, unless the loss has kinks, where a difference is a product with another
Hessian. What was taken is told by `product` and the `repr` of a loss, and saved with it.

Example:
    >>> import torch
    >>> from thalweg.loss.function_loss import FunctionLoss
    >>> points = torch.tensor([[0.0, 1.0]])
    >>> function = lambda t: torch.cdist(t[None], points).square().sum()
    >>> loss = FunctionLoss(function, torch.tensor([1.0, 1.0]))
    >>> loss.linearize().multiply(torch.eye(2)).round(decimals=2).tolist(), loss.product
    ([[2.0, 0.0], [0.0, 2.0]], 'difference')
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, TypeVar

from torch import Tensor

from thalweg.errors import (
    DifferentiableOnce,
    InvalidInput,
    KinkedDifferences,
    invalid,
    level_of_caller,
)
from thalweg.loss.gradient_differences import DifferenceSteps, GradientDifferences, GradientsAt
from thalweg.loss.guards.failures import is_foreign
from thalweg.loss.protocol import Linearization

Product = Literal["auto", "exact", "difference"]
WAYS = ("auto", "exact", "difference")
Result = TypeVar("Result")


class Tried(Protocol):
    """What is asked of a loss where exact products fail."""

    def first_kink(self) -> str:
        """The first operation with a kink, see `guards/kinks.py`; "" where there is none."""
        ...

    def has_gradient(self) -> bool:
        """Whether there is a first derivative, and it is that of the loss."""
        ...


class ProductChoice:
    """How the products of one loss are made.

    Args:
        given: "exact", "difference", or "auto" for exact ones wherever there are any.
        rounding: the relative rounding of what gradients are computed in.

    Attributes:
        taken: "exact" or "difference"; "auto" while neither is known to work.
        reason: why differences were taken; "" where they were asked for.
        steps: what is known of the errors of differences.

    Raises:
        InvalidInput: another way.
    """

    def __init__(self, given: Product, rounding: float) -> None:
        if given not in WAYS:
            raise invalid("product", given, "'auto', 'exact' or 'difference'")
        self.given: Product = given
        self.taken: Product = given
        self.reason = ""
        self.steps = DifferenceSteps(rounding)
        self._looked = False

    @property
    def is_exact(self) -> bool:
        """Whether a second derivative is asked for."""
        return self.taken != "difference"

    def linearization(
        self,
        loss: Tried,
        exact: Callable[[], Linearization],
        gradient_at: Callable[[Tensor], Tensor],
        theta: Tensor,
        *,
        checks: bool,
        at_once: Callable[[int], GradientsAt | None] = lambda points: None,
    ) -> Linearization:
        """The gradient and products at theta (P,), made in the way that is taken.

        Args:
            loss: whose products they are.
            exact: builds that with exact products.
            gradient_at, checks, at_once: as for `GradientDifferences`.
        """

        def differences() -> GradientDifferences:
            return GradientDifferences(
                gradient_at, theta, self.steps, checks=checks, at_once=at_once
            )

        if not self.is_exact:
            self._warn_of_kinks(loss)
            return differences()
        if self.given == "exact":
            return exact()
        try:
            at = exact()
        except Exception as error:
            self.fall_back(loss, error)
            return differences()
        return _UnlessImpossible(self, loss, at, differences)

    def unless_once(self, loss: Tried, compute: Callable[[], Result]) -> Result:
        """A value or gradient; with differences where the loss can be differentiated once only."""
        try:
            return compute()
        except DifferentiableOnce as error:
            self.fall_back(loss, error)
        return compute()

    def fall_back(self, loss: Tried, error: Exception) -> None:
        """Take differences from now on, where that helps.

        Raises:
            Exception: the error itself, where it does not.
            InvalidInput: where the loss has kinks.
        """
        if self.given != "auto" or not (isinstance(error, DifferentiableOnce) or is_foreign(error)):
            raise error
        self.taken = "difference"
        try:
            if not loss.has_gradient():
                raise error
            kink = loss.first_kink()
            if kink:
                raise InvalidInput(
                    f"{error}; differences of gradients, which need none, are no way either:"
                    f' {kink} has a kink (product="difference" takes them all the same)'
                ) from error
        except BaseException:
            self.taken = "auto"
            raise
        # Without what would help.
        self.reason = str(error).partition("; ")[0]

    def _warn_of_kinks(self, loss: Tried) -> None:
        if self._looked or self.given != "difference":
            return
        self._looked = True
        if kink := loss.first_kink():
            warnings.warn(
                f"{kink} has a kink: a difference of gradients across it is a product with another"
                ' Hessian, smoothed over the step; product="exact" is right',
                KinkedDifferences,
                stacklevel=level_of_caller(),
            )

    def state_dict(self) -> dict[str, Any]:
        """Where differences are taken: that, why, and their steps; else nothing."""
        if self.is_exact:
            return {}
        return {"product": self.taken, "reason": self.reason, "steps": self.steps.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, among other things.

        Raises:
            InvalidInput: differences were taken, and exact products are asked for.
        """
        if "product" not in state:
            return
        if self.given == "exact":
            hint = 'it continues with product="auto" or "difference"'
            raise invalid("product", "exact", "'difference', as in what is restored", hint)
        self.taken, self.reason = state["product"], state["reason"]
        self.steps.load_state_dict(state["steps"])

    def __str__(self) -> str:
        """What a `repr` says of it: nothing of exact products."""
        if self.is_exact:
            return ""
        return f", product='difference'{f' ({self.reason})' if self.reason else ''}"


class _UnlessImpossible:
    """Exact products while they work; the first one that can't be made is made of differences."""

    def __init__(
        self,
        choice: ProductChoice,
        loss: Tried,
        exact: Linearization,
        differences: Callable[[], GradientDifferences],
    ) -> None:
        self._choice = choice
        self._loss = loss
        self._at: Linearization = exact
        self._differences = differences

    def gradient(self) -> Tensor:
        return self._by(lambda: self._at.gradient())

    def multiply(self, rows: Tensor) -> Tensor:
        result = self._by(lambda: self._at.multiply(rows))
        if self._choice.taken == "auto":
            self._choice.taken = "exact"
        return result

    def multiply_with_error(
        self, rows: Tensor, *, measured: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `GradientDifferences`; None for the error of exact products."""
        images = None if isinstance(self._at, GradientDifferences) else self.multiply(rows)
        if isinstance(self._at, GradientDifferences):
            return self._at.multiply_with_error(rows, measured=measured)
        assert images is not None
        return images, None

    def _by(self, compute: Callable[[], Result]) -> Result:
        if isinstance(self._at, GradientDifferences):
            return compute()
        try:
            return compute()
        except Exception as error:
            self._choice.fall_back(self._loss, error)
        self._at = self._differences()
        return compute()
