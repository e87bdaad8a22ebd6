"""The fixed reference of a tracker: a control variate for products with a curvature A of the loss.

At theta_r the product of a basis U with A over all samples is known. At a later theta only a fixed
subset B of the samples is multiplied, and corrected by what it missed at theta_r:

    A(theta) U  ~  A_B(theta) U + (A(theta_r) U - A_B(theta_r) U)

The two halves of B, corrected likewise, differ from each other by a sampling error of the same
size: see `error_estimate.py`. `Reference`, of one run, multiplies all of B at once. A
`LockstepReference`, of R runs, multiplies its halves apart, as two rows of one batched computation:
a subset in one piece would be no faster there, and the difference of the halves comes with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.linalg import combine, inner_products, norm
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.operators.symmetric import SymmetricOperator, product_with_error

Curvature = Callable[[Tensor | None], SymmetricOperator]
"""A at one theta, over some of the samples; None for all."""


def draw_halves(num_samples: int, size: int, generator: torch.Generator) -> Tensor:
    """Two disjoint random halves of a subset of `size` samples, int64 (2, size / 2), ascending."""
    order = torch.randperm(num_samples, generator=generator, device="cpu")[: size // 2 * 2]
    # In ascending order each half reads the data forwards.
    return order.reshape(2, -1).sort(dim=1).values


def relative_error(errors: Tensor | None, images: Tensor, k: int | None = None) -> float:
    """The largest error of products, relative to their norms; 0 where they are exact.

    Differences of gradients are about equally good along all vectors, relative to their products.

    Args:
        errors: by column (b,), None where they are exact.
        images: the products, (P, b).
        k: how many of the columns count; None for all.
    """
    if errors is None:
        return 0.0
    lengths = norm(images, dim=0).to(errors).clamp(min=torch.finfo(torch.float32).tiny)
    return float((errors / lengths)[:k].max())


def turn(rows: Tensor, reference: Tensor) -> Tensor:
    """R = U^T C (..., k, b) of bases C near U, both as rows: C is U R and a small rest D.

    Seen from C, the part U R of a product is corrected, and D enters by the subset alone.
    """
    return inner_products(rows, reference).to(rows)


@dataclass
class Reference:
    """A basis, and how far the subset and its first half are from all samples there.

    Attributes:
        rows: U^T (b, P).
        offset: (A - A_B) U at the reference, as rows (b, P).
        offset_first: (A - A_1) U at the reference, A_1 over the first half of B, as rows (b, P).
        subset: the samples B, first half first, int64 (m,).
        product_error: of the products that it was made of, see `relative_error`.
    """

    rows: Tensor
    offset: Tensor
    offset_first: Tensor
    subset: Tensor
    product_error: float = 0.0

    @classmethod
    def at(
        cls,
        curvature: Curvature,
        rows: Tensor,
        whole: Tensor,
        halves: Tensor,
        product_error: float = 0.0,
    ) -> Reference:
        """Take the reference.

        Args:
            curvature: A at the reference point, over given samples.
            rows: U^T (b, P).
            whole: A U over all samples there, as rows (b, P).
            halves: the samples of the subset, (2, m / 2).
            product_error: of the images over all samples.
        """
        subset = halves.reshape(-1)
        sampled, error = product_with_error(curvature(subset), rows.T)
        half, _ = product_with_error(curvature(halves[0]), rows.T)
        both = math.hypot(product_error, relative_error(error, sampled))
        return cls(rows, whole - sampled.T, whole - half.T, subset, both)

    def images(self, curvature: Curvature) -> tuple[Tensor, Tensor | None, float]:
        """A U by the subset, corrected, as rows; the subset's gradient (P,), where known.

        And the products' own error, those of the reference included, see `relative_error`.
        """
        operator = curvature(self.subset)
        sampled, errors = product_with_error(operator, self.rows.T)
        error = math.hypot(self.product_error, relative_error(errors, sampled))
        images = sampled.T.add_(self.offset)
        return images, getattr(operator, "gradient", None), error

    def turned(self, rows: Tensor) -> Reference:
        """The same reference seen from another basis near U, as rows: see `turn`."""
        rotation = turn(rows, self.rows)
        offset, first = (combine(rotation, each) for each in (self.offset, self.offset_first))
        return Reference(rows, offset, first, self.subset, self.product_error)

    @property
    def first_half(self) -> Tensor:
        """The samples of the first half, int64 (m / 2,)."""
        return self.subset[: len(self.subset) // 2]

    def state_dict(self) -> dict[str, Any]:
        """The tensors, by name."""
        return vars(self).copy()


@dataclass
class LockstepReference:
    """A basis for each of R runs, and how far the halves of the subset are from all samples there.

    Attributes:
        rows: U^T of each run, (R, k, P).
        offset: (H - H_h) U at the reference, (R, 2, k, P), a half of the subset each.
        halves: the samples of both halves, the same for all runs, int64 (2, m / 2).
    """

    rows: Tensor
    offset: Tensor
    halves: Tensor

    @classmethod
    def at(
        cls,
        objective: LockstepObjective,
        thetas: Tensor,
        rows: Tensor,
        whole: Tensor,
        halves: Tensor,
    ) -> LockstepReference:
        """Take the reference.

        Args:
            objective: of the runs.
            thetas: the reference points (R, P).
            rows: U^T of each run, (R, k, P).
            whole: H U over all samples there, as rows (R, k, P).
            halves: the samples of the subset, (2, m / 2).
        """
        sampled = _products_of_halves(objective, thetas, rows, halves)
        return cls(rows, (whole.unsqueeze(1) - sampled).contiguous(), halves)

    def images(self, objective: LockstepObjective, thetas: Tensor) -> tuple[Tensor, Tensor]:
        """H U by the subset, corrected; and half the difference of its halves.

        Args:
            objective: of the runs.
            thetas: where the runs are now (R, P).

        Returns:
            Both as rows (R, k, P).
        """
        first, second = self.offset.add(
            _products_of_halves(objective, thetas, self.rows, self.halves)
        ).unbind(1)
        return (first + second) / 2, (first - second) / 2

    def turned(self, rows: Tensor) -> LockstepReference:
        """The same reference seen from other bases near U (R, k, P): see `turn`."""
        rotation = turn(rows, self.rows)
        return LockstepReference(rows, combine(rotation.unsqueeze(1), self.offset), self.halves)

    def state_dict(self) -> dict[str, Any]:
        """The tensors, by name."""
        return vars(self).copy()


def _products_of_halves(
    objective: LockstepObjective, thetas: Tensor, rows: Tensor, halves: Tensor
) -> Tensor:
    """The Hessian over each half of the subset times the bases, (R, 2, k, P)."""
    runs = len(thetas)
    product = objective.hessian_products(
        thetas.repeat_interleave(2, 0), rows.repeat_interleave(2, 0), halves.repeat(runs, 1)
    )
    return product.unflatten(0, (runs, 2))
