"""The page docs/reliability.md: what was tried how often, and what a study survives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.faults.fault import Family, Fault, Tried

HEAD = """# What a study survives

Faults that happen to people's studies, each done on purpose, as often as time allowed, with what
came of it. `make faults` does all of it again and writes this page: an hour on two cores, or
`make faults MINUTES=5`. `make slow` includes a short form.

{made}

A study here is two seeds of a trunk and two branches, two processes at a time, a checkpoint every
{every} steps, small enough to be harmed thousands of times. *Resumed, the same* means: `thalweg
check` finds nothing; `thalweg resume`, or the same command where nothing was written yet, ends with
0; every measured number and every tensor of the last checkpoints is bit for bit that of an
undisturbed study on the same machine; and `check` finds nothing then. Random instants are uniform
over the study's duration, so that some lie before its first step and some in the drawing of
figures. "Steps again" are steps that were made twice, of 66 in all.
"""
TAIL = """
## Not in this table

- A power cut. What is sealed is flushed to the disk, its folder's entry too, before it counts; a
  disk that says "flushed" and is not can lose more than a checkpoint. `thalweg check` finds that.
- A forger. Hashes find damage and mistakes, not intent ([checking](checking.md)).
- Text that nothing is computed from: `log.txt`, figures and pages have no digest; `verdicts.json`
  is read as JSON, and made anew from the measured rows by `thalweg report`.
- `spec.toml` may be edited where that changes no number that is there: names, seeds, claims,
  figures, more steps. A flipped bit in one of these is an edit.
"""
ROW = "| {happens} | {tried} | {survived} | {means} | {lost} |"
COLUMNS = "| what happens | tried | survived | that is | lost at most |\n|---|--:|--:|---|---|"


@dataclass
class Counts:
    """What came of all attempts at one fault."""

    tried: int = 0
    seconds: float = 0.0
    lost: list[float] = field(default_factory=list)
    failures: list[Tried] = field(default_factory=list)
    unable: str = ""
    exhausted: bool = False

    def add(self, tried: Tried) -> None:
        """Count one more."""
        self.seconds += tried.seconds
        self.unable = self.unable or tried.unable
        self.exhausted = self.exhausted or tried.exhausted or bool(tried.unable)
        if tried.exhausted or tried.unable:
            return
        self.tried += 1
        if tried.failure:
            self.failures.append(tried)
        elif tried.lost is not None:
            self.lost.append(tried.lost)


def page(families: Sequence[Family], counts: Mapping[str, Counts], made: str, every: int) -> str:
    """The whole page as Markdown.

    Args:
        families: what there is to be tried.
        counts: of each fault, by its key.
        made: a line on what it was made with.
        every: steps between two checkpoints.
    """
    parts = [HEAD.format(made=made, every=every)]
    for family in families:
        rows = [_row(fault, counts[fault.key]) for fault in family.faults]
        parts.append("\n".join([f"\n## {family.name}\n", COLUMNS, *rows, ""]))
    return "".join([*parts, TAIL])


def _row(fault: Fault, counts: Counts) -> str:
    survived = str(counts.tried - len(counts.failures))
    if counts.failures:
        survived = f"**{survived}**"
    tried = "not possible here" if counts.unable and not counts.tried else f"{counts.tried:,}"
    return ROW.format(
        happens=fault.happens,
        tried=tried + (" (all)" if counts.exhausted and counts.tried else ""),
        survived="" if not counts.tried else survived,
        means=fault.survived,
        lost=fault.lost + _measured(fault, counts),
    )


def _measured(fault: Fault, counts: Counts) -> str:
    if not fault.unit or not counts.lost:
        return ""
    mean, most = sum(counts.lost) / len(counts.lost), max(counts.lost)
    return f"; measured: {most:g} {fault.unit} at most, {mean:.2g} on average"
