"""How is a statement judged on a study: statistic, interval over seeds, rule, verdict.

A `Claim` is written down before the run: what is measured (one number per seed), and the number
that decides. `judge` applies it to a study's metric table. The published claims themselves are in
`claims.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from thalweg.errors import InvalidInput, invalid
from thalweg.lab.claims.interval import Interval, seed_interval

if TYPE_CHECKING:
    import pandas as pd

Outcome = Literal["holds", "does not hold", "undecided"]

#: Which branch of the built-in studies plays which part.
DEFAULT_ROLES: Mapping[str, str] = {"plain": "sgd", "dominant": "dom-sgd", "bulk": "bulk-sgd"}


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
        return f"{'≥' if self.direction == 'above' else '≤'} {self.threshold:g}"

    def allows(self, value: float) -> bool:
        """Whether the value is on the right side; NaN never is."""
        return value >= self.threshold if self.direction == "above" else value <= self.threshold


@dataclass(frozen=True)
class SeedTables:
    """The rows of one seed, by the role of the branch (plain, dominant, bulk)."""

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

    measure       one seed's tables -> one number; raises NotMeasurableError where the data lack it
    logarithmic   the statistic is a ratio: mean and interval are taken of its logarithm
    needs_roles   the branches, needs_columns the columns of the metric table that it reads
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


@dataclass(frozen=True)
class Verdict:
    """What the rule of a claim says about a study; mean, low and high are over the seeds.

    low, high     ends of the 95 % t-interval; NaN with fewer than two measured seeds
    values        seed -> statistic; NaN where a seed could not be measured
    beside        further numbers, mean over the measured seeds
    """

    claim: str
    statement: str
    source: str
    statistic: str
    rule: Rule
    refuted_by: str
    values: Mapping[int, float]
    mean: float
    low: float
    high: float
    outcome: Outcome
    note: str = ""
    beside: Mapping[str, float] = field(default_factory=dict)
    logarithmic: bool = False


def judge(claim: Claim, data: pd.DataFrame, roles: Mapping[str, str] = DEFAULT_ROLES) -> Verdict:
    """Apply a claim's rule to the metric table of a study.

    "holds" when the whole 95 % interval over seeds is on the right side of the threshold, "does
    not hold" when the whole interval is on the wrong side, otherwise "undecided". It is undecided
    too with fewer seeds than the claim asks for, or when a seed could not be measured.

    data    metric table with the columns `seed`, `branch`, `step`, as `thalweg.load` gives it
    roles   role (plain, dominant, bulk) -> name of the branch
    Raises InvalidInput where a column is missing, or a branch for every seed.
    """
    _require(claim, data, roles)
    measured: dict[int, Measurement] = {}
    reasons: list[str] = []
    for seed in sorted(int(seed) for seed in data["seed"].unique()):
        try:
            measurement = claim.measure(_tables_of_seed(claim, data, roles, seed))
            if math.isnan(measurement.value):
                raise NotMeasurableError("the statistic is not a number")
            if measurement.note:
                reasons.append(f"seed {seed}: {measurement.note}")
        except NotMeasurableError as error:
            measurement = Measurement(math.nan)
            reasons.append(f"seed {seed}: {error}")
        measured[seed] = measurement
    return _verdict(claim, measured, reasons)


def judge_all(
    claims: Iterable[Claim], data: pd.DataFrame, roles: Mapping[str, str] = DEFAULT_ROLES
) -> list[Verdict]:
    """Judge each claim; one that the data cannot serve is undecided and says what is missing."""
    verdicts = []
    for claim in claims:
        try:
            verdicts.append(judge(claim, data, roles))
        except InvalidInput as error:
            verdicts.append(_verdict(claim, {}, [str(error)]))
    return verdicts


def rows_where(data: pd.DataFrame, column: str, value: object) -> pd.DataFrame:
    """The rows in which a column has this value."""
    return data.loc[data[column] == value, :]  # type: ignore[return-value]


def _require(claim: Claim, data: pd.DataFrame, roles: Mapping[str, str]) -> None:
    columns = ("seed", "branch", "step", *claim.needs_columns)
    missing = [name for name in columns if name not in data.columns]
    if missing:
        raise invalid(
            f"data for claim {claim.name!r}",
            "no column " + ", ".join(missing),
            "a metric table with " + ", ".join(columns),
            "run the study with the probes that measure them",
        )
    if data.empty:
        raise invalid(f"data for claim {claim.name!r}", "no rows", "at least one measured step")
    unnamed = [role for role in claim.needs_roles if role not in roles]
    if unnamed:
        raise invalid(
            f"roles for claim {claim.name!r}", dict(roles), "a branch for " + ", ".join(unnamed)
        )
    present = set(data["branch"].unique())
    absent = [roles[role] for role in claim.needs_roles if roles[role] not in present]
    if absent:
        raise invalid(
            f"branches for claim {claim.name!r}",
            sorted(map(str, present)),
            "a study with the branches " + ", ".join(absent),
            "run these branches, or name the branches in `roles`",
        )


def _tables_of_seed(
    claim: Claim, data: pd.DataFrame, roles: Mapping[str, str], seed: int
) -> SeedTables:
    """Rows of one seed by role; NotMeasurableError where its branches end at different steps."""
    rows = rows_where(data, "seed", seed)
    tables: dict[str, pd.DataFrame] = {}
    for role in claim.needs_roles:
        table = rows_where(rows, "branch", roles[role])
        if not table.empty:
            tables[role] = table.sort_values("step").reset_index(drop=True)
    ends = {roles[role]: int(table["step"].iloc[-1]) for role, table in tables.items()}
    if len(set(ends.values())) > 1:
        listed = ", ".join(f"{name} at step {end}" for name, end in ends.items())
        raise NotMeasurableError(f"branches end at different steps ({listed})")
    return SeedTables(seed, tables, roles)


def _interval(claim: Claim, values: list[float]) -> Interval:
    if not claim.logarithmic:
        return seed_interval(values)
    logs = seed_interval([math.log(value) for value in values])
    return Interval(math.exp(logs.mean), math.exp(logs.low), math.exp(logs.high))


def _outcome(
    claim: Claim, values: list[float], interval: Interval, unmeasured: int
) -> tuple[Outcome, str]:
    """The verdict's word and the reason where it is not plain from the numbers."""
    rule = claim.rule
    if not values:
        return "undecided", ""
    if any(math.isinf(value) and not rule.allows(value) for value in values):
        return "does not hold", ""
    if len(values) + unmeasured == 1:
        side = "on the right side of" if rule.allows(values[0]) else "on the wrong side of"
        return "undecided", f"one seed: its value is {side} the rule, its spread is unknown"
    if len(values) < claim.minimum_seeds:
        return "undecided", f"{len(values)} seeds measured, {claim.minimum_seeds} needed"
    ends = (rule.allows(interval.low), rule.allows(interval.high))
    # A seed without a value may be the one that refutes: the others cannot speak for it.
    if all(ends):
        return ("undecided", "not every seed could be measured") if unmeasured else ("holds", "")
    if not any(ends):
        return "does not hold", ""
    return "undecided", "the interval over seeds contains the threshold"


def _verdict(claim: Claim, measured: Mapping[int, Measurement], reasons: list[str]) -> Verdict:
    found = [entry for entry in measured.values() if not math.isnan(entry.value)]
    values = [entry.value for entry in found]
    interval = Interval(math.nan, math.nan, math.nan)
    if values and all(map(math.isfinite, values)):
        interval = _interval(claim, values)
    elif values:
        interval = Interval(math.fsum(values), math.nan, math.nan)
    outcome, why = _outcome(claim, values, interval, len(measured) - len(values))
    names = dict.fromkeys(name for entry in found for name in entry.beside)
    beside = {
        name: math.fsum(entry.beside.get(name, math.nan) for entry in found) / len(found)
        for name in names
    }
    return Verdict(
        claim=claim.name,
        statement=claim.statement,
        source=claim.source,
        statistic=claim.statistic,
        rule=claim.rule,
        refuted_by=claim.refuted_by,
        values={seed: entry.value for seed, entry in measured.items()},
        mean=interval.mean,
        low=interval.low,
        high=interval.high,
        outcome=outcome,
        note="; ".join([why, *reasons] if why else reasons),
        beside=beside,
        logarithmic=claim.logarithmic,
    )
