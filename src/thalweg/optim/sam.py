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
    >>> loss_at_the_perturbed_point = optimizer.step(closure)
    >>> bool(loss_at_the_perturbed_point < closure())
    False
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.errors import InvalidInput, invalid
from thalweg.optim.copying import undone_on_failure
from thalweg.optim.scaled_closure import evaluate
from thalweg.optim.wrapper import Wrapper
from thalweg.tracking.wrapping import needs_closure, require_optimizer


class SAM(Wrapper):
    """Wraps an optimizer; each step uses the gradient at the perturbed point.

    Either `step(closure)` alone, as for every optimizer of torch with a closure, which is then
    called twice: at theta and at theta + e. Or `loss.backward()` at theta first, then
    `step(closure)`, where it is called once; gradients that the last step left behind do not count
    as such. Or by hand: `backward`, `first_step`, `backward`, `second_step`. Norms are over all
    parameters that have a gradient, whatever their group. Weight decay belongs to the wrapped
    optimizer: it acts at theta and has no part in the perturbation. Where a group maximizes, e
    points the other way.

    Under a `GradScaler` the closure may scale its loss or not: `scaler.step(optimizer, closure)`
    after a scaled `backward` at theta, or `step(closure)`. A step whose scaled gradients are
    infinite is left out, and the scaler told. Closures that scale by hand are not seen.

    A step that fails, in a closure or in the wrapped optimizer, leaves parameters and state as they
    were, to the last bit.

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
        require_optimizer("base_optimizer", base_optimizer)
        if needs_closure(base_optimizer):
            name = type(base_optimizer).__name__
            raise invalid("base_optimizer", name, "an optimizer whose step needs no closure")
        super().__init__(base_optimizer)
        self.base_optimizer = base_optimizer
        self.rho = rho
        self.adaptive = adaptive
        self.eps = eps
        self._before: list[tuple[Tensor, Tensor]] = []
        self._left = LeftGradients()

    @property
    def needs_closure(self) -> bool:
        """True."""
        return True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one step.

        Args:
            closure: clears the gradients, computes the loss and calls `backward`; called at theta,
                unless there are gradients that no step has used yet, and at the perturbed point.

        Returns:
            What `closure` returned at the perturbed point.

        Raises:
            InvalidInput: no closure, or one that leaves no gradient.
        """
        if closure is None:
            raise InvalidInput(
                "SAM.step: no closure; call loss.backward(), then step(closure), or step(closure)"
                " alone, with a function that clears the gradients, computes the loss and calls"
                " backward"
            )
        self._require_not_perturbed()
        try:
            return self._step(closure, self._parameters())
        finally:
            self._left.note(self._parameters())

    def _step(self, closure: Callable[[], Any], parameters: list[Tensor]) -> Any:
        if self._left.are_all_there_is(parameters):
            loss, finite = evaluate(closure, parameters)
            if not finite:
                return loss
            if all(p.grad is None for p in parameters) and any(p.requires_grad for p in parameters):
                raise InvalidInput(
                    "SAM.step: the closure left no gradient; it must compute the loss and call"
                    " backward"
                )
        self._perturb()
        try:
            loss, finite = evaluate(closure, parameters)
        finally:
            self._go_back()
        if finite:
            with undone_on_failure(self.base_optimizer):
                self.base_optimizer.step()
        return loss

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Move from theta to theta + e; `zero_grad` clears the gradients after that.

        With `second_step` it is one step, also to hooks and schedulers.

        Raises:
            InvalidInput: the parameters are at a perturbed point already; there is no gradient, or
                that of the last step.
        """
        self._require_not_perturbed()
        if self._left.are_all_there_is(self._parameters(), sure=True):
            raise InvalidInput(
                "SAM.first_step: there is no gradient that the last step has not used; call"
                " loss.backward() first"
            )
        for hook in self._optimizer_step_pre_hooks.values():
            hook(self, (self,), {})
        self._perturb()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Go back to theta, bit for bit, and step from there with the gradients as they are now.

        `zero_grad` clears the gradients after that.
        """
        # Schedulers ask whether a step was made, of the method that they have wrapped.
        self._opt_called = True
        self._go_back()
        with undone_on_failure(self.base_optimizer):
            self.base_optimizer.step()
        self._left.note(self._parameters())
        for hook in self._optimizer_step_post_hooks.values():
            hook(self, (self,), {})
        if zero_grad:
            self.zero_grad()

    def _perturb(self) -> None:
        moved = list(self._gradients())
        if not moved:
            return
        scale = self.rho / (self._norm([(p, g) for p, g, _ in moved]) + self.eps)
        self._before = [(p, p.clone()) for p, _, _ in moved]
        for p, gradient, maximize in moved:
            direction = p.square() * gradient if self.adaptive else gradient
            p.add_(direction * scale.to(p), alpha=-1 if maximize else 1)

    def _gradients(self) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Parameter, dense gradient, and whether its group maximizes."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    dense = p.grad if p.grad.layout == torch.strided else p.grad.to_dense()
                    yield p, dense, bool(group.get("maximize", False))

    def _norm(self, moved: list[tuple[Tensor, Tensor]]) -> Tensor:
        """norm(g), or norm(abs(theta) g), a scalar, from pairs of parameter and gradient."""
        device = moved[0][0].device
        scaled = [p.abs() * gradient if self.adaptive else gradient for p, gradient in moved]
        norms = [torch.linalg.vector_norm(part).to(device) for part in scaled]
        return torch.linalg.vector_norm(torch.stack(norms))

    def _require_not_perturbed(self) -> None:
        if self._before:
            raise InvalidInput("SAM: already perturbed by first_step; call second_step() first")

    def _go_back(self) -> None:
        for parameter, value in self._before:
            parameter.copy_(value)
        self._before = []


class LeftGradients:
    """Record of the gradients that a step has used and left in place: they are of no later batch.

    A gradient is known again as the same tensor, unchanged; as the same tensor changed in place it
    is the old one where the change is a factor, such as that of a scaler or of clipping, or zero.
    """

    def __init__(self) -> None:
        self._used: list[tuple[weakref.ref[Tensor], int]] = []
        self._sample: Tensor | None = None

    def note(self, parameters: list[Tensor]) -> None:
        """Remember the gradients that are there now."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._used = [(weakref.ref(g), g._version) for g in gradients]
        self._sample = _sample(gradients)

    def are_all_there_is(self, parameters: list[Tensor], *, sure: bool = False) -> bool:
        """Whether no parameter has a gradient that came later.

        Args:
            sure: False where a gradient was changed in place; otherwise that depends on whether it
                is a multiple of what it was.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        used = {id(g): version for held, version in self._used if (g := held()) is not None}
        if any(id(g) not in used for g in gradients):
            return False
        if all(used[id(g)] == g._version for g in gradients):
            return True
        if sure:
            return False
        now = _sample(gradients)
        if self._sample is None or now is None or now.shape != self._sample.shape:
            return False
        before = self._sample
        across = torch.outer(now, before) - torch.outer(before, now)
        return bool(across.abs().max() <= 1e-5 * now.norm() * before.norm())

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins without: copies of parameters have no gradient."""
        return {"_used": [], "_sample": None}


def _sample(gradients: list[Tensor]) -> Tensor | None:
    """A few entries of some gradients, to know them by after a change in place."""
    dense = [g.detach() for g in gradients if g.layout == torch.strided and g.numel()][:2]
    if not dense:
        return None
    rows = [g[(0,) * (g.dim() - 1)] if g.dim() else g.reshape(1) for g in dense]
    return torch.cat([row[:16].to(dense[0].device, torch.float32) for row in rows])
