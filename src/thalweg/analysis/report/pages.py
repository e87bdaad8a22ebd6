"""What all pages share: templates, escaping, the table of verdicts, and writing in one go."""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from thalweg import registry
from thalweg.analysis.claims.judgement import Verdict
from thalweg.analysis.claims.verdicts import verdict_text
from thalweg.analysis.figures.drawing import COLUMN_WIDTH, STYLE
from thalweg.analysis.figures.figure import SavedFigure
from thalweg.lab.store.durable import write_file

LOSS_COUNTS = 0.5
OTHERS_COUNT = 0.05
"""What a column that a claim and a figure share counts if it is the loss, and one not shared."""


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


def verdict_rows(
    verdicts: Iterable[Verdict], figures: Sequence[SavedFigure], study: str = ""
) -> list[dict[str, Any]]:
    """What the table of verdicts shows of each.

    Args:
        figures: those on the page, of which each claim is linked to the one that shows it.
        study: see `anchor`.
    """
    rows: list[dict[str, Any]] = []
    for verdict in verdicts:
        figure = figure_of(verdict.claim, figures)
        link = figure and {"anchor": anchor(figure, study), "title": figure.title}
        text, plot = verdict_text(verdict), interval_plot(verdict)
        rows.append({"verdict": verdict, "text": text, "plot": plot, "figure": link})
    return rows


def figure_of(claim: str, figures: Sequence[SavedFigure]) -> SavedFigure | None:
    """The figure that shows what a claim is about: it draws the same columns, and few others.

    Many claims read the loss beside what they are about, so that it counts less. Of equals the
    first; None where no figure draws anything of it.
    """
    about = set(registry.claims[claim].needs_columns) if claim in registry.claims else set()
    best, most = None, 0.0
    for figure in figures:
        drawn = set(registry.figures[figure.name].needs if figure.name in registry.figures else ())
        shared = sum(LOSS_COUNTS if column == "loss" else 1.0 for column in about & drawn)
        value = shared - OTHERS_COUNT * len(drawn - about) if shared else 0.0
        if value > most:
            best, most = figure, value
    return best


def anchor(figure: SavedFigure, study: str = "") -> str:
    """Where a figure stands on a page; with the name of its study where there are several."""
    return f"figure-{study}-{figure.name}" if study else f"figure-{figure.name}"


def embedded_figure(figure: SavedFigure, folder: Path, study: str = "") -> dict[str, Any]:
    """What a page shows of a figure: its picture inside, and the names of its files.

    Args:
        folder: of the page.
        study: see `anchor`.
    """
    image = figure.png.read_bytes()
    first = Path(os.path.relpath(figure.png, folder)).as_posix()
    return {
        "anchor": anchor(figure, study),
        "title": figure.title,
        "caption": figure.caption,
        "image": f"data:image/png;base64,{base64.b64encode(image).decode()}",
        "files": ", ".join([first, figure.pdf.suffix, figure.csv.suffix]),
        "wide": is_wide(image),
    }


def is_wide(png: bytes) -> bool:
    """Whether a figure is wider than one column: its pixels in a row stand first in its header."""
    return int.from_bytes(png[16:20], "big") > 1.5 * COLUMN_WIDTH * STYLE["savefig.dpi"]


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
