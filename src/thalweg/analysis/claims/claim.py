"""A claim: a published statement, one number per seed that tests it, and the rule that decides.

A claim names the *roles* of the branches that it compares. Which branch has which role is said
where the claim is judged, so that one claim serves several comparisons of one study.

Example:
    >>> Rule(1.1, "below").text
    '≤ 1.1'
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from thalweg.errors import invalid

if TYPE_CHECKING:
    import pandas as pd


class NotMeasurableError(Exception):
    """One seed's data cannot give the statistic; the message says why and reaches the verdict."""


class NonFiniteError(NotMeasurableError):
    """A branch's values stop being finite numbers: its training diverged."""


@dataclass(frozen=True)
class Rule:
    """A number and the side of it on which the statistic must lie."""

    threshold: float
    direction: Literal["above", "below"]

    @property
    def text(self) -> str:
        """The rule as shown to people, such as `≥ 0.9`."""
        sign = "≥" if self.direction == "above" else "≤"
        return f"{sign} {self.threshold:g}".replace("-", "\N{MINUS SIGN}")

    def allows(self, value: float) -> bool:
        """Whether the value is on the right side; NaN never is."""
        return value >= self.threshold if self.direction == "above" else value <= self.threshold


@dataclass(frozen=True)
class SeedTables:
    """The rows of one seed, by the role of the branch; `names` are the branches' own names."""

    seed: int
    tables: Mapping[str, pd.DataFrame]
    names: Mapping[str, str]

    def table(self, role: str) -> pd.DataFrame:
        """Rows of the branch in this role, in order of steps."""
        if role not in self.tables:
            raise NotMeasurableError(f"branch {self.names[role]!r} is missing")
        return self.tables[role]


@dataclass(frozen=True)
class Measurement:
    """The statistic of one seed; `beside` and `note` are worth showing with it, not deciding."""

    value: float
    beside: Mapping[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Claim:
    """A published statement, the statistic that tests it, and the rule that decides.

    measure         one seed's tables -> one number; raises NotMeasurableError where the data lack
                    it
    logarithmic     the statistic is a ratio: mean and interval are taken of its logarithm
    needs_roles     the branches that it reads; where there are several, the others are compared
                    with the first
    needs_columns   the columns of the metric table that it reads
    same_end        the branches must end at the same step; False where each is read by itself, so
                    that they may start and end anywhere
    """

    name: str
    statement: str
    source: str
    statistic: str
    measure: Callable[[SeedTables], Measurement]
    rule: Rule
    refuted_by: str
    needs_roles: tuple[str, ...]
    needs_columns: tuple[str, ...]
    logarithmic: bool = False
    minimum_seeds: int = 3
    same_end: bool = True


@dataclass(frozen=True)
class ClaimUse:
    """A claim to be judged, with roles of its own in place of the study's standard ones.

    roles   role -> name of the branch; a role that is not named here is the study's standard one
    Raises InvalidInput for a role that the claim does not have.
    """

    claim: Claim
    roles: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [role for role in self.roles if role not in self.claim.needs_roles]
        if unknown:
            raise invalid(
                f"roles of claim {self.claim.name!r}",
                ", ".join(unknown),
                "branches for " + ", ".join(self.claim.needs_roles),
            )
