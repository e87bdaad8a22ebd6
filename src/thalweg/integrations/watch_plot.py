"""A picture of what `watch` reported: `watcher.plot()`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thalweg.errors import InvalidInput, require_extra
from thalweg.measure.curvature_shares import PARTS_OF_SHARPNESS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Sequence[Mapping[str, Any]]
ALIGNMENTS = {
    "alignment_gradient": "gradient",
    "alignment_minibatch": "mini-batch gradient",
    "alignment_update": "update",
}
SHARES = {"gradient_shares": "gradient", "update_shares": "update"}


def draw(history: History) -> Figure:
    """Loss, sharpness and its limit, alignments and, where there are any, further panels.

    Those are critical sharpness beside 2 / lr, and shares by curvature.

    Args:
        history: rows as of `Watcher.history`.

    Raises:
        InvalidInput: there is no row.
        MissingExtra: matplotlib is not installed.
    """
    require_extra("lab", "matplotlib")
    from matplotlib.figure import Figure

    if not history:
        raise InvalidInput("plot: nothing was reported yet")
    shown = [column for column in SHARES if any(row.get(column) for row in history)]
    critical = any(_is_number(row.get("critical_sharpness")) for row in history)
    panels = 3 + critical + len(shown)
    figure = Figure(figsize=(7.0, 1.9 * panels), layout="constrained")
    axes: list[Axes] = list(figure.subplots(panels, 1, sharex=True))
    _lines(axes[0], history, {"loss": "loss"}, "loss", logarithmic=True)
    limits = {"sharpness": "sharpness", "stability_threshold": "limit of the optimizer"}
    if any(row.get("preconditioned_sharpness") is not None for row in history):
        # The limit is one in the optimizer's own metric then.
        limits = {"preconditioned_sharpness": "preconditioned sharpness", **limits}
        limits.pop("sharpness")
    _lines(axes[1], history, limits, "curvature", logarithmic=True)
    _lines(axes[2], history, ALIGNMENTS, "alignment")
    axes[2].set_ylim(0, 1.02)
    if critical:
        # In its own panel: its limit is 2 / lr, whatever the optimizer.
        limit = [{**row, "limit": _limit_along_update(row)} for row in history]
        names = {"critical_sharpness": "critical sharpness", "limit": "2 / learning rate"}
        _lines(axes[3], limit, names, "along update", logarithmic=True)
    for place, column in zip(axes[3 + critical :], shown, strict=True):
        _bands(place, history, column)
    axes[-1].set_xlabel("step")
    return figure


def _lines(
    axes: Axes,
    history: History,
    names: Mapping[str, str],
    label: str,
    *,
    logarithmic: bool = False,
) -> None:
    for column, name in names.items():
        # A line goes on where a quick row has nothing of it, and breaks where a report failed.
        rows = [row for row in history if row.get(column) is not None or row.get("failure")]
        numbers = [math.nan if (v := row.get(column)) is None else float(v) for row in rows]
        if any(math.isfinite(number) for number in numbers):
            steps = [row["step"] for row in rows]
            axes.plot(steps, numbers, marker=".", linewidth=1, label=name)
    axes.set_ylabel(label)
    if logarithmic:
        axes.set_yscale("log")
    if len(axes.get_lines()) > 1:
        axes.legend(fontsize=8, frameon=False)


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _limit_along_update(row: Mapping[str, Any]) -> float | None:
    """2 / lr, where critical sharpness was looked for."""
    rate = row.get("learning_rate") or 0.0
    known = row.get("critical_sharpness") is not None and math.isfinite(rate) and rate > 0
    return 2 / rate if known else None


def _bands(axes: Axes, history: History, column: str) -> None:
    """How much of a vector lies between two curvatures, stacked: the sharpest at the bottom."""
    rows = [row for row in history if row.get(column)]
    steps = [row["step"] for row in rows]
    above = [[0.0, *row[column], 1.0] for row in rows]
    bands = [
        [max(0.0, upper[i + 1] - upper[i]) for upper in above]
        for i in range(len(PARTS_OF_SHARPNESS) + 1)
    ]
    edges = [f"{1 / part:g}" for part in PARTS_OF_SHARPNESS]
    names = [f"above λ₁ / {edges[0]}"]
    names += [f"to λ₁ / {edge}" for edge in edges[1:]] + ["below"]
    colours = [str(0.15 + 0.75 * i / len(PARTS_OF_SHARPNESS)) for i in range(len(bands))]
    axes.stackplot(steps, bands, labels=names, colors=colours, edgecolor="white", linewidth=0.3)
    axes.set_ylim(0, 1)
    axes.set_ylabel(f"share of the {SHARES[column]}")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
