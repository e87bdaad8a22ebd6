"""What do all studies look like as one page: verdicts and figures of each, and the way to the rest.

Self-contained, without scripts: the figures are inside. Each study's own page, with interactive
curves, is linked relative to this one.
"""

from __future__ import annotations

import base64
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from thalweg import __version__, registry
from thalweg.analysis.figures.drawing import COLUMN_WIDTH, STYLE
from thalweg.analysis.report.pages import read, template, trusted, verdict_rows, write_page
from thalweg.lab.preparing import read_spec

if TYPE_CHECKING:
    from thalweg.lab.study import StudyResult

OUTCOMES = ("holds", "does not hold", "undecided")


def write_collection(path: Path, results: Sequence[StudyResult], title: str) -> Path:
    """Write the page to `path`, beside the studies' folders, and return it."""
    found = Counter(verdict.outcome for result in results for verdict in result.verdicts)
    html = template("collection.html.jinja").render(
        title=title,
        version=__version__,
        style=trusted(read("page.css") + read("collection.css")),
        counts={outcome: found[outcome] for outcome in OUTCOMES},
        studies=[_section(path.parent, result) for result in results],
    )
    write_page(path, html)
    return path


def _section(root: Path, result: StudyResult) -> dict[str, Any]:
    spec = read_spec(result.study)
    report = result.report
    return {
        "anchor": result.study.name,
        "name": f"{spec.name} on {spec.problem.data.registered_name}",
        "description": spec.description,
        "report": report and quote(Path(os.path.relpath(report, root)).as_posix()),
        "verdicts": verdict_rows(result.verdicts),
        "figures": [_figure(png) for png in result.figures],
    }


def _figure(png: Path) -> dict[str, Any]:
    figure, image = registry.figures[png.stem], png.read_bytes()
    return {
        "title": figure.title,
        "caption": figure.caption,
        "image": f"data:image/png;base64,{base64.b64encode(image).decode()}",
        "wide": _width(image) > 1.5 * COLUMN_WIDTH * STYLE["savefig.dpi"],
    }


def _width(png: bytes) -> int:
    """Pixels in a row of a PNG: the first number of its header chunk."""
    return int.from_bytes(png[16:20], "big")
