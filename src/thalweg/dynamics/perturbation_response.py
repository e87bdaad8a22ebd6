"""How far is training linear in the initial parameters?

theta_0 is moved by s v, the same run made again, and the response compared with what the training
Jacobian says of it:

    delta(s) = theta_T(theta_0 + s v) - theta_T(theta_0)   against   s J v

`along` is the part of delta(s) along J v, `beside` the norm of the rest, `predicted` norm(s J v).
Along a singular vector v_i these are <u_i, delta>, what does not go along u_i, and sigma_i s.

On a quadratic loss training is affine and the prediction exact at every size. Rounding of the end
points leaves an error of about eps norm(theta_T) / (s norm(J v)) at small s.

Source: Belrose, Scherlis 2024 (arXiv 2412.07003), with sizes from 1e-3 to 1e3.

Example:
    >>> import torch
    >>> from thalweg.curvature import Objective
    >>> from thalweg.dynamics.training_jacobian import training_jacobian
    >>> data = (torch.randn(8, 3).double(), torch.randn(8, 1).double())
    >>> objective = Objective(torch.nn.Linear(3, 1).double(), torch.nn.MSELoss(), data)
    >>> batches = [None] * 10
    >>> run = training_jacobian(objective, batches, 0.05)
    >>> first = torch.eye(4, 1).double()
    >>> found = perturbation_responses(objective, batches, 0.05, run, first, [1e-2, 1e2])
    >>> found.error.shape, bool(found.error.max() < 1e-9)  # least squares: a quadratic
    (torch.Size([1, 2]), True)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.curvature.objective import Objective
from thalweg.dynamics.training_jacobian import TrainingJacobian
from thalweg.dynamics.training_run import trained_parameters
from thalweg.errors import Diverged, invalid

SIZES = tuple(10 ** (exponent / 2) for exponent in range(-6, 7))
"""1e-3 to 1e3, two a decade."""


@dataclass(frozen=True)
class PerturbationResponses:
    """Responses of a training run to b perturbations of theta_0, each in s sizes.

    Attributes:
        sizes: norms of the perturbations, (s,), in units of theta.
        along: <J v, delta> / norm(J v), (b, s), in units of theta.
        beside: norm of what remains of delta, (b, s).
        predicted: norm(J v) times the size, (b, s): what `along` is where training is linear.

    NaN where the run from the moved theta_0 diverges, and where J v = 0. Example: see the module.
    """

    sizes: Tensor
    along: Tensor
    beside: Tensor
    predicted: Tensor

    @property
    def error(self) -> Tensor:
        """norm(delta - s J v) / norm(s J v), (b, s): 0 where training is linear."""
        return torch.hypot(self.along - self.predicted, self.beside) / self.predicted

    def linear_up_to(self, tolerance: float = 0.1) -> Tensor:
        """The largest size of each direction, (b,), up to which no error exceeds the tolerance.

        0 where that of the smallest size does.
        """
        # A run that diverged is not linear.
        linear = (self.error <= tolerance).cumprod(1)
        return (linear * self.sizes).amax(1)


def perturbation_responses(
    objective: Objective,
    batches: Sequence[Tensor | None],
    learning_rate: float | Callable[[int], float],
    run: TrainingJacobian,
    directions: Tensor,
    sizes: Sequence[float] = SIZES,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
) -> PerturbationResponses:
    """Move theta_0 along each direction by each size, train again, compare with the Jacobian.

    Costs b s runs, of a gradient a step.

    Args:
        objective, batches, learning_rate, momentum, dampening, weight_decay: those of `run`.
        run: the whole J, from `training_jacobian` with directions=None.
        directions: v, unit columns (P, b), such as columns of `SingularSpectrum.right`.
        sizes: s > 0, ascending.

    Raises:
        InvalidInput: J times some directions only, directions of another shape or no unit
            vectors, sizes that are not positive and ascending, no batch.
    """
    _refuse_unfit(run, directions, sizes)
    images = run.columns @ directions
    gains = images.norm(dim=0)
    along, beside = torch.zeros(2, len(gains), len(sizes), dtype=images.dtype).unbind()
    for i, (direction, image) in enumerate(zip(directions.T, images.T, strict=True)):
        for j, size in enumerate(sizes):
            theta = run.theta_0 + size * direction
            try:
                end = trained_parameters(
                    objective,
                    batches,
                    learning_rate,
                    theta=theta,
                    momentum=momentum,
                    dampening=dampening,
                    weight_decay=weight_decay,
                )
            except Diverged:
                end = torch.full_like(theta, float("nan"))
            delta, unit = end - run.theta_T, image / gains[i]
            along[i, j] = unit @ delta
            beside[i, j] = (delta - along[i, j] * unit).norm()
    norms = torch.tensor(list(sizes), dtype=images.dtype)
    return PerturbationResponses(norms, along, beside, gains.cpu()[:, None] * norms)


def _refuse_unfit(run: TrainingJacobian, directions: Tensor, sizes: Sequence[float]) -> None:
    if run.directions is not None:
        given = f"J times {run.columns.shape[1]} directions"
        raise invalid("run", given, "the whole of J", "call training_jacobian with directions=None")
    parameters = len(run.theta_0)
    if directions.dim() != 2 or directions.shape[0] != parameters or directions.shape[1] < 1:
        allowed = f"a shape (P, b) with P = {parameters}, b >= 1"
        raise invalid("directions", tuple(directions.shape), allowed)
    norms = directions.norm(dim=0)
    off = int((norms - 1).abs().argmax())
    if not abs(float(norms[off]) - 1) < 1e-3:
        raise invalid("directions", f"a norm of {float(norms[off]):.3g}", "unit columns")
    if not sizes or sizes[0] <= 0 or list(sizes) != sorted(set(sizes)):
        raise invalid("sizes", list(sizes), "positive numbers, ascending")
