"""Random probe vectors for estimates of a whole spectrum, outside of what is known of it already.

A probe v is uniform on the unit sphere of the complement of a known subspace, of dimension d, so
that E[v^T A v] = tr(A restricted to the complement) / d. Uniform on the sphere rather than
Gaussian, since a multiple of the identity then has no variance; rather than of random signs, since
the variance then depends on the eigenvalues alone, not on the coordinates.

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> known = known_part(DenseOperator(torch.eye(5)), None)
    >>> known.k, probe_vectors(known.basis, 2, torch.Generator().manual_seed(0)).shape
    (0, torch.Size([5, 2]))
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.linalg import combine, empty_rows, gram, length, norm, random_unit
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.sharding import sharding_of
from thalweg.spectrum.subspace import Subspace


def known_part(operator: SymmetricOperator, known: Subspace | None) -> Subspace:
    """The known eigenpairs in the operator's dtype and on its device; None is a k of 0.

    Raises:
        InvalidInput: the subspace is one of another space, all of it, or without eigenvalues.
    """
    size = operator.shape[0]
    kind = {"dtype": operator.dtype, "device": operator.device}
    if known is None:
        return Subspace(empty_rows(0, operator).T, torch.empty(0, **kind))
    if length(known.basis, 0) != size or known.k >= size:
        raise invalid("known", known, f"a subspace of R^P of dimension < P = {size}")
    if not bool(torch.isfinite(known.eigenvalues).all()):
        raise invalid("known", known, "finite eigenvalues", "take those of `top_eigenpairs`")
    return replace(
        known, basis=known.basis.to(**kind), eigenvalues=known.eigenvalues.to(operator.device)
    )


def probe_vectors(basis: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random unit vectors (P, count), column by column, orthogonal to a basis (P, k), k < P.

    Independent of one another: whether they are drawn at once or in turns makes no difference.
    """
    rows = empty_rows(count, basis.T)
    for row in rows:
        # In float64 and one by one: the same vectors in every dtype, without count copies of them.
        row.copy_(random_unit(length(rows), generator, sharding_of(rows)))
    for _ in range(2):
        rows -= combine(gram(rows, basis.T), basis.T)
        rows /= norm(rows)[:, None]
    return rows.T
