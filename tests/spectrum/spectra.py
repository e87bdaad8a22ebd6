"""Random diagonal operators of many shapes of spectrum, and vectors with more of the top."""

from __future__ import annotations

import torch
from torch import Tensor

from thalweg.operators.symmetric import DenseOperator

KINDS = 6


class Diagonal(DenseOperator):
    """A diagonal matrix: multiplied element by element."""

    def __init__(self, eigenvalues: Tensor) -> None:
        super().__init__(torch.diag(eigenvalues))
        self.eigenvalues = eigenvalues

    def __matmul__(self, vectors: Tensor) -> Tensor:
        self.num_matvecs += vectors.shape[1] if vectors.dim() == 2 else 1
        scale = self.eigenvalues if vectors.dim() == 1 else self.eigenvalues[:, None]
        return scale * vectors


def spectrum(kind: int, size: int, generator: torch.Generator) -> Tensor:
    """Eigenvalues (size,) in float64, the largest 1: with and without gaps, bulks of both signs."""

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64)

    def normal(count: int) -> Tensor:
        return torch.randn(count, generator=generator, dtype=torch.float64)

    if kind == 0:
        values = 10 ** (-3 * uniform(size))
    elif kind == 1:
        outliers = 3 + int(17 * uniform(1))
        values = torch.cat([0.1 + 0.9 * uniform(outliers), 0.02 * normal(size - outliers)])
    elif kind == 2:
        values = torch.arange(1, size + 1, dtype=torch.float64) ** -(0.5 + uniform(1))
    elif kind == 3:
        values = torch.cat([0.9 ** torch.arange(40).double(), 0.02 * normal(size - 40)])
    elif kind == 4:
        one = torch.ones(1, dtype=torch.float64)
        values = torch.cat([one, 0.25 * uniform(30), 0.01 * normal(size - 31)])
    else:
        values = 2 * uniform(size) - 1
    return values / values.max()


def vectors(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Vectors (P, count) with more of the top, by a random power of the curvature."""
    power = 1.5 * torch.rand(1, generator=generator, dtype=torch.float64)
    drawn = torch.randn(len(values), count, generator=generator, dtype=torch.float64)
    return drawn * values.abs().clamp(min=1e-4)[:, None] ** power


def threshold(generator: torch.Generator) -> float:
    """From 1 down to a fiftieth."""
    return float(10 ** (-1.7 * torch.rand(1, generator=generator)))
