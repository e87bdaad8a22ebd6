"""A run of SGD as a function of its initial parameters, freely or within a subspace.

Heavy ball as in `torch.optim.SGD`, on given mini-batches, of parameters as one flat vector:

    v <- beta v + (1 - d) (g + w theta),   theta <- theta - lr Q v,   from v = 0

(the first v undamped), Q the identity, or the projector on a subspace: the run then stays in
theta_0 + span(Q), and is the same as training coordinates of that subspace.

Source: restricted training as in Belrose, Scherlis 2024 (arXiv 2412.07003).

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.spectrum.subspace import random_subspace
    >>> data = (torch.randn(8, 3), torch.randn(8, 1))
    >>> objective = Objective(torch.nn.Linear(3, 1), torch.nn.MSELoss(), data)
    >>> run = TrainingRun(objective, [None] * 10, learning_rate=0.1)
    >>> plane = random_subspace(objective.num_parameters, 2, seed=0)
    >>> end = trained_parameters(run, within=plane.project)
    >>> bool(plane.reject(end - run.theta_0).norm() < 1e-6)
    True
    >>> trained_parameters(run, torch.randn(5, 4)).shape  # five runs at once
    torch.Size([5, 4])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective


class TrainingRun:
    """A run of SGD as a function of theta_0: its loss, mini-batches and settings.

    Args:
        objective: the loss; its samples are all that the batches draw from.
        batches: the samples of each step, int64 (n,); None for all. As many as there are steps.
        learning_rate: a number, or `learning_rate(step)` with steps from 0.
        theta: theta_0, (P,); None for the model's parameters as they are now (copied).
        momentum, dampening, weight_decay: as in `torch.optim.SGD`.

    Attributes:
        theta_0: (P,).

    Raises:
        InvalidInput: no batch.

    Everything is in the dtype and on the device of the objective: for float64, give it a model and
    inputs in float64. The model stays as it is. Example: see the module.
    """

    def __init__(
        self,
        objective: Objective,
        batches: Sequence[Tensor | None],
        learning_rate: float | Callable[[int], float],
        *,
        theta: Tensor | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        if not batches:
            raise invalid("batches", "none", "a batch for each step, one at least")
        self.objective = objective
        self.batches = batches
        self.learning_rate = learning_rate
        self.theta_0 = objective.theta() if theta is None else theta
        self.momentum = momentum
        self.dampening = dampening
        self.weight_decay = weight_decay

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rate = self.learning_rate
        return rate(step) if callable(rate) else rate

    def rule(self, start: Tensor) -> HeavyBall:
        """The run's update rule, of a point (P,), points (R, P), or tangents (P, b)."""
        return HeavyBall(start, self.momentum, self.dampening, self.weight_decay)

    def __repr__(self) -> str:
        return f"TrainingRun({self.objective}, steps={len(self.batches)})"


def trained_parameters(
    run: TrainingRun,
    theta: Tensor | None = None,
    *,
    within: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """theta_T of a training run, (P,); or of R runs in one batched computation, (R, P).

    Args:
        run: loss, batches and settings.
        theta: another theta_0, (P,), or (R, P) for R runs that differ in it alone; None for that
            of `run`.
        within: a linear projector on the directions that may change, such as `subspace.project`, or
            `subspace.reject` for its complement; None for all. It maps (P,) to (P,), or (R, P) to
            (R, P), where each row may have a projector of its own.

    Raises:
        InvalidInput: indices that name no samples, theta of another length than P.
        Diverged: of a single run: the loss or its gradient became NaN or infinite. Of R runs,
            those that did end in NaN.

    Example: see the module.
    """
    start = run.theta_0 if theta is None else theta
    if start.dim() not in (1, 2):
        raise invalid("theta", tuple(start.shape), "(P,), or (R, P) for R runs")
    if start.dim() == 2:
        return _in_lockstep(run, start, within)
    point = run.rule(start)
    for step, batch in enumerate(run.batches):
        point.step(run.objective.gradient(point.value, batch), run.rate(step), within)
    return point.value


def _in_lockstep(
    run: TrainingRun, starts: Tensor, within: Callable[[Tensor], Tensor] | None
) -> Tensor:
    runs, points = LockstepObjective(run.objective), run.rule(starts)
    sound = torch.ones(len(starts), dtype=torch.bool, device=starts.device)
    for step, batch in enumerate(run.batches):
        losses, gradients = runs.values_and_gradients(points.value, batch)
        # Noted but not looked at, which would wait for the device at every step.
        sound &= losses.isfinite() & gradients.isfinite().all(dim=1)
        points.step(gradients, run.rate(step), within)
    return points.value.masked_fill(~sound[:, None], float("nan"))


class HeavyBall:
    """The rule of `torch.optim.SGD`, for points (P,) or (R, P), or for a block of tangents (P, b).

    Attributes:
        value: the point, or the block, after the last step.
    """

    def __init__(
        self, start: Tensor, momentum: float, dampening: float, weight_decay: float
    ) -> None:
        self.value = start
        self.momentum = momentum
        self.dampening = dampening
        self.weight_decay = weight_decay
        self._velocity: Tensor | None = None

    def step(
        self, gradient: Tensor, rate: float, within: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Move by one step; for tangents, `gradient` is the Hessian times them."""
        if self.weight_decay:
            gradient = gradient.add(self.value, alpha=self.weight_decay)
        if self.momentum:
            if self._velocity is None:
                self._velocity = gradient.clone()
            else:
                self._velocity.mul_(self.momentum).add_(gradient, alpha=1 - self.dampening)
            gradient = self._velocity
        if within is not None:
            gradient = within(gradient)
        self.value = self.value.sub(gradient, alpha=rate)
