"""Where does a run of SGD end, from other initial parameters or confined to a subspace?

Heavy ball as in `torch.optim.SGD`, on given mini-batches, of parameters as one flat vector:

    v <- beta v + (1 - d) (g + w theta),   theta <- theta - lr Q v,   from v = 0

(the first v undamped), Q the identity, or the projector on a subspace: the run then stays in
theta_0 + span(Q), and is the same as training coordinates of that subspace.

Source: restricted training as in Belrose, Scherlis 2024 (arXiv 2412.07003).

Example:
    >>> import torch
    >>> from thalweg.curvature import Objective, random_subspace
    >>> data = (torch.randn(8, 3), torch.randn(8, 1))
    >>> objective = Objective(torch.nn.Linear(3, 1), torch.nn.MSELoss(), data)
    >>> plane = random_subspace(objective.num_parameters, 2, seed=0)
    >>> end = trained_parameters(objective, [None] * 10, 0.1, within=plane.project)
    >>> bool(plane.reject(end - objective.theta()).norm() < 1e-6)
    True
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from thalweg.curvature.objective import Objective
from thalweg.errors import invalid


def trained_parameters(
    objective: Objective,
    batches: Sequence[Tensor | None],
    learning_rate: float | Callable[[int], float],
    *,
    theta: Tensor | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    within: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """theta_T of a training run, (P,), in the dtype of the objective. The model stays as it is.

    Args:
        objective: the loss; its samples are all that the batches draw from.
        batches: the samples of each step, int64 (n,); None for all. As many as there are steps.
        learning_rate: a number, or `learning_rate(step)` with steps from 0.
        theta: theta_0, (P,); None for the model's parameters.
        momentum, dampening, weight_decay: as in `torch.optim.SGD`.
        within: a linear projector (P,) -> (P,) on the directions that may change, such as
            `subspace.project`, or `subspace.reject` for its complement; None for all.

    Raises:
        InvalidInput: no batch, indices that name no samples.
        Diverged: the loss or its gradient became NaN or infinite.

    Example: see the module.
    """
    refuse_no_batch(batches)
    rate = as_schedule(learning_rate)
    start = objective.theta() if theta is None else theta
    point = HeavyBall(start, momentum, dampening, weight_decay)
    for step, batch in enumerate(batches):
        point.step(objective.gradient(point.value, batch), rate(step), within)
    return point.value


class HeavyBall:
    """The rule of `torch.optim.SGD`, for a point (P,) or for a block of tangents (P, b).

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


def as_schedule(learning_rate: float | Callable[[int], float]) -> Callable[[int], float]:
    """The learning rate of each step, from one number or from a function."""
    return learning_rate if callable(learning_rate) else lambda step: learning_rate


def refuse_no_batch(batches: Sequence[Tensor | None]) -> None:
    """A run of no step is a mistake. Raises InvalidInput."""
    if not batches:
        raise invalid("batches", "none", "a batch for each step, one at least")
