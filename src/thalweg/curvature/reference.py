"""The fixed reference of a tracker: a control variate for products with the Hessian.

At theta_r the product of a basis U with the Hessian of all samples is known, Y_r = H(theta_r) U. At
a later theta only a fixed subset B of the samples is multiplied, and corrected by what it missed at
theta_r:

    H(theta) U  ~  H_B(theta) U + (H(theta_r) U - H_B(theta_r) U)

The first half of B, corrected likewise, differs from this by a sampling error of the same size:
(H_1 - H_2) / 2 = H_1 - H_B. Its effect on the projection of one vector costs two products with the
half, not k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.curvature.objective import Objective
from thalweg.curvature.operators import Hessian
from thalweg.curvature.power_step import PowerStep


@dataclass
class Reference:
    """A basis as rows (b, P), and how far the subset and its first half are from all samples there.

    Attributes:
        rows: U^T.
        offset: (H - H_B) U at the reference, as rows.
        offset_first: (H - H_1) U at the reference, as rows.
        subset: the samples B, first half first, int64 (m,).
    """

    rows: Tensor
    offset: Tensor
    offset_first: Tensor
    subset: Tensor

    @classmethod
    def at(
        cls,
        objective: Objective,
        theta: Tensor,
        rows: Tensor,
        size: int,
        generator: torch.Generator,
    ) -> tuple[Reference, Tensor]:
        """Take the reference at theta; also return the products over all samples, as rows.

        Args:
            size: m, samples in the subset.
            generator: what the subset is drawn by.
        """
        order = torch.randperm(objective.num_samples, generator=generator)
        # In ascending order each part reads the data forwards.
        parts = [part.sort().values for part in order.tensor_split((size // 2, size)) if len(part)]
        products = [(Hessian(objective, theta, part) @ rows.T).T for part in parts]
        # Weights, not numbers of samples: classes and ignored targets may weigh unequally.
        shares = [objective.weight(part) / objective.weight() for part in parts]
        sampled = products[0].mul(shares[0]).add_(products[1], alpha=shares[1])
        whole = sampled.clone()
        for share, product in zip(shares[2:], products[2:], strict=True):
            whole.add_(product, alpha=share)
        offset = whole - sampled.div_(shares[0] + shares[1])
        subset = torch.cat(parts[:2])
        return cls(rows, offset, whole - products[0], subset), whole

    def images(self, objective: Objective, theta: Tensor) -> tuple[Tensor, Tensor]:
        """H(theta) times the basis by the subset, as rows; and the subset's gradient (P,)."""
        hessian = Hessian(objective, theta, self.subset)
        images = (hessian @ self.rows.T).T.add_(self.offset)
        assert hessian.gradient is not None
        return images, hessian.gradient

    def first_half(self, objective: Objective, theta: Tensor) -> Hessian:
        """H_1 at theta, ready for several products."""
        return Hessian(objective, theta, self.subset[: len(self.subset) // 2], keep_graph=True)

    def deviation(self, half: Hessian, step: PowerStep, vector: Tensor) -> Tensor:
        """How far the projection of v would be off by half the difference of the halves, its norm.

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
