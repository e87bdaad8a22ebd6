"""How wrong is a tracked projection P_k v? The parts of its error, and what a step sees of each.

Let U be the block before a power step, C after it, c_i its Ritz vectors and theta_i its Ritz
values; i is one of the first k, the dominant ones, and the guards beside them have the indices up
to b. The eigenvector u_j of the bulk has the part T_ji in a Ritz vector of U: its tilt. All errors
are relative to norm(v), and r_ji = lambda_j / lambda_i.

**Bias**, out of the block. A power step multiplies T_ji by r_ji: it moves by (1 - r_ji) T_ji and
leaves r_ji T_ji, that is, r_ji / (1 - r_ji) times as much as it moved. So what was seen to move
says what is left, but only with r. Along u_{b+1} this is at most

    r / (1 - r),    r = lambda_{b+1} / lambda_k,

and far less where the movement is spread over the bulk, most of which is near 0. How it is spread
one product shows: with the movement of the projection, weighted,

    m = sum_i (c_i . v) / theta_i (delta c_i),    A m = sum_ji r_ji (movement_ji) (c_i . v) u_j,

which lacks the factors 1 / (1 - r_ji) alone; their largest, 1 / (1 - r), takes their place. With
the guards chosen so that r <= 0.6, the bound is at most 2.5 times too large, and 1.0 to 1.3 times
as a rule. `Movement` and `content` are this. Without a gap guards may be packets of eigenvectors,
and what is left lies above lambda_{b+1}: after a step by all samples `bulk_edge.reach` takes its
place, and what this says is left, later steps from the same block leave as well. The projection is
wrong by sum_i (e_i (c_i . v) + c_i (e_i . v)) if the c_i are wrong by e_i: the second part has the
same ratio.

**Sampling**, out of the block. Products come from a subset of the samples, corrected by a
reference. Its two halves, corrected likewise, give Y_1 and Y_2: D = (Y_1 - Y_2) / 2 has the
distribution of the error of their mean. To first order e_i is D Z_i outside of C, Z being the
combination of Y that C is. Its effect on one vector costs two products with a half, not b. The
finite population correction sqrt(1 - m / N) applies.

**Mixing**, in the block. Sampling errors E of C^T A C turn dominant Ritz vectors into guards, by
E_ij / (theta_i - theta_j), at most 1. Its entries are few, and one draw of a few is too small by
three in a fifth of all cases. But they are of one kind: the curvature of a sample is nearly a sum
of squares, and E_ij varies as sigma sqrt(theta_i theta_j). So sigma is taken from all b components
of the deviation D Z c in the block, c_i = c_i . v, each of which has the variance
sigma^2 theta_j sum_i c_i^2 / theta_i. Eigenvalues are off by about sigma theta_i.

All parts add up in squares. What none of them can see: errors of second order, which matter after a
jump of theta (`turn` shows it, and the tracker solves anew); a direction of the bulk that overtakes
one of the block and to which no product leads (`bulk_edge.py` looks for it); rounding.

Example:
    >>> import torch
    >>> from thalweg.tracking.power_step import power_step
    >>> matrix = torch.diag(torch.tensor([10.0, 4.0, 0.0]))
    >>> rows = torch.tensor([[0.99995, 0.01, 0.0]])  # tilted by 0.01: 0.004 will be left
    >>> step = power_step(rows, rows @ matrix, 1)
    >>> vector = torch.tensor([1.0, 0.0, 0.0])
    >>> moved = Movement.of(step, vector)
    >>> fraction = content(step, moved, matrix @ moved.weighted)
    >>> round(float(fraction), 3), round(bias(float(fraction), float(moved.size), ratio=0.4), 5)
    (0.4, 0.004)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from thalweg.linalg import (
    combine,
    coordinates,
    gram,
    inner_products,
    linear_combination,
    norm,
    project,
    reject,
    squared_norm,
)
from thalweg.operators.symmetric import SymmetricOperator
from thalweg.tracking.power_step import LockstepPowerStep, PowerStep
from thalweg.tracking.reference import Reference

AnyPowerStep = PowerStep | LockstepPowerStep

ROUNDING = 10
"""Rounding of products, in units of the last place of lambda_1."""
LARGEST_RATIO = 0.95
"""What r counts as at most: a factor of 19 in place of any."""


@dataclass(frozen=True)
class Movement:
    """What a power step moved of the projections of vectors, out of the block; (P,) or (R, P).

    Attributes:
        weighted: m, see the module, (..., P); its sign is that of -m.
        outside: norm(sum_i (c_i . v) delta c_i), (...,).
        inside: norm(sum_i c_i (delta c_i . v)), (...,).
    """

    weighted: Tensor
    outside: Tensor
    inside: Tensor

    @classmethod
    def of(cls, step: AnyPowerStep, vectors: Tensor) -> Movement:
        """That of a step, in units of the vectors (P,) or (R, P)."""
        if step.stale is None:
            nothing = torch.zeros_like(norm(vectors))
            return cls(torch.zeros_like(vectors), nothing, nothing)
        # With B = C^T U each pass over P numbers is one of few. As (I - P_C) C = 0, what a vector
        # in span(C) has outside of U is, to first order, what its part in U has outside of C.
        shared = overlaps(step)
        within = coordinates(step.rows, vectors)
        k = within.shape[-1]
        both = torch.stack([within, step.divided(within)], dim=-2)
        in_old = both @ shared[..., :k, :]
        moved = combine(in_old, step.stale) - combine(in_old @ shared.mT, step.block)
        outside, weighted = moved.unbind(-2)
        of_bulk = coordinates(step.stale, vectors) - in_old[..., 0, :]
        inside = (shared[..., :k, :] @ of_bulk.unsqueeze(-1)).squeeze(-1)
        return cls(weighted, norm(outside), norm(inside))

    @property
    def size(self) -> Tensor:
        """Both parts together, (...,)."""
        return torch.hypot(self.outside, self.inside)


def overlaps(step: AnyPowerStep) -> Tensor:
    """C^T U (..., b, b) of a power step, in the dtype of the vectors."""
    assert step.stale is not None
    if step.stale.dim() == 3:
        return gram(step.block, step.stale)
    return inner_products(step.block, step.stale).to(step.stale)


def content(step: AnyPowerStep, movement: Movement, image: Tensor) -> Tensor:
    """norm(A m) / norm of the movement: what r is for it on the whole, (...,); 0 without movement.

    Args:
        step: the power step.
        movement: its movement.
        image: A m (..., P), for m = `movement.weighted`.
    """
    left = norm(reject(step.block, image))
    tiny = torch.finfo(left.dtype).tiny
    return torch.where(movement.outside > tiny, left / movement.outside.clamp(min=tiny), 0.0)


def bias(content: float, moved: float, ratio: float) -> float:
    """What a power step left of the error that it moved by `moved`: see the module.

    Args:
        content: see there.
        moved: of any unit; the result has it.
        ratio: r = lambda_{b+1} / lambda_k.
    """
    return content / (1 - min(max(ratio, 0.0), LARGEST_RATIO)) * moved


@dataclass(frozen=True)
class Deviation:
    """What a difference of two halves of a subset does to the projection of a vector, unscaled.

    Attributes:
        outside: its norm out of the block, (...,).
        inside: the components in the block of what it does to the dominant part, (..., b).
    """

    outside: Tensor
    inside: Tensor

    @classmethod
    def of(cls, step: AnyPowerStep, across: Tensor, along: Tensor) -> Deviation:
        """From D Z c (..., P) and Z^T D v_perp (..., k), v_perp = v outside of the block."""
        inside = coordinates(step.block, across)
        # The part outside of the block, by Pythagoras.
        away = (squared_norm(across) - squared_norm(inside)).clamp(min=0)
        return cls((away + squared_norm(along)).sqrt(), inside)


def deviation_by_half(
    reference: Reference, half: SymmetricOperator, step: PowerStep, vector: Tensor
) -> Deviation:
    """That of one run, by two products with the first half.

    The first half differs from the whole subset by half the difference of the halves:
    D = (A_1 - A_2) / 2 = A_1 - A_B.

    Args:
        reference: what the step began from.
        half: A over the first half of the subset, at the point of the step.
        step: the power step from the block of the reference.
        vector: v (P,).
    """
    assert step.combination is not None
    combination = step.combination[:, : step.k].to(reference.rows)
    within = coordinates(step.block, vector)
    dominant = linear_combination(step.rows, within[: step.k])
    outside = vector - linear_combination(step.block, within)
    mixed = combination @ within[: step.k]
    block = torch.stack([linear_combination(reference.rows, mixed), outside], dim=1)
    moved, turned = (half @ block).T
    # The images of the whole subset give C^T c.
    across = moved + linear_combination(reference.offset_first, mixed) - dominant
    seen = coordinates(reference.rows, turned) + coordinates(reference.offset_first, outside)
    return Deviation.of(step, across, combination.T @ seen)


def deviation_by_difference(step: LockstepPowerStep, vectors: Tensor) -> Deviation:
    """That of R runs, whose step has the difference of the halves for the whole bases."""
    assert step.difference is not None
    assert step.combination is not None
    combination = step.combination.to(vectors)
    within = coordinates(step.rows, vectors)
    across = linear_combination(step.difference, coordinates(combination, within))
    turned = coordinates(step.difference, vectors - project(step.rows, vectors))
    return Deviation.of(step, across, linear_combination(combination, turned))


def spread(step: PowerStep, deviation: Deviation, vector: Tensor) -> float:
    """sigma: see the module; NaN where the vector (P,) has no dominant part."""
    sizes = step.values.abs().clamp(min=torch.finfo(torch.float64).tiny)
    within = coordinates(step.rows, vector).double().cpu()
    weight = float((within.square() / sizes[: step.k]).sum())
    seen = float((deviation.inside.double().cpu().square() / sizes).mean())
    return (seen / weight) ** 0.5 if weight > 0 else math.nan


def mixing(step: PowerStep, sigma: float, vector: Tensor) -> float:
    """What turning Ritz vectors into guards does to P_k v, in units of the vector (P,).

    Args:
        step: a power step of one run.
        sigma: see the module.
        vector: v.
    """
    k, sizes = step.k, step.values.abs()
    within = coordinates(step.block, vector).double().cpu()
    gaps = (step.values[:k, None] - step.values[k:]).clamp(min=torch.finfo(torch.float64).tiny)
    # Rounding turns them as well, where the gap is closed.
    errors = sigma * (sizes[:k, None] * sizes[k:]).sqrt() + ROUNDING * _eps(step) * sizes[0]
    squares = (errors / gaps).clamp(max=1).square()
    return float(within[:k].square() @ squares.sum(1) + squares.sum(0) @ within[k:].square()) ** 0.5


def _eps(step: PowerStep) -> float:
    return torch.finfo(step.block.dtype).eps


def turn(step: AnyPowerStep) -> Tensor:
    """The sine of the largest angle between the new basis and the block before the step, (...,)."""
    cosines = torch.linalg.svdvals(overlaps(step)[..., : step.rows.shape[-2], :].double())
    return (1 - cosines[..., -1].square()).clamp(min=0).sqrt()


def total(sampling: float, bias: float) -> float:
    """Both kinds of error together; at most 1, which a wrong projection can do no worse than."""
    return min((sampling**2 + bias**2) ** 0.5, 1.0)


def relative(difference: Tensor, vectors: Tensor) -> list[float]:
    """norm(difference) / norm(v) of each vector (P,) or (R, P); 0 where both vanish."""
    lengths = norm(vectors).clamp(min=torch.finfo(vectors.dtype).tiny)
    return (norm(difference) / lengths).reshape(-1).tolist()


def population_correction(subset: int, num_samples: int) -> float:
    """sqrt(1 - m / N), the finite population correction: all samples have no sampling error."""
    return (1 - subset / num_samples) ** 0.5
