"""Powers of the gradient, taken before any optimizer sees it.

phi(g) = sign(g) abs(g)^p, elementwise. The wrapped optimizer steps with phi(g) in the place of g,
its settings as they were: AdamPower is `GradPower(Adam(...))`, MuonPower `GradPower(Muon(...))`.

Source: Wang et al. 2025 (arXiv 2505.24275), equation of phi_p; p = 1.2 in the reported runs. The
common public code has (abs(g) + 1e-8)^p, after clipping by the global norm: that is `eps=1e-8`, and
differs from phi by the factor (1 + eps / abs(g))^p. Here eps is 0, as in the paper: for p > 0
nothing is divided, so nothing needs it.

Example:
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = GradPower(torch.optim.SGD([weight], lr=1.0), power=2.0)
    >>> weight.grad = torch.tensor([3.0, -0.5])
    >>> optimizer.step()
    >>> weight.tolist(), weight.grad.tolist()
    ([-9.0, 0.25], [3.0, -0.5])
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.errors import invalid
from thalweg.optim.copying import undone_on_failure
from thalweg.optim.wrapper import Wrapper
from thalweg.tracking.wrapping import needs_closure, require_optimizer


class GradPower(Wrapper):
    """Wraps an optimizer, which sees sign(g) (abs(g) + eps)^p in the place of each gradient g.

    Clip gradients before the step, weight decay belongs to the wrapped optimizer: neither is seen
    by the power. After the step `grad` holds the gradients as they were, so hooks and a second step
    see the same; in between a second copy of them is held. `SplitUpdate` and `SAM` go around it;
    around a `Combined`, or as one of its parts, it acts on all of what it wraps.

    Args:
        optimizer: any `torch.optim.Optimizer`, already built, that needs no closure itself.
        power: p > 0; 1 leaves the optimizer alone, bit for bit, whatever eps.
        eps: added to abs(g), >= 0.

    Attributes:
        wrapped, power, eps: the optimizer and the settings as given; `power` may be changed between
            steps. The name is not that of other wrappers on purpose: what is known of the wrapped
            optimizer, such as its stability threshold, does not hold with powers of its gradient.

    Raises:
        InvalidInput: power or eps out of range; an optimizer that needs a closure.
    """

    def __init__(self, optimizer: Optimizer, power: float = 1.2, eps: float = 0.0) -> None:
        if not (power > 0 and power < float("inf")):
            raise invalid("power", power, "a number > 0", "1 is the bare optimizer")
        if not (eps >= 0 and eps < float("inf")):
            raise invalid("eps", eps, "a number >= 0")
        require_optimizer("optimizer", optimizer)
        if needs_closure(optimizer):
            name = type(optimizer).__name__
            raise invalid(
                "optimizer",
                name,
                "an optimizer whose step needs no closure",
                "wrap SAM around GradPower instead" if name == "SAM" else "",
            )
        super().__init__(optimizer)
        self.wrapped = optimizer
        self.power = power
        self.eps = eps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step; returns the loss of `closure`, evaluated once before, if one is given.

        Raises:
            InvalidInput: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with undone_on_failure(self.wrapped):
            self._step()
        return loss

    def _step(self) -> None:
        if self.power == 1:
            self.wrapped.step()
            return
        own = [p for p in self._parameters() if p.grad is not None]
        before = [p.grad for p in own if p.grad is not None]
        try:
            for parameter, gradient in zip(own, self._powers(before), strict=True):
                parameter.grad = gradient
            self.wrapped.step()
        finally:
            for parameter, gradient in zip(own, before, strict=True):
                parameter.grad = gradient

    def _powers(self, gradients: list[Tensor]) -> list[Tensor]:
        """phi of each, all of a device and dtype in one call."""
        if not gradients:
            return []
        for gradient in gradients:
            if gradient.layout != torch.strided:
                raise invalid("gradient", str(gradient.layout), "dense gradients")
        # One kernel for many tensors on a GPU; the type stubs lack these functions.
        many: Any = torch
        sizes = many._foreach_abs(gradients)
        if self.eps:
            many._foreach_add_(sizes, self.eps)
        many._foreach_pow_(sizes, self.power)
        many._foreach_mul_(sizes, many._foreach_sign(gradients))
        return list(sizes)
