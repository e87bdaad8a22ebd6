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
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from thalweg import __version__
from thalweg.lab.claims.judgement import DEFAULT_ROLES, Verdict
from thalweg.lab.claims.verdicts import verdict_text
from thalweg.lab.figures.saving import SavedFigures
from thalweg.lab.report.facts import costs, flattened, headline
from thalweg.lab.report.interval_drawing import interval_plot
from thalweg.lab.report.page_data import embedded_json, page_data
from thalweg.lab.report.panels import PANELS, Panel, Quantity, add_panel

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["PANELS", "Panel", "Quantity", "add_panel", "write_report"]


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
    plotly, page = _plotly_script(), _read("page.js")
    html = _template().render(
        title=title,
        version=__version__,
        policy=_policy(plotly, page),
        plotly=_trusted(plotly),
        script=_trusted(page),
        style=_trusted(_read("page.css")),
        study_data=_trusted(embedded_json(page_data(data, roles))),
        headline=headline(data, verdicts, roles),
        verdicts=[
            {"verdict": verdict, "text": verdict_text(verdict), "plot": interval_plot(verdict)}
            for verdict in verdicts
        ],
        costs=costs(data, roles),
        figures=_links(figures, study_folder),
        skipped=dict(figures.skipped),
        spec=spec_toml,
        environment=list(flattened(environment)),
        command=command,
    )
    path = study_folder / "report.html"
    # A reader with the page open must never load half of it.
    unfinished = path.with_name(f".report.html.{os.getpid()}")
    try:
        unfinished.write_text(html, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_read("report.html.jinja"))


def _read(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")


def _plotly_script() -> str:
    """The plotly.js that the plotly package ships: the full bundle, 4.8 MB, and no smaller one."""
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()


def _trusted(text: str) -> Any:
    """Mark text of our own, or escaped by us, as not to be escaped again."""
    from markupsafe import Markup

    return Markup(text)


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
