"""Products with the Hessian by central differences of gradients: nothing but gradients is needed.

    D(e) = (g(theta + e v) - g(theta - e v)) / (2 e) = H v + e^2 T(v) + ...,    norm(v) = 1

is off by the third derivatives of the gradient, which are large along sharp directions, and by the
gradients' rounding over e, which weighs most along flat ones. So the step is chosen for each vector
by its slope s = norm(H v), which the first of the two gradients tells:

    error = noise / e + s max(floor, bend s) e^2,

and the step is where that is least. Both gradients together tell how fast H changes along the very
vector, see `_truncation_of`; where that is faster, a shorter step is taken.

(Relative to s, third derivatives grow no faster than s from flat to sharp directions in the models
that were tried, and do not always vanish with it: hence two coefficients.) The three numbers are
measured before the first product of a loss, along its vector and along H times that, a sharp one,
by differences at steps a factor of 4 apart, until the shorter ones show rounding and the longer
ones truncation: 12 to 20 gradients. They are kept for the products that follow, at other points and
over other samples too, and checked by a second step, twice as long, along the sharpest vector of
the first block of each `GradientDifferences` over all samples; where they no longer hold they are
measured anew. A measured product is Richardson's
extrapolation, (4 D(e) - D(2 e)) / 3, of four gradients.

A product is two gradients, and a third where the slope was not as expected. Where gradients of many
points at once are cheaper, those of a block are taken together; a vector whose slope was not as
expected is multiplied again, beside others of that kind, at two gradients more. With kinks (ReLU)
it is one with another Hessian, smoothed over the step: see `guards/kinks.py`.

Source: Nocedal, Wright 2006, "Numerical Optimization", section 8.1, for the best step.

Example:
    >>> import torch
    >>> theta = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> at = GradientDifferences(lambda t: t**3, theta, DifferenceSteps(2.2e-16))
    >>> product, error = at.multiply_with_error(torch.eye(2, dtype=torch.float64))
    >>> product.round(decimals=6).tolist(), bool((error < 1e-6).all())
    ([[3.0, 0.0], [0.0, 12.0]], True)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from thalweg.linalg import norm

FIRST_STEP = 0.03
"""Where a search begins: this times the cube root of the rounding, in units of norm(theta)."""
APART = 4.0
"""The ratio of two steps of a search."""
SETTLED = 0.5
"""Differences at two steps that are further apart, relative to the product, say nothing yet."""
FLATTER = 10.0
"""The slopes of a flat and a sharp vector differ by this at least."""
LOOKED_AT = (0, *range(-1, -6, -1), *range(1, 9))
"""Powers of that ratio at which it begins, until one where two steps agree."""
MOST_STEPS = 14
"""Of a search, in case that neither rounding nor truncation shows."""
NEAR = 3.0
"""A step within this factor of the best one serves: the error is 1.7 to 3 times the least."""
TRIES = 3
MARGIN = 4.0
"""Third derivatives count as so many times what was measured: they vary among vectors, and a step
that is too short by a little costs less."""
SAFETY = 2.0
"""Errors are said to be so many times what they are expected to be: rounding varies."""
HOLDS = (1 / 16, 2.0)
"""A second step may differ by so much of what is expected before the search is done again."""
FLATTEST = 0.01
"""Vectors count as no flatter than this part of the flattest one of a search."""


GradientsAt = Callable[[Tensor], Tensor]
"""Gradients (m, P) at m points (m, P)."""


class DifferenceSteps:
    """What is known of the errors of a loss's differences, and the steps that follow from it.

    Args:
        rounding: the relative rounding of what gradients are computed in.

    Attributes:
        noise: norm of the rounding of a gradient, in its unit; NaN before the first product.
        floor, bend: of the truncation, see the module.
        flattest: the smallest slope that was measured.
        slopes: those of the last block, which the next one is expected to have.

    An `Objective` has one as `differences`. Example: see the module.
    """

    def __init__(self, rounding: float) -> None:
        self.rounding = rounding
        self.noise = math.nan
        self.floor = self.bend = self.flattest = 0.0
        self.slopes: list[float] = []

    @property
    def is_known(self) -> bool:
        """Whether they were measured."""
        return not math.isnan(self.noise)

    def truncation(self, slope: float) -> float:
        """norm(T(v)), at worst, of a unit vector of that slope."""
        return MARGIN * slope * max(self.floor, self.bend * slope)

    def step(self, slope: float, truncation: float = 0.0) -> float:
        """The best step along a unit vector of that slope, and of that truncation or more."""
        least = max(slope, FLATTEST * self.flattest, torch.finfo(torch.float32).tiny)
        return (self.noise / (2 * max(self.truncation(least), truncation))) ** (1 / 3)

    def error(self, slope: float, truncation: float, step: float) -> float:
        """norm(D(step) - H v) of a unit vector of that slope and truncation, by estimate."""
        truncation = max(self.truncation(slope), truncation)
        return SAFETY * (self.noise / step + truncation * step**2)

    def raise_by(self, factor: float) -> None:
        """Expect so many times the error, where that is more."""
        self.noise *= max(factor, 1.0)
        self.floor *= max(factor, 1.0)
        self.bend *= max(factor, 1.0)

    def state_dict(self) -> dict[str, object]:
        """What was measured, so that a resumed run takes the same steps."""
        return {name: value for name, value in vars(self).items() if name != "rounding"}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what `state_dict` gave."""
        vars(self).update(state)


