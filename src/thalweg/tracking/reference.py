"""The fixed reference of a tracker: a control variate for products with a curvature A of the loss.

At theta_r the product of a basis U with A over all samples is known. At a later theta only a fixed
subset B of the samples is multiplied, and corrected by what it missed at theta_r:

    A(theta) U  ~  A_B(theta) U + (A(theta_r) U - A_B(theta_r) U)

The first half of B, corrected likewise, differs from this by a sampling error of the same size:
(A_1 - A_2) / 2 = A_1 - A_B. Its effect on the projection of one vector costs two products with the
half, not k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.linalg import inner_products
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.tracking.power_step import PowerStep

Curvature = Callable[[Tensor | None], SymmetricOperator]
"""A at one theta, over some of the samples; None for all."""


@dataclass
class Reference:
    """A basis as rows (b, P), and how far the subset and its first half are from all samples there.

    Attributes:
        rows: U^T.
        offset: (A - A_B) U at the reference, as rows.
        offset_first: (A - A_1) U at the reference, as rows.
        subset: the samples B, first half first, int64 (m,).
    """

    rows: Tensor
    offset: Tensor
    offset_first: Tensor
    subset: Tensor

    @classmethod
    def at(
        cls,
        curvature: Curvature,
        rows: Tensor,
        size: int,
        num_samples: int,
        generator: torch.Generator,
    ) -> tuple[Reference, Tensor]:
        """Take the reference; also return the products over all samples, as rows.

        Args:
            curvature: A at the reference point, over given samples.
            size: m, samples in the subset.
            generator: what the subset is drawn by.
        """
        order = torch.randperm(num_samples, generator=generator)
        # In ascending order each half reads the data forwards.
        first, second = (part.sort().values for part in order[:size].tensor_split(2))
        subset = torch.cat([first, second])
        whole, sampled, half = ((curvature(part) @ rows.T).T for part in (None, subset, first))
        return cls(rows, whole - sampled, whole - half, subset), whole

    def turned(self, rows: Tensor) -> Reference:
        """The same reference seen from another basis C near U, as rows.

        Of C = U R + D the part in span(U) is corrected, with R = U^T C; the small rest D enters by
        the subset alone.
        """
        coordinates = inner_products(rows, self.rows).to(rows)
        return Reference(
            rows, coordinates @ self.offset, coordinates @ self.offset_first, self.subset
        )

    def images(self, curvature: Curvature) -> tuple[Tensor, Tensor | None]:
        """A times the basis by the subset, as rows; and the subset's gradient (P,), if known."""
        operator = curvature(self.subset)
        images = (operator @ self.rows.T).T.add_(self.offset)
        return images, getattr(operator, "gradient", None)

    @property
    def first_half(self) -> Tensor:
        """The samples of the first half, int64 (m / 2,)."""
        return self.subset[: len(self.subset) // 2]

    def deviation(self, half: SymmetricOperator, step: PowerStep, vector: Tensor) -> Tensor:
        """How far the projection of v would be off by half the difference of the halves, its norm.

        Args:
            half: A over the first half, at the point of the step.
            step: the power step from the basis of this reference.

        To first order: with E the difference in the images and F = Z^T E that in the basis C, the
        projector differs by (I - P) F^T C + C^T F (I - P).
        """
        assert step.combination is not None
        combination = step.combination.to(self.rows)
        coordinates = step.rows @ vector
        dominant = step.rows.T @ coordinates
        outside = vector - dominant
        mixed = combination @ coordinates
        moved, turned = (half @ torch.stack([self.rows.T @ mixed, outside], dim=1)).T
        # E^T Z c; the images of the whole subset give C^T c.
        across = moved + self.offset_first.T @ mixed - dominant
        # Its part outside S_k, by Pythagoras.
        away = across.square().sum() - (step.rows @ across).square().sum()
        within = combination.T @ (self.rows @ turned + self.offset_first @ outside)
        return (away.clamp(min=0) + within.square().sum()).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        return vars(self).copy()
