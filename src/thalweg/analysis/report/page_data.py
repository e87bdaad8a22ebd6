"""What does the page's script draw: the panels as plain lists, rounded and thinned."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thalweg import registry
from thalweg.analysis.figures.branch_style import branch_styles
from thalweg.analysis.figures.curves import Curve, branches_of, step_axis
from thalweg.analysis.figures.saving import Source
from thalweg.analysis.report.panels import Panel

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

#: Points drawn of one curve; of longer ones every n-th measured step is drawn.
MOST_POINTS = 1500


def page_data(data: pd.DataFrame, roles: Mapping[str, str]) -> dict[str, Any]:
    """Everything the page's script draws, as plain lists and strings; null stands for NaN.

    Quantities whose columns are missing or were never measured are left out, and panels without
    any quantity.
    """
    axis = step_axis(data)
    source = Source(data, axis, roles)
    branches = branches_of(data, roles)
    styles = {
        name: {
            "label": style.label,
            "light": style.colour,
            "dark": style.colour_on_dark,
            "dash": ",".join(f"{length}px" for length in style.dash) or "solid",
        }
        for name, style in branch_styles(branches, roles).items()
    }
    groups = {
        "top k": {"label": "top k", "light": "#0072b2", "dark": "#56b4e9", "dash": "solid"},
        "next k": {"label": "next k", "light": "#d55e00", "dark": "#ff9150", "dash": "3px,1.5px"},
    }
    panels = [_panel(panel, source) for panel in registry.panels.values()]
    return {
        "axisTitle": axis.label,
        "branchPoint": axis.branch_point,
        "branches": branches,
        "styles": styles | groups,
        "panels": [panel for panel in panels if panel["quantities"]],
    }


def _panel(panel: Panel, source: Source) -> dict[str, Any]:
    quantities = []
    for quantity in panel.quantities:
        if any(name not in source.data.columns for name in quantity.needs):
            continue
        lines = [
            _line(name, style, line, quantity.factor)
            for name, style, line in quantity.lines(source)
            if line is not None
        ]
        if lines:
            quantities.append(
                {"label": quantity.label, "axisTitle": quantity.axis_title, "lines": lines}
            )
    return {
        "name": panel.name,
        "title": panel.title,
        "caption": panel.caption,
        "log": panel.logarithmic,
        "wide": panel.wide,
        "quantities": quantities,
    }


def _line(name: str, style: str, line: Curve, factor: float) -> dict[str, Any]:
    stride = math.ceil(len(line.steps) / MOST_POINTS)
    # Counted from the end, so that the last point always stays.
    kept = slice((len(line.steps) - 1) % stride, None, stride)
    return {
        "name": name,
        "style": style,
        "x": _rounded(line.steps[kept], digits=9),
        "mean": _rounded(line.center[kept] * factor),
        "low": _rounded(line.low[kept] * factor),
        "high": _rounded(line.high[kept] * factor),
        "seeds": {
            str(seed): _rounded(values[kept] * factor) for seed, values in line.of_seed.items()
        },
    }


def _rounded(values: NDArray[np.float64], digits: int = 5) -> Sequence[float | None]:
    """Values with five significant digits, as short as JSON can have them; None for NaN."""
    return [
        None if not math.isfinite(value) else float(f"{value:.{digits}g}")
        for value in values.tolist()
    ]


def embedded_json(value: object) -> str:
    """JSON that cannot end the script element around it, nor open a comment or an entity."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
