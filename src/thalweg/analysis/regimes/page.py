"""The page of a sweep: its phase diagrams, what holds where, and a table of all its points.

One HTML file that opens offline: figures, their data, style and script are inside. A
Content-Security-Policy allows this one script, by its hash, and no load from anywhere. Each point
links to its own study, relative to the page.
"""

from __future__ import annotations

import base64
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from thalweg import __version__, registry
from thalweg.analysis.claims.statistics import rows_where
from thalweg.analysis.claims.verdicts import SYMBOLS, number
from thalweg.analysis.quantities import quantities
from thalweg.analysis.regimes.boundary import PlaneVerdict
from thalweg.analysis.regimes.phase_diagram import Picture
from thalweg.analysis.regimes.plane import setting_text, statistic_of_points
from thalweg.analysis.regimes.table import DAMAGED, SweepTable
from thalweg.analysis.report.pages import (
    is_wide,
    policy_for,
    read,
    template,
    trusted,
    write_page,
)
from thalweg.analysis.report.panels import embedded_json

SHOWN = ("loss", "test_accuracy", "sharpness", "alignment_gradient")
"""Quantities that the table of points has besides the one that is drawn."""
NO_BREAK = "\N{NO-BREAK SPACE}"
MOST_NOTES = 50
"""Runs that failed or are damaged that are listed."""


def write_sweep_page(
    table: SweepTable,
    pictures: Sequence[Picture],
    verdicts: Sequence[tuple[PlaneVerdict, Picture | None]],
    skipped: Mapping[str, str],
    *,
    statistic: str,
    branch: str,
    warning: str = "",
) -> Path:
    """Write `report.html` into the sweep's folder and return its path.

    Args:
        pictures: of the statistic.
        verdicts: of each claim, with its phase diagram.
        skipped: name of each figure that is not there, and why.
        statistic: what is drawn, and one of the columns.
        branch: whose numbers the table has.
        warning: what stands at the head, after "This is".
    """
    sweep = table.sweep
    script = read("sweep.js")
    drawn = [*pictures, *(picture for _, picture in verdicts if picture is not None)]
    path = sweep.path / "report.html"
    columns = [name for name in dict.fromkeys((statistic, *SHOWN)) if name in table.statistics]
    html = template("sweep.html.jinja").render(
        title=sweep.name,
        warning=warning,
        version=__version__,
        policy=policy_for(script),
        style=trusted(read("page.css") + read("all_studies.css") + read("sweep.css")),
        script=trusted(script),
        sweep_data=trusted(embedded_json(_regions(drawn))),
        headline=_headline(table),
        pictures=[_card(picture, sweep.path) for picture in pictures],
        claims=[
            {**_claim(table, verdict), "card": picture and _card(picture, sweep.path)}
            for verdict, picture in verdicts
        ],
        skipped=dict(skipped),
        branch=branch,
        heads=_heads(table, columns),
        rows=_rows(table, columns, branch),
        notes=_notes(table),
    )
    write_page(path, html)
    return path


def _headline(table: SweepTable) -> dict[str, Any]:
    states = Counter(table.runs["state"])
    runs = sum(states.values())
    others = ("diverged", "failed", DAMAGED, "running", "interrupted", "waiting")
    return {
        "points": len(table.sweep.points),
        "seeds": len(set(table.runs["seed"])),
        "done": f"{states['done']:,}",
        "runs": f"{runs:,}",
        "states": [(state, f"{states[state]:,}") for state in others if states[state]],
        "settings": [
            (key, len(table.sweep.values(key)), _range(table, key)) for key in table.sweep.keys
        ],
    }


def _range(table: SweepTable, key: str) -> str:
    texts = [setting_text(value) for value in table.sweep.values(key)]
    return ", ".join(texts) if len(texts) <= 8 else f"{texts[0]} … {texts[-1]}"


def _card(picture: Picture, folder: Path) -> dict[str, Any]:
    """A figure with all its files: picture and data inside, the others linked."""
    saved = picture.saved
    image = saved.png.read_bytes()
    return {
        "name": saved.name,
        "title": saved.title,
        "caption": saved.caption,
        "image": f"data:image/png;base64,{base64.b64encode(_smaller(image)).decode()}",
        "wide": is_wide(image),
        "csv": f"data:text/csv;base64,{base64.b64encode(saved.csv.read_bytes()).decode()}",
        "files": [
            (kind, quote(Path(os.path.relpath(path, folder)).as_posix()))
            for kind, path in (("PNG", saved.png), ("PDF", saved.pdf))
        ],
    }


