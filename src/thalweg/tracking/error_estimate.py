"""How wrong is a tracked projection P_k v? Which parts its error has, and what a step sees of each.

- **Sampling.** Products come from a subset B of the samples, corrected by a reference. The halves
  of B, corrected likewise, differ by errors of the same size: half the difference that they make to
  the projection of v is the estimate, at each step (`sampling_error`, `lockstep_errors`).
- **Bias.** One power step takes the basis towards the eigenspace and leaves a fraction of its
  error, the damping: at worst lambda_{k+1} / lambda_k. Both halves have it in common, so it cannot
  be seen between them. It is estimated as the damping times the distance that the step moved the
  projection (`movement`). A fresh product over all samples, at each renewal of the reference, shows
  both parts together, and the damping is learned from it (`ErrorEstimate`).

The two are independent and add up in squares. All errors are relative to norm(v).

Example:
    >>> estimate = ErrorEstimate()
    >>> estimate.begin(0.5)  # lambda_{k+1} / lambda_k
    >>> estimate.learn(checked=0.01, sampling=0.006, bias=estimate.bias(0.02))  # 0.008 was left
    >>> round(estimate.damping, 3)
    0.316
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from thalweg.linalg import coordinates, linear_combination, norm, project, squared_norm
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.spectrum.gap import GapWatch
from thalweg.tracking.power_step import LockstepPowerStep, PowerStep
from thalweg.tracking.reference import Reference

# Until it is known better: the least that one power step leaves of a basis's error.
INITIAL = 0.1
LEAST, MOST = 0.02, 0.9


class ErrorEstimate:
    """What is known of one run's error: its damping and its lambda_{k+1}.

    Args:
        gap_every: renewals from one look at lambda_{k+1} to the next, 0 for none.

    Attributes:
        damping: the fraction of a projection's movement by a power step that the step leaves
            undone, from `LEAST` to `MOST`.
        gap: lambda_{k+1} when last looked at.

    Raises:
        InvalidInput: a negative `gap_every`.
    """

    def __init__(self, gap_every: int = 0) -> None:
        self.damping = INITIAL
        self.gap = GapWatch(gap_every)

    def begin(self, ratio: float) -> None:
        """Start from lambda_{k+1} / lambda_k: at worst that is left, on average less."""
        self.damping = min(max(INITIAL, ratio / 2), MOST)

    def bias(self, moved: float) -> float:
        """What a power step has left, from how far it moved the projection."""
        return self.damping * moved

    def learn(self, checked: float, sampling: float, bias: float) -> None:
        """Learn from a fresh product over all samples.

        Args:
            checked: how far it moved the tracked projection: bias and sampling error together.
            sampling: the estimated sampling error.
            bias: the estimated bias, of the tracker's own power step.
        """
        if bias > 0:
            moved = bias / self.damping
            excess = max(checked**2 - sampling**2, 0.0) ** 0.5
            measured = min(max(excess / moved, LEAST), MOST)
            self.damping = (self.damping * measured) ** 0.5

    def left(self, checked: float) -> float:
        """The error after a fresh product has moved the projection by `checked`.

        Of an error e the product has seen (1 - damping) e, and left damping e.
        """
        return min(checked * self.damping / (1 - self.damping), 1.0)

    def look_at_gap(
        self, operator: Callable[[], SymmetricOperator], rows: Tensor, eigenvalues: Tensor
    ) -> float:
        """Find lambda_{k+1} where that is due, see `GapWatch.look`; returns the products spent.

        The first look is where the damping begins from.
        """
        first = self.gap.looks == 0
        products = self.gap.look(operator, rows, eigenvalues)
        if first and self.gap.looks:
            self.begin(self.gap.ratio(eigenvalues))
        return products

    def overtaken(self, eigenvalue: float, tolerance: float) -> bool:
        """Whether lambda_{k+1} was seen above lambda_k: S_k has lost an eigenvector to the bulk."""
        return self.gap.value > eigenvalue * (1 + tolerance)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next estimates depend on."""
        return {"damping": self.damping, "gap": self.gap.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.damping = state["damping"]
        self.gap.load_state_dict(state["gap"])


@dataclass
class SeenError:
    """What a power step and its subset show of the error of one run's P_k v.

    Attributes:
        step: the power step.
        vector: v (P,).
        reference: what the step began from; None where all samples were used, and `half` as well.
        half: the operator over the first half of the subset, at the point of the step.
        correction: see `population_correction`.
    """

    step: PowerStep
    vector: Tensor
    reference: Reference | None
    half: SymmetricOperator | None
    correction: float

    @cached_property
    def moved(self) -> float:
        """How far the step moved the projection."""
        return movement(self.step, self.vector)

    @cached_property
    def sampling(self) -> float:
        """The estimated sampling error; costs two products with the half, once."""
        if self.reference is None or self.half is None:
            return 0.0
        error = sampling_error(self.reference, self.half, self.step, self.vector)
        return error * self.correction


def total(sampling: float, bias: float) -> float:
    """Both parts of an error together."""
    return (sampling**2 + bias**2) ** 0.5


def relative(difference: Tensor, vectors: Tensor) -> list[float]:
    """norm(difference) / norm(v) of each vector (P,) or (R, P); 0 where both vanish."""
    lengths = norm(vectors).clamp(min=torch.finfo(vectors.dtype).tiny)
    return (norm(difference) / lengths).reshape(-1).tolist()


def population_correction(subset: int, num_samples: int) -> float:
    """sqrt(1 - m / N), the finite population correction: all samples have no sampling error."""
    return (1 - subset / num_samples) ** 0.5


def movement(step: PowerStep, vector: Tensor) -> float:
    """norm of the change of P_k v by a power step, relative to a vector (P,)."""
    if step.stale is None:
        return 0.0
    return relative(step.project(vector) - project(step.stale, vector), vector)[0]


def sampling_error(
    reference: Reference, half: SymmetricOperator, step: PowerStep, vector: Tensor
) -> float:
    """What half the difference of the subset's halves does to P_k v, its norm over norm(v).

    The first half differs from the whole subset by half the difference of the halves:
    (A_1 - A_2) / 2 = A_1 - A_B. Its effect on one vector costs two products with the half, not k.

    Args:
        reference: what the step began from.
        half: A over the first half of the subset, at the point of the step.
        step: the power step from the basis of the reference.
        vector: v (P,).

    To first order: with E the difference in the images and F = Z^T E that in the basis C, the
    projector differs by (I - P) F^T C + C^T F (I - P).
    """
    assert step.combination is not None
    combination = step.combination.to(reference.rows)
    within = coordinates(step.rows, vector)
    dominant = linear_combination(step.rows, within)
    outside = vector - dominant
    mixed = combination @ within
    block = torch.stack([linear_combination(reference.rows, mixed), outside], dim=1)
    moved, turned = (half @ block).T
    # E^T Z c; the images of the whole subset give C^T c.
    across = moved + linear_combination(reference.offset_first, mixed) - dominant
    # Its part outside S_k, by Pythagoras.
    away = squared_norm(across) - squared_norm(coordinates(step.rows, across))
    seen = coordinates(reference.rows, turned) + coordinates(reference.offset_first, outside)
    deviation = (away.clamp(min=0) + squared_norm(combination.T @ seen)).sqrt()
    return float(deviation / norm(vector)) if norm(vector) > 0 else 0.0


def lockstep_errors(step: LockstepPowerStep, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """`sampling_error` and `movement` of R runs, relative to vectors (R, P); both (R,).

    The difference of the halves is known for the whole bases here: there is nothing to multiply.
    """
    assert step.stale is not None
    lengths = norm(vectors).clamp(min=torch.finfo(vectors.dtype).tiny)
    within = coordinates(step.rows, vectors)
    dominant = linear_combination(step.rows, within)
    moved = norm(dominant - project(step.stale, vectors))
    if step.difference is None:
        return torch.zeros_like(lengths), moved / lengths
    assert step.combination is not None
    combination = step.combination.to(vectors)
    across = linear_combination(step.difference, coordinates(combination, within))
    away = squared_norm(across) - squared_norm(coordinates(step.rows, across))
    turned = coordinates(step.difference, vectors - dominant)
    sampling = away.clamp(min=0) + squared_norm(linear_combination(combination, turned))
    return sampling.sqrt() / lengths, moved / lengths
