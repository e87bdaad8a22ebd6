"""Figures that compare branches by one number a seed, drawn as dots: a row a branch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from thalweg.analysis.figures.branch_style import branch_label
from thalweg.analysis.figures.curves import branches_of, seed_tables
from thalweg.analysis.figures.dots import (
    DotRow,
    Dots,
    Mark,
    draw_rows,
    mean_since,
    name_marks,
    ratio_of_means,
    rows_of_branches,
    size_of_rows,
)
from thalweg.analysis.figures.drawing import PAGE_WIDTH, in_mathtext
from thalweg.analysis.figures.families import base_of, part_of, unsplit
from thalweg.analysis.figures.figure import Figure, NotDrawableError, Size, Source
from thalweg.analysis.quantities import PARTS, quantities
from thalweg.registry import figures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Canvas

    from thalweg.analysis.figures.drawing import Look

#: Windows at the end of a branch, as parts of it: of losses, and of what fluctuates more.
_END, _LATE = 0.1, 0.5
_BLUE, _OCHRE = Mark("#0072b2"), Mark("#b07800", "D", hollow=True)


def _branches(dots: Mapping[str, Dots | None]) -> list[str]:
    return list(dict.fromkeys(drawn.branch for drawn in dots.values() if drawn is not None))


def _size_of_pairs(dots: Mapping[str, Dots | None], look: Look) -> Size:
    """Of rows with two kinds of dots each."""
    return size_of_rows(len(_branches(dots)), marks=2)


# Final loss of each branch over that of the unsplit one.

_PART_MARKS: Mapping[str | None, tuple[str, Mark]] = {
    # Also those that scale both parts, each by its own factor.
    None: ("whole or mixed", Mark("#0072b2", "D")),
    "dominant": ("Dom", Mark("#d55e00", "s")),
    "bulk": ("Bulk", Mark("#009e73", "o")),
}
#: Within a family: these first, dominant, bulk.
_ORDER = list(_PART_MARKS)


def _loss_ratios(source: Source) -> dict[str, Dots | None]:
    branches = branches_of(source.data, source.roles)
    tables = {branch: seed_tables(source.data, branch) for branch in branches}
    dots: dict[str, Dots | None] = {}
    for branch in branches:
        base = base_of(branch, branches, source.roles)
        if base is None:
            continue
        ratios = {
            seed: ratio
            for seed, table in tables[branch].items()
            if seed in tables[base]
            and (ratio := ratio_of_means(table, tables[base][seed], "loss", _END)) is not None
        }
        if ratios:
            dots[f"loss_ratio|{branch}"] = Dots(branch, ratios, base, logarithmic=True)
    if not dots:
        raise NotDrawableError("no branch to compare with an unsplit one over the same steps")
    return dots


def _family_rows(dots: Mapping[str, Dots | None], roles: Mapping[str, str]) -> list[DotRow]:
    """Family by family, each below a heading where there are several."""
    families: dict[str, list[Dots]] = {}
    for drawn in dots.values():
        if drawn is not None:
            families.setdefault(drawn.against, []).append(drawn)
    rows = []
    for base, members in families.items():
        if len(families) > 1:
            rows.append(DotRow(f"against {branch_label(base)}"))
        for drawn in sorted(members, key=lambda dots: _ORDER.index(part_of(dots.branch, roles))):
            mark = _PART_MARKS[part_of(drawn.branch, roles)][1]
            rows.append(DotRow(branch_label(drawn.branch), [(drawn, mark)]))
    return rows


def _draw_loss_ratios(canvas: Canvas, dots: Mapping[str, Dots | None], look: Look) -> None:
    axes = canvas.subplots()
    draw_rows(axes, _family_rows(dots, look.roles), logarithmic=True, line=1.0)
    parts = {part_of(drawn.branch, look.roles) for drawn in dots.values() if drawn is not None}
    name_marks(axes, {text: mark for part, (text, mark) in _PART_MARKS.items() if part in parts})
    against = {drawn.against for drawn in dots.values() if drawn is not None}
    whose = branch_label(against.pop()) if len(against) == 1 else "the unsplit branch"
    # Centred under a narrow panel beside long names it would leave the page.
    axes.set_xlabel(f"training loss / that of {whose}", loc="right")


def _size_of_loss_ratios(dots: Mapping[str, Dots | None], look: Look) -> Size:
    return size_of_rows(len(_family_rows(dots, look.roles)))


figures.add_named(
    Figure(
        name="branch-comparison",
        title="Final loss of each branch over that of the unsplit one",
        caption="Mean training loss over the last tenth of the steps that a branch and its "
        "unsplit branch have in common, divided by that of the unsplit branch of the same seed; "
        "line: 1. Dots: seeds; tick and bar: geometric mean and its 95 % t-interval.",
        needs=("loss",),
        curves=_loss_ratios,
        draw=_draw_loss_ratios,
        size=_size_of_loss_ratios,
    )
)


# Alignment late in training.

_ALIGNED = {"alignment_gradient": _BLUE, "alignment_minibatch": _OCHRE}


def _late_alignments(source: Source) -> dict[str, Dots | None]:
    branches = unsplit(branches_of(source.data, source.roles), source.roles)
    if len(branches) < 2:
        raise NotDrawableError("fewer than two unsplit branches to compare")
    return {
        f"{name}|{branch}": Dots(
            branch,
            {
                seed: mean_since(table, name, _LATE)
                for seed, table in seed_tables(source.data, branch).items()
            },
        )
        for branch in branches
        for name in _ALIGNED
        if name in source.data.columns
    }


def _draw_late_alignments(canvas: Canvas, dots: Mapping[str, Dots | None], look: Look) -> None:
    axes = canvas.subplots()
    known = {name: drawn for name, drawn in dots.items() if drawn is not None and drawn.finite}
    rows = rows_of_branches(known, _ALIGNED, look)
    draw_rows(axes, rows, logarithmic=False, line=None)
    name_marks(axes, {quantities[name].short: mark for name, mark in _ALIGNED.items()})
    axes.set_xlim(0, 1.02)
    axes.set_xlabel(in_mathtext(f"mean alignment χₖ over the last {100 * _LATE:g} %"))


figures.add_named(
    Figure(
        name="batch-size",
        title="Alignment late in training, by batch size and noise",
        caption="Mean of chi_k over the last half of each unsplit branch. Dots: seeds; tick and "
        "bar: mean and 95 % t-interval.",
        needs=("alignment_gradient",),
        curves=_late_alignments,
        draw=_draw_late_alignments,
        size=_size_of_pairs,
    )
)


# Effective learning rates.

_SUMS = tuple(name for part in PARTS for name in quantities[f"effective_lr_{part}"].needs)
_SPANS: Mapping[str, tuple[str, Mark, float]] = {
    "first_tenth": ("first tenth", _OCHRE, 0.1),
    "whole": ("whole branch", _BLUE, 1.0),
}


def _effective_rate(table: pd.DataFrame, part: str) -> float:
    """Effective learning rate of a part over the rows; NaN where unknown or not positive.

    A part of the update that climbs has no place on a logarithmic axis.
    """
    from thalweg.measure.effective_learning_rate import effective_learning_rate

    terms = (table[name] for name in quantities[f"effective_lr_{part}"].needs)
    rate = effective_learning_rate(*terms)
    return rate if rate > 0 else math.nan


def bulk_over_dominant(table: pd.DataFrame, fraction: float) -> float:
    """Effective bulk over effective dominant learning rate in the first fraction of a run.

    Over the steps where both are known; NaN where one of them is unknown or not positive.
    """
    steps = table["step"].to_numpy(dtype=np.float64)
    early = steps <= steps[0] + fraction * (steps[-1] - steps[0])
    known = table.loc[early & np.isfinite(table[list(_SUMS)].to_numpy(np.float64)).all(axis=1)]
    return _effective_rate(known, "bulk") / _effective_rate(known, "dominant")


def _rate_ratios(source: Source) -> dict[str, Dots | None]:
    dots: dict[str, Dots | None] = {}
    for branch in unsplit(branches_of(source.data, source.roles), source.roles):
        tables = seed_tables(source.data, branch)
        for name, (_, _, fraction) in _SPANS.items():
            ratios = {seed: bulk_over_dominant(table, fraction) for seed, table in tables.items()}
            known = {seed: ratio for seed, ratio in ratios.items() if math.isfinite(ratio)}
            dots[f"{name}|{branch}"] = Dots(branch, known, logarithmic=True) if known else None
    if not any(dots.values()):
        raise NotDrawableError("no unsplit branch whose update goes downhill in both parts")
    return dots


def _draw_rate_ratios(canvas: Canvas, dots: Mapping[str, Dots | None], look: Look) -> None:
    axes = canvas.subplots()
    known = {name: drawn for name, drawn in dots.items() if drawn is not None}
    marks = {name: mark for name, (_, mark, _) in _SPANS.items()}
    draw_rows(axes, rows_of_branches(known, marks, look), logarithmic=True, line=1.0)
    name_marks(axes, {text: mark for text, mark, _ in _SPANS.values()})
    axes.set_xlabel("effective learning rate, bulk / dominant")


figures.add_named(
    Figure(
        name="effective-learning-rate-ratio",
        title="Effective learning rate of the bulk over that of the dominant part",
        caption="Of the proposed update of each unsplit branch, as ratios of sums over its first "
        "tenth and over all of it; line: 1, as for plain SGD in the mean. Dots: seeds; tick and "
        "bar: geometric mean and its 95 % t-interval.",
        needs=_SUMS,
        curves=_rate_ratios,
        draw=_draw_rate_ratios,
        size=_size_of_pairs,
    )
)


# Optimizers side by side: a panel a quantity; the figure's CSV file is the table.

#: Fewer unsplit branches have figures of their own that say more.
_FEWEST = 4
_RATES = {
    f"effective_lr_{part}": mark
    for part, mark in zip(PARTS, (Mark("#d55e00", "s"), Mark("#009e73")), strict=True)
}
#: Of each panel: its quantities, the title of its axis, whether that is logarithmic.
_PANELS = (
    *(
        ({name: _BLUE}, quantities[name].axis, quantities[name].logarithmic)
        for name in ("loss", "sharpness", "alignment_gradient")
    ),
    (_RATES, "effective learning rate", True),
)


def _numbers(table: pd.DataFrame) -> dict[str, float]:
    diverged = not math.isfinite(float(table["loss"].to_numpy(dtype=np.float64)[-1]))
    return {
        "loss": math.nan if diverged else mean_since(table, "loss", _END),
        "sharpness": mean_since(table, "sharpness", _LATE),
        "alignment_gradient": mean_since(table, "alignment_gradient", _LATE),
        **{f"effective_lr_{part}": _effective_rate(table, part) for part in PARTS},
    }


def _all_numbers(source: Source) -> dict[str, Dots | None]:
    branches = [name for name in branches_of(source.data, source.roles) if name != "trunk"]
    if len(unsplit(branches, source.roles)) < _FEWEST:
        raise NotDrawableError(f"fewer than {_FEWEST} unsplit branches to set side by side")
    dots: dict[str, Dots | None] = {}
    for branch in branches:
        values = {seed: _numbers(t) for seed, t in seed_tables(source.data, branch).items()}
        for marks, _, logarithmic in _PANELS:
            for name in marks:
                # Only of the loss does a missing value mean that training diverged.
                of_seed = {
                    seed: row[name]
                    for seed, row in values.items()
                    if name == "loss" or math.isfinite(row[name])
                }
                drawn = Dots(branch, of_seed, logarithmic=logarithmic) if of_seed else None
                dots[f"{name}|{branch}"] = drawn
    return dots


def _draw_all_numbers(canvas: Canvas, dots: Mapping[str, Dots | None], look: Look) -> None:
    panels = canvas.subplots(1, len(_PANELS))
    for axes, (marks, title, logarithmic) in zip(panels, _PANELS, strict=True):
        draw_rows(axes, rows_of_branches(dots, marks, look), logarithmic=logarithmic, line=None)
        axes.set_xlabel(in_mathtext(title))
    name_marks(panels[-1], dict(zip(PARTS, _RATES.values(), strict=True)))
    for axes in panels[1:]:
        axes.tick_params(axis="y", labelleft=False)


def _size_of_all(dots: Mapping[str, Dots | None], look: Look) -> Size:
    return PAGE_WIDTH, _size_of_pairs(dots, look)[1]


figures.add_named(
    Figure(
        name="all-methods",
        title="Optimizers side by side",
        caption="Training loss over the last tenth of each branch; sharpness and alignment of the "
        "full gradient over its last half; effective learning rates of the proposed update in the "
        "dominant and the bulk part, as ratios of sums over all of it (left out where not "
        "positive). Dots: seeds; tick and bar: mean (geometric on logarithmic axes) and its 95 % "
        "t-interval.",
        needs=("loss", "sharpness", "alignment_gradient", *_SUMS),
        curves=_all_numbers,
        draw=_draw_all_numbers,
        size=_size_of_all,
    )
)