def _smaller(png: bytes) -> bytes:
    """The picture with 256 colours in place of all: a third of the bytes, and no other look."""
    # matplotlib needs it too.
    from PIL import Image

    picture, written = Image.open(BytesIO(png)).convert("RGB"), BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(written, "png", optimize=True)
    return written.getvalue()


def _regions(pictures: Sequence[Picture]) -> dict[str, list[list[Any]]]:
    """Where each point is in each picture: point, left, top, width, height in per cent, words."""
    return {
        picture.saved.name: [
            [region.point, *(round(100 * part, 2) for part in region.box), region.said]
            for region in picture.regions
        ]
        for picture in pictures
        if picture.regions
    }


def _claim(table: SweepTable, verdict: PlaneVerdict) -> dict[str, Any]:
    own = rows_where(table.verdicts, "label", verdict.label)
    claim = registry.claims.get(next(iter(own["claim"])))
    return {
        "label": verdict.label,
        "statement": claim.statement if claim else "",
        "statistic": f"{claim.statistic}: {claim.rule.text.replace(' ', NO_BREAK)}"
        if claim
        else "",
        "boundaries": verdict.boundaries_in_words,
        "counts": verdict.counts_in_words,
    }


def _heads(table: SweepTable, columns: Sequence[str]) -> list[dict[str, str]]:
    """The columns of the table of points: name, what it is, and its kind."""
    settings = [
        {"name": key, "what": f"setting {key}", "kind": "setting"} for key in table.sweep.keys
    ]
    states = {"name": "runs done", "what": "runs that are done, of all", "kind": "state"}
    numbers = [
        {
            "name": name,
            "what": f"last {quantities[name].axis}, mean over seeds",
            "kind": "num",
        }
        for name in columns
    ]
    claims = [
        {"name": label, "what": f"verdict on {label}, and its mean", "kind": "verdict"}
        for label in table.labels
    ]
    return [*settings, states, *numbers, *claims]


def _rows(table: SweepTable, columns: Sequence[str], branch: str) -> list[dict[str, Any]]:
    """A row a point: where its study is, and each cell as (text, class)."""
    means = {name: statistic_of_points(table, name, branch)["mean"].tolist() for name in columns}
    states: dict[int, Counter[str]] = {}
    for point, state in zip(table.runs["point"], table.runs["state"], strict=True):
        states.setdefault(point, Counter())[state] += 1
    judged = {(row["point"], row["label"]): row for row in table.verdicts.to_dict("records")}
    return [
        {
            "href": _address(table, at),
            "settings": [setting_text(point.settings.get(key)) for key in table.sweep.keys],
            "cells": [
                (_states_text(states.get(at, Counter())), "state"),
                *((number(means[name][at]), "num") for name in columns),
                *(_verdict_cell(judged.get((at, label))) for label in table.labels),
            ],
        }
        for at, point in enumerate(table.sweep.points)
    ]


def _address(table: SweepTable, at: int) -> str:
    """A point's report, or its folder before there is one, relative to the page."""
    study = table.sweep.points[at].study.path
    report = study / "report.html"
    target = os.path.relpath(report if report.is_file() else study, table.sweep.path)
    # "./" so that no name is taken for a scheme, such as `javascript:`.
    return "./" + quote(Path(target).as_posix())


def _states_text(states: Counter[str]) -> str:
    text = f"{states['done']} of {sum(states.values())}"
    others = [
        f"{count} {state}" for state, count in states.items() if state not in ("done", "waiting")
    ]
    return ", ".join([text, *sorted(others)])


def _verdict_cell(verdict: Mapping[str, Any] | None) -> tuple[str, str]:
    if verdict is None:
        return "\N{EN DASH}", ""
    outcome = verdict["outcome"]
    mean = "" if math.isnan(verdict["mean"]) else f" {number(verdict['mean'])}"
    return f"{SYMBOLS[outcome]} {outcome}{mean}", outcome.replace(" ", "-")


def _notes(table: SweepTable) -> dict[str, Any]:
    """The runs that failed or are damaged, with what is said of them."""
    bad = [row for row in table.runs.to_dict("records") if row["state"] in ("failed", DAMAGED)]
    listed = bad[:MOST_NOTES]
    return {
        "more": len(bad) - len(listed),
        "runs": [
            (row["study"], f"seed {row['seed']} {row['branch']}", row["state"], row["note"])
            for row in listed
        ],
    }
