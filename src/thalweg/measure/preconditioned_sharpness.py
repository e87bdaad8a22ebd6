"""The sharpness that Adam and RMSprop feel: that of the Hessian in the metric of their divisor.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> model, data = torch.nn.Linear(3, 1), (torch.randn(32, 3), torch.randn(32, 1))
    >>> optimizer, loss = torch.optim.Adam(model.parameters(), lr=0.01), torch.nn.MSELoss()
    >>> loss(model(data[0]), data[1]).backward()
    >>> optimizer.step()
    >>> found = preconditioned_sharpness(Objective(model, loss, data), optimizer)
    >>> found.k, float(found.eigenvalues[0]) > 0
    (1, True)
"""

from __future__ import annotations

from torch import Tensor
from torch.optim import Optimizer

from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import Hessian
from thalweg.operators.preconditioned import Preconditioned
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.metric_subspace import MetricSubspace
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.preconditioner import metric_of


def preconditioned_sharpness(
    objective: Loss,
    optimizer: Optimizer,
    theta: Tensor | None = None,
    *,
    tolerance: float = 1e-2,
    start: Tensor | None = None,
) -> Subspace:
    """lambda_1 of D^-1/2 (H + w I) D^-1/2, to compare with the optimizer's `stability_threshold`.

    D and w are those of `metric_of`.

    Args:
        objective: the loss.
        optimizer: Adam, AdamW or RMSprop after a step.
        theta: the point (P,), such as that before the step; None for the model's parameters.
        tolerance: of the residual, see `top_eigenpairs`; the eigenvalue's error is about its square
            over the gap.
        start: a vector (P,) to start from, such as the eigenvector found a few steps before.

    Returns:
        The eigenvalue, with its eigenvector in the coordinates D^1/2 theta.

    Raises:
        InvalidInput: the optimizer has no preconditioner, or none yet; it holds a zero.
        Diverged: the loss or a product is NaN or infinite.

    Source: Cohen et al. 2022 (arXiv 2207.14484).
    """
    return metric_subspace(objective, optimizer, theta, tolerance=tolerance, start=start).scaled


def metric_subspace(
    objective: Loss,
    optimizer: Optimizer,
    theta: Tensor | None = None,
    k: int = 1,
    *,
    tolerance: float = 1e-3,
    start: Tensor | None = None,
) -> MetricSubspace:
    """S_k in the metric of the optimizer, D^-1/2 (H + w I) D^-1/2, solved from scratch.

    Arguments, errors and source are those of `preconditioned_sharpness`; k is the dimension.
    """
    diagonal, shift = metric_of(optimizer, objective)
    operator = Preconditioned(Hessian(objective, theta, keep_graph=True), diagonal, shift=shift)
    solved = top_eigenpairs(operator, k, tolerance=tolerance, start=start, check_repeated=0)
    return MetricSubspace(solved, diagonal)
