"""How many samples to follow the subspace with, and when to take a new reference.

A tracker multiplies its basis by the Hessian of m of N samples at every step, and of all N when it
renews its reference. Both cost; both lower the error. `RefreshPolicy` learns from the errors that
were estimated since the last renewal, and chooses the pair (m, period) that should meet the target
at the lowest count of samples touched a step, m + N / period. Where one power step leaves too much
of the target, it asks for a second one at the same step. It decides by counts and estimates, never
by a clock, so that two runs with one seed decide alike.

Example:
    >>> policy = RefreshPolicy(num_samples=5000, target=0.01)
    >>> policy.subset, policy.period
    (250, 20)
    >>> policy.record(sampling_error=0.02, bias=0.001)
    >>> policy.due(error=0.005), policy.due(error=0.02), policy.wants_second_step(bias=0.006)
    (False, True, True)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

SMALLEST_SUBSET = 32
# The estimated error of a typical step (80 % of them lie below) is aimed at half the target, so
# that the target itself is exceeded at few steps; one that exceeds it is renewed at once.
AIM = 0.5
QUANTILE = 0.8
# A second power step is taken where the first leaves more than this fraction of the target.
SECOND_STEP = 0.5


@dataclass
class RefreshPolicy:
    """Chooses the subset size m and the renewal period from the errors seen.

    Attributes:
        num_samples: N.
        target: the error relative to the vector that a step should stay below.
        subset: m, the samples used at each step, even.
        period: the steps after which the reference is renewed.
        few_sizes: round subset sizes up to `one_of_few`.
    """

    num_samples: int
    target: float
    subset: int = 0
    period: int = 20
    few_sizes: bool = False
    # Errors since the last renewal: (scaled sampling error, bias), one entry a step.
    history: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.subset = self.subset or self._clip(self.num_samples / 20)

    @property
    def sampling_factor(self) -> float:
        """sqrt(1/m - 1/N): how the error of a mean over m of N samples scales with m."""
        return (1 / self.subset - 1 / self.num_samples) ** 0.5

    def record(self, sampling_error: float, bias: float) -> None:
        """Note the estimated relative errors of one step."""
        factor = self.sampling_factor
        self.history.append((sampling_error / factor if factor else 0.0, bias))

    def wants_second_step(self, bias: float) -> bool:
        """Whether one power step leaves so much that another one should follow at once."""
        return bias > SECOND_STEP * self.target

    def due(self, error: float) -> bool:
        """Whether to renew the reference: the step's error is too large, or the reference old."""
        # Written so that an error that is NaN asks for a renewal.
        return not error <= self.target or len(self.history) >= self.period

    @property
    def age(self) -> int:
        """Steps since the reference was taken."""
        return len(self.history)

    def plan(self) -> None:
        """Choose subset and period for the next reference, and forget the history."""
        if self.history:
            self.period = self._cheapest_period()
            self.subset = self._subset_for(self.period)
        if self.few_sizes:
            self.subset = one_of_few(self.subset, self.num_samples)
        self.history = []

    def _subset_for(self, period: int) -> int:
        """The m whose sampling error, by what was seen in the first `period` steps, is aimed at."""
        seen = sorted(scaled for scaled, _ in self.history[:period])
        scaled = seen[min(len(seen) - 1, int(QUANTILE * len(seen)))]
        aim = AIM * self.target
        wanted = 1 / ((aim / max(scaled, 1e-12)) ** 2 + 1 / self.num_samples)
        # One reference's history is one draw of the samples: move by at most a factor of three.
        return self._clip(min(max(wanted, self.subset / 2), 3 * self.subset))

    def _cheapest_period(self) -> int:
        seen = len(self.history)
        usable = next((i for i, (_, bias) in enumerate(self.history) if bias > self.target), seen)
        candidates = sorted({max(1, round(usable * part)) for part in (0.25, 0.5, 0.75, 1.0)})
        cost = {p: self._subset_for(p) + self.num_samples / p for p in candidates}
        best = min(candidates, key=lambda p: cost[p])
        if best != seen:
            return best
        # The longest period seen is the cheapest: try a longer one, until renewals are a small
        # part of the cost anyway.
        longest = max(1, int(8 * self.num_samples / self._subset_for(seen)))
        return min(int(1.5 * seen) + 1, max(seen, longest))

    def _clip(self, wanted: float) -> int:
        highest = max(2, self.num_samples // 2)
        return 2 * round(min(max(wanted, min(SMALLEST_SUBSET, highest)), highest) / 2)

    def state_dict(self) -> dict[str, object]:
        """Everything that the next decisions depend on, as numbers and lists."""
        return {
            "subset": self.subset,
            "period": self.period,
            "history": [list(entry) for entry in self.history],
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Restore what `state_dict` gave."""
        self.subset, self.period = state["subset"], state["period"]
        self.history = [(scaled, bias) for scaled, bias in state["history"]]


def one_of_few(subset: int, num_samples: int) -> int:
    """The next larger of few subset sizes, 32 times powers of 2^(1/4), and even.

    Where a computation is recorded once for each shape, few sizes are few recordings.
    """
    if subset < SMALLEST_SUBSET:
        return subset
    steps = math.ceil(4 * math.log2(subset / SMALLEST_SUBSET))
    size = 2 * math.ceil(SMALLEST_SUBSET * 2 ** (steps / 4) / 2)
    return max(subset, min(size, num_samples // 4 * 2))
