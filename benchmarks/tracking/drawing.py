"""The figure: cost against error, and what each change costs at equal error."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis

from tracking.comparison import Row, frontier, of_change


def draw(rows: list[Row], path: Path) -> None:
    """Cost against error on the left; on the right what each change costs at equal error."""
    figure, (points, ranks) = plt.subplots(
        1, 2, figsize=(11, 5.2), width_ratios=[1.45, 1], layout="constrained"
    )
    _draw_points(points, rows)
    _draw_ranks(ranks, rows)
    points.set_title(rows[0].regime, loc="left")
    figure.savefig(path, dpi=160)
    plt.close(figure)


ERROR_TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1, 2, 5, 10)
COST_TICKS = (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10)
RELATIVE_TICKS = (0.3, 0.5, 0.7, 0.8, 1, 1.2, 1.5, 2, 3, 5)

# Okabe and Ito's colours, told apart by readers who are colour-blind; one for each group.
GROUPS = {
    "#0072B2": ["stratified", "kept subset"],
    "#009E73": ["2 guards", "5 guards"],
    "#D55E00": ["in time", "third, 1", "third, 3"],
    "#CC79A7": ["bfloat16"],
    "#E69F00": ["no estimate", "in parts", "gap looked at"],
    "#56B4E9": ["one step", "two steps"],
}
LOOKS = {
    name: {"color": colour, "marker": "osD"[i]}
    for colour, names in GROUPS.items()
    for i, name in enumerate(names)
}


def _draw_points(axes: Axes, rows: list[Row]) -> None:
    grid = [row for row in rows if row.change == "by clock"]
    axes.scatter(
        [100 * r.error for r in grid], [r.counted for r in grid], s=9, color="0.65", zorder=1
    )
    errors, costs = frontier(rows)
    axes.plot(100 * errors, costs, color="0.45", lw=1.4, label="best by clock (grey: the grid)")
    chosen = [row for row in rows if row.change == "by estimate"]
    axes.plot(
        [100 * r.error for r in chosen],
        [r.counted for r in chosen],
        color="black",
        marker="o",
        ms=5,
        lw=1.8,
        label="by estimate, targets " + ", ".join(r.setting.split()[-1] for r in chosen),
        zorder=3,
    )
    for row in rows:
        if row.change in LOOKS:
            look = LOOKS[row.change]
            face = look["color"] if row.by_clock else "white"
            axes.plot(
                100 * row.error,
                row.counted,
                color=look["color"],
                marker=look["marker"],
                mfc=face,
                ms=5.5,
                ls="",
                alpha=0.9,
            )
    axes.plot([], [], color="0.5", marker="s", ls="", label="with one change, as on the right")
    axes.set(xscale="log", yscale="log")
    _mark(axes.xaxis, ERROR_TICKS)
    _mark(axes.yaxis, COST_TICKS)
    axes.set_xlabel("95 % error of $P_k g$, % of norm(g)")
    axes.set_ylabel("counted gradients a step")
    axes.legend(frameon=False, loc="lower left")
    axes.grid(color="0.92")


def _draw_ranks(axes: Axes, rows: list[Row]) -> None:
    def rank(name: str) -> float:
        both = [of_change(rows, name, by_clock) for by_clock in (True, False)]
        return float(np.nanmean(both)) if not all(map(math.isnan, both)) else math.inf

    names = sorted({r.change for r in rows if r.change in LOOKS}, key=rank, reverse=True)
    for place, name in enumerate(names):
        for by_clock in (True, False):
            look = LOOKS[name]
            face = look["color"] if by_clock else "white"
            cost = of_change(rows, name, by_clock)
            axes.plot(
                cost, place, color=look["color"], marker=look["marker"], mfc=face, ms=7, ls=""
            )
    axes.axvline(1, color="0.45", lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    _mark(axes.xaxis, RELATIVE_TICKS)
    axes.set_xlabel("cost at equal error, unchanged = 1\n(filled: by clock, open: by estimate)")
    axes.grid(color="0.92", axis="x")


def _mark(axis: Axis, ticks: tuple[float, ...]) -> None:
    """Those of the ticks that lie within what the data show, in plain numbers."""
    low, high = axis.get_view_interval()
    shown = [tick for tick in ticks if low <= tick <= high]
    axis.set_ticks(shown, labels=[f"{tick:g}" for tick in shown])
    axis.set_ticks([], minor=True)
