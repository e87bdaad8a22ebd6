"""Sharpness-aware minimization around any optimizer.

The gradient g at theta gives the perturbation e = rho g / norm(g), the worst one of length rho to
first order; the wrapped optimizer steps from theta with the gradient at theta + e. The adaptive
variant has e = rho T^2 g / norm(T g) with T = abs(theta), elementwise: larger parameters move more.

Source: Foret et al. 2021 (arXiv 2010.01412), equation 2; adaptive: Kwon et al. 2021 (2102.11600),
here as in the common public code, without the small constant that the paper adds to T.

Example:
    >>> import torch
    >>> inputs, targets = torch.randn(64, 3), torch.randn(64, 2)
    >>> model, loss_function = torch.nn.Linear(3, 2), torch.nn.MSELoss()
    >>> optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05)
    >>> def closure():
    ...     optimizer.zero_grad()
    ...     loss = loss_function(model(inputs), targets)
    ...     loss.backward()
    ...     return loss
    >>> loss = closure()
    >>> loss_at_the_perturbed_point = optimizer.step(closure)
    >>> bool(loss_at_the_perturbed_point > loss)
    True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.errors import InvalidInput, invalid
from thalweg.optim.wrapper import Wrapper
from thalweg.tracking.wrapping import needs_closure


class SAM(Wrapper):
    """Wraps an optimizer; each step uses the gradient at the perturbed point.

    The loss is evaluated twice a step: `loss.backward()` at theta, then `step(closure)`. Norms are
    over all parameters that have a gradient, whatever their group. Weight decay belongs to the
    wrapped optimizer: it acts at theta and has no part in the perturbation.

    Args:
        base_optimizer: any `torch.optim.Optimizer`, already built, that needs no closure itself.
        rho: length of the perturbation, >= 0.
        adaptive: scale the perturbation by the size of each parameter.
        eps: added to the norm that is divided by, > 0: a zero gradient gives no perturbation.

    Attributes:
        base_optimizer, rho, adaptive, eps: as given; `rho` may be changed between steps.
        needs_closure: True.

    Raises:
        InvalidInput: rho or eps out of range; a base optimizer that needs a closure.
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        eps: float = 1e-12,
    ) -> None:
        if not rho >= 0:
            raise invalid("rho", rho, "a number >= 0")
        if not eps > 0:
            raise invalid("eps", eps, "a number > 0")
        if needs_closure(base_optimizer):
            name = type(base_optimizer).__name__
            raise invalid("base_optimizer", name, "an optimizer whose step needs no closure")
        self.base_optimizer = base_optimizer
        self.rho = rho
        self.adaptive = adaptive
        self.eps = eps
        super().__init__(base_optimizer)
        self._before: list[tuple[Tensor, Tensor]] = []

    @property
    def needs_closure(self) -> bool:
        """True."""
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step from the gradients at theta.

        Args:
            closure: clears the gradients, computes the loss and calls `backward`; called once, at
                the perturbed point.

        Returns:
            What `closure` returned: the loss at the perturbed point.

        Raises:
            InvalidInput: no closure.
        """
        if closure is None:
            raise InvalidInput(
                "SAM.step: no closure; call loss.backward(), then step(closure) with a function"
                " that clears the gradients, computes the loss and calls backward again"
            )
        self.first_step()
        try:
            with torch.enable_grad():
                loss = closure()
        except BaseException:
            self._go_back()
            raise
        self.second_step()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move from theta to theta + e; `zero_grad` clears the gradients after that.

        Raises:
            InvalidInput: the parameters are at a perturbed point already.
        """
        if self._before:
            raise InvalidInput("SAM.first_step: already perturbed; call second_step() first")
        own = [p for group in self.param_groups for p in group["params"]]
        moved = [(p, p.grad) for p in own if p.grad is not None]
        if moved:
            scale = self.rho / (self._norm(moved) + self.eps)
            self._before = [(p, p.clone()) for p, _ in moved]
            for p, gradient in moved:
                direction = p.square() * gradient if self.adaptive else gradient
                p.add_(direction * scale.to(p))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Go back to theta, bit for bit, and step from there with the gradients as they are now.

        `zero_grad` clears the gradients after that.
        """
        self._go_back()
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    def _norm(self, moved: list[tuple[Tensor, Tensor]]) -> Tensor:
        """norm(g), or norm(abs(theta) g), a scalar, from pairs of parameter and gradient."""
        device = moved[0][0].device
        scaled = [p.abs() * gradient if self.adaptive else gradient for p, gradient in moved]
        norms = [torch.linalg.vector_norm(part).to(device) for part in scaled]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _go_back(self) -> None:
        for parameter, value in self._before:
            parameter.copy_(value)
        self._before = []
