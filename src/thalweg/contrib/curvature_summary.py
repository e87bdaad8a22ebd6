"""What the curvature of a loss at one point is, as a table: of a model as it is, after the fact.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> data = (torch.randn(50, 3), torch.randn(50, 2))
    >>> found = curvature_summary(Objective(model, torch.nn.MSELoss(), data), k=3)
    >>> [layer.name for layer in found.layers], len(found.eigenvalues)
    (['0', '2'], 4)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thalweg.contrib.block_sharpness import block_sharpness
from thalweg.errors import invalid
from thalweg.linalg import norm
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.operators.restricted import layers_of
from thalweg.representation import Table, as_html, as_text
from thalweg.spectrum.curvature_profile import curvature_profile
from thalweg.spectrum.eigensolver import eigenpairs
from thalweg.spectrum.gap import widest_gap
from thalweg.spectrum.trace_estimation import trace

THRESHOLDS = (0.5, 0.1, 0.02)
"""Of lambda_1, above which the share of the gradient is told."""


@dataclass(frozen=True)
class Layer:
    """The curvature of one layer's parameters alone, in units of the Hessian.

    Attributes:
        name: of the layer.
        num_parameters: P_b.
        sharpness: lambda_1 of the Hessian restricted to them.
        average: trace over P_b, with its standard error.
    """

    name: str
    num_parameters: int
    sharpness: float
    average: float
    standard_error: float


@dataclass(frozen=True)
class CurvatureSummary:
    """The curvature of a loss at one point.

    Attributes:
        num_parameters, num_samples: P and N.
        loss, gradient_norm: at the point.
        eigenvalues: lambda_1 to lambda_{k+1}, with
        residuals: of each, relative to lambda_1.
        widest_gap: the k below which the gap is widest.
        shares: of norm(g)^2 above each of `THRESHOLDS` times lambda_1, as (low, high) bounds.
        trace, trace_error: of H, with its standard error.
        layers: in the model's order.
    """

    num_parameters: int
    num_samples: int
    loss: float
    gradient_norm: float
    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    widest_gap: int
    shares: tuple[tuple[float, float], ...]
    trace: float
    trace_error: float
    layers: tuple[Layer, ...]

    def tables(self) -> list[Table]:
        """Title, heads and rows of each table, as text."""
        facts = [
            ["parameters P", f"{self.num_parameters:,}"],
            ["samples N", f"{self.num_samples:,}"],
            ["loss", f"{self.loss:.6g}"],
            ["norm of the gradient", f"{self.gradient_norm:.4g}"],
            ["sharpness lambda_1", f"{self.eigenvalues[0]:.5g}"],
            ["trace of H", f"{self.trace:.4g} ± {self.trace_error:.2g}"],
            ["widest gap below", f"lambda_{self.widest_gap}"],
        ]
        facts += [
            [f"share of the gradient above lambda_1 x {part:g}", f"{low:.2f} to {high:.2f}"]
            for part, (low, high) in zip(THRESHOLDS, self.shares, strict=True)
        ]
        spectrum = [
            [f"lambda_{i}", f"{value:.5g}", f"{residual:.1e}", _ratio(self.eigenvalues, i)]
            for i, (value, residual) in enumerate(
                zip(self.eigenvalues, self.residuals, strict=True), start=1
            )
        ]
        layers = [
            [
                layer.name,
                f"{layer.num_parameters:,}",
                f"{layer.sharpness:.4g}",
                f"{layer.average:.3g} ± {layer.standard_error:.1g}",
            ]
            for layer in self.layers
        ]
        return [
            ("the loss", ["", ""], facts),
            ("spectrum", ["", "eigenvalue", "residual", "next / this"], spectrum),
            ("by layer", ["layer", "parameters", "sharpness", "trace / parameters"], layers),
        ]

    def __str__(self) -> str:
        return "\n\n".join(map(as_text, self.tables()))

    def _repr_html_(self) -> str:
        return "".join(map(as_html, self.tables()))


def curvature_summary(
    objective: Objective, k: int = 10, *, products: int = 24, tolerance: float = 1e-3, seed: int = 0
) -> CurvatureSummary:
    """Spectrum, gap, trace, where the gradient lies, and the sharpness of each layer.

    A layer is a numbered module, such as "h.3" of a GPT-2 or "0" of a `Sequential`, or what has no
    number in its name.

    Args:
        objective: the loss, at the model's parameters.
        k: eigenvalues, >= 1; one more is found, for the gap below them.
        products: of each trace, >= 4.
        tolerance: of the residuals.
        seed: of random vectors.

    Raises:
        InvalidInput: k < 1 or k >= P.
        Diverged: the loss or a product is NaN or infinite.
    """
    if not 1 <= k < objective.num_parameters:
        allowed = f"an integer from 1 to P - 1 = {objective.num_parameters - 1}"
        raise invalid("k", k, allowed, "one eigenvalue more is found, for the gap")
    hessian = Hessian(objective, keep_graph=True)
    value, gradient = objective.value_and_gradient()
    space = eigenpairs(hessian, k + 1, tolerance=tolerance, seed=seed)
    assert space.residuals is not None
    first = float(space.eigenvalues[0])
    shares = [(math.nan, math.nan)] * len(THRESHOLDS)
    if first > 0 and float(norm(gradient)) > 0:
        taus = [part * first for part in THRESHOLDS]
        profile = curvature_profile(hessian, gradient, thresholds=taus)
        found = [profile.share_above(tau) for tau in taus]
        shares = [(share.lower, share.upper) for share in found]
    whole = trace(hessian, num_matvecs=products, seed=seed, known=space)
    blocks = layers_of(objective.layout.names)
    by_layer = block_sharpness(objective, blocks, products=products, largest=True, seed=seed)
    return CurvatureSummary(
        objective.num_parameters,
        objective.num_samples,
        float(value),
        float(norm(gradient)),
        tuple(space.eigenvalues.tolist()),
        tuple(space.residuals.tolist()),
        widest_gap(space.eigenvalues),
        tuple(shares),
        whole.value,
        whole.standard_error,
        tuple(
            Layer(name, b.num_parameters, b.largest or 0.0, b.average, b.standard_error)
            for name, b in by_layer.items()
        ),
    )


def _ratio(values: Sequence[float], place: int) -> str:
    if place >= len(values) or not values[place - 1] > 0:
        return ""
    return f"{values[place] / values[place - 1]:.2f}"


def as_data(found: CurvatureSummary) -> dict[str, Any]:
    """All of it as numbers and lists, for JSON."""
    return {**vars(found), "layers": [vars(layer) for layer in found.layers]}
