"""The fixed references of R runs: the control variate of `reference.py`, for all runs at once.

The two halves of the subset are multiplied apart, as two rows of the same computation; their mean
corrects the reference, and half their difference is the sampling error, without a further product.

    Y_h = H_h(theta) U + (H(theta_r) U - H_h(theta_r) U),    Y = (Y_1 + Y_2) / 2
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.linalg import inner_products
from thalweg.loss.lockstep_objective import LockstepObjective


@dataclass
class LockstepReference:
    """A basis for each run, and how far the halves of the subset are from all samples there.

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
        size: int,
        generator: torch.Generator,
    ) -> tuple[LockstepReference, Tensor]:
        """Take the reference; also return the products over all samples, as rows (R, k, P).

        Args:
            objective: of the runs.
            thetas: the reference points (R, P).
            rows: U^T of each run, (R, k, P).
            size: m, samples in the subset, even.
            generator: what the subset is drawn by.
        """
        order = torch.randperm(objective.num_samples, generator=generator)
        # In ascending order each half reads the data forwards.
        halves = order[:size].reshape(2, -1).sort(dim=1).values.to(thetas.device)
        whole = objective.hessian_products(thetas, rows)
        sampled = _products_of_halves(objective, thetas, rows, halves)
        return cls(rows, (whole.unsqueeze(1) - sampled).contiguous(), halves), whole

    def images(self, objective: LockstepObjective, thetas: Tensor) -> tuple[Tensor, Tensor]:
        """H times the bases by the subset, corrected; and half the difference of the halves.

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
        """The same reference seen from other bases (R, k, P): see `Reference.turned`."""
        coordinates = inner_products(rows, self.rows).to(rows)
        offset = coordinates.unsqueeze(1) @ self.offset
        return LockstepReference(rows, offset, self.halves)


def _products_of_halves(
    objective: LockstepObjective, thetas: Tensor, rows: Tensor, halves: Tensor
) -> Tensor:
    """The Hessian over each half of the subset times the bases, (R, 2, k, P)."""
    runs = len(thetas)
    product = objective.hessian_products(
        thetas.repeat_interleave(2, 0), rows.repeat_interleave(2, 0), halves.repeat(runs, 1)
    )
    return product.unflatten(0, (runs, 2))
