"""Does a product with a derivative agree with differences? Told apart from kinks and rounding.

At kinks (ReLU, max pooling) a central difference disagrees until its step is tiny, and where it is
too small rounding decides. So a disagreement is a fault only where differences at several steps
agree with one another, and not with the product. Each parameter is compared on its own scale, so
that a small one is not hidden by large ones.

Example:
    >>> import torch
    >>> theta, along = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    >>> gradient = lambda theta: theta**3
    >>> def difference(step):
    ...     return (gradient(theta + step * along) - gradient(theta - step * along)) / (2 * step)
    >>> compare(3 * along, gradient(theta), difference, [3]).agrees
    True
    >>> compare(2 * along, gradient(theta), difference, [3]).agrees
    False
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thalweg.linalg import norm, random_part
from thalweg.sharding import ShardedVector

# Relative to the scale of each parameter. Most are settled at the first.
STEPS = {torch.float64: (1e-5, 1e-6, 1e-7, 1e-4, 1e-3), torch.float32: (1e-2, 3e-3, 1e-3)}
TOLERANCE = {torch.float64: 1e-3, torch.float32: 5e-2}
# How far differences at two steps may be apart, relative to what they say is wrong.
SPREAD = {torch.float64: 0.01, torch.float32: 0.2}
# A difference below so many roundings of the largest part of the gradient says nothing.
ROUNDINGS = 100
SMALLEST_SCALE = 1e-2
# How far to go for the slope of a loss, and how far it may be off.
SLOPE, ROUGH_SLOPE = (0.01, 0.1), (0.1, 0.5)


@dataclass(frozen=True)
class Comparison:
    """What came out of comparing a product with differences.

    Attributes:
        agrees: True or False; None where nothing can be said.
        worst: the largest disagreement of a parameter, relative to its part of the product; where
            it agrees, beyond what rounding may do.
        parameter: the number of that parameter.
        dtype: in which it was compared.
        note: why nothing can be said, if so.
    """

    agrees: bool | None
    worst: float = 0.0
    parameter: int = 0
    dtype: torch.dtype | None = None
    note: str = ""


def compare(
    product: Tensor,
    gradient: Tensor,
    difference: Callable[[float], Tensor],
    sizes: Sequence[int],
) -> Comparison:
    """Compare a product (P,) with differences at some steps, parameter by parameter.

    Args:
        product: along a vector on the scale of the parameters.
        gradient: what the difference is of (P,): its size tells what rounding does.
        difference: the central difference (P,) along the same vector, at a step.
        sizes: of the parameters, which make up P.
    """
    dtype = product.dtype
    if dtype not in STEPS:
        return Comparison(None, dtype=dtype, note=f"{dtype} is too coarse for differences")
    if not bool(torch.isfinite(product).all()):
        return Comparison(None, dtype=dtype, note="the product is not finite")
    sizes = list(sizes)
    parts = product.split(sizes)
    largest = max(float(part.norm()) / part.numel() ** 0.5 for part in gradient.split(sizes))
    rounding = ROUNDINGS * torch.finfo(dtype).eps * largest
    unsettled = dict.fromkeys(range(len(sizes)), 0.0)
    before: dict[int, Tensor] = {}
    settled: dict[int, list[bool]] = {}
    worst = (0.0, 0)
    for step in STEPS[dtype]:
        moved = difference(step)
        for i, other in enumerate(moved.split(sizes)):
            if i not in unsettled:
                continue
            apart = float((parts[i] - other).norm())
            size = max(float(parts[i].norm()), float(other.norm()))
            beyond = apart - rounding / step * sizes[i] ** 0.5
            if beyond <= TOLERANCE[dtype] * size:
                del unsettled[i]
                worst = max(worst, (beyond / size if beyond > 0 else 0.0, i))
                continue
            if i in before:
                spread = float((other - before[i]).norm())
                settled.setdefault(i, []).append(spread <= SPREAD[dtype] * apart)
            before[i], unsettled[i] = other, apart / size
        if not unsettled:
            return Comparison(True, *worst, dtype)
    # In float32 one step says too little.
    enough = any if dtype == torch.float64 else all
    faulty = [(unsettled[i], i) for i, steps in settled.items() if i in unsettled and enough(steps)]
    if faulty:
        return Comparison(False, *max(faulty), dtype)
    worst = max((relative, i) for i, relative in unsettled.items())
    note = "differences do not settle as their step shrinks (kinks, or rounding)"
    return Comparison(None, *worst, dtype, note)


class Valued(Protocol):
    """What has a gradient: a `Loss`."""

    def parameters(self) -> Sequence[Tensor]: ...
    def theta(self) -> Tensor: ...
    def value(self, theta: Tensor | None = None, samples: Tensor | None = None) -> Tensor: ...
    def value_and_gradient(
        self, theta: Tensor | None = None, samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...


def is_gradient(loss: Valued, samples: Tensor | None, *, rough: bool) -> bool:
    """Whether the gradient is that of the values: not so of straight-through estimators.

    Args:
        rough: the loss is computed in lower precision than its parameters.
    """
    theta, (_, gradient) = loss.theta(), loss.value_and_gradient(samples=samples)
    size = scales(theta, [parameter.numel() for parameter in loss.parameters()])
    along = size.square() * gradient
    length = float(norm(size * gradient))
    if not length:
        return True
    step, tolerance = ROUGH_SLOPE if rough else SLOPE
    ends = [float(loss.value(theta + s * step * along / length, samples)) for s in (1, -1)]
    return abs((ends[0] - ends[1]) / (2 * step) - length) <= tolerance * length


def scales(theta: Tensor, sizes: Sequence[int]) -> Tensor:
    """How far each of P numbers is moved: the root mean square of its parameter, (P,)."""
    if isinstance(theta, ShardedVector):
        return _scales_of_parts(theta, sizes)
    parts = theta.split(list(sizes))
    each = [max(float(p.norm()) / max(p.numel(), 1) ** 0.5, SMALLEST_SCALE) for p in parts]
    return torch.cat([torch.full_like(p, s) for p, s in zip(parts, each, strict=True)])


def _scales_of_parts(theta: ShardedVector, sizes: Sequence[int]) -> Tensor:
    sharding = theta.sharding
    parts = theta.own.split(sharding.counts_of(sizes))
    squares = sharding.total(torch.stack([part.square().sum() for part in parts]))
    each = [
        max((float(square) / max(size, 1)) ** 0.5, SMALLEST_SCALE)
        for square, size in zip(squares, sizes, strict=True)
    ]
    scaled = [torch.full_like(part, scale) for part, scale in zip(parts, each, strict=True)]
    return sharding.vector(torch.cat(scaled))


def random_like(tensor: Tensor, seed: int) -> Tensor:
    """Normal random numbers from a generator of their own, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(tensor, ShardedVector):
        kind = {"dtype": tensor.dtype, "device": tensor.device}
        return random_part(generator, tensor.sharding).to(**kind)
    return torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu").to(
        tensor
    )
