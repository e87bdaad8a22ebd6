"""The effective learning rate of a part of the updates, from sums over steps.

For a part Q in {P_k, I - P_k} of an update delta and the full gradient g, over some steps t,

    sum_t -<Q delta_t, Q g_t> / sum_t norm(Q g_t)^2,

how far the updates go along Q, as a learning rate of plain gradient descent. It is a ratio of sums,
not a mean of ratios: those are ruled by the steps whose denominator is near zero. The probe
`effective_learning_rates` measures the terms of a step, the columns `lr_numerator_*` and
`lr_denominator_*`.

Source: Song, Ahn, Yun 2025 (arXiv 2405.16002), section 6.

Example:
    >>> effective_learning_rate([0.1, 0.3], [1.0, 3.0])
    0.1
    >>> effective_learning_rate([0.1, 0.3], [0.0, 0.0])
    nan
"""

from __future__ import annotations

import math
from collections.abc import Iterable


def effective_learning_rate(
    numerators: Iterable[float | None], denominators: Iterable[float | None]
) -> float:
    """Sum of the numerators over sum of the denominators, of the steps where both are finite.

    Args:
        numerators, denominators: one a step; None or NaN where the step was not measured.

    Returns:
        The rate: negative where the part of the updates climbs, NaN where the denominators' sum is
        not positive.
    """
    terms = [
        (above, below)
        for above, below in zip(numerators, denominators, strict=True)
        if above is not None and below is not None and math.isfinite(above) and math.isfinite(below)
    ]
    return ratio_of_sums(sum(above for above, _ in terms), sum(below for _, below in terms))


def ratio_of_sums(numerator: float, denominator: float) -> float:
    """The rate from sums over some steps; NaN where that of the denominators is not positive."""
    return numerator / denominator if denominator > 0 else math.nan
