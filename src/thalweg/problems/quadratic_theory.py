"""What does SGD do on a quadratic of two curvatures, a > b > 0? In closed form, in expectation.

Let g = A theta be the full gradient, n the noise of a mini-batch gradient: of mean 0, independent
of theta. P projects on the eigenspace of a. Write D = norm(P g)^2 and B = norm((I - P) g)^2, and
s_D = E norm(P n)^2 and s_B = E norm((I - P) n)^2 for the variances. A step
theta' = theta - lr (g + n) gives g' = (I - lr A) g - lr A n, hence

    E D' = (1 - lr a)^2 D + lr^2 a^2 s_D,    E B' = (1 - lr b)^2 B + lr^2 b^2 s_B.

**Alignment** chi^2 = D / (D + B) rises, to E D' / D > E B' / B, exactly if

    lr (a^2 (1 + s_D / D) - b^2 (1 + s_B / B)) > 2 (a - b),

that is above a critical step size. It depends on the point: near the floor (D small) it is small,
so that almost every step aligns. High on the walls (s_D / D and s_B / B near 0) it is 2 / (a + b),
the edge of stability 2 / a but for the factor a / (a + b): there alignment falls by itself.

**A step along one part**, theta' = theta - lr Q (g + n) with Q = P or I - P, changes the loss by

    E L' - L = -lr norm(Q g)^2 + lr^2 / 2 E[(Q (g + n))^T A (Q (g + n))],

and lowers it exactly if lr < 2 norm(Q g)^2 / E[(Q g_B)^T A (Q g_B)]; for an eigenspace of curvature
h, that is 2 / (h (1 + s / norm(Q g)^2)). Under SGD at lr_0 the dominant part settles where this is
lr_0 itself: Dom-SGD stands still there and climbs at any larger learning rate, while Bulk-SGD
descends up to its own critical rate.

Source: Deng, Liao, Ouyang, Pang, Song, Yang 2026 (arXiv 2601.11789): the critical step size, the
correction of high alignment, the interval between the two rates; derived here anew.
"""

from __future__ import annotations

import math


def expected_after_step(lr: float, curvature: float, squared: float, noise: float) -> float:
    """E norm(Q g')^2 = (1 - lr h)^2 norm(Q g)^2 + lr^2 h^2 s after one SGD step.

    Args:
        lr: learning rate.
        curvature: h, of the eigenspace Q.
        squared: norm(Q g)^2 before the step.
        noise: s = E norm(Q n)^2, variance of the mini-batch gradient in Q.
    """
    return (1 - lr * curvature) ** 2 * squared + (lr * curvature) ** 2 * noise


def expected_after_steps(
    lr: float, curvature: float, squared: float, noise: float, steps: int
) -> float:
    """E norm(Q g_t)^2 after t steps: r^t norm(Q g)^2 + lr^2 h^2 s (1 + r + ... + r^(t - 1)).

    r = (1 - lr h)^2. Arguments as for `expected_after_step`.
    """
    ratio = (1 - lr * curvature) ** 2
    power = ratio**steps
    total = steps if ratio == 1 else (1 - power) / (1 - ratio)
    return power * squared + (lr * curvature) ** 2 * noise * total


def stationary(lr: float, curvature: float, noise: float) -> float:
    """norm(Q g)^2 that one step leaves as it is, in expectation: lr h s / (2 - lr h).

    Infinite at and beyond the edge of stability, lr h = 2.
    """
    step = lr * curvature
    return step * noise / (2 - step) if step < 2 else math.inf


def critical_step_size(
    steep: float,
    flat: float,
    dominant: float,
    bulk: float,
    noise_dominant: float,
    noise_bulk: float,
) -> float:
    """The learning rate above which an SGD step raises the alignment, below which it lowers it.

    2 (a - b) / (a^2 (1 + s_D / D) - b^2 (1 + s_B / B)); infinite where no step raises it.

    Args:
        steep, flat: a and b.
        dominant, bulk: D and B, both > 0.
        noise_dominant, noise_bulk: s_D and s_B.
    """
    slope = steep**2 * (1 + noise_dominant / dominant) - flat**2 * (1 + noise_bulk / bulk)
    return 2 * (steep - flat) / slope if slope > 0 else math.inf


def critical_learning_rate(curvature: float, squared: float, noise: float) -> float:
    """The learning rate below which one step along an eigenspace lowers the expected loss.

    2 / (h (1 + s / norm(Q g)^2)). Arguments as for `expected_after_step`.
    """
    return 2 * squared / (curvature * (squared + noise))


def expected_loss_change(lr: float, curvature: float, squared: float, noise: float) -> float:
    """E L' - L = -lr norm(Q g)^2 + lr^2 h (norm(Q g)^2 + s) / 2 of a step along an eigenspace.

    Arguments as for `expected_after_step`.
    """
    return -lr * squared + lr**2 * curvature * (squared + noise) / 2
