"""Baselines: subspaces that are not S_k, for which a claim about S_k must not hold.

`random_subspace` gives k random directions (alignment near sqrt(k / P)); `NextEigenspace` the k
eigenvectors below the dominant ones.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> inputs = torch.randn(64, 4) * torch.tensor([4.0, 3.0, 2.0, 1.0])
    >>> data = (inputs, torch.randn(64, 1))
    >>> objective = Objective(torch.nn.Linear(4, 1, bias=False), torch.nn.MSELoss(), data)
    >>> below = NextEigenspace(objective, k=1).update()
    >>> second = 2 * torch.linalg.eigvalsh(inputs.T @ inputs / 64)[-2]  # H = 2 X^T X / N
    >>> torch.allclose(below.eigenvalues[0], second, rtol=1e-3)
    True
"""

from __future__ import annotations

from torch import Tensor

from thalweg.errors import invalid
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import eigenpairs
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.solved_source import SolvedSource


class NextEigenspace(SolvedSource):
    """The span of u_{k+1}, ..., u_{2k}, from scratch; a `SubspaceSource`.

    Args:
        objective: the loss.
        k: dimension, 1 <= k <= P / 2.
        tolerance: residual of the solves, see `eigenpairs`.
        every: solve at every n-th update only, and keep the basis in between.

    Raises:
        InvalidInput: k is out of that range; every < 1.
    """

    def __init__(self, objective: Loss, k: int, *, tolerance: float = 1e-3, every: int = 1) -> None:
        super().__init__(objective, k, tolerance=tolerance, every=every)
        if k < 1:
            raise invalid("k", k, "an integer >= 1")
        if 2 * k > objective.num_parameters:
            raise invalid("k", k, f"at most P / 2 = {objective.num_parameters // 2} here")

    def _solve(self, theta: Tensor | None) -> tuple[Subspace, int]:
        """The eigenpairs k + 1 to 2k, over all samples."""
        hessian = Hessian(self.objective, theta, keep_graph=True)
        band = (self.k, 2 * self.k)
        solved = eigenpairs(hessian, band=band, tolerance=self.tolerance, check_repeated=0)
        return solved, self.objective.num_samples
