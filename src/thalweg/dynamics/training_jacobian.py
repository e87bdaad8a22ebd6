"""The derivative of trained parameters with respect to the initial ones, through the whole run.

J = d theta_T / d theta_0 of T steps of SGD with heavy-ball momentum on given mini-batches. The
update is linear in parameters, gradient and velocity, so a block of tangents (P, b) goes through
the same rule with H_t tangents in place of the gradient, H_t the mini-batch Hessian at theta_t:

    V <- beta V + (1 - d) (H_t T + w T),   T <- T - lr_t V,   from T = directions, V = 0

(the first V undamped, as torch does it). That is forward mode: exact up to rounding, and memory
does not grow with the number of steps. `singular_spectrum.py` reads the result.

Cost: b products with a mini-batch Hessian a step. All of J for an MLP of P = 4,810 over 625
batches of 64: 0.2 ms a direction and step measured in float64 on one core, which makes 10 minutes;
half of that in float32.

Source: Belrose, Scherlis 2024, "Understanding gradient descent through the training Jacobian"
(arXiv 2412.07003).

Example:
    >>> import torch
    >>> from thalweg.curvature import Objective
    >>> data = (torch.randn(8, 3).double(), torch.randn(8, 1).double())
    >>> objective = Objective(torch.nn.Linear(3, 1).double(), torch.nn.MSELoss(), data)
    >>> batches = [torch.arange(4), torch.arange(4, 8)] * 10
    >>> run = training_jacobian(objective, batches, learning_rate=0.05, momentum=0.9)
    >>> run.columns.shape
    torch.Size([4, 4])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.curvature.objective import Objective
from thalweg.curvature.operators import Hessian
from thalweg.curvature.subspace import random_subspace
from thalweg.dynamics.training_run import HeavyBall, as_schedule, refuse_no_batch
from thalweg.errors import invalid


@dataclass(frozen=True)
class TrainingJacobian:
    """J times some directions, with both ends of the run.

    Attributes:
        columns: J @ directions, (P, b); J itself, (P, P), where `directions` is None.
        directions: (P, b); None for the unit vectors of all parameters.
        theta_0, theta_T: the parameters before and after the run, (P,).

    J has no unit. Example: see the module.
    """

    columns: Tensor
    directions: Tensor | None
    theta_0: Tensor
    theta_T: Tensor  # noqa: N815

    def __repr__(self) -> str:
        parameters, directions = self.columns.shape
        return f"TrainingJacobian(P={parameters}, directions={directions})"


def training_jacobian(
    objective: Objective,
    batches: Sequence[Tensor | None],
    learning_rate: float | Callable[[int], float],
    *,
    theta: Tensor | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    directions: Tensor | int | None = None,
    seed: int = 0,
    chunk_size: int = 256,
) -> TrainingJacobian:
    """J = d theta_T / d theta_0 of a training run, or J times some directions.

    The run is that of `torch.optim.SGD` with the same settings. Everything is in the dtype of the
    objective: for float64, give it a model and inputs in float64. The model stays as it is.

    Args:
        objective: the loss; its samples are all that the batches draw from.
        batches: the samples of each step, int64 (n,); None for all. As many as there are steps.
        learning_rate: a number, or `learning_rate(step)` with steps from 0.
        theta: theta_0, (P,); None for the model's parameters.
        momentum, dampening, weight_decay: as in `torch.optim.SGD`.
        directions: what J multiplies, (P, b); or how many random orthonormal ones; None for all P
            unit vectors, which gives J itself.
        seed: of the random directions.
        chunk_size: directions pushed at once; bounds memory, changes only the rounding. Each chunk
            repeats the run, whose gradients come with the products.

    Raises:
        InvalidInput: no batch, a direction of another length than P, a chunk size below 1, a
            number of directions out of range, indices that name no samples.
        Diverged: the run, or the block of tangents, became NaN or infinite.
    """
    start = objective.theta() if theta is None else theta
    refuse_no_batch(batches)
    if chunk_size < 1:
        raise invalid("chunk_size", chunk_size, "an integer >= 1")
    block = _directions(objective, directions, seed)
    rate = as_schedule(learning_rate)
    columns, end = [], start
    for chunk in block.split(chunk_size, dim=1):
        point = HeavyBall(start, momentum, dampening, weight_decay)
        tangent = HeavyBall(chunk, momentum, dampening, weight_decay)
        for step, batch in enumerate(batches):
            hessian = Hessian(objective, point.value, batch)
            tangent.step(hessian @ tangent.value, rate(step))
            assert hessian.gradient is not None, "known after the first product"
            point.step(hessian.gradient, rate(step))
        columns.append(tangent.value)
        end = point.value
    kept = None if directions is None else block
    return TrainingJacobian(torch.cat(columns, dim=1), kept, start, end)


def _directions(objective: Objective, given: Tensor | int | None, seed: int) -> Tensor:
    """The block (P, b) that J multiplies, in the dtype and on the device of the objective."""
    size, dtype, device = objective.num_parameters, objective.dtype, objective.device
    if given is None:
        return torch.eye(size, dtype=dtype, device=device)
    if isinstance(given, int):
        return random_subspace(size, given, seed, dtype=dtype).basis.to(device)
    if given.dim() != 2 or given.shape[0] != size or given.shape[1] < 1:
        raise invalid("directions", tuple(given.shape), f"a shape (P, b) with P = {size}, b >= 1")
    return given.to(device=device, dtype=dtype)
