"""Critical sharpness: how large may the learning rate be before the next step raises the loss?

Along the update that an optimizer proposes, theta + eta d with d the update over its learning rate,
the critical learning rate eta_c is the smallest eta at which the loss is larger than now, and

    lambda_c = 2 / eta_c

is its critical sharpness: a few forward passes, no product with the Hessian. For gradient descent
on a quadratic it is the curvature along the gradient; in training it follows the sharpness. Below
2 / lr the step lowers the loss.

The search knows more than halving and doubling: the change of the loss over eta is a straight line
on a quadratic, from the slope <g, d> at 0 through 0 at eta_c.

Source: Kalra et al. 2026 (arXiv 2601.16979), for the quantity and the search by forward passes; the
interpolation is ours.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> torch.nn.init.ones_(model.weight) is model.weight
    True
    >>> data, loss = (torch.tensor([[2.0, 0.0]]), torch.zeros(1, 1)), torch.nn.MSELoss()
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    >>> loss(model(data[0]), data[1]).backward()
    >>> found = critical_sharpness(Objective(model, loss, data), optimizer)
    >>> round(found.value, 3), round(found.learning_rate, 3)  # H = diag(8, 0)
    (8.0, 0.25)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from thalweg.errors import Diverged, invalid
from thalweg.linalg import all_finite, dots, norm
from thalweg.loss.protocol import Loss, value_of
from thalweg.measure.probes import Value, probe
from thalweg.measure.step_state import StepState
from thalweg.optim.virtual_step import largest_learning_rate, proposed_update

# What is further off than so many times the update is no learning rate.
FARTHEST = 2.0**30
MOST_EVALUATIONS = 60
# The most that a step of the search goes by the straight line: the loss is no quadratic.
FARTHEST_JUMP = 8.0
# Rounding of a mean loss, in units of the last place of its largest term.
ROUNDING = 4.0


@dataclass(frozen=True)
class CriticalSharpness:
    """A critical sharpness, or why there is none.

    Attributes:
        value: lambda_c = 2 / eta_c, in units of the Hessian; 0 where the loss falls as far as was
            looked, NaN where it falls nowhere.
        learning_rate: eta_c; infinite or NaN likewise.
        error: of `value`: eta_c lies between two learning rates that were tried, and rounding of
            the loss moves either.
        evaluations: forward passes over all samples, that at theta included unless it was given.
        reason: why the value is 0 or NaN; "" where it is neither.
    """

    value: float
    learning_rate: float
    error: float
    evaluations: int
    reason: str = ""


def critical_sharpness(
    objective: Loss, optimizer: Optimizer, *, tolerance: float = 0.05
) -> CriticalSharpness:
    """The critical sharpness of the step that an optimizer would make now.

    The update is that of a copy of the optimizer, by the gradients that the parameters hold, or by
    that of the objective where they hold none; parameters and optimizer stay as they are. It takes
    the memory of that copy: parameters, gradients, state.

    Args:
        objective: the loss; its parameters are the optimizer's.
        optimizer: any of torch, momentum, preconditioning and weight decay included.
        tolerance: relative width of the bracket that eta_c is found in.

    Raises:
        InvalidInput: a tolerance outside (0, 1); an optimizer that cannot be copied, that needs a
            closure, or has no positive learning rate.
        Diverged: the loss at theta is NaN or infinite.

    Example: see the module.
    """
    update = proposed_update(optimizer, objective)
    rate = largest_learning_rate(optimizer, objective.parameters())
    return critical_sharpness_along(objective, update, rate, tolerance=tolerance)


def critical_sharpness_along(
    objective: Loss,
    update: Tensor,
    learning_rate: float,
    *,
    theta: Tensor | None = None,
    loss: float | None = None,
    slope: float | None = None,
    tolerance: float = 0.05,
) -> CriticalSharpness:
    """The critical sharpness along an update (P,) that was made with some learning rate.

    Args:
        objective: the loss, which may be another than the one trained.
        update: theta_{t+1} - theta_t.
        learning_rate: that it was made with, > 0.
        theta: theta_t, (P,); None for the parameters as they are now.
        loss: at theta_t, where it is known.
        slope: <g, update>, where it is known, with g the gradient at theta_t: the search is then
            shorter, and it is known at once where the update is no descent direction.
        tolerance: relative width of the bracket that eta_c is found in.

    Raises:
        InvalidInput: a tolerance outside (0, 1), a learning rate that is not positive and finite.
        Diverged: the loss at theta is NaN or infinite.

    Example:
        >>> from thalweg.loss.function_loss import FunctionLoss
        >>> theta = torch.tensor([1.0, 1.0])
        >>> loss = FunctionLoss(lambda t: t[0] ** 2 + 2 * t[1] ** 2, theta)  # H = diag(2, 4)
        >>> along = torch.tensor([0.0, -0.04])  # gradient descent in the second direction
        >>> round(critical_sharpness_along(loss, along, 0.01, theta=theta).value, 2)
        4.0
    """
    if not 0 < tolerance < 1:
        raise invalid("tolerance", tolerance, "a number between 0 and 1")
    if not 0 < learning_rate < math.inf:
        raise invalid("learning_rate", learning_rate, "a finite number > 0")
    theta = objective.theta() if theta is None else theta
    line = _Line(objective, theta, update, loss)
    if not all_finite(update) or not float(norm(update)) > 0:
        return line.nowhere("the update is zero, NaN or infinite")
    if slope is not None and not slope < 0:
        return line.nowhere("the update is no descent direction of this loss")
    return _Search(line, slope, tolerance).found(learning_rate)


class _Line:
    """The change of a loss along an update, at factors of it."""

    def __init__(self, objective: Loss, theta: Tensor, update: Tensor, loss: float | None) -> None:
        self.objective, self.theta, self.update = objective, theta, update
        self.evaluations = 0
        self.loss = self._loss_at(0.0) if loss is None else loss
        if not math.isfinite(self.loss):
            raise Diverged("the loss is NaN or infinite")
        self.rounding = ROUNDING * torch.finfo(objective.dtype).eps * abs(self.loss)

    def change(self, factor: float) -> float:
        """L(theta + factor update) - L(theta); infinite where the loss is no number."""
        return self._loss_at(factor) - self.loss

    def _loss_at(self, factor: float) -> float:
        self.evaluations += 1
        try:
            return float(value_of(self.objective, self.theta + factor * self.update))
        except Diverged:
            return math.inf

    def nowhere(self, reason: str) -> CriticalSharpness:
        """No value, for a reason."""
        return CriticalSharpness(math.nan, math.nan, math.nan, self.evaluations, reason)


class _Search:
    """Finds the factor of an update at which the loss is as large as at 0, between two others.

    `low` and `high` are factors at which the loss has fallen and risen, 0 and infinite at first;
    the quotient of the change by the factor is a straight line on a quadratic.
    """

    def __init__(self, line: _Line, slope: float | None, tolerance: float) -> None:
        self.line, self.tolerance = line, tolerance
        self.low, self.high = 0.0, math.inf
        self._at_low = math.nan if slope is None else slope
        self._at_high = math.nan
        # One more point on the line, by which to look ahead of `low` while nothing has risen.
        self._before: tuple[float, float] | None = None
        # The factor from which the loss differs by rounding alone, where nothing finer can be seen.
        self._resolved: float | None = None
        self._fall = 0.0

    def found(self, learning_rate: float) -> CriticalSharpness:
        """The critical sharpness of the update, made with this learning rate."""
        factor = 1.0
        while 1 / FARTHEST < factor < FARTHEST and self.line.evaluations < MOST_EVALUATIONS:
            self._try(factor)
            if self._is_narrow():
                break
            factor = self._next()
        if self.low == 0 or self._fall <= self.line.rounding:
            tried = min(self.high, factor) * learning_rate
            return self.line.nowhere(
                f"the loss does not fall, as far as its rounding lets see, down to a learning rate"
                f" of {tried:.1e}: no descent direction, or one that falls by less"
            )
        if math.isinf(self.high):
            farthest = self.low * learning_rate
            reason = f"the loss does not rise up to a learning rate of {farthest:.1e}"
            return CriticalSharpness(0.0, math.inf, 2 / farthest, self.line.evaluations, reason)
        return self._between(learning_rate)

    def _try(self, factor: float) -> None:
        change = self.line.change(factor)
        self._fall = max(self._fall, -change)
        if math.isfinite(self.high) and abs(change) <= self.line.rounding:
            self._resolved = factor
        # While nothing has risen, a change within rounding is no rise yet.
        elif change > (self.line.rounding if math.isinf(self.high) else 0.0):
            self.high, self._at_high = factor, change / factor
        else:
            self._before = (self.low, self._at_low)
            self.low, self._at_low = factor, change / factor

    def _is_narrow(self) -> bool:
        narrow = self.low > 0 and self.high <= (1 + self.tolerance) * self.low
        return narrow or self._resolved is not None

    def _next(self) -> float:
        low, high = self.low, self.high
        # Beyond the zero of the line by less than the tolerance: the next one is then before it,
        # and what is between them is narrow.
        beyond = self.tolerance / 3
        if math.isinf(high):
            ahead = _zero(self._before, (low, self._at_low)) * (1 + beyond)
            # Not at once: before it the loss may rise and fall again.
            return min(ahead, FARTHEST_JUMP * low) if ahead > low else 2 * low
        root = _zero((low, self._at_low), (high, self._at_high))
        if not low < root < high:
            return math.sqrt(low * high) if low > 0 else high / 2
        aimed = root * (1 + beyond if high - root > root - low else 1 - beyond)
        margin = (high - low) / 10
        return min(max(aimed, low + margin, high / FARTHEST_JUMP), high - margin)

    def _between(self, learning_rate: float) -> CriticalSharpness:
        low, high = self.low, self.high
        root = _zero((low, self._at_low), (high, self._at_high))
        if self._resolved is not None:
            root = self._resolved
        elif not low < root < high:
            root = math.sqrt(low * high)
        # A quadratic falls by a quarter of what its slope at the root says.
        secant = (high * self._at_high - low * self._at_low) / (high - low)
        steepness = min(secant, 4 * self._fall / root)
        blur = self.line.rounding / steepness
        nearest, farthest = (root, root) if self._resolved is not None else (low, high)
        value = 2 / (root * learning_rate)
        ends = (max(nearest - blur, 0.0), farthest + blur)
        error = max(abs(2 / (end * learning_rate) - value) if end else math.inf for end in ends)
        return CriticalSharpness(value, root * learning_rate, error, self.line.evaluations)


def _zero(first: tuple[float, float] | None, second: tuple[float, float]) -> float:
    """Where the straight line through two points is zero; NaN where it rises nowhere."""
    if first is None or not second[1] - first[1] > 0 or math.isinf(second[1]):
        return math.nan
    return second[0] - second[1] * (second[0] - first[0]) / (second[1] - first[1])


@probe(
    "critical_sharpness",
    ["critical_sharpness", "critical_sharpness_error", "critical_sharpness_passes"],
    needs_gradient=True,
    quick=True,
)
def critical_sharpness_of_state(state: StepState) -> Mapping[str, Value]:
    """2 / eta_c along the update that the optimizer proposed, its error and its forward passes.

    Compare with 2 / lr: below it the step lowers the full loss. 0 where the loss falls as far as
    was looked; NaN where the update is no descent direction of the full loss, as it may be for a
    mini-batch's or with momentum, and where the learning rate is 0, as at the start of a warm-up.

    Source: Kalra et al. 2026 (arXiv 2601.16979).
    """
    if state.proposed is None:
        return {}
    if 0 < state.learning_rate < math.inf:
        found = critical_sharpness_along(
            state.objective,
            state.proposed,
            state.learning_rate,
            theta=state.theta,
            loss=state.loss,
            slope=float(dots(state.gradient, state.proposed, dim=-1)),
        )
    else:
        rate = state.learning_rate
        reason = "the optimizer tells no learning rate" if math.isnan(rate) else f"at lr = {rate:g}"
        found = CriticalSharpness(math.nan, math.nan, math.nan, 0, reason)
    if found.reason:
        state.notes.append(f"critical sharpness: {found.reason}")
    return {
        "critical_sharpness": found.value,
        "critical_sharpness_error": found.error,
        "critical_sharpness_passes": found.evaluations,
    }
