"""Figure that sets optimizers side by side: loss, sharpness, alignment, effective learning rates.

A row a branch, a panel a quantity; the figure's CSV file is the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from thalweg.analysis.figures.curves import branches_of
from thalweg.analysis.figures.dot_drawing import DotRow, Mark, draw_rows, name_marks, size_of_rows
from thalweg.analysis.figures.dots import Dots
from thalweg.analysis.figures.drawing import PAGE_WIDTH
from thalweg.analysis.figures.families import unsplit
from thalweg.analysis.figures.saving import Figure, NotDrawableError, Size, Source
from thalweg.analysis.figures.windows import mean_since, seed_tables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Canvas

    from thalweg.analysis.figures.drawing import Look

#: Window of the loss, as a part of a branch; of sharpness and alignment it is the last half.
_END, _LATE = 0.1, 0.5
#: Fewer unsplit branches have figures of their own that say more.
_FEWEST = 4
_ONE = Mark("#0072b2")
_PARTS = {"dominant": Mark("#d55e00", "s"), "bulk": Mark("#009e73")}
_RATES = tuple(f"effective_lr_{part}" for part in _PARTS)
#: Of each panel: its quantities, the label of its axis, whether that is logarithmic.
_PANELS = (
    (("loss",), "training loss", True),
    (("sharpness",), "sharpness", True),
    (("alignment_gradient",), "alignment of the gradient", False),
    (_RATES, "effective learning rate", True),
)
_SIDES = ("numerator", "denominator")
_NEEDS = (
    "loss",
    "sharpness",
    "alignment_gradient",
    *(f"lr_{side}_{part}" for part in _PARTS for side in _SIDES),
)


def _rate(table: pd.DataFrame, part: str) -> float:
    """Effective learning rate over a branch; NaN where it is not positive: no place on a log axis.

    part   dominant or bulk
    """
    from thalweg.measure.effective_learning_rate import effective_learning_rate

    rate = effective_learning_rate(*(table[f"lr_{side}_{part}"] for side in _SIDES))
    return rate if rate > 0 else math.nan


def _values(table: pd.DataFrame) -> dict[str, float]:
    diverged = not math.isfinite(float(table["loss"].to_numpy(dtype=np.float64)[-1]))
    return {
        "loss": math.nan if diverged else mean_since(table, "loss", _END),
        "sharpness": mean_since(table, "sharpness", _LATE),
        "alignment_gradient": mean_since(table, "alignment_gradient", _LATE),
        **{f"effective_lr_{part}": _rate(table, part) for part in _PARTS},
    }


def _dots(source: Source) -> dict[str, Dots | None]:
    branches = [name for name in branches_of(source.data, source.roles) if name != "trunk"]
    if len(unsplit(branches, source.roles)) < _FEWEST:
        raise NotDrawableError(f"fewer than {_FEWEST} unsplit branches to set side by side")
    dots: dict[str, Dots | None] = {}
    for branch in branches:
        values = {seed: _values(t) for seed, t in seed_tables(source.data, branch).items()}
        for quantities, _, logarithmic in _PANELS:
            for name in quantities:
                # Only of the loss does a missing value mean that training diverged.
                of_seed = {
                    seed: row[name]
                    for seed, row in values.items()
                    if name == "loss" or math.isfinite(row[name])
                }
                drawn = Dots(branch, of_seed, logarithmic=logarithmic) if of_seed else None
                dots[f"{name}|{branch}"] = drawn
    return dots


def _branches(dots: Mapping[str, Dots | None]) -> list[str]:
    return list(dict.fromkeys(name.partition("|")[2] for name in dots))


def _draw(canvas: Canvas, dots: Mapping[str, Dots | None], look: Look) -> None:
    panels = canvas.subplots(1, len(_PANELS))
    for axes, (quantities, label, logarithmic) in zip(panels, _PANELS, strict=True):
        marks = [_ONE] if len(quantities) == 1 else list(_PARTS.values())
        rows = [
            DotRow(
                look.styles[branch].label,
                [
                    (drawn, mark)
                    for name, mark in zip(quantities, marks, strict=True)
                    if (drawn := dots.get(f"{name}|{branch}")) is not None
                ],
            )
            for branch in _branches(dots)
        ]
        draw_rows(axes, rows, logarithmic=logarithmic, line=None)
        axes.set_xlabel(label)
    name_marks(panels[-1], _PARTS)
    for axes in panels[1:]:
        axes.tick_params(axis="y", labelleft=False)


def _size(dots: Mapping[str, Dots | None], look: Look) -> Size:
    return PAGE_WIDTH, size_of_rows(len(_branches(dots)), marks=2)[1]


ALL_METHODS = Figure(
    name="all-methods",
    title="Optimizers side by side",
    caption="Training loss over the last tenth of each branch; sharpness and alignment of the full "
    "gradient over its last half; effective learning rates of the proposed update in the dominant "
    "and the bulk part, as ratios of sums over all of it (left out where not positive). Dots: "
    "seeds; tick and bar: mean (geometric on logarithmic axes) and its 95 % t-interval.",
    needs=_NEEDS,
    curves=_dots,
    draw=_draw,
    size=_size,
)
