"""What evaluations of a loss have cost, counted in gradients of one sample, never in seconds.

Counts are the same on every machine, and on every process of a group: what is decided by them is
decided alike, and again after a resume.

Example:
    >>> cost = Cost()
    >>> cost.add(10, FORWARD + BACKWARD)
    >>> cost.add(10, 4 * PRODUCT)
    >>> cost.gradients
    60.0
"""

from __future__ import annotations

from dataclasses import dataclass

from thalweg.loss.protocol import Loss

PARTS = 12
"""Of a gradient, that costs are summed in: whole numbers, whose sums and differences are exact."""
FORWARD, BACKWARD = 4, 8
"""As usually counted: a backward pass is two products of matrices for each one of the forward."""
PRODUCT = 15
"""Of a vector with the Hessian, beside the gradient whose graph it goes through: 1.15 to 1.35."""


@dataclass
class Cost:
    """A sum of what was evaluated.

    Attributes:
        parts: in `PARTS` of a gradient of one sample.
    """

    parts: int = 0

    @property
    def gradients(self) -> float:
        """In gradients of one sample."""
        return self.parts / PARTS

    def add(self, samples: int, each: int) -> None:
        """Add what was evaluated for some samples, in `PARTS` of a gradient each."""
        self.parts += samples * each


def cost_of(loss: Loss) -> int | None:
    """What a loss has counted so far, in `PARTS` of a gradient; None where it does not count."""
    terms = getattr(loss, "terms", None)
    if terms is not None:
        counted = [cost_of(term.loss) for term in terms]
        return None if None in counted else sum(each for each in counted if each is not None)
    cost = getattr(loss, "cost", None)
    return cost.parts if isinstance(cost, Cost) else None
