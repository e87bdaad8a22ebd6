"""The spectral density of a symmetric operator, from products alone, with error bars.

    phi(x) = (1/P) sum_i delta(x - lambda_i) = E[sum_i (u_i^T v)^2 delta(x - lambda_i)]

for v uniform on the unit sphere. Some Lanczos steps from one probe v give the Gauss quadrature of
its measure: the eigenvalues of the tridiagonal matrix T are the nodes, the squared first components
of its eigenvectors the weights (Ubaru, Chen, Saad 2017, "Fast estimation of tr(f(A)) via stochastic
Lanczos quadrature"; Ghorbani, Krishnan, Xiao 2019, arXiv 1901.10159, algorithm 1). How it differs:

1. All probes run side by side, each with a recurrence of its own: a step is one product with a
   block, which shares the primal pass.
2. Full reorthogonalization, so that there are no copies of converged eigenvalues, and what it
   takes away shows an operator that is not symmetric. The recurrence is kept in float64.
3. The nodes of every probe are kept: whatever is computed from them has a standard error, see
   `SpectralDensity.average`.
4. Eigenpairs that are known already enter exactly; the probes see the rest.

What it resolves: positions of eigenvalues that stand clear of the others, to rounding; the shape of
the bulk down to about its width / steps; means over the spectrum to their standard error. What it
does not: an eigenvalue inside the bulk; the weight of a single outlier, 1/P, which m probes give to
within sqrt(2 / m) of itself (so pass `known`); how often an outlier is repeated.

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> operator = DenseOperator(torch.diag(torch.tensor([5.0, 2.0, 2.0, 2.0, 1.0])))
    >>> spectrum = spectral_density(operator, probes=200, steps=10)
    >>> spectrum
    SpectralDensity(from 1 to 5, probes=200, steps=3, num_matvecs=600)
    >>> spectrum.cumulative(torch.tensor([0.0, 3.0, 6.0])).value.round(decimals=1).tolist()
    [0.0, 0.8, 1.0]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import Diverged, invalid
from thalweg.linalg import combine, coordinates, dots, empty_rows, gram, linear_combination, norm
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import as_operator
from thalweg.operators.symmetric import (
    CountsMatvecs,
    SymmetricOperator,
    product_with_error,
    refuse_asymmetry,
)
from thalweg.representation import as_html, curve_as_svg
from thalweg.spectrum.probe_vectors import known_part, probe_vectors
from thalweg.spectrum.subspace import Subspace

CURVE_POINTS = 230
CURVE_WIDTHS = 100
"""Of a curve in a notebook: points, and Gaussian widths from end to end of the spectrum."""
ONE_VALUE = 1e-6
"""Eigenvalues that differ by less, relative to the largest, are one: float32 tells no more."""


@dataclass(frozen=True)
class Estimate:
    """A mean over the spectrum and its standard error.

    Attributes:
        value: float64, () or one for each point asked for (g,); unbiased where steps suffice.
        standard_error: of the same shape and unit.

    Example:
        >>> from thalweg.operators.symmetric import DenseOperator
        >>> mean = spectral_density(DenseOperator(2 * torch.eye(4)), probes=3).moment(1)
        >>> round(float(mean.value), 6), round(float(mean.standard_error), 6)
        (2.0, 0.0)
    """

    value: Tensor
    standard_error: Tensor


@dataclass(frozen=True, repr=False)
class SpectralDensity(CountsMatvecs):
    """The quadrature of each probe's spectral measure, from which all else is computed.

    All tensors are float64 on the CPU, eigenvalues in units of the operator.

    Attributes:
        nodes: (m, n), Ritz values of m probes, ascending. All lie inside the spectrum.
        weights: (m, n), >= 0, of sum 1 for each probe.
        residuals: (m, n), how far from a node the nearest eigenvalue is at most.
        known: (k,), the eigenvalues that were passed in, of weight 1/P each.
        num_parameters: P.
        num_matvecs: vectors multiplied by the operator.

    Source: Ghorbani, Krishnan, Xiao 2019 (arXiv 1901.10159). Example: see the module.
    """

    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    known: Tensor
    num_parameters: int
    num_matvecs: int

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue seen: the spectrum's ends, from inside."""
        seen = torch.cat([self.nodes.flatten(), self.known])
        return float(seen.min()), float(seen.max())

    def average(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """(1/P) sum_i f(lambda_i) = tr f(A) / P.

        The error is the larger of two. One is the closed form for v on the sphere of dimension d,
        Var[v^T f(A) v] = 2 / (d + 2) (tr f(A)^2 / d - (tr f(A) / d)^2): it serves even one probe,
        and a skewed sample does not deceive it. The other is the spread over probes: it also shows
        where too few steps were made, though not all of what they do.

        Args:
            function: takes eigenvalues (...) and gives values of shape (...) or (..., g).

        Returns:
            Of shape () or (g,), in the function's unit.
        """
        values = function(self.nodes)
        weights = self.weights if values.dim() == 2 else self.weights[..., None]
        samples = (weights * values).sum(dim=1)
        mean, probes = samples.mean(dim=0), len(samples)
        rest = self.num_parameters - len(self.known)
        variance = 2 / (rest + 2) * (weights * (values - mean).square()).sum(dim=1).mean(dim=0)
        if probes > 1:
            variance = variance.maximum(samples.var(dim=0))
        fraction = rest / self.num_parameters
        known = function(self.known).sum(dim=0) / self.num_parameters
        return Estimate(known + fraction * mean, fraction * (variance / probes).sqrt())

    def moment(self, power: int) -> Estimate:
        """(1/P) sum_i lambda_i^power; the first moment is the trace divided by P.

        Raises:
            InvalidInput: a power above 2 n - 1, which the quadrature does not integrate.
        """
        highest = 2 * self.nodes.shape[1] - 1
        limited = bool(self.residuals.any())
        if not isinstance(power, int) or power < 0 or (limited and power > highest):
            raise invalid("power", power, f"an integer from 0 to {highest}", "take more steps")
        return self.average(lambda values: values**power)

    def density(self, grid: Tensor, width: float) -> Estimate:
        """phi smoothed by a Gaussian of standard deviation `width`, at `grid` (g,).

        Per unit of the operator. A width below the bulk's extent / steps shows single nodes.

        Args:
            grid: in units of the operator.
            width: > 0, in the same.

        Raises:
            InvalidInput: a grid that is not (g,), or a width that is not > 0.
        """
        points = _points("grid", grid)
        if not width > 0:
            raise invalid("width", width, "a number > 0, in units of the operator")
        height = 1 / (width * math.sqrt(2 * math.pi))
        return self.average(
            lambda values: height * torch.exp(-(((points - values[..., None]) / width) ** 2) / 2)
        )

    def cumulative(self, points: Tensor, width: float = 0.0) -> Estimate:
        """The fraction of eigenvalues that are at most x, for each x in `points` (g,).

        Args:
            points: in units of the operator.
            width: of the Gaussian that smooths the steps. With 0 each node is one step, and the
                fraction is known no better than to the weights of the nodes around x.

        Raises:
            InvalidInput: points that are not (g,), or a negative width.
        """
        points = _points("points", points)
        if width < 0:
            raise invalid("width", width, "a number >= 0, in units of the operator")
        if width == 0:
            return self.average(lambda values: (values[..., None] <= points).double())
        return self.average(lambda values: torch.special.ndtr((points - values[..., None]) / width))

    def __repr__(self) -> str:
        smallest, largest = self.extremes
        return (
            f"SpectralDensity(from {smallest:.4g} to {largest:.4g}, probes={len(self.nodes)},"
            f" steps={self.nodes.shape[1]}, num_matvecs={self.num_matvecs})"
        )

    def _repr_html_(self) -> str:
        """The density as a curve, the numbers of eigenvalues on a log scale, for a notebook."""
        smallest, largest = self.extremes
        mean = self.moment(1)
        facts = [
            ["parameters P", f"{self.num_parameters:,}"],
            ["smallest, largest", f"{smallest:.5g}, {largest:.5g}"],
            ["trace / P", f"{float(mean.value):.4g} ± {float(mean.standard_error):.1g}"],
            ["products", str(self.num_matvecs)],
        ]
        return self._curve(smallest, largest) + as_html(("", ["", ""], facts))

    def _curve(self, smallest: float, largest: float) -> str:
        """The curve as SVG; none where all eigenvalues are one."""
        if largest - smallest <= ONE_VALUE * max(abs(smallest), abs(largest)):
            return ""
        width = (largest - smallest) / CURVE_WIDTHS
        ends = (smallest - 3 * width, largest + 3 * width)
        grid = torch.linspace(*ends, CURVE_POINTS, dtype=torch.float64, device="cpu")
        # A handful of large eigenvalues among P would not be seen beside the bulk.
        numbers = self.num_parameters * width * self.density(grid, width).value
        label = f"log10(1 + number of eigenvalues within {width:.2g})"
        return curve_as_svg(grid.tolist(), (1 + numbers).log10().tolist(), label)


def spectral_density(
    operator: SymmetricOperator | Loss,
    *,
    probes: int = 10,
    steps: int = 80,
    block: int | None = None,
    seed: int = 0,
    known: Subspace | None = None,
) -> SpectralDensity:
    """Estimate the spectral density by stochastic Lanczos quadrature (see the module).

    Args:
        operator: anything with `shape`, `dtype`, `device` and `@` on a block (P, b); or a loss, for
            its Hessian at the parameters.
        probes: m, random start vectors; errors fall as 1 / sqrt(m).
        steps: n, Lanczos steps from each; fewer are made where the space is exhausted.
        block: probes that run side by side; None for all. Memory: n * block vectors.
        seed: of the probes.
        known: k eigenpairs, such as the outliers found by `top_eigenpairs`: they enter with their
            exact weight 1/P, and the probes see what is orthogonal to them.

    Returns:
        Nodes and weights of each probe; m n vectors were multiplied.

    Raises:
        InvalidInput: impossible settings; an operator that is not symmetric.
        Diverged: a product is NaN or infinite.

    Source and example: see the module.
    """
    operator = as_operator(operator)
    block = probes if block is None else block
    for name, value in (("probes", probes), ("steps", steps), ("block", block)):
        if value < 1:
            raise invalid(name, value, "an integer >= 1")
    known = known_part(operator, known)
    generator = torch.Generator().manual_seed(seed)
    steps, made, num_matvecs = min(steps, operator.shape[0] - known.k), 0, 0
    diagonal = torch.zeros(probes, steps, dtype=torch.float64, device="cpu")
    off_diagonal = torch.zeros_like(diagonal)
    for begin in range(0, probes, block):
        part = slice(begin, min(begin + block, probes))
        starts = probe_vectors(known.basis, part.stop - begin, generator)
        done = _lanczos(operator, known.basis, starts, diagonal[part], off_diagonal[part])
        made, num_matvecs = max(made, done), num_matvecs + done * starts.shape[1]
    nodes, weights, residuals = _quadrature(diagonal[:, :made], off_diagonal[:, :made])
    return SpectralDensity(
        nodes,
        weights,
        residuals,
        known.eigenvalues.double().cpu(),
        operator.shape[0],
        num_matvecs,
    )


def _lanczos(
    operator: SymmetricOperator,
    known: Tensor,
    starts: Tensor,
    diagonal: Tensor,
    off_diagonal: Tensor,
) -> int:
    """Run the recurrence of each start (P, b), orthogonal to known (P, k); the steps made.

    Fills the coefficients (b, n) of A v_j = beta_{j-1} v_{j-1} + alpha_j v_j + beta_j v_{j+1}:
    alpha on the diagonal, beta beside it, the last beta what the quadrature leaves out.
    """
    rows, steps = starts.T, diagonal.shape[1]
    basis = empty_rows(len(rows) * steps, rows).reshape(len(rows), steps, -1)
    before, beta = torch.zeros_like(rows), diagonal[:, :1].to(rows) * 0
    ended = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    scale = torch.zeros(len(rows), dtype=torch.float64, device="cpu")
    rounding = 10 * torch.finfo(operator.dtype).eps
    for step in range(steps):
        basis[:, step] = rows
        images, errors = product_with_error(operator, rows.T)
        images = images.T
        scale = scale.maximum(_norms(images))
        if errors is not None:
            rounding = max(rounding, float((errors / scale.clamp(min=1e-300)).max()))
        alpha = dots(rows, images, dim=1)
        images = images - alpha[:, None].to(images) * rows - beta * before
        images -= combine(gram(images, known.T), known.T)
        leaks = coordinates(basis[:, : step + 1], images)
        images -= linear_combination(basis[:, : step + 1], leaks)
        _check(alpha.cpu(), leaks.double().abs().amax(dim=1).cpu(), scale, rounding)
        # Where a start's invariant subspace is exhausted, T continues with a block of its own, in
        # the spectrum and of weight zero, so that all probes have equally many nodes.
        diagonal[:, step] = torch.where(ended, diagonal[:, 0], alpha.cpu())
        norms = _norms(images)
        ended |= norms <= rounding * scale
        off_diagonal[:, step] = torch.where(ended, 0.0, norms)
        if bool(ended.all()):
            diagonal[:, step + 1 :] = diagonal[:, :1]
            return step + 1
        before, beta = rows, off_diagonal[:, step, None].to(images)
        rows = torch.where(beta > 0, images / beta, 0.0)
    return steps


def _points(name: str, points: Tensor) -> Tensor:
    if points.dim() != 1:
        raise invalid(name, tuple(points.shape), "a tensor of shape (g,)")
    return points.double().cpu()


def _norms(rows: Tensor) -> Tensor:
    return norm(rows, dtype=torch.float64).cpu()


def _check(alpha: Tensor, leaks: Tensor, scale: Tensor, rounding: float) -> None:
    """Refuse products that are not finite, or not orthogonal to what symmetry says they are.

    Args:
        rounding: of products, and what they are off by estimate, relative to the largest.
    """
    if not bool(torch.isfinite(alpha).all() and torch.isfinite(scale).all()):
        raise Diverged("a product with the operator is NaN or infinite")
    asymmetry = float((leaks / scale.clamp(min=1e-300)).max())
    refuse_asymmetry(asymmetry, 1e-3, rounding)


def _quadrature(diagonal: Tensor, off_diagonal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, weights and residuals (m, n) of the tridiagonal matrices (Golub and Welsch 1969)."""
    beside = torch.diag_embed(off_diagonal[:, :-1], offset=1)
    nodes, vectors = torch.linalg.eigh(torch.diag_embed(diagonal) + beside + beside.mT)
    return nodes, vectors[:, 0].square(), off_diagonal[:, -1:] * vectors[:, -1].abs()