class GradientDifferences:
    """The gradient at theta, and products with its Jacobian by differences: a `Linearization`.

    Args:
        gradient_at: the gradient at a point, (P,) of (P,), a new tensor at each call; with the same
            samples and the same random numbers each time.
        theta: the point (P,).
        steps: what is known of errors, used and renewed.
        checks: whether the first block spends a second step to check that.
        at_once: of so many points, what gives their gradients together, (m, P) of (m, P); None
            where that is no way, or not the faster one.

    Vectors may have any length; errors are in units of the products. Example: see the module.
    """

    def __init__(
        self,
        gradient_at: Callable[[Tensor], Tensor],
        theta: Tensor,
        steps: DifferenceSteps,
        *,
        checks: bool = True,
        at_once: Callable[[int], GradientsAt | None] = lambda points: None,
    ) -> None:
        self._gradient_at = gradient_at
        self._theta = theta
        self._steps = steps
        self._checks = checks
        self._at_once = at_once
        # Of the block at work.
        self._gradients_at: GradientsAt | None = None
        self._gradient: Tensor | None = None

    def gradient(self) -> Tensor:
        """The gradient at theta (P,)."""
        if self._gradient is None:
            self._gradient = self._gradient_at(self._theta)
        return self._gradient

    def multiply(self, rows: Tensor) -> Tensor:
        """H times each row of (k, P), as rows."""
        return self.multiply_with_error(rows)[0]

    def multiply_with_error(self, rows: Tensor, *, measured: bool = False) -> tuple[Tensor, Tensor]:
        """The products, and how far they are off: norms (k,) by estimate, float64 on the CPU.

        Args:
            measured: by Richardson's extrapolation, four gradients each.
        """
        lengths = norm(rows, dtype=torch.float64).tolist()
        self._gradients_at = self._at_once(2 * len(rows))
        if not self._steps.is_known:
            self._search(rows, lengths)
        images = torch.zeros_like(rows)
        made = self._fill(images, rows, lengths)
        if self._checks and not measured and not self._hold(images, rows, lengths, made):
            made = self._fill(images, rows, lengths)
        self._checks = False
        self._steps.slopes = [each.slope for each in made]
        errors = [self._steps.error(*each) if each.step else 0.0 for each in made]
        if measured:
            doubled = [
                2 * each.step / (length or 1) for each, length in zip(made, lengths, strict=True)
            ]
            together = self._together(rows, doubled)
            for i, each in enumerate(made):
                if each.step:
                    farther = (
                        self._central(rows[i], doubled[i]) if together is None else together[i]
                    )
                    errors[i] = self._extrapolate(images[i], farther, each)
        per_unit = torch.tensor(errors, dtype=torch.float64, device="cpu")
        return images, per_unit * torch.tensor(lengths, dtype=torch.float64, device="cpu")

    def _fill(self, images: Tensor, rows: Tensor, lengths: list[float]) -> list[_Made]:
        """Write the products into `images`; how each was made."""
        if self._gradients_at is not None:
            return self._fill_at_once(images, rows, lengths, self._gradients_at)
        before, made = self._steps.slopes, list[_Made]()
        for i, row in enumerate(rows):
            slope = (
                before[i] if len(before) == len(rows) else [*before, *(m.slope for m in made)][-1]
            )
            none = _Made(slope, 0.0, 0.0)
            made.append(self._product(images[i], row, lengths[i], slope) if lengths[i] else none)
        return made

    def _fill_at_once(
        self, images: Tensor, rows: Tensor, lengths: list[float], gradients_at: GradientsAt
    ) -> list[_Made]:
        """The same with the gradients of all rows together, and of those again that need it."""
        before = self._steps.slopes
        slopes = before if len(before) == len(rows) else [*before, 0.0][:1] * len(rows)
        made = [_Made(slope, 0.0, 0.0) for slope in slopes]
        steps = [self._steps.step(slope) for slope in slopes]
        left = [i for i, length in enumerate(lengths) if length]
        for _ in range(TRIES):
            if not left:
                break
            far = rows.new_tensor([steps[i] / lengths[i] for i in left])
            ahead, behind = self._both(rows[left] * far[:, None], gradients_at)
            found = (ahead - behind).div_(2 * far[:, None])
            images[left] = found
            # Each in one look, where a GPU is to be waited for.
            sizes = [norm(each, dtype=torch.float64).tolist() for each in (
                found, ahead.sub_(self.gradient()), behind.sub_(self.gradient())
            )]  # fmt: skip
            again = []
            for i, size, front, back in zip(left, *sizes, strict=True):
                slope, step = size / lengths[i], steps[i]
                truncation = _truncation_of(front, back, slope * step) / step**3
                made[i] = _Made(slope, truncation, step)
                steps[i] = self._steps.step(slope, truncation)
                if not 1 / NEAR <= steps[i] / step <= NEAR:
                    again.append(i)
            left = again
        return made

    def _both(self, moves: Tensor, gradients_at: GradientsAt) -> tuple[Tensor, Tensor]:
        """Gradients (m, P) ahead of theta by some moves (m, P), and behind."""
        found = gradients_at(torch.cat([self._theta + moves, self._theta - moves]))
        ahead, behind = found.chunk(2)
        return ahead, behind

    def _together(self, rows: Tensor, steps: list[float]) -> Tensor | None:
        """Central differences (k, P) at a step for each; None where they are not taken at once."""
        if self._gradients_at is None:
            return None
        far = rows.new_tensor(steps)[:, None]
        ahead, behind = self._both(rows * far, self._gradients_at)
        return ahead.sub_(behind).div_(2 * far)

    def _product(self, image: Tensor, row: Tensor, length: float, slope: float) -> _Made:
        """Write H v of one row, whose slope is expected to be about that."""
        step, best, truncation = 0.0, self._steps.step(slope), 0.0
        for number in range(TRIES):
            step = best
            image.copy_(self._gradient_at(self._moved(row, step / length)))
            ahead = float(norm(image - self.gradient(), dtype=torch.float64))
            best = self._steps.step(ahead / step, truncation)
            if number < TRIES - 1 and not 1 / NEAR <= best / step <= NEAR:
                continue
            behind = self._gradient_at(self._moved(row, -step / length))
            image.sub_(behind).mul_(length / (2 * step))
            slope = float(norm(image, dtype=torch.float64)) / length
            back = float(norm(behind.sub_(self.gradient()), dtype=torch.float64))
            truncation = _truncation_of(ahead, back, slope * step) / step**3
            best = self._steps.step(slope, truncation)
            if best > step / NEAR:
                break
        return _Made(slope, truncation, step)

    def _hold(self, images: Tensor, rows: Tensor, lengths: list[float], made: list[_Made]) -> bool:
        """Whether a second step along the sharpest vector says what is expected; else search."""
        at = max(range(len(rows)), key=lambda i: made[i].slope if lengths[i] else -1.0)
        if not lengths[at]:
            return True
        slope, truncation, step = made[at]
        farther = self._central(rows[at], 2 * step / lengths[at]).sub_(images[at])
        apart = float(norm(farther, dtype=torch.float64)) / lengths[at]
        truncation = max(self._steps.truncation(slope), truncation)
        expected = 3 * truncation * step**2 + self._steps.noise / step
        if HOLDS[0] <= apart / expected <= HOLDS[1]:
            self._steps.raise_by(apart / expected)
            return True
        self._search(rows[at : at + 1], lengths[at : at + 1])
        return False

    def _extrapolate(self, image: Tensor, farther: Tensor, made: _Made) -> float:
        """Take (4 D(e) - D(2 e)) / 3 in place of D(e); its error for the unit vector."""
        slope, truncation, step = made
        image.mul_(4 / 3).sub_(farther, alpha=1 / 3)
        left = max(self._steps.truncation(slope), truncation) * step**2
        of_fifth_order = 4 * left * min(1.0, left / slope) if slope else 0.0
        return SAFETY * (1.4 * self._steps.noise / step + of_fifth_order)

    def _search(self, rows: Tensor, lengths: list[float]) -> None:
        """Measure the noise and the truncation along the first row and a sharp vector."""
        steps = self._steps
        at = next((i for i, length in enumerate(lengths) if length), None)
        if at is None:
            return
        tiny = torch.finfo(torch.float32).tiny
        size = float(norm(self._theta, dtype=torch.float64))
        start = FIRST_STEP * steps.rounding ** (1 / 3) * (size or 1.0)
        found = self._noise(rows[at] / lengths[at], start)
        flat, truncation, slope = found.step, found.truncation, max(found.slope, tiny)
        least = steps.rounding * float(norm(self.gradient(), dtype=torch.float64))
        steps.noise = max(found.noise, least, tiny)
        sharpest, bend = slope, truncation / slope**2
        if found.slope:
            # One product more turns any vector into a sharp one.
            other = self._truncation(found.image.mul_(1 / slope), flat)
            sharpest, bend = other.slope, other.truncation / max(other.slope, tiny) ** 2
        if not steps.floor or sharpest > FLATTER * slope:
            steps.floor, steps.flattest = max(truncation / slope, tiny), slope
        steps.bend, steps.slopes = max(bend, tiny), [slope]

    def _noise(self, unit: Tensor, step: float) -> _Found:
        """Go where longer steps show truncation and shorter ones rounding, of a unit vector."""
        images, found = self._settled(unit, step)
        step = found.step
        images.append(self._central(unit, step / APART))
        shorter = _Found.of(images[1], images[2], step / APART)
        descended = False
        for _ in range(MOST_STEPS):
            if shorter.settled and shorter.apart < found.apart / APART:
                # Truncation alone, which falls by 16: go on to shorter steps.
                descended, step = True, step / APART
                images = [*images[1:], self._central(unit, step / APART)]
                found, shorter = shorter, _Found.of(images[1], images[2], step / APART)
            elif not descended and shorter.apart > found.apart * APART / 2:
                # Rounding alone, which falls by 4 the other way.
                images = [self._central(unit, APART**2 * step), *images[:2]]
                longer = _Found.of(images[0], images[1], APART * step)
                if not longer.settled:
                    break
                step, found, shorter = APART * step, longer, found
            else:
                break
        return replace(found, noise=shorter.apart * step / APART)

    def _settled(self, unit: Tensor, begin: float) -> tuple[list[Tensor], _Found]:
        """Products at a step and at a longer one that agree; those that do best, where none do."""
        best: tuple[list[Tensor], _Found] | None = None
        for step in (begin * APART**power for power in LOOKED_AT):
            images = [self._central(unit, APART * step), self._central(unit, step)]
            found = _Found.of(images[0], images[1], step)
            if best is None or found.relative < best[1].relative:
                best = images, found
            if found.settled:
                break
        assert best is not None
        return best

    def _truncation(self, unit: Tensor, step: float) -> _Found:
        """The truncation of a unit vector, once the noise is known."""
        images = [self._central(unit, APART * step), self._central(unit, step)]
        found = _Found.of(images[0], images[1], step)
        descended = False
        for _ in range(MOST_STEPS):
            noise = self._steps.noise / step
            if not found.settled and noise < SETTLED * found.slope:
                descended, step = True, step / APART
                images = [images[1], self._central(unit, step)]
                found = _Found.of(images[0], images[1], step)
            elif not descended and found.apart < 2 * noise:
                images = [self._central(unit, APART**2 * step), images[0]]
                longer = _Found.of(images[0], images[1], APART * step)
                if not longer.settled:
                    break
                step, found = APART * step, longer
            else:
                break
        return found

    def _central(self, vector: Tensor, step: float) -> Tensor:
        """(g(theta + step v) - g(theta - step v)) / (2 step), (P,)."""
        ahead = self._gradient_at(self._moved(vector, step))
        return ahead.sub_(self._gradient_at(self._moved(vector, -step))).mul_(1 / (2 * step))

    def _moved(self, vector: Tensor, step: float) -> Tensor:
        return torch.add(self._theta, vector, alpha=step)


