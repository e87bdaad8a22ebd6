"""The page of one study: verdicts, interactive curves, spec, environment.

The page is a single HTML file that can be sent alone and opens offline: plotly's script, the data,
figures, style and script are all inside. A Content-Security-Policy allows exactly these two
scripts, by their hashes, and no load from anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg import __version__
from thalweg.analysis.claims.judgement import DEFAULT_ROLES, Verdict
from thalweg.analysis.claims.statistics import rows_where
from thalweg.analysis.claims.verdicts import number
from thalweg.analysis.figures.curves import branches_of, step_axis
from thalweg.analysis.figures.figure import SavedFigures
from thalweg.analysis.report.pages import (
    embedded_figure,
    policy_for,
    read,
    template,
    trusted,
    verdict_rows,
    write_page,
)
from thalweg.analysis.report.panels import embedded_json, page_data

if TYPE_CHECKING:
    import pandas as pd


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
    warning: str = "",
) -> Path:
    """Write `report.html` into the study folder and return its path; an earlier one is replaced.

    data          metric table with `seed` and `branch`, as `thalweg.load` gives it
    spec_toml     the resolved spec, shown as it is
    environment   versions, device and the like; nested mappings are flattened
    figures       the saved figures, put into the page; their files are named beside them
    command       what to type to make the study again
    warning       what a reader must know before anything else, such as that it is a smoke run
    """
    plotly, page = read("plotly/plotly-basic.min.js"), read("page.js")
    html = template("report.html.jinja").render(
        title=title,
        version=__version__,
        policy=policy_for(plotly, page),
        plotly=trusted(plotly),
        script=trusted(page),
        style=trusted(read("page.css")),
        study_data=trusted(embedded_json(page_data(data, roles))),
        headline=_headline(data, verdicts, roles),
        verdicts=verdict_rows(verdicts, figures.saved),
        costs=_costs(data, roles),
        figures=[embedded_figure(figure, study_folder) for figure in figures.saved],
        skipped=dict(figures.skipped),
        spec=spec_toml,
        environment=list(_flattened(environment)),
        command=command,
        warning=warning,
    )
    path = study_folder / "report.html"
    write_page(path, html)
    return path


def _headline(
    data: pd.DataFrame, verdicts: Sequence[Verdict], roles: Mapping[str, str]
) -> dict[str, Any]:
    """Counts for the head of the page."""
    points = sorted(set(step_axis(data).branch_points.values()))
    start = f"{points[0]:,}" if points else ""
    if len(points) > 1:
        start += f"\N{EN DASH}{points[-1]:,}"
    return {
        "held": sum(verdict.outcome == "holds" for verdict in verdicts),
        "claims": len(verdicts),
        "seeds": len(set(data["seed"])),
        "branches": len([name for name in branches_of(data, roles) if name != "trunk"]),
        "branch_point": start,
        "last_step": f"{data['step'].to_numpy().max():,}",
    }


def _costs(data: pd.DataFrame, roles: Mapping[str, str]) -> list[dict[str, str]]:
    """Mean cost and estimated error of the tracked subspace, branch by branch."""
    if "subspace_gradients" not in data.columns:
        return []
    rows = []
    for branch in branches_of(data, roles):
        table = rows_where(data, "branch", branch)
        counted = _finite(table, "subspace_gradients")
        if not len(counted):
            continue
        errors = _finite(table, "subspace_error")
        error = 100 * float(np.median(errors)) if len(errors) else math.nan
        rows.append(
            {
                "branch": branch,
                "cost": number(float(counted.mean())),
                "error": number(error) + (" %" if len(errors) else ""),
                "rows": f"{len(counted):,}",
            }
        )
    return rows


def _flattened(entries: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Names and values of nested settings, names joined by dots."""
    for key, value in entries.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            yield name, ", ".join(map(str, value))
        else:
            yield name, str(value)


def _finite(table: pd.DataFrame, column: str) -> np.ndarray:
    """Measured values of a column; none where there is no such column."""
    if column not in table.columns:
        return np.empty(0)
    values = table[column].to_numpy(dtype=np.float64)
    return values[np.isfinite(values)]
