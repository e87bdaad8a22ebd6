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
    >>> from thalweg.loss.objective import Objective
    >>> data = (torch.randn(8, 3).double(), torch.randn(8, 1).double())
    >>> objective = Objective(torch.nn.Linear(3, 1).double(), torch.nn.MSELoss(), data)
    >>> batches = [torch.arange(4), torch.arange(4, 8)] * 10
    >>> run = TrainingRun(objective, batches, learning_rate=0.05, momentum=0.9)
    >>> training_jacobian(run).columns.shape
    torch.Size([4, 4])
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.contrib.training_jacobian.training_run import TrainingRun
from thalweg.errors import Diverged, invalid
from thalweg.linalg import all_finite
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.operators.product_check import check_once
from thalweg.spectrum.subspace import random_subspace

CHUNK_ON_CPU, CHUNK_ELSEWHERE = 256, 8192
"""Directions pushed through the run at once."""


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
    run: TrainingRun,
    *,
    directions: Tensor | int | None = None,
    seed: int = 0,
    chunk_size: int | None = None,
) -> TrainingJacobian:
    """J = d theta_T / d theta_0 of a training run, or J times some directions.

    The run is that of `torch.optim.SGD` with the same settings.

    Args:
        run: loss, batches and settings.
        directions: what J multiplies, (P, b); or how many random orthonormal ones; None for all P
            unit vectors, which gives J itself.
        seed: of the random directions.
        chunk_size: directions pushed at once; bounds memory, changes only the rounding. Each chunk
            repeats the run. None for 256 on a CPU, whose caches hold no more, and 8,192 on another
            device, which needs many to be busy. An MLP 64-64-10 on batches of 64 takes 0.6 MB a
            direction in float64.

    Raises:
        InvalidInput: a direction of another length than P, a chunk size below 1, a number of
            directions out of range, indices that name no samples.
        Diverged: the run, or the block of tangents, became NaN or infinite.
    """
    if chunk_size is None:
        chunk_size = CHUNK_ON_CPU if run.objective.device.type == "cpu" else CHUNK_ELSEWHERE
    if chunk_size < 1:
        raise invalid("chunk_size", chunk_size, "an integer >= 1, or None")
    check_once(Hessian(run.objective))
    block = _directions(run.objective, directions, seed)
    # One run in lockstep is the fastest way to multiply many vectors by one batch's Hessian.
    one = LockstepObjective(run.objective)
    # A copy: what is measured with so many vectors does not hold for the objective's own blocks.
    one.multiplier = copy.copy(run.objective.multiplier)
    pushed = [_push(run, one, chunk) for chunk in block.split(chunk_size, dim=1)]
    columns, end = [tangents for _, tangents in pushed], pushed[-1][0]
    kept = None if directions is None else block
    return TrainingJacobian(torch.cat(columns, dim=1), kept, run.theta_0, end)


def _push(run: TrainingRun, one: LockstepObjective, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """theta_T (P,), and J times the columns (P, b) of a chunk."""
    # Rows: the rule is the same for them, and products are rows.
    point, tangent = run.rule(run.theta_0[None]), run.rule(chunk.T.contiguous())
    sound = torch.ones((), dtype=torch.bool, device=chunk.device)
    for step, batch in enumerate(run.batches):
        losses, gradients = one.values_and_gradients(point.value, batch)
        products = one.hessian_products(point.value, tangent.value[None], batch)[0]
        # Noted but not looked at, which would wait for the device at every step.
        sound &= losses.isfinite().all() & gradients.isfinite().all()
        tangent.step(products, run.rate(step))
        point.step(gradients, run.rate(step))
    if not (bool(sound) and all_finite(tangent.value)):
        raise Diverged("the run, or the block of tangents, became NaN or infinite")
    return point.value[0], tangent.value.T


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
