"""Claims and verdicts as shown: a table for the terminal, rows and JSON for programs.

The report has its own table, made from the same `VerdictText`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg import registry
from thalweg.analysis.claims.judgement import Outcome, Verdict

if TYPE_CHECKING:
    from rich.table import Table

#: Symbol of each outcome, so that no reader needs the colour.
SYMBOLS: Mapping[Outcome, str] = {"holds": "✓", "does not hold": "✗", "undecided": "?"}
_COLOURS: Mapping[Outcome, str] = {"holds": "green", "does not hold": "red", "undecided": "yellow"}


@dataclass(frozen=True)
class VerdictText:
    """The words and numbers of one verdict, as every table shows them."""

    measured: str
    spread: str
    outcome: str
    seeds: str
    beside: tuple[tuple[str, str], ...]


def number(value: float) -> str:
    """Three significant digits; a dash for what is not known."""
    if math.isnan(value):
        return "\N{EN DASH}"
    if math.isinf(value):
        return "∞" if value > 0 else "\N{MINUS SIGN}∞"
    digits = 3 if abs(value) < 1000 else 4
    return f"{value:#.{digits}g}".rstrip(".").replace("-", "\N{MINUS SIGN}")


def verdict_text(verdict: Verdict) -> VerdictText:
    """Format a verdict: mean, interval over seeds, symbol and word, value of each seed."""
    spread = ""
    if not math.isnan(verdict.low):
        spread = f"[{number(verdict.low)}, {number(verdict.high)}]"
    return VerdictText(
        measured=number(verdict.mean),
        spread=spread,
        outcome=f"{SYMBOLS[verdict.outcome]} {verdict.outcome}",
        seeds=", ".join(f"{seed}: {number(value)}" for seed, value in verdict.values.items()),
        beside=tuple((name, number(value)) for name, value in verdict.beside.items()),
    )


def render_verdicts(verdicts: Sequence[Verdict]) -> Table:
    """The table that ends a study: claim, measured statistic over seeds, rule, verdict."""
    from rich.table import Table
    from rich.text import Text

    counts = {len(verdict.values) for verdict in verdicts}
    seeds = f"{max(counts, default=0)} seed" + ("" if max(counts, default=0) == 1 else "s")
    table = Table(
        title=f"Claims, judged over {seeds}",
        caption="measured: mean over seeds [95 % t-interval]",
        title_justify="left",
        caption_justify="left",
        show_lines=True,
    )
    table.add_column("claim", ratio=4)
    table.add_column("measured", ratio=4)
    table.add_column("rule", no_wrap=True)
    table.add_column("verdict", ratio=2, min_width=15)
    for verdict in verdicts:
        shown = verdict_text(verdict)
        claim = Text.assemble((verdict.label, "bold"), "\n", (verdict.statement, "dim"))
        outcome = Text(shown.outcome, style=f"bold {_COLOURS[verdict.outcome]}")
        if verdict.note:
            outcome.append("\n" + verdict.note, style="dim not bold")
        measured = Text.assemble(
            shown.measured, " ", shown.spread, "\n", (verdict.statistic, "dim")
        )
        table.add_row(claim, measured, Text(verdict.rule.text), outcome)
    return table


def verdicts_to_json(verdicts: Sequence[Verdict]) -> str:
    """A JSON list, one object a verdict; NaN becomes null, an infinite value the word "inf"."""
    entries = [_plain({"label": verdict.label, **asdict(verdict)}) for verdict in verdicts]
    return json.dumps(entries, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: object) -> object:
    """JSON has neither NaN nor infinity, nor keys that are numbers."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def claim_rows(root: Path | str = "runs") -> list[dict[str, Any]]:
    """One row a claim: what it says, how it is judged, and the newest verdicts by study.

    A claim judged for several branches of one study has a verdict for each: the study's name is
    then followed by the branches, such as `main-digits, bulk-k20 against sgd`.
    """
    from thalweg.lab.store import find_studies

    verdicts = {study.name: study.known_verdicts() for study in find_studies(root)}
    return [
        {
            "claim": claim.name,
            "statement": claim.statement,
            "source": claim.source,
            "statistic": claim.statistic,
            "rule": claim.rule.text,
            "refuted_by": claim.refuted_by,
            "minimum_seeds": claim.minimum_seeds,
            "verdicts": {
                _place(study, verdict): verdict["outcome"]
                for study, found in verdicts.items()
                for verdict in found
                if verdict["claim"] == claim.name
            },
        }
        for claim in registry.claims.values()
    ]


def _place(study: str, verdict: Mapping[str, Any]) -> str:
    """The study, and the branches where these were named for the claim."""
    branches = verdict.get("label", "").removeprefix(verdict["claim"]).removeprefix(": ")
    return f"{study}, {branches}" if branches else study
