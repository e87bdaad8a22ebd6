"""What all pages share: templates, escaping, the table of verdicts, and writing in one go."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from thalweg.analysis.claims.judgement import Verdict
from thalweg.analysis.claims.verdicts import verdict_text
from thalweg.lab.store.durable import write_file


def template(name: str) -> Any:
    """A template of this package; all that is put into it is escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def read(name: str) -> str:
    """The text of a file beside this one."""
    return resources.files("thalweg.analysis.report").joinpath(name).read_text(encoding="utf-8")


def trusted(text: str) -> Any:
    """Mark text of our own, or escaped by us, as not to be escaped again."""
    from markupsafe import Markup

    return Markup(text)


def policy_for(*scripts: str) -> str:
    """Content-Security-Policy: the given inline scripts by hash, inline styles, nothing remote.

    Plotly inserts style rules at run time, hence 'unsafe-inline' for styles alone; its "download as
    PNG" needs images from data: and blob:.
    """
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
        for text in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def verdict_rows(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """What the table of verdicts shows of each."""
    return [
        {"verdict": verdict, "text": verdict_text(verdict), "plot": interval_plot(verdict)}
        for verdict in verdicts
    ]


def write_page(path: Path, html: str) -> None:
    """Write a page, replacing an earlier one: a reader must never load half of it.

    Raises DiskFull where there is no room for it.
    """
    write_file(path, html, flush=False)


# Where the seeds, their interval and the rule lie: a small drawing beside each verdict.

#: Width of the drawing in its own units; the page scales it.
WIDTH = 220.0


@dataclass(frozen=True)
class IntervalPlot:
    """Horizontal positions in [0, WIDTH].

    allowed     start and width of the side on which the claim holds
    interval    start and width of the interval over seeds; None where there is none
    """

    threshold: float
    allowed: tuple[float, float]
    mean: float
    interval: tuple[float, float] | None
    seeds: tuple[float, ...]


def interval_plot(verdict: Verdict) -> IntervalPlot | None:
    """Positions for the drawing, on a log axis for ratios; None where nothing finite is known."""
    values = [value for value in verdict.values.values() if _drawable(verdict, value)]
    if not values or not _drawable(verdict, verdict.mean):
        return None
    ends = [end for end in (verdict.low, verdict.high) if _drawable(verdict, end)]
    place = math.log if verdict.logarithmic else float
    marks = [place(mark) for mark in (*values, *ends, verdict.rule.threshold)]
    low, high = min(marks), max(marks)
    # A wide margin on both sides shows the rule as a region, not as the edge of the drawing.
    margin = 0.25 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def position(value: float) -> float:
        return round((place(value) - low) / (high - low) * WIDTH, 1)

    threshold = position(verdict.rule.threshold)
    above = verdict.rule.direction == "above"
    allowed = (threshold, WIDTH - threshold) if above else (0.0, threshold)
    interval = None
    if len(ends) == 2:
        start, end = position(ends[0]), position(ends[1])
        interval = (start, max(end - start, 1.0))
    return IntervalPlot(
        threshold, allowed, position(verdict.mean), interval, tuple(map(position, values))
    )


def _drawable(verdict: Verdict, value: float) -> bool:
    return math.isfinite(value) and (value > 0 or not verdict.logarithmic)
