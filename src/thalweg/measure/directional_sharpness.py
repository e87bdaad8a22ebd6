"""Directional sharpness: the curvature along one vector, such as an update, <d, H d> / norm(d)^2.

Unlike lambda_1 it is that of the way that training goes. Compare along the gradient with 2 / lr for
gradient descent; along the updates of two optimizers with each other.

Source: Pan and Li 2023 (arXiv 2306.00204), along an update; exact but for rounding here.

Example:
    >>> import torch
    >>> from thalweg.loss.function_loss import FunctionLoss
    >>> loss = FunctionLoss(lambda t: t[0] ** 2 + 2 * t[1] ** 2, torch.ones(2))  # H = diag(2, 4)
    >>> directional_sharpness(loss, torch.tensor([3.0, 3.0]))
    3.0
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.linalg import dots
from thalweg.loss.protocol import Loss
from thalweg.measure.probes import Value, probe
from thalweg.measure.step_state import StepState
from thalweg.operators.hessian import Hessian


def directional_sharpness(
    objective: Loss, direction: Tensor, theta: Tensor | None = None, samples: Tensor | None = None
) -> float:
    """<d, H d> / norm(d)^2, in units of the Hessian. Costs one product with H.

    Args:
        objective: the loss.
        direction: d, (P,), of any length but 0.
        theta: the point (P,); None for the parameters as they are now.
        samples: indices of the samples that H is over, int64 (n,); None for all.

    Raises:
        InvalidInput: d is zero.
        Diverged: the loss or the product is NaN or infinite.

    Example: see the module.
    """
    curvature, square = curvature_along(Hessian(objective, theta, samples), direction[:, None])
    if not float(square) > 0:
        raise invalid("direction", "a vector of length 0 or NaN", "one of a length > 0")
    return float(curvature / square)


def curvature_along(hessian: Hessian, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """<d, H d> and norm(d)^2 of each column of (P, m), in float64 (m,) each.

    Raises:
        Diverged: the loss or a product is NaN or infinite.
    """
    wide = vectors.double()
    return dots(wide, (hessian @ vectors).double(), dim=0), dots(wide, wide, dim=0)


@probe(
    "directional_sharpness",
    ["directional_sharpness_gradient", "directional_sharpness_update"],
    needs_gradient=True,
    quick=True,
)
def directional_sharpness_of_state(state: StepState) -> Mapping[str, Value]:
    """<d, H d> / norm(d)^2 along the full gradient, and along the update that was made.

    With H that of all samples at theta_t; NaN along a vector of length 0. Costs a block of two
    products with H.
    """
    vectors = {"gradient": state.gradient, "update": state.update}
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    block = torch.stack(list(given.values())).T
    found = zip(given, *curvature_along(Hessian(state.objective, state.theta), block), strict=True)
    return {
        f"directional_sharpness_{name}": float(curvature / square) if square > 0 else math.nan
        for name, curvature, square in found
    }
