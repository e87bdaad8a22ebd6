"""SGD of R runs in lockstep, each with its own rate and its own factors on S_k and the bulk.

    theta_r <- theta_r - lr_r (a_r P_k g_r + b_r (g_r - P_k g_r)),    g_r on the run's mini-batch

Plain SGD is (a, b) = (1, 1), Dom-SGD (1, 0), Bulk-SGD (0, 1): the branches of one experiment, over
any number of seeds, are one computation. `SplitUpdate` is the same for one run, around any
optimizer.

Source: Song, Ahn, Yun 2025 (arXiv 2405.16002), section 4 and figure 1a.

Example:
    >>> import torch
    >>> from thalweg.loss.lockstep_objective import LockstepObjective
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.tracking.lockstep_tracker import LockstepTracker
    >>> data = (torch.randn(64, 3) * torch.tensor([3.0, 1.0, 1.0]), torch.randn(64, 2))
    >>> runs = LockstepObjective(Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss(), data))
    >>> start = torch.randn(8).expand(3, 8)
    >>> sgd = LockstepSGD(
    ...     LockstepTracker(runs, k=2), start, lr=0.01, dominant=[1, 1, 0], bulk=[1, 0, 1]
    ... )
    >>> sgd.step(torch.arange(16).expand(3, 16)).shape, sgd.thetas.shape
    (torch.Size([3]), torch.Size([3, 8]))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.tracking.lockstep_tracker import LockstepTracker

PerRun = float | Sequence[float]
"""One number for all runs, or one for each."""


class LockstepSGD:
    """SGD with a split update for each of R runs; the subspace is followed for all of them.

    Args:
        tracker: follows the runs' subspaces; its objective gives the gradients.
        thetas: where the runs begin (R, P), copied.
        lr: the learning rate.
        dominant: a, the factor on the part in S_k.
        bulk: b, the factor on the rest.

    Attributes:
        thetas: where the runs are (R, P).
        gradients: those of the last step's mini-batches (R, P); None before.

    Raises:
        InvalidInput: thetas that are not (R, P), a number of rates or factors that is not R.

    Example: see the module.
    """

    def __init__(
        self,
        tracker: LockstepTracker,
        thetas: Tensor,
        lr: PerRun,
        dominant: PerRun = 1.0,
        bulk: PerRun = 1.0,
    ) -> None:
        if thetas.dim() != 2 or thetas.shape[1] != tracker.objective.num_parameters:
            allowed = f"(R, P) with P = {tracker.objective.num_parameters}"
            raise invalid("thetas", tuple(thetas.shape), allowed)
        self.tracker = tracker
        self.thetas = thetas.detach().clone()
        self.gradients: Tensor | None = None
        self._on_gradient, self._on_dominant = split_factors(
            self._column("lr", lr), self._column("dominant", dominant), self._column("bulk", bulk)
        )

    @torch.no_grad()
    def step(self, samples: Tensor | None) -> Tensor:
        """One step of every run; the losses (R,) of the mini-batches before it.

        Args:
            samples: the runs' mini-batches, int64 (R, b), or one for all (b,); None for all
                samples.

        Raises:
            Diverged: a gradient or product of some run is NaN or infinite.
        """
        objective = self.tracker.objective
        losses, gradients = objective.values_and_gradients(self.thetas, samples)
        self.tracker.update(self.thetas, gradients)
        dominant = self.tracker.project(gradients)
        moved = split_step(self.thetas, gradients, dominant, self._on_gradient, self._on_dominant)
        # Last, so that a step that fails leaves the runs where they were.
        self.gradients, self.thetas = gradients, moved
        return losses

    def _column(self, name: str, given: PerRun) -> Tensor:
        """One number for each run, (R, 1)."""
        runs = len(self.thetas)
        values = [given] * runs if isinstance(given, (int, float)) else list(given)
        if len(values) != runs:
            raise invalid(name, f"{len(values)} numbers", f"one, or R = {runs} of them")
        return self.thetas.new_tensor(values).unsqueeze(1)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit, the tracker's state included."""
        return {"thetas": self.thetas, "tracker": self.tracker.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.thetas = state["thetas"]
        self.tracker.load_state_dict(state["tracker"])


def split_factors(lr: Tensor, dominant: Tensor, bulk: Tensor) -> tuple[Tensor, Tensor]:
    """Factors on g and on P_k g in a split step of SGD, of rates and factors (R, 1) each.

    theta - lr (b g + (a - b) P_k g) is one pass less than with both parts apart.
    """
    return -lr * bulk, -lr * (dominant - bulk)


def split_step(
    thetas: Tensor, gradients: Tensor, dominant: Tensor, on_gradient: Tensor, on_dominant: Tensor
) -> Tensor:
    """Where a split step of SGD leads to, (R, P).

    Args:
        thetas, gradients: of R runs (R, P).
        dominant: P_k g of each, (R, P).
        on_gradient, on_dominant: see `split_factors`.
    """
    moved = torch.addcmul(thetas, on_gradient, gradients)
    return moved.addcmul_(on_dominant, dominant)
