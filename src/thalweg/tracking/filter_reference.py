"""Products over few samples, corrected by what was known at a reference over all of them.

At a reference theta_r the Krylov space of a vector gives an orthonormal V (m, P) with A(theta_r) V,
over all samples, for nothing. Over a random part B of the samples, later on,

    A(theta) ~ A_B(theta) + C,   C V = (A - A_B)(theta_r) V,   C symmetric, 0 outside of V and C V

is a control variate: what remains is the sampling error of the *change* since the reference, and
that outside of V. Two halves B_1 and B_2 of the part give two results; their mean counts, and half
of their difference estimates its error, whatever the cause but one that both share.

Example:
    >>> import torch
    >>> from thalweg.operators.symmetric import DenseOperator
    >>> rough, exact = torch.eye(3), torch.diag(torch.tensor([2.0, 1.0, 1.0]))
    >>> rows = torch.eye(3)[:1]
    >>> corrected = Corrected(DenseOperator(rough), rows, rows @ (exact - rough))
    >>> (corrected @ torch.ones(3, 1)).flatten().tolist()
    [2.0, 1.0, 1.0]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.linalg import coordinates, gram, linear_combination
from thalweg.loss.protocol import Loss
from thalweg.operators.symmetric import (
    OperatorAround,
    OperatorAt,
    SymmetricOperator,
    product_with_error,
)
from thalweg.spectrum.lanczos import LanczosSpace


class Corrected(OperatorAround):
    """A symmetric operator plus the symmetric C with C V = E, 0 on what is outside of V and E.

    C = E V^T + V E^T - V (V^T E) V^T, for an orthonormal V.

    Args:
        operator: the one to correct.
        rows: V^T, (m, P).
        differences: E^T, (m, P).
    """

    def __init__(self, operator: SymmetricOperator, rows: Tensor, differences: Tensor) -> None:
        self.operator = operator
        self._rows = rows
        self._differences = differences
        within = gram(rows, differences)
        self._within = (within + within.T) / 2

    def __matmul__(self, vectors: Tensor) -> Tensor:
        """The product with (P,) or the columns of (P, k)."""
        return self.product_with_error(vectors)[0]

    def product_with_error(
        self, vectors: Tensor, *, measured: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `SymmetricOperator`. What corrects is as good as the products that it was made of."""
        inside = coordinates(self._rows, vectors)
        other = coordinates(self._differences, vectors) - self._within @ inside
        image, errors = product_with_error(self.operator, vectors, measured=measured)
        image = image + linear_combination(self._differences, inside)
        return image + linear_combination(self._rows, other), errors


@dataclass(frozen=True)
class FilterReference:
    """A Krylov space with its products over all samples, and over two halves of a few of them.

    Attributes:
        rows: V^T, (m, P).
        differences: of either half, ((A - A_B)(theta_r) V)^T, (m, P).
        halves: the samples of either, int64 (n,).
    """

    rows: Tensor
    differences: tuple[Tensor, Tensor]
    halves: tuple[Tensor, Tensor]

    @classmethod
    def at(
        cls,
        space: LanczosSpace,
        operator: OperatorAt,
        objective: Loss,
        theta: Tensor,
        halves: tuple[Tensor, Tensor],
    ) -> FilterReference:
        """The reference at theta, from a space that was grown there over all samples."""
        rows, images = space.rows_and_images()
        over_halves = (operator(objective, theta, half) for half in halves)
        first, second = (images - (half @ rows.T).T for half in over_halves)
        return cls(rows, (first, second), halves)

    def corrected(
        self, operator: OperatorAt, objective: Loss, theta: Tensor
    ) -> tuple[Corrected, Corrected]:
        """A at theta by either half, corrected."""
        first, second = (
            Corrected(operator(objective, theta, half), self.rows, difference)
            for half, difference in zip(self.halves, self.differences, strict=True)
        )
        return first, second

    def state_dict(self) -> dict[str, Any]:
        """All that it is."""
        return {
            "rows": self.rows,
            "differences": list(self.differences),
            "halves": list(self.halves),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> FilterReference:
        """What `state_dict` gave."""
        first, second = state["differences"]
        one, other = state["halves"]
        return cls(state["rows"], (first, second), (one, other))


def drawn_halves(
    num_samples: int, count: int, generator: torch.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Two halves of `count` samples that are drawn at random, each in order."""
    drawn = torch.randperm(num_samples, generator=generator, device="cpu")[:count].to(device)
    half = count // 2
    return drawn[:half].sort().values, drawn[half : 2 * half].sort().values
