"""An alarm over the rows of a training: a number too low or too high, for so many reports in a row.

An `Alarm` is a sink. When it goes off it warns, calls what it was given, and says so by `raised`:
stop there, or lower the learning rate.

Example:
    >>> rates = [0.1]
    >>> alarm = Alarm("stability_margin", below=0.0, reports=2, then=lambda row: rates.append(0.05))
    >>> for step, margin in enumerate([0.2, -0.1, -0.2, -0.3]):
    ...     alarm.log({"stability_margin": margin}, step)
    >>> alarm.raised, alarm.steps, rates
    (True, [2], [0.1, 0.05])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from thalweg.errors import invalid, unknown_name
from thalweg.measure.sinks import warn


class Alarm:
    """Watches one column of the rows.

    Args:
        column: a column of numbers, such as "stability_margin".
        below, above: what is too low, or too high; one of them.
        reports: in a row, >= 1; a report that lacks the number is passed over.
        then: called with the row at which it goes off; None to warn alone. An error that it raises
            is a warning and does not stop the training: for that look at `raised`.

    Attributes:
        raised: whether the number is still where it should not be.
        steps: at which it went off.

    Raises:
        InvalidInput: neither or both limits, one that is no number; reports < 1.

    Warns:
        WatchWarning: when it goes off, and again only after the number was all right; once, where
            rows have no such column.
    """

    def __init__(
        self,
        column: str,
        *,
        below: float | None = None,
        above: float | None = None,
        reports: int = 3,
        then: Callable[[Mapping[str, Any]], Any] | None = None,
    ) -> None:
        if (below is None) == (above is None):
            raise invalid("below, above", (below, above), "one of them, the other None")
        limit = above if below is None else below
        if not isinstance(limit, Real):
            raise invalid("above" if below is None else "below", limit, "a number")
        if not isinstance(reports, Integral) or reports < 1:
            raise invalid("reports", reports, "an integer >= 1")
        self.column, self.below, self.above = column, below, above
        self.reports, self.then = reports, then
        self.raised = False
        self.steps: list[int] = []
        self._in_a_row = 0
        self._has_column: bool | None = None

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """Look at a row."""
        if self._has_column is None:
            self._has_column = self.column in row
            if not self._has_column:
                warn(f"an alarm never goes off: {unknown_name('column', self.column, row)}")
        value = row.get(self.column)
        if not isinstance(value, (int, float)) or math.isnan(value):
            return
        low = self.below is not None and value < self.below
        high = self.above is not None and value > self.above
        self._in_a_row = self._in_a_row + 1 if low or high else 0
        before, self.raised = self.raised, self._in_a_row >= self.reports
        if not self.raised or before:
            return
        self.steps.append(step)
        limit = f"below {self.below:g}" if low else f"above {self.above:g}"
        times = "" if self.reports == 1 else f" for {self.reports} reports"
        warn(f"step {step}: {self.column} is {value:.4g}, {limit}{times}")
        if self.then is not None:
            self.then(row)

    def close(self) -> None:
        """Nothing: `raised` and `steps` stay."""
