"""Up to which size of a perturbation is training linear in the initial parameters?

theta_0 is moved by s v, the same run is made again, and its response is compared with what the
training Jacobian predicts:

    delta(s) = theta_T(theta_0 + s v) - theta_T(theta_0)   against   s J v

`along` is the part of delta(s) along J v, `beside` the norm of the rest, `predicted` norm(s J v).
Along a singular vector v_i these are <u_i, delta>, the norm of the rest, and sigma_i s.

On a quadratic loss training is affine and the prediction exact at every size. Rounding of the end
points leaves an error of about eps norm(theta_T) / (s norm(J v)) at small s.

Source: Belrose, Scherlis 2024 (arXiv 2412.07003), with sizes from 1e-3 to 1e3.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.contrib.training_jacobian import training_jacobian
    >>> from thalweg.contrib.training_jacobian.training_run import TrainingRun
    >>> data = (torch.randn(8, 3).double(), torch.randn(8, 1).double())
    >>> objective = Objective(torch.nn.Linear(3, 1).double(), torch.nn.MSELoss(), data)
    >>> run = TrainingRun(objective, [None] * 10, learning_rate=0.05)
    >>> first = torch.eye(4, 1).double()
    >>> found = perturbation_responses(run, training_jacobian(run), first, [1e-2, 1e2])
    >>> found.error.shape, bool(found.error.max() < 1e-9)  # least squares: a quadratic
    (torch.Size([1, 2]), True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.contrib.training_jacobian.jacobian import TrainingJacobian
from thalweg.contrib.training_jacobian.training_run import TrainingRun, trained_parameters
from thalweg.errors import invalid

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

    On the CPU. NaN where the run from the moved theta_0 diverges, and where J v = 0. Example: see
    the module.
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
    run: TrainingRun,
    jacobian: TrainingJacobian,
    directions: Tensor,
    sizes: Sequence[float] = SIZES,
) -> PerturbationResponses:
    """Move theta_0 along each direction by each size, train again, compare with the Jacobian.

    Costs b s runs, of a gradient a step, all in one batched computation.

    Args:
        run: what `jacobian` is the derivative of.
        jacobian: the whole J, from `training_jacobian` with directions=None.
        directions: v, unit columns (P, b), such as columns of `SingularSpectrum.right`.
        sizes: s > 0, ascending.

    Raises:
        InvalidInput: J times some directions only, directions of another shape or no unit
            vectors, sizes that are not positive and ascending.
    """
    _refuse_unfit(jacobian, directions, sizes)
    images = (jacobian.columns @ directions).T
    gains = images.norm(dim=1)
    norms = torch.tensor(list(sizes), dtype=images.dtype, device=images.device)
    starts = jacobian.theta_0 + norms[:, None] * directions.T[:, None]
    ends = trained_parameters(run, starts.flatten(0, 1)).unflatten(0, (len(gains), -1))
    deltas, units = ends - jacobian.theta_T, images / gains[:, None]
    along = (deltas * units[:, None]).sum(2)
    beside = (deltas - along[:, :, None] * units[:, None]).norm(dim=2)
    predicted = gains[:, None] * norms
    return PerturbationResponses(norms.cpu(), along.cpu(), beside.cpu(), predicted.cpu())


def _refuse_unfit(jacobian: TrainingJacobian, directions: Tensor, sizes: Sequence[float]) -> None:
    if jacobian.directions is not None:
        given = f"J times {jacobian.columns.shape[1]} directions"
        raise invalid(
            "jacobian", given, "the whole of J", "call training_jacobian with directions=None"
        )
    parameters = len(jacobian.theta_0)
    if directions.dim() != 2 or directions.shape[0] != parameters or directions.shape[1] < 1:
        allowed = f"a shape (P, b) with P = {parameters}, b >= 1"
        raise invalid("directions", tuple(directions.shape), allowed)
    norms = directions.norm(dim=0)
    off = int((norms - 1).abs().argmax())
    if not abs(float(norms[off]) - 1) < 1e-3:
        raise invalid("directions", f"a norm of {float(norms[off]):.3g}", "unit columns")
    if not sizes or sizes[0] <= 0 or list(sizes) != sorted(set(sizes)):
        raise invalid("sizes", list(sizes), "positive numbers, ascending")
