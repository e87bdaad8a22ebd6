"""The dominant subspace of the very mini-batch that a step trains on, solved anew at each.

H_B(theta_t), the Hessian of the mini-batch loss, is another matrix at every step: there is nothing
to follow, so its top k eigenpairs are found from scratch. A mini-batch has few samples and its
products cost little: n / N of a product with all.

Every solve begins at random. On an MLP of 17,610 parameters, k = 10 and batches of 50 it takes 22.3
products; from the sum of the last basis's columns 20.9, from all of them as a block 34. Those seven
per cent are not worth it: a start within the last subspace hides a direction that comes in.

Source: Zakarin, Singh 2025 (arXiv 2505.11972), who take the Hessian of the mini-batch, of a subset,
or of all data.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> data = (torch.randn(64, 3) * torch.tensor([3.0, 1.0, 1.0]), torch.randn(64, 2))
    >>> objective = Objective(torch.nn.Linear(3, 2), torch.nn.MSELoss(), data)
    >>> source = BatchSubspace(objective, k=2)
    >>> for step in range(3):
    ...     source.samples = torch.arange(16 * step, 16 * (step + 1))
    ...     space = source.update()
    >>> space.k, source.report.subset
    (2, 16)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.solved_source import SolvedSource
from thalweg.tracking.source import check_dimension


class BatchSubspace(SolvedSource):
    """Top k eigenpairs of the Hessian over given samples, from scratch; a `SubspaceSource`.

    Args:
        objective: the loss over all samples.
        k: dimension of the subspace, 1 <= k <= P.
        tolerance: residual of the solves, see `top_eigenpairs`.
        every: solve at every n-th update only, and keep the basis in between.
        seed: of the start vector.

    Attributes:
        samples: indices of the samples whose Hessian the next update is of, int64 (n,), on the
            CPU; None for all. Set it before each step.
        report: what the last update cost, and how far it can be trusted: a `TrackerReport`. Costs
            are in gradients of the full loss: a product over n of N samples counts n / N.

    Raises:
        InvalidInput: k or `every` out of range.

    Example: see the module.
    """

    def __init__(
        self,
        objective: Loss,
        k: int,
        *,
        tolerance: float = 1e-3,
        every: int = 1,
        seed: int = 0,
    ) -> None:
        check_dimension(k, objective.num_parameters)
        super().__init__(objective, k, tolerance=tolerance, every=every)
        self.seed = seed
        self.samples: Tensor | None = None

    def _solve(self, theta: Tensor | None) -> tuple[Subspace, int]:
        """The top k eigenpairs over `samples`."""
        hessian = Hessian(self.objective, theta, self.samples, keep_graph=True)
        solved = top_eigenpairs(hessian, self.k, tolerance=self.tolerance, seed=self.seed)
        return solved, self.objective.num_samples if self.samples is None else len(self.samples)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit for bit, except the samples of the next step."""
        return super().state_dict() | {
            "loss": self.objective.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, the way to multiply by the Hessian included."""
        super().load_state_dict(state)
        self.objective.load_state_dict(state.get("loss", state))
