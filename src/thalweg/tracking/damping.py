"""How much of a basis's error one power step leaves: the bias of a tracked subspace.

A power step moves the projection of a vector by some distance; what it leaves undone is a share of
that, at worst lambda_{k+1} / lambda_k. Halves of a subset have this error in common, so it is not
seen between them. It is learned at each renewal, where a fresh product over all samples shows it.

Example:
    >>> damping = Damping()
    >>> damping.begin(0.5)  # lambda_{k+1} / lambda_k
    >>> damping.learn(checked=0.01, sampling=0.006, moved=0.02)  # 0.008 was left of 0.02
    >>> round(damping.value, 3)
    0.316
"""

from __future__ import annotations

# Until it is known better: the least that one power step leaves of a basis's error.
INITIAL = 0.1
LEAST, MOST = 0.02, 0.9


class Damping:
    """The share of a projection's movement by a power step that the step leaves undone.

    Attributes:
        value: the share, from `LEAST` to `MOST`.
    """

    def __init__(self) -> None:
        self.value = INITIAL

    def begin(self, ratio: float) -> None:
        """Start from lambda_{k+1} / lambda_k: at worst that is left, on average less."""
        self.value = min(max(INITIAL, ratio / 2), MOST)

    def learn(self, checked: float, sampling: float, moved: float) -> None:
        """Learn from a fresh product, all errors relative to the vector.

        Args:
            checked: how wrong the tracked projection was by it.
            sampling: the part of this that the subset is estimated to cause.
            moved: how far the tracker's power step had moved the projection.
        """
        if moved > 0:
            excess = max(checked**2 - sampling**2, 0.0) ** 0.5
            measured = min(max(excess / moved, LEAST), MOST)
            self.value = (self.value * measured) ** 0.5
