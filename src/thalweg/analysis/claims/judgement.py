"""The judgement of a claim on a study: statistic, interval over seeds, rule, verdict.

`judge` applies a claim to a study's metric table. Which branches it compares is said by roles: the
study's standard ones (plain, dominant, bulk), or those of a `ClaimUse`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from thalweg.analysis.claims.claim import (
    Claim,
    ClaimUse,
    Measurement,
    NotMeasurableError,
    Rule,
    SeedTables,
)
from thalweg.analysis.claims.interval import Interval, seed_interval
from thalweg.analysis.claims.statistics import rows_where, stops_by_divergence
from thalweg.errors import InvalidInput, invalid

if TYPE_CHECKING:
    import pandas as pd

Outcome = Literal["holds", "does not hold", "undecided"]

#: Which branch of the built-in studies plays which part.
DEFAULT_ROLES: Mapping[str, str] = {"plain": "sgd", "dominant": "dom-sgd", "bulk": "bulk-sgd"}
#: The trunk has one name in every study.
TRUNK_ROLE: Mapping[str, str] = {"trunk": "trunk"}


@dataclass(frozen=True)
class Verdict:
    """What the rule of a claim says about a study; mean, low and high are over the seeds.

    low, high     ends of the 95 % t-interval; NaN with fewer than two measured seeds
    values        seed -> statistic; NaN where a seed could not be measured
    beside        further numbers, mean over the measured seeds
    roles         role -> branch where this was said for this use, in the claim's order; empty where
                  the study's standard roles served
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
    roles: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The claim's name and the branches named for it: `bulk-suffices: bulk-k20 against sgd`."""
        if not self.roles:
            return self.claim
        first, *others = self.roles.values()
        branches = f"{', '.join(others)} against {first}" if others else first
        return f"{self.claim}: {branches}"


def judge(
    claim: Claim | ClaimUse, data: pd.DataFrame, roles: Mapping[str, str] = DEFAULT_ROLES
) -> Verdict:
    """Apply a claim's rule to the metric table of a study.

    "holds" when the whole 95 % interval over seeds is on the right side of the threshold, "does
    not hold" when the whole interval is on the wrong side, otherwise "undecided". It is undecided
    too with fewer seeds than the claim asks for, or when a seed could not be measured.

    data    metric table with the columns `seed`, `branch`, `step`, as `thalweg.load` gives it
    roles   role -> name of the branch; those of a `ClaimUse` come before them
    Raises InvalidInput where a column is missing, or a branch for every seed.
    """
    use = claim if isinstance(claim, ClaimUse) else ClaimUse(claim)
    claim, named = use.claim, {**TRUNK_ROLE, **roles, **use.roles}
    _require(claim, data, named)
    measured: dict[int, Measurement] = {}
    reasons: list[str] = []
    for seed in sorted(int(seed) for seed in data["seed"].unique()):
        try:
            measurement = _measured(claim, _tables_of_seed(claim, data, named, seed))
            if measurement.note:
                reasons.append(f"seed {seed}: {measurement.note}")
        except NotMeasurableError as error:
            measurement = Measurement(math.nan)
            reasons.append(f"seed {seed}: {error}")
        measured[seed] = measurement
    return _verdict(use, measured, reasons)


def judge_all(
    uses: Iterable[Claim | ClaimUse], data: pd.DataFrame, roles: Mapping[str, str] = DEFAULT_ROLES
) -> list[Verdict]:
    """Judge each use; one that the data cannot serve is undecided and says what is missing."""
    verdicts = []
    for use in uses:
        try:
            verdicts.append(judge(use, data, roles))
        except InvalidInput as error:
            asked = use if isinstance(use, ClaimUse) else ClaimUse(use)
            verdicts.append(_verdict(asked, {}, [str(error)]))
    return verdicts


def with_note(verdict: Verdict, note: str) -> Verdict:
    """The same verdict with one more thing to know about it, where there is one."""
    both = "; ".join(part for part in (verdict.note, note) if part)
    return replace(verdict, note=both)


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
        given = {role: branch for role, branch in roles.items() if role not in TRUNK_ROLE}
        raise invalid(
            f"roles for claim {claim.name!r}", given, "a branch for " + ", ".join(unnamed)
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
    # A run that diverged ends where it did: the claim says what that means.
    ends = {
        roles[role]: int(table["step"].iloc[-1])
        for role, table in tables.items()
        if not stops_by_divergence(table)
    }
    if claim.same_end and len(set(ends.values())) > 1:
        listed = ", ".join(f"{name} at step {end}" for name, end in ends.items())
        raise NotMeasurableError(f"branches end at different steps ({listed})")
    return SeedTables(seed, tables, roles)


def _measured(claim: Claim, seed: SeedTables) -> Measurement:
    """The statistic of one seed, if it is a number that the interval can be taken of."""
    measurement = claim.measure(seed)
    if math.isnan(measurement.value):
        raise NotMeasurableError("the statistic is not a number")
    if claim.logarithmic and measurement.value < 0:
        raise NotMeasurableError(f"a ratio of {measurement.value:.3g} has no logarithm")
    return measurement


def _is_extreme(claim: Claim, value: float) -> bool:
    """Whether the value, or its logarithm where that is what counts, is infinite."""
    return math.isinf(value) or (claim.logarithmic and value == 0)


def _interval(claim: Claim, values: list[float]) -> Interval:
    """Mean and ends; all unknown without a value, the ends where a value is extreme."""
    if not values:
        return Interval(math.nan, math.nan, math.nan)
    extreme = [value for value in values if _is_extreme(claim, value)]
    if extreme:
        # The mean of values that are infinite in both directions is not a number.
        mean = extreme[0] if len(set(extreme)) == 1 else math.nan
        return Interval(mean, math.nan, math.nan)
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
    extreme = [value for value in values if _is_extreme(claim, value)]
    if any(not rule.allows(value) for value in extreme):
        return "does not hold", ""
    if extreme:
        return "undecided", f"a value of {extreme[0]:g} has no interval"
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


def _verdict(use: ClaimUse, measured: Mapping[int, Measurement], reasons: list[str]) -> Verdict:
    claim = use.claim
    found = [entry for entry in measured.values() if not math.isnan(entry.value)]
    values = [entry.value for entry in found]
    interval = _interval(claim, values)
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
        roles={role: use.roles[role] for role in claim.needs_roles if role in use.roles},
    )
