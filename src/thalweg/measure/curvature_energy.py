"""Probe of how much curvature lies in S_k: of the Gauss-Newton and of the residual part of H.

The energy of a symmetric A inside S_k is norm(P_k A P_k)^2 / norm(A)^2 in the Frobenius norm: the
fraction of the squared matrix elements, in a basis of S_k and its complement, that are between two
directions of S_k. (How the source defines its energy could not be checked; this is our reading.) It
is 1 where A acts within S_k alone, and about (k / P)^2 where A has nothing to do with S_k.

With V (P, k) the basis of S_k, P_k A P_k has the norm of V^T A V, and

    norm(A)^2 = norm(A V)^2 + (P - k) E[norm(A z)^2],  z uniform on the unit sphere orthogonal to V,

so that only the bulk's part of the denominator is estimated, from m probes.

Source: Zakarin, Singh 2025 (arXiv 2505.11972), on where curvature energy lies.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> from thalweg.spectrum.subspace import Subspace
    >>> from thalweg.tracking.source import FixedSubspace
    >>> model = torch.nn.Linear(3, 1, bias=False)
    >>> data = (torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.zeros(3, 1))
    >>> space = FixedSubspace(Subspace(torch.eye(3)[:, :1], torch.ones(1)))
    >>> objective = Objective(model, torch.nn.MSELoss(), data)
    >>> state = StepState(0, torch.ones(3), objective, space, learning_rate=0.1)
    >>> fraction = curvature_energy(state)["energy_gauss_newton_dominant"]
    >>> 0.6 < fraction < 1.0  # 9^2 / (9^2 + 4^2 + 1^2) = 0.83, up to the probes' error
    True
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from thalweg.linalg import gram, length, squared_norm
from thalweg.measure.probes import Value, probe
from thalweg.measure.step_state import StepState
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.probe_vectors import probe_vectors

# Random directions of the bulk; the spread of the result is that of a mean over so many.
PROBES_OF_THE_BULK = 16


@probe("curvature_energy", ["energy_gauss_newton_dominant", "energy_residual_dominant"])
def curvature_energy(state: StepState) -> Mapping[str, Value]:
    """Energy of the Gauss-Newton part G, and of the residual part H - G, inside S_k.

    Pure numbers in [0, 1]; NaN for a part that vanishes, as the residual part of a linear model
    does up to rounding. Costs k + 16 products with H and with G over all samples. The probes are a
    function of the step, and no other random number is drawn. See the module.
    """
    basis = state.subspace.basis
    size, k = length(basis, 0), basis.shape[1]
    generator = torch.Generator().manual_seed(state.step)
    count = PROBES_OF_THE_BULK if k < size else 0
    block = torch.cat([basis, probe_vectors(basis, count, generator)], dim=1)
    hessian = Hessian(state.objective, state.theta) @ block
    gauss_newton = GaussNewton(state.objective, state.theta) @ block
    return {
        "energy_gauss_newton_dominant": _fraction(gauss_newton, basis),
        "energy_residual_dominant": _fraction(hessian - gauss_newton, basis),
    }


def _fraction(images: Tensor, basis: Tensor) -> float:
    """norm(V^T A V)^2 over the estimate of norm(A)^2, from A [V, Z] (P, k + m)."""
    size, k = length(basis, 0), basis.shape[1]
    inside = float(gram(basis.T, images[:, :k].T).double().square().sum())
    squares = squared_norm(images.T.double())
    total = float(squares[:k].sum())
    if images.shape[1] > k:
        total += (size - k) * float(squares[k:].mean())
    return min(1.0, inside / total) if total else math.nan
