"""Figures of learning rates by part of the update: effective ones, their ratio, critical ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from thalweg.analysis.figures import drawing
from thalweg.analysis.figures.along_steps import Quantity, draw_each_branch, size_of_branches
from thalweg.analysis.figures.curves import Curve, branches_of, column, effective_rate
from thalweg.analysis.figures.dot_drawing import DotRow, Mark, draw_rows, name_marks, size_of_rows
from thalweg.analysis.figures.dots import Dots
from thalweg.analysis.figures.drawing import BAND, LOG_BAND, BranchStyle, Look
from thalweg.analysis.figures.families import unsplit
from thalweg.analysis.figures.saving import Curves, Figure, NotDrawableError, Size, Source
from thalweg.analysis.figures.windows import seed_tables

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Canvas

#: Window of the sums of effective learning rates, as a part of a run.
WINDOW = 0.1
_PARTS = ("dominant", "bulk")
_SUMS = tuple(f"lr_{side}_{part}" for part in _PARTS for side in ("numerator", "denominator"))


def _effective_curves(source: Source) -> Curves:
    curves: dict[str, Curve | None] = {}
    for part in _PARTS:
        series = effective_rate(f"lr_numerator_{part}", f"lr_denominator_{part}", WINDOW)
        curves |= source.each_branch(f"effective_lr_{part}", series)
    return curves | source.each_branch("learning_rate", column("learning_rate"))


def _draw_effective(canvas: Canvas, curves: Curves, look: Look) -> None:
    parts = [
        Quantity(
            f"effective_lr_{part}",
            f"effective learning rate,\n{part} part",
            beside="learning_rate",
            central=True,
        )
        for part in _PARTS
    ]
    draw_each_branch(canvas, curves, look, *parts, share_y=True)


EFFECTIVE_LEARNING_RATES = Figure(
    name="effective-learning-rates",
    title="Effective learning rates of the proposed update",
    caption="-<Q delta, Q g> / norm(Q g)^2 of the proposed update delta for the dominant and "
    f"the bulk projector Q, as ratio of sums over {WINDOW:.0%} of a run; grey: "
    "the learning rate set. " + BAND,
    needs=("learning_rate", *_SUMS),
    curves=_effective_curves,
    draw=_draw_effective,
    size=size_of_branches(quantities=2, height=3.4),
)


_EARLY = 0.1
_SPANS: Mapping[str, tuple[str, Mark, float]] = {
    "first_tenth": ("first tenth", Mark("#b07800", "D", hollow=True), _EARLY),
    "whole": ("whole branch", Mark("#0072b2"), 1.0),
}


def bulk_over_dominant(table: pd.DataFrame, part: float) -> float:
    """Effective bulk over effective dominant learning rate in the first part of a run.

    Each is a ratio of sums over the steps where all four sums are known; NaN where there are none,
    or where the ratio is not positive: a part of the update that climbs has no place on a log axis.
    """
    from thalweg.measure.effective_learning_rate import effective_learning_rate

    steps = table["step"].to_numpy(dtype=np.float64)
    early = steps <= steps[0] + part * (steps[-1] - steps[0])
    terms = table[list(_SUMS)].to_numpy(dtype=np.float64)[early]
    known = terms[np.isfinite(terms).all(axis=1)].T
    dominant, bulk = effective_learning_rate(*known[:2]), effective_learning_rate(*known[2:])
    return bulk / dominant if dominant > 0 and bulk > 0 else math.nan


def _ratios(source: Source) -> dict[str, Dots | None]:
    dots: dict[str, Dots | None] = {}
    for branch in unsplit(branches_of(source.data, source.roles), source.roles):
        tables = seed_tables(source.data, branch)
        for name, (_, _, part) in _SPANS.items():
            ratios = {seed: bulk_over_dominant(table, part) for seed, table in tables.items()}
            known = {seed: ratio for seed, ratio in ratios.items() if math.isfinite(ratio)}
            dots[f"{name}|{branch}"] = Dots(branch, known, logarithmic=True) if known else None
    if not any(dots.values()):
        raise NotDrawableError("no unsplit branch whose update goes downhill in both parts")
    return dots


def _ratio_branches(dots: Mapping[str, Dots | None]) -> list[str]:
    return list(dict.fromkeys(drawn.branch for drawn in dots.values() if drawn is not None))


def _draw_ratios(canvas: Canvas, dots: Mapping[str, Dots | None], look: Look) -> None:
    rows = [
        DotRow(
            look.styles[branch].label,
            [
                (drawn, mark)
                for name, (_, mark, _) in _SPANS.items()
                if (drawn := dots.get(f"{name}|{branch}")) is not None
            ],
        )
        for branch in _ratio_branches(dots)
    ]
    axes = canvas.subplots()
    draw_rows(axes, rows, logarithmic=True, line=1.0)
    name_marks(axes, {text: mark for text, mark, _ in _SPANS.values()})
    axes.set_xlabel("effective learning rate, bulk / dominant")


def _ratio_size(dots: Mapping[str, Dots | None], look: Look) -> Size:
    return size_of_rows(len(_ratio_branches(dots)), marks=2)


EFFECTIVE_LEARNING_RATE_RATIO = Figure(
    name="effective-learning-rate-ratio",
    title="Effective learning rate of the bulk over that of the dominant part",
    caption="Of the proposed update of each unsplit branch, as ratios of sums over its first tenth "
    "and over all of it; line: 1, as for plain SGD in the mean. Dots: seeds; tick and bar: "
    "geometric mean and its 95 % t-interval.",
    needs=_SUMS,
    curves=_ratios,
    draw=_draw_ratios,
    size=_ratio_size,
)


_CRITICAL = (
    ("critical_lr_dominant", "critical, dominant", BranchStyle("", "#d55e00", "", (4.0, 1.5))),
    ("critical_lr_bulk", "critical, bulk", BranchStyle("", "#009e73", "", (6.0, 1.5, 1.2, 1.5))),
    ("learning_rate", "set", BranchStyle("", drawing.INK, "", (), 0.8)),
)


def _critical_curves(source: Source) -> Curves:
    return {
        f"{name}|{branch}": source.curve(branch, column(name), logarithmic=True)
        for name, _, _ in _CRITICAL
        for branch in source.plain_and_trunk()
    }


def _draw_critical(canvas: Canvas, curves: Curves, look: Look) -> None:
    axes = canvas.subplots()
    axes.set_yscale("log")
    labels: dict[str, drawing.EndLabel] = {}
    for name, text, style in _CRITICAL:
        for key, line in curves.items():
            if line is not None and key.partition("|")[0] == name:
                drawing.draw_curve(axes, line, style)
                labels[name] = (text, float(line.center[-1]), style.colour)
    axes.set_ylabel("learning rate")
    drawing.mark_branch_point(axes, look.axis)
    drawing.finish_steps(axes, look.axis)
    drawing.plain_log_ticks(axes)
    drawing.label_ends(axes, labels.values())


CRITICAL_LEARNING_RATES = Figure(
    name="critical-learning-rates",
    title="Critical learning rates of the dominant and the bulk step",
    caption="Learning rate at which one projected step leaves the expected loss as it is (in the "
    "quadratic approximation), along the unsplit run. Where the learning rate set lies between the "
    "two, the bulk step lowers the loss and the dominant step raises it. " + LOG_BAND,
    needs=("critical_lr_dominant", "critical_lr_bulk", "learning_rate"),
    curves=_critical_curves,
    draw=_draw_critical,
)
