"""The trace of a symmetric operator from products alone, with its standard error: Hutch++.

    tr A = tr(Q^T A Q) + (P - q) E[v^T A v],  v uniform on the unit sphere orthogonal to Q

Q (P, q) is an orthonormal basis of A S, S random: the part of A that would make random estimates
vary most is summed exactly, the rest is a mean over random probes (Meyer, Musco, Musco, Woodruff
2021, "Hutch++: Optimal Stochastic Trace Estimation", arXiv 2010.09649, algorithm 1). How it differs
from the paper:

1. The probes are unit vectors of the complement of Q, see `probe_vectors`: less variance.
2. There is a standard error where the paper has a bound. With B the rest of A, on d dimensions,
   Var[d v^T B v] = 2 d^2 / (d + 2) (tr B^2 / d - (tr B / d)^2), and tr B^2 / d = E[norm(B v)^2]
   comes from the same products. (The spread of few v^T B v would be a worse estimate of it.)
3. Eigenpairs that are known already join Q without a product.

Nothing here asks for positive eigenvalues. Where they cancel, as those of a Hessian can, the
paper's bound holds relative to the sum of their absolute values, not to the trace: the standard
error is absolute for that reason.

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> trace(DenseOperator(torch.diag(torch.tensor([3.0, -1.0, 2.0]))))
    TraceEstimate(value=4.0, standard_error=0.0, num_matvecs=3)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.errors import Diverged, formerly, invalid
from thalweg.linalg import dots, orthonormalize, reject
from thalweg.loss.protocol import Loss
from thalweg.operators.hessian import as_operator
from thalweg.operators.symmetric import CountsMatvecs, SymmetricOperator
from thalweg.spectrum.probe_vectors import known_part, probe_vectors
from thalweg.spectrum.subspace import Subspace

# Vectors multiplied at once where every column of the identity is.
BLOCK = 64


@dataclass(frozen=True)
class TraceEstimate(CountsMatvecs):
    """An estimate of a trace, in units of the operator.

    Attributes:
        value: the estimate; unbiased.
        standard_error: of `value`; 0 where every direction was multiplied.
        num_matvecs: vectors multiplied by the operator.

    Source and example: see the module.
    """

    value: float
    standard_error: float
    num_matvecs: int


@formerly(products="num_matvecs")
def trace(
    operator: SymmetricOperator | Loss,
    *,
    num_matvecs: int = 60,
    seed: int = 0,
    known: Subspace | None = None,
) -> TraceEstimate:
    """Estimate the trace of a symmetric operator, definite or not (Hutch++, see the module).

    Args:
        operator: anything with `shape`, `dtype`, `device` and `@` on a block (P, b); or a loss, for
            its Hessian at the parameters.
        num_matvecs: vectors to multiply, >= 4: a third each for the sketch A S, for A Q, and for
            probes. From P - k on, P - k are spent and the result is exact up to rounding.
        seed: of the sketch and of the probes.
        known: k orthonormal directions with their Rayleigh quotients as eigenvalues, such as
            `top_eigenpairs` gives, converged or not; their part costs no product. (A tracked
            subspace's eigenvalues are a step behind, which would bias the result.)

    Returns:
        The estimate, with its standard error and the vectors multiplied. Memory: about
        `num_matvecs` vectors.

    Raises:
        InvalidInput: too few vectors to multiply, or a known subspace that does not fit.
        Diverged: a product is NaN or infinite.

    Source: Meyer et al. 2021 (arXiv 2010.09649). Example: see the module.
    """
    operator = as_operator(operator)
    known = known_part(operator, known)
    known_sum = float(known.eigenvalues.sum(dtype=torch.float64))
    size, unknown = operator.shape[0], operator.shape[0] - known.k
    if num_matvecs < min(4, unknown):
        raise invalid(
            "num_matvecs", num_matvecs, "an integer >= 4, or all the directions not known"
        )
    if num_matvecs >= unknown:
        columns = torch.linalg.qr(known.basis, mode="complete")[0][:, known.k :]
        parts = [_quadratic_forms(block, operator @ block) for block in columns.split(BLOCK, dim=1)]
        return TraceEstimate(known_sum + float(torch.cat(parts).sum()), 0.0, unknown)
    generator = torch.Generator().manual_seed(seed)
    sketch = num_matvecs // 3
    images = operator @ probe_vectors(known.basis, sketch, generator)
    # Together with what is known, or columns that are rounding noise would lean into that.
    basis = orthonormalize(torch.cat([known.basis, images], dim=1))
    added = basis[:, known.k :]
    sketch_sum = float(_quadratic_forms(added, operator @ added).sum())
    probes = probe_vectors(basis, num_matvecs - 2 * sketch, generator)
    images = operator @ probes
    forms = _quadratic_forms(probes, images)
    images = reject(basis.T, images)
    # norm(B v)^2 - (v^T B v)^2, as a square: a difference would be lost in rounding.
    rest_of_each = images - forms.to(images) * probes
    squares = dots(rest_of_each, rest_of_each, dim=0)
    rest = size - basis.shape[1]
    variance = 2 * rest**2 / (rest + 2) * float(squares.mean() + forms.var()) / len(forms)
    value = known_sum + sketch_sum + rest * float(forms.mean())
    return TraceEstimate(value, math.sqrt(variance), num_matvecs)


def _quadratic_forms(vectors: Tensor, images: Tensor) -> Tensor:
    """v^T A v of each column of V and A V (P, m): (m,), float64."""
    forms = dots(vectors, images, dim=0)
    if not bool(torch.isfinite(forms).all()):
        raise Diverged("a product with the operator is NaN or infinite")
    return forms
