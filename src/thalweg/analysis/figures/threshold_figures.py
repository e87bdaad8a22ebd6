"""Figures without a k: progress against the curvature of a split, and where vectors lie.

Both are of parts of vectors above curvatures: see the probe `curvature_shares` and the study
`threshold`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from thalweg.analysis.claims.statistics import LEAST_DECREASE
from thalweg.analysis.figures import drawing
from thalweg.analysis.figures.branch_style import IN_ORDER, branch_label
from thalweg.analysis.figures.curves import Curve, branches_of, entry, list_length, seed_tables
from thalweg.analysis.figures.dots import mean_since
from thalweg.analysis.figures.families import base_of, part_of, tail_of, unsplit
from thalweg.analysis.figures.figure import Curves, Figure, NotDrawableError, Size, Source
from thalweg.analysis.quantities import SHARE_THRESHOLDS, SHARES, quantities
from thalweg.registry import figures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from numpy.typing import NDArray

    from thalweg.analysis.figures.drawing import Look

    Vector = NDArray[np.float64]

# Progress against the threshold.

#: Windows at the end of a branch, as parts of it: of losses, and of shares.
_END, _LATE = 0.1, 0.5
#: Progress outside of these is drawn at them, as a triangle.
_LOWEST, _HIGHEST = -0.6, 1.6
_MOST_A_ROW = 3

Kind = Literal["dominant", "bulk", "gradient", "update", "last"]
#: The split is at a curvature, at one in the optimizer's own metric, or that of S_k at lambda_k.
How = Literal["curvature", "own metric", "S_k"]
_DASHES: Mapping[How, tuple[float, ...]] = {"curvature": (), "own metric": (4.0, 1.5), "S_k": ()}


@dataclass(frozen=True)
class AtThreshold:
    """Values of the seeds at one threshold.

    threshold   tau over the largest curvature
    of_seed     seed -> value; minus infinity where training diverged
    against     the unsplit branch
    """

    branch: str
    kind: Kind
    threshold: float
    of_seed: Mapping[int, float]
    against: str
    how: How = "curvature"

    def rows(self, quantity: str) -> pd.DataFrame:
        """A row a seed."""
        import pandas as pd

        return pd.DataFrame(
            {
                "quantity": quantity,
                "branch": self.branch,
                "divided_by": self.against,
                "threshold": self.threshold,
                "split_at": self.how,
                "seed": list(self.of_seed),
                "value": list(self.of_seed.values()),
            }
        )


def progress(table: pd.DataFrame, plain: pd.DataFrame) -> float:
    """log(L_0 / L_end) of a branch over that of the unsplit one, L_0 at the branch point.

    Minus infinity where the branch diverged; NaN where the unsplit one makes no progress.
    """
    start = float(plain["loss"].iloc[0])
    ends = [mean_since(rows, "loss", _END) for rows in (plain, table)]
    if not (start > 0 and 0 < ends[0] < start / LEAST_DECREASE):
        return math.nan
    if not (math.isfinite(ends[1]) and ends[1] > 0 and math.isfinite(table["loss"].iloc[-1])):
        return -math.inf
    return math.log(start / ends[1]) / math.log(start / ends[0])


def _progress_of_branches(source: Source) -> dict[str, AtThreshold | None]:
    branches = branches_of(source.data, source.roles)
    tables = {branch: seed_tables(source.data, branch) for branch in branches}
    found: dict[str, AtThreshold | None] = {}
    for branch in branches:
        part, base = part_of(branch, source.roles), base_of(branch, branches, source.roles)
        if part is None or base is None:
            continue
        values = {
            seed: value
            for seed, table in tables[branch].items()
            if seed in tables[base] and not math.isnan(value := progress(table, tables[base][seed]))
        }
        how, threshold = _split_of(branch, base, tables[branch], source.roles)
        if values and math.isfinite(threshold):
            found[f"progress|{branch}"] = AtThreshold(branch, part, threshold, values, base, how)
    if all(drawn is None or drawn.how == "S_k" for drawn in found.values()):
        raise NotDrawableError("no branch is split at a curvature")
    bases = dict.fromkeys(drawn.against for drawn in found.values() if drawn is not None)
    for base in bases:
        found |= dict(_shares(tables[base], base))
        found[f"last_eigenvalue|{base}"] = _last_eigenvalue(tables[base], base)
    return found


def _split_of(
    branch: str, base: str, tables: Mapping[int, pd.DataFrame], roles: Mapping[str, str]
) -> tuple[How, float]:
    """How a branch is split, and the threshold over the largest curvature; NaN: neither way."""
    thresholds = [mean_since(table, "split_threshold_part", 1.0) for table in tables.values()]
    if np.isfinite(thresholds).any():
        own = tail_of(branch, base).partition("-")[0] == "own"
        return "own metric" if own else "curvature", float(np.nanmean(thresholds))
    if branch in roles.values() and (ratios := _last_over_first(tables)):
        return "S_k", float(np.mean(list(ratios.values())))
    return "curvature", math.nan


def _last_over_first(tables: Mapping[int, pd.DataFrame]) -> dict[int, float]:
    """lambda_k over lambda_1 of each seed, over the last half of where they were measured."""
    return {
        seed: float(np.mean([row[-1] / row[0] for row in known[-ceil(len(known) / 2) :]]))
        for seed, table in tables.items()
        if "eigenvalues" in table.columns
        and (known := [row for row in table["eigenvalues"] if np.ndim(row) == 1 and row[0] > 0])
    }


def _shares(tables: Mapping[int, pd.DataFrame], base: str) -> Iterable[tuple[str, AtThreshold]]:
    """The shares of the gradient and the update above each threshold, late in an unsplit run."""
    from thalweg.measure.curvature_shares import PARTS_OF_SHARPNESS

    for kind in ("gradient", "update"):
        for place, part in enumerate(PARTS_OF_SHARPNESS):
            values = {}
            for seed, table in tables.items():
                if f"{kind}_shares" not in table.columns:
                    continue
                steps, shares = entry(f"{kind}_shares", place)(table)
                first, last = table["step"].iloc[[0, -1]]
                late = shares[steps >= last - _LATE * (last - first)]
                if len(late):
                    values[seed] = float(late.mean())
            if values:
                name = f"{kind}_share_above_{part:g}|{base}"
                yield name, AtThreshold(base, kind, part, values, base)


def _last_eigenvalue(tables: Mapping[int, pd.DataFrame], base: str) -> AtThreshold | None:
    """lambda_k over lambda_1 late in an unsplit run, where its k eigenvalues were measured."""
    ratios = _last_over_first(tables)
    mean = float(np.mean(list(ratios.values()))) if ratios else 0.0
    return AtThreshold(base, "last", mean, ratios, base) if mean > 0 else None


#: Colour, shape and label of the lines.
_LOOKS: Mapping[Kind, tuple[str, str, str]] = {
    "bulk": ("#009e73", "o", "Bulk: progress"),
    "dominant": ("#d55e00", "s", "Dom: progress"),
    "gradient": (drawing.INK, "", "share of the gradient above τ"),
    "update": ("#8a8a8a", "", "share of the update above τ"),
}


def _draw_progress(canvas: Canvas, points: Mapping[str, AtThreshold | None], look: Look) -> None:
    drawn = [point for point in points.values() if point is not None]
    bases = list(dict.fromkeys(point.against for point in drawn))
    columns = min(len(bases), _MOST_A_ROW)
    panels = canvas.subplots(
        ceil(len(bases) / columns), columns, sharex=True, sharey=True, squeeze=False
    )
    for axes, base in zip(panels.flat, bases, strict=False):
        _draw_base(axes, [point for point in drawn if point.against == base])
        if len(bases) > 1:
            axes.set_title(branch_label(base), fontsize=8, loc="left", pad=2)
    for axes in panels.flat[len(bases) :]:
        axes.remove()
    panels[0, 0].set_xscale("log")
    drawing.plain_log_ticks(panels[0, 0], horizontal=True)
    canvas.supxlabel(r"threshold $\tau\,/\,\lambda_1$ of the split", fontsize=9)
    canvas.supylabel("progress (unsplit run: 1)", fontsize=9)
    _name_lines(canvas, drawn)


def _draw_base(axes: Axes, points: Sequence[AtThreshold]) -> None:
    for value in (0.0, 1.0):
        axes.axhline(value, color=drawing.FAINT, linewidth=0.6, linestyle=(0, (5, 2)), zorder=0)
    for point in points:
        if point.kind == "last":
            axes.axvline(point.threshold, color=drawing.FAINT, linewidth=0.6, zorder=0)
            axes.annotate(
                r"$\lambda_k$",
                (point.threshold, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(0, 1),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color="#6b6b6b",
            )
    for kind in _LOOKS:
        for how in _DASHES:
            line = [point for point in points if (point.kind, point.how) == (kind, how)]
            if line:
                _draw_line(axes, sorted(line, key=lambda point: point.threshold))


def _draw_line(axes: Axes, line: Sequence[AtThreshold]) -> None:
    colour, shape, _ = _LOOKS[line[0].kind]
    taus = [point.threshold for point in line]
    values = [np.clip(list(point.of_seed.values()), _LOWEST, _HIGHEST) for point in line]
    low, high = [float(v.min()) for v in values], [float(v.max()) for v in values]
    axes.fill_between(taus, low, high, color=colour, alpha=0.15, linewidth=0)
    means = [float(of_seeds.mean()) for of_seeds in values]
    handle = _handle(line[0])
    axes.plot(
        taus, means, color=colour, linewidth=handle["linewidth"], linestyle=handle["linestyle"]
    )
    if not shape:
        return
    places = np.repeat(taus, [len(of_seeds) for of_seeds in values])
    heights = np.concatenate(values)
    lowest, highest = heights <= _LOWEST, heights >= _HIGHEST
    marks = {handle["marker"]: ~(lowest | highest), "v": lowest, "^": highest}
    for mark, shown in marks.items():
        axes.plot(
            places[shown],
            heights[shown],
            mark,
            color=colour,
            markersize=3.4,
            markeredgewidth=0.8,
            markerfacecolor=handle["markerfacecolor"],
        )


def _handle(point: AtThreshold) -> dict[str, Any]:
    """How the line of a point looks, and its marks."""
    colour, shape, text = _LOOKS[point.kind]
    dashes = _DASHES[point.how] if shape else (1.2, 1.2)
    endings: Mapping[How, str] = {
        "own metric": ", own metric",
        "S_k": " with $S_k$",
        "curvature": "",
    }
    return {
        "color": colour,
        "linestyle": (0, dashes) if dashes else "solid",
        "linewidth": 0.9 if not shape else 0.0 if point.how == "S_k" else 1.3,
        "marker": "D" if point.how == "S_k" else shape or None,
        "markersize": 4,
        "markerfacecolor": colour if point.how == "curvature" else "white",
        "label": text + endings[point.how],
    }


def _name_lines(canvas: Canvas, drawn: Sequence[AtThreshold]) -> None:
    from matplotlib.lines import Line2D

    order = [(kind, how) for kind in _LOOKS for how in _DASHES]
    first = {(point.kind, point.how): point for point in reversed(drawn)}
    handles = [Line2D([], [], **_handle(first[key])) for key in order if key in first]
    canvas.legend(
        handles=handles,
        loc="outside upper center",
        ncols=2,
        frameon=False,
        handlelength=2.4,
        columnspacing=1.2,
    )


def _size_of_progress(points: Mapping[str, AtThreshold | None], look: Look) -> Size:
    bases = {point.against for point in points.values() if point is not None}
    rows = ceil(len(bases) / _MOST_A_ROW)
    return (drawing.COLUMN_WIDTH if len(bases) == 1 else drawing.PAGE_WIDTH), 1.0 + 1.8 * rows


figures.add_named(
    Figure(
        name="progress-against-threshold",
        title="Progress of Dom and Bulk against the curvature of the split",
        caption="Decrease of the logarithm of the training loss over each branch, as a part of "
        "that of its unsplit branch, against the threshold of its split over the largest "
        "curvature; 1: as far, 0: as at the branch point. Dots: seeds; line: mean. What is above "
        f"{_HIGHEST} or below \N{MINUS SIGN}{-_LOWEST}, or diverged, is at the edge as a triangle. "
        "Dotted: the part of the squared length of the unsplit run's gradient and proposed update "
        "that lies above, over its last half; bands: lowest to highest seed. Upright: lambda_k of "
        "the unsplit run; there, diamonds: Dom and Bulk with S_k.",
        needs=("split_threshold_part", "loss"),
        curves=_progress_of_branches,
        draw=_draw_progress,
        size=_size_of_progress,
    )
)


# Where vectors lie in the spectrum along training.

_REST = "#e3e3e3"


def _share_curves(source: Source) -> Curves:
    """Of the unsplit runs that measured shares; the trunk goes with the plain one."""
    runs = [*unsplit(branches_of(source.data, source.roles), source.roles), "trunk"]
    return {
        f"{vector}_share_above_{place}|{branch}": source.curve(branch, entry(name, place))
        for vector in SHARES
        if (name := f"{vector}_shares") in source.data.columns
        for place in range(list_length(source.data, name))
        for branch in runs
    }


def _share_rows(curves: Curves, look: Look) -> list[list[str]]:
    """The runs of each row of panels: trunk and plain branch, then the others."""
    known = list(dict.fromkeys(line.branch for line in curves.values() if line is not None))
    plain = look.roles.get("plain", "")
    first = [name for name in ("trunk", plain) if name in known]
    return [*([first] if first else []), *([name] for name in known if name not in first)]


def _size_of_shares(curves: Curves, look: Look) -> Size:
    return drawing.PAGE_WIDTH, 0.75 + 1.55 * len(_share_rows(curves, look))


def _joined(lines: Sequence[Curve | None]) -> tuple[Vector, Vector]:
    """Steps and values of runs that follow one another, each step once."""
    known = [line for line in lines if line is not None]
    if not known:
        return np.empty(0), np.empty(0)
    steps = np.concatenate([line.steps for line in known])
    values = np.concatenate([line.center for line in known])
    once, first = np.unique(steps, return_index=True)
    return once, values[first]


def _draw_shares(canvas: Canvas, curves: Curves, look: Look) -> None:
    rows = _share_rows(curves, look)
    panels = canvas.subplots(len(rows), len(SHARES), sharey=True, squeeze=False)
    for number, (row, runs) in enumerate(zip(panels, rows, strict=True)):
        for axes, vector in zip(row, SHARES, strict=True):
            _draw_bands(axes, curves, vector, runs)
            if look.axis.branch_point is not None and "trunk" in runs:
                # Upon the bands, which would hide the usual one.
                axes.axvline(look.axis.branch_point, color="white", linewidth=0.9, linestyle=":")
            drawing.finish_steps(axes, look.axis, label=False, ticks=4)
            if number == 0:
                axes.set_title(quantities[f"{vector}_shares"].short, fontsize=9)
        row[0].set_ylabel("share" if len(rows) == 1 else branch_label(runs[-1]))
    canvas.supxlabel(look.axis.label, fontsize=9)
    _name_bands(canvas)


def _draw_bands(axes: Axes, curves: Curves, vector: str, runs: Sequence[str]) -> None:
    steps: Vector = np.empty(0)
    below: Vector | float = 0.0
    for place, (colour, _) in enumerate(IN_ORDER):
        steps, above = _joined([curves.get(f"{vector}_share_above_{place}|{r}") for r in runs])
        if not len(steps):
            return
        axes.fill_between(steps, below, above, color=colour, linewidth=0)
        axes.plot(steps, above, color="white", linewidth=0.4)
        below = above
    axes.fill_between(steps, below, 1.0, color=_REST, linewidth=0)
    axes.set_ylim(0.0, 1.0)


def _name_bands(canvas: Canvas) -> None:
    from matplotlib.patches import Patch

    names = [drawing.in_mathtext(name) for name in SHARE_THRESHOLDS]
    texts = [f"above {names[0]}", *(f"to {name}" for name in names[1:]), "below"]
    colours = [*(light for light, _ in IN_ORDER), _REST]
    # As they are stacked: the flattest on top.
    canvas.legend(
        handles=[Patch(color=c, label=t) for t, c in zip(texts, colours, strict=True)][::-1],
        loc="outside right center",
        frameon=False,
        handlelength=1.0,
        title="curvature",
        title_fontsize=8,
        alignment="left",
    )


figures.add_named(
    Figure(
        name="curvature-of-gradient",
        title="Where the gradient and the update lie in the spectrum, along training",
        caption="Parts of the squared length of the full gradient, the mini-batch gradient and "
        "the proposed update at ranges of curvature, in parts of the largest curvature; steepest "
        "at the bottom. Mean over seeds, along the unsplit runs; dotted: the branch point.",
        needs=("gradient_shares",),
        curves=_share_curves,
        draw=_draw_shares,
        size=_size_of_shares,
    )
)
