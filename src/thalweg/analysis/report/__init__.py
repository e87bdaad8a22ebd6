"""What does a study look like as one page: verdicts, interactive curves, spec, environment.

The page is a single HTML file that opens offline: plotly's script, the data, style and script are
all inside. A Content-Security-Policy allows exactly these two scripts, by their hashes, and no
load from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from thalweg import __version__
from thalweg.analysis.claims.judgement import DEFAULT_ROLES, Verdict
from thalweg.analysis.figures.saving import SavedFigures
from thalweg.analysis.report.facts import costs, flattened, headline
from thalweg.analysis.report.page_data import embedded_json, page_data
from thalweg.analysis.report.pages import read, template, trusted, verdict_rows, write_page
from thalweg.analysis.report.panel import Panel, Quantity

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Panel", "Quantity", "write_report"]


def write_report(
    study_folder: Path,
    data: pd.DataFrame,
    verdicts: Sequence[Verdict],
    spec_toml: str,
    environment: Mapping[str, object],
    figures: SavedFigures,
    title: str,
    *,
    roles: Mapping[str, str] = DEFAULT_ROLES,
    command: str = "thalweg run spec.toml",
) -> Path:
    """Write `report.html` into the study folder and return its path; an earlier one is replaced.

    data          metric table with `seed` and `branch`, as `thalweg.load` gives it
    spec_toml     the resolved spec, shown as it is
    environment   versions, device and the like; nested mappings are flattened
    figures       the saved figures, linked relative to the study folder
    command       what to type to make the study again
    """
    plotly, page = _plotly_script(), read("page.js")
    html = template("report.html.jinja").render(
        title=title,
        version=__version__,
        policy=_policy(plotly, page),
        plotly=trusted(plotly),
        script=trusted(page),
        style=trusted(read("page.css")),
        study_data=trusted(embedded_json(page_data(data, roles))),
        headline=headline(data, verdicts, roles),
        verdicts=verdict_rows(verdicts),
        costs=costs(data, roles),
        figures=_links(figures, study_folder),
        skipped=dict(figures.skipped),
        spec=spec_toml,
        environment=list(flattened(environment)),
        command=command,
    )
    path = study_folder / "report.html"
    write_page(path, html)
    return path


def _plotly_script() -> str:
    """The plotly.js that the plotly package ships: the full bundle, 4.8 MB, and no smaller one."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _policy(*scripts: str) -> str:
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


def _links(figures: SavedFigures, study_folder: Path) -> list[dict[str, Any]]:
    """Title, caption and relative addresses of each figure's files."""

    def address(path: Path) -> str:
        return quote(Path(os.path.relpath(path, study_folder)).as_posix())

    return [
        {
            "title": figure.title,
            "caption": figure.caption,
            "files": [
                (kind, address(path))
                for kind, path in (("PNG", figure.png), ("PDF", figure.pdf), ("CSV", figure.csv))
            ],
        }
        for figure in figures.saved
    ]
