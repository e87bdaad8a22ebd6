"""Singular value decomposition by the polar decomposition, which is fast on a GPU.

A = Q H, Q orthogonal and H symmetric positive semidefinite. With H = V diag(sigma) V^T the singular
vectors are V and Q V. Everything is products, QR and Cholesky factors, and one symmetric eigenvalue
problem, which a GPU is fast at; the methods of `torch.linalg.svd` there are not, or sweep many
times. Backward stable, as LAPACK's are: errors of about eps sigma_1.

Q is found by the dynamically weighted Halley iteration (QDWH), X from A / alpha:

    X <- X (a I + b X^T X) (I + c X^T X)^-1

by which no singular value of X, from l to 1, stays below the next l; from l = eps it is 1 to
rounding after six steps. Steps with large c go through QR, without X^T X.

Source: Nakatsukasa, Bai, Gygi 2010, "Optimizing Halley's iteration for computing the matrix polar
decomposition"; Nakatsukasa, Higham 2013, "Stable and efficient spectral divide and conquer
algorithms for the symmetric eigenvalue decomposition and the SVD".

Example:
    >>> import torch
    >>> left, values, right = svd_by_polar(torch.tensor([[0.0, 2.0], [1.0, 0.0]]).double())
    >>> [round(value, 12) for value in values.tolist()]
    [2.0, 1.0]
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGE = 100.0
"""The weight c from which I + c X^T X is too ill-conditioned for Cholesky (the 2013 paper)."""


def svd_by_polar(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, sigma, V^T of a square matrix, as `torch.linalg.svd` orders them.

    Args:
        matrix: (P, P), finite, float32 or float64.

    Returns:
        (P, P), (P,) descending, (P, P), on its device and in its dtype.

    Example: see the module.
    """
    factor = polar_factor(matrix)
    symmetric = factor.T @ matrix
    values, vectors = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    # Q does not reach length 1 where sigma is 0; as the last columns they are completed.
    left, upper = torch.linalg.qr(factor @ vectors)
    signs = torch.where(upper.diagonal() < 0, -1.0, 1.0).to(left)
    return left * signs, values, vectors.T


def polar_factor(matrix: Tensor) -> Tensor:
    """Q of A = Q H, (P, P); on the null space of A of no use. Arguments as for `svd_by_polar`.

    Example:
        >>> factor = polar_factor(torch.tensor([[0.0, -2.0], [3.0, 0.0]]).double())
        >>> (factor.round(decimals=9) + 0).tolist()
        [[0.0, -1.0], [1.0, 0.0]]
    """
    accuracy = torch.finfo(matrix.dtype).eps
    # The Frobenius norm bounds the largest singular value.
    factor = matrix / matrix.norm().clamp(min=torch.finfo(matrix.dtype).tiny)
    lowest = accuracy
    while 1 - lowest > 10 * accuracy:
        a, b, c = _weights(lowest)
        step = _by_qr if c > LARGE else _by_cholesky
        factor = (b / c) * factor + (a - b / c) * step(factor, c)
        lowest = min(1.0, lowest * (a + b * lowest**2) / (1 + c * lowest**2))
    return factor


def _weights(lowest: float) -> tuple[float, float, float]:
    """a, b, c of a step that lifts singular values from [l, 1] highest."""
    square = lowest**2
    d = (4 * (1 - square) / square**2) ** (1 / 3)
    root = (1 + d) ** 0.5
    a = root + (8 - 4 * d + 8 * (2 - square) / (square * root)) ** 0.5 / 2
    b = (a - 1) ** 2 / 4
    return a, b, a + b - 1


def _by_qr(factor: Tensor, c: float) -> Tensor:
    """X (I + c X^T X)^-1 from the QR factors of sqrt(c) X above I."""
    size = len(factor)
    one = torch.eye(size, dtype=factor.dtype, device=factor.device)
    stacked = torch.linalg.qr(torch.cat([c**0.5 * factor, one]))[0]
    return stacked[:size] @ stacked[size:].T / c**0.5


def _by_cholesky(factor: Tensor, c: float) -> Tensor:
    """The same from a Cholesky factor."""
    gram = c * (factor.T @ factor)
    gram.diagonal().add_(1)
    return torch.cholesky_solve(factor.T, torch.linalg.cholesky(gram)).T