def _truncation_of(ahead: float, back: float, odd: float) -> float:
    """norm(D(e) - H v) / norm(v) times e, from what both gradients differ from that at theta.

    The even part of the gradient along v tells how fast H changes: where its ratio to the odd part
    is q, the next odd order is about 2 / 3 q^2 of the first.

    Args:
        ahead, back: norm(g(theta +- e v) - g(theta)).
        odd: norm(g(theta + e v) - g(theta - e v)) / 2.
    """
    even = max((ahead**2 + back**2) / 2 - odd**2, 0.0)
    return 2 / 3 * even / odd if odd else 0.0


class _Made(NamedTuple):
    """How a product with a unit vector was made.

    Attributes:
        slope: norm(H v).
        truncation: norm(T(v)), as its own gradients tell.
        step: 0 for a vector of zeros.
    """

    slope: float
    truncation: float
    step: float


@dataclass(frozen=True)
class _Found:
    """What two steps of a search show along a unit vector.

    Attributes:
        image: D(step), (P,).
        slope: its norm.
        apart: norm(D(APART step) - D(step)).
        step: the shorter one.
        noise: of a gradient; 0 where not known.
    """

    image: Tensor
    slope: float
    apart: float
    step: float
    noise: float = 0.0

    @classmethod
    def of(cls, longer: Tensor, image: Tensor, step: float) -> _Found:
        apart = float(norm(longer - image, dtype=torch.float64))
        return cls(image, float(norm(image, dtype=torch.float64)), apart, step)

    @property
    def relative(self) -> float:
        return self.apart / self.slope if self.slope else math.inf

    @property
    def settled(self) -> bool:
        return self.relative <= SETTLED

    @property
    def truncation(self) -> float:
        """norm(T), where rounding does not show; more, where it does."""
        return self.apart / ((APART**2 - 1) * self.step**2)
