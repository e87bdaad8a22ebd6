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
    from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
    from rich.text import Text

#: Symbol of each outcome, so that no reader needs the colour.
SYMBOLS: Mapping[Outcome, str] = {"holds": "✓", "does not hold": "✗", "undecided": "?"}
_COLOURS: Mapping[Outcome, str] = {"holds": "green", "does not hold": "red", "undecided": "yellow"}


GAP, INDENT, LEAST = 2, 2, 12
"""Columns of a terminal: between cells, before a statement, and for a claim's name at least."""


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


def render_verdicts(verdicts: Sequence[Verdict]) -> Group:
    """What ends a study: claim, statistic over seeds, rule and verdict in a row, words below it.

    It is made for 80 columns, and fits fewer.
    """
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    most = max((len(verdict.values) for verdict in verdicts), default=0)
    shown = [(verdict, verdict_text(verdict)) for verdict in verdicts]
    rows = [
        (
            Text(verdict.label, style="bold"),
            Text(f"{text.measured} {text.spread}".rstrip()),
            Text(verdict.rule.text),
            Text(text.outcome, style=f"bold {_COLOURS[verdict.outcome]}"),
        )
        for verdict, text in shown
    ]
    head = tuple(Text(word, style="dim") for word in ("claim", "measured", "rule", "verdict"))
    widths = [max(cell.cell_len for cell in column) for column in zip(head, *rows, strict=True)]
    parts: list[RenderableType] = [
        Text(f"Claims, judged over {most} seed" + ("" if most == 1 else "s"), style="bold"),
        _Row(head, widths),
    ]
    for (verdict, _), row in zip(shown, rows, strict=True):
        parts.append(_Row(row, widths))
        below = [verdict.statement, f"measured: {verdict.statistic}", verdict.note]
        parts += [
            Padding(Text(line, style="dim"), (0, 0, 0, INDENT), expand=False)
            for line in below
            if line
        ]
    parts.append(Text("A number is the mean over seeds [95 % t-interval].", style="dim"))
    return Group(*parts)


@dataclass(frozen=True)
class _Row:
    """One line of cells below those of the other rows; the first is wrapped where it must be."""

    cells: tuple[Text, ...]
    widths: Sequence[int]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table

        gaps = GAP * (len(self.widths) - 1)
        first = min(self.widths[0], max(options.max_width - sum(self.widths[1:]) - gaps, LEAST))
        table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        for width in (first, *self.widths[1:]):
            table.add_column(width=width, overflow="fold")
        table.add_row(*self.cells)
        yield table


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
