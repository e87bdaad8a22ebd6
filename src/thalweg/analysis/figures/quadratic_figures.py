"""Figures that hold SGD on a quadratic against its theory: critical rates, phases of alignment.

What theory predicts for a run is computed from its first row alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from thalweg.analysis.figures import drawing
from thalweg.analysis.figures.curves import branches_of, seed_tables
from thalweg.analysis.figures.dots import mean_since
from thalweg.analysis.figures.families import Part, part_of
from thalweg.analysis.figures.figure import Figure, NotDrawableError, Source
from thalweg.problems.quadratic_theory import critical_learning_rate, expected_after_steps
from thalweg.registry import figures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from numpy.typing import NDArray

    from thalweg.analysis.figures.drawing import Look

    Vector = NDArray[np.float64]

_LATE = 0.1
_MARKS: Mapping[Part, tuple[str, str, str]] = {
    "dominant": ("Dom-SGD", "#d55e00", "s"),
    "bulk": ("Bulk-SGD", "#009e73", "o"),
}
_SHADE = "#e8e4da"
_NEEDS = (
    "gradient_norm_dominant",
    "gradient_norm_bulk",
    "learning_rate",
    "noise_share_dominant",
    "noise_norm",
    "solved_eigenvalues",
)


@dataclass(frozen=True)
class TwoLevels:
    """What theory needs of a run's first row, by part.

    curvature   mean eigenvalue
    squared     squared norm of the part of the full gradient
    noise       variance of the part of the mini-batch gradient
    """

    curvature: Mapping[Part, float]
    squared: Mapping[Part, float]
    noise: Mapping[Part, float]

    def expected(self, part: Part, rate: float, steps: int) -> float:
        """Expected squared norm of a part of the gradient after some steps of SGD."""
        return expected_after_steps(
            rate, self.curvature[part], self.squared[part], self.noise[part], steps
        )

    def critical(self, part: Part) -> float:
        """Learning rate at which a step along the part leaves the expected loss as it is."""
        return critical_learning_rate(self.curvature[part], self.squared[part], self.noise[part])

    def loss_ratio(self, part: Part, rate: float, steps: int) -> float:
        """Expected loss after steps along one part alone, over the loss now."""
        now = {name: self.squared[name] / (2 * self.curvature[name]) for name in _MARKS}
        change = (self.expected(part, rate, steps) - self.squared[part]) / (
            2 * self.curvature[part]
        )
        return 1 + change / sum(now.values())


def two_levels(table: pd.DataFrame) -> TwoLevels | None:
    """From the first row of a run.

    None where spectrum, gradient or noise are not known there, and where the spectrum has not two
    levels, as that of a network: what theory says is not about it.
    """
    first = table.iloc[0]
    spectrum = first["solved_eigenvalues"]
    if spectrum is None or np.ndim(spectrum) != 1 or len(spectrum) < 2:
        return None
    k = len(spectrum) // 2
    if any(max(level) > 1.01 * min(level) for level in (spectrum[:k], spectrum[k:])):
        return None
    share, variance = float(first["noise_share_dominant"]), float(first["noise_norm"]) ** 2
    norms: dict[Part, float] = {part: float(first[f"gradient_norm_{part}"]) for part in _MARKS}
    if not all(map(math.isfinite, (share, variance, *norms.values()))):
        return None
    return TwoLevels(
        {"dominant": float(np.mean(spectrum[:k])), "bulk": float(np.mean(spectrum[k:]))},
        {part: norm**2 for part, norm in norms.items()},
        {"dominant": share * variance, "bulk": (1 - share) * variance},
    )


def _geometric_mean(values: Sequence[float] | Sequence[Vector]) -> Vector:
    return np.exp(np.mean(np.log(values), axis=0))


# Change of the loss against the learning rate


@dataclass(frozen=True)
class LossChange:
    """What a split branch at one learning rate does to the loss.

    of_seed     seed -> loss over the last tenth of the branch / loss at its start
    levels      what theory starts from, for each seed
    steps       length of the branch
    """

    branch: str
    part: Part
    rate: float
    of_seed: Mapping[int, float]
    levels: tuple[TwoLevels, ...]
    steps: int

    def expected(self, rate: float) -> float:
        """What theory expects of such a branch at a learning rate, geometric mean over seeds."""
        length = round(self.steps * (1 - _LATE / 2))  # the middle of the last tenth
        ratios = [levels.loss_ratio(self.part, rate, length) for levels in self.levels]
        return float(_geometric_mean(ratios))

    def rows(self, quantity: str) -> pd.DataFrame:
        """A row a seed."""
        import pandas as pd

        return pd.DataFrame(
            {
                "quantity": quantity,
                "branch": self.branch,
                "learning_rate": self.rate,
                "seed": list(self.of_seed),
                "value": list(self.of_seed.values()),
                "expected": self.expected(self.rate),
                "critical_learning_rate": [levels.critical(self.part) for levels in self.levels],
            }
        )


def _loss_changes(source: Source) -> dict[str, LossChange | None]:
    found: dict[str, LossChange | None] = {}
    for branch in branches_of(source.data, source.roles):
        part = part_of(branch, source.roles)
        if part is None:
            continue
        tables = {
            seed: (table, levels)
            for seed, table in seed_tables(source.data, branch).items()
            if (levels := two_levels(table)) is not None
        }
        if not tables:
            continue
        table = next(iter(tables.values()))[0]
        found[f"loss_ratio|{branch}"] = LossChange(
            branch,
            part,
            float(table["learning_rate"].iloc[0]),
            {
                seed: mean_since(table, "loss", _LATE) / float(table["loss"].iloc[0])
                for seed, (table, _) in tables.items()
            },
            tuple(levels for _, levels in tables.values()),
            int(table["step"].iloc[-1] - table["step"].iloc[0]),
        )
    if len({(change.part, change.rate) for change in found.values() if change}) < 4:
        raise NotDrawableError("no split branches of both parts at several learning rates")
    return found


def _draw_rates(canvas: Canvas, curves: Mapping[str, LossChange | None], look: Look) -> None:
    axes = canvas.subplots()
    axes.set(xscale="log", yscale="log")
    changes = [change for change in curves.values() if change is not None]
    axes.axhline(1.0, color=drawing.INK, linewidth=0.6, linestyle=(0, (5, 2)), zorder=0.5)
    edges = [_draw_part(axes, changes, part) for part in _MARKS]
    axes.axvspan(min(edges), max(edges), color=_SHADE, linewidth=0, zorder=0)
    axes.margins(x=0.04, y=0.08)
    drawing.plain_log_ticks(axes)
    drawing.plain_log_ticks(axes, horizontal=True)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss, end / branch point")
    _write_above(axes, math.sqrt(math.prod(edges)), "predicted interval")
    axes.legend(loc="upper left", frameon=False, handletextpad=0.5, borderaxespad=0.2)


def _draw_part(axes: Axes, changes: list[LossChange], part: Part) -> float:
    """Theory as a line, seeds as marks; returns the critical learning rate."""
    label, colour, shape = _MARKS[part]
    own = [change for change in changes if change.part == part]
    rates = [change.rate for change in changes]
    grid = np.geomspace(min(rates) / 1.3, max(rates) * 1.1, 200)
    expected = [own[0].expected(float(rate)) for rate in grid]
    axes.plot(grid, expected, color=colour, linewidth=1.1, label=f"{label}, theory")
    seeds = [(change.rate, value) for change in own for value in change.of_seed.values()]
    axes.plot(
        *zip(*seeds, strict=True),
        linestyle="none",
        marker=shape,
        markersize=4,
        markerfacecolor="white",
        markeredgecolor=colour,
        markeredgewidth=0.9,
        zorder=3,
        label=f"{label}, measured",
    )
    return float(_geometric_mean([levels.critical(part) for levels in own[0].levels]))


def _write_above(axes: Axes, place: float, text: str) -> None:
    axes.annotate(
        text,
        (place, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8,
        color="#6b6b6b",
    )


figures.add_named(
    Figure(
        name="quadratic-rates",
        title="What each part of the update does to the loss, against the learning rate",
        caption="Loss over the last tenth of a branch divided by that at the branch point: marks, "
        "each seed; lines, expected by theory from the branch point alone. Shaded: between the "
        "critical learning rates, where one step of Bulk-SGD lowers the expected loss and one of "
        "Dom-SGD raises it (Deng et al. 2026).",
        needs=("loss", *_NEEDS),
        curves=_loss_changes,
        draw=_draw_rates,
        size=(drawing.COLUMN_WIDTH, 2.6),
    )
)


# Phases of alignment, measured and predicted


@dataclass(frozen=True)
class GradientRatio:
    """norm(P g)^2 / norm((I - P) g)^2 along a run, and what theory expects of it from its start.

    rate        learning rate
    steps       (n,), measured
    of_seed     seed -> (n,)
    predicted   (n,): ratio of the expected squares, geometric mean over seeds
    """

    branch: str
    rate: float
    steps: Vector
    of_seed: Mapping[int, Vector]
    predicted: Vector

    def rows(self, quantity: str) -> pd.DataFrame:
        """A row a seed and step."""
        import pandas as pd

        frames = [
            pd.DataFrame(
                {
                    "quantity": quantity,
                    "branch": self.branch,
                    "learning_rate": self.rate,
                    "seed": seed,
                    "step": self.steps,
                    "value": values,
                    "predicted": self.predicted,
                }
            )
            for seed, values in self.of_seed.items()
        ]
        return pd.concat(frames, ignore_index=True)


def _gradient_ratio(branch: str, tables: Mapping[int, pd.DataFrame]) -> GradientRatio | None:
    """None where theory has nothing to start from."""
    measured: dict[int, Vector] = {}
    predicted, steps, rate = [], np.empty(0), math.nan
    for seed, table in tables.items():
        levels = two_levels(table)
        own = table["step"].to_numpy(dtype=np.float64)
        if levels is None or (measured and not np.array_equal(own, steps)):
            continue
        steps, rate = own, float(table["learning_rate"].iloc[0])
        norms = [table[f"gradient_norm_{part}"].to_numpy(dtype=np.float64) for part in _MARKS]
        measured[seed] = (norms[0] / norms[1]) ** 2
        dominant, bulk = (
            np.array([levels.expected(part, rate, int(step)) for step in own - own[0]])
            for part in _MARKS
        )
        predicted.append(dominant / bulk)
    if not measured:
        return None
    return GradientRatio(branch, rate, steps, measured, _geometric_mean(predicted))


def _ratios(source: Source) -> dict[str, GradientRatio | None]:
    found = {
        f"gradient_ratio|{branch}": _gradient_ratio(branch, seed_tables(source.data, branch))
        for branch in branches_of(source.data, source.roles)
        if part_of(branch, source.roles) is None
    }
    if not any(found.values()):
        raise NotDrawableError("no unsplit run whose spectrum and noise are known at its start")
    return found


def _draw_ratios(canvas: Canvas, curves: Mapping[str, GradientRatio | None], look: Look) -> None:
    lines = [line for line in curves.values() if line is not None]
    trunk = [line for line in lines if line.branch == "trunk"]
    others = [line for line in lines if line.branch != "trunk"]
    panels = [panel for panel in (trunk, others) if panel]
    all_axes = canvas.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        axes.set_yscale("log")
        for line in panel:
            _draw_ratio(axes, line, look)
        axes.axhline(1.0, color=drawing.FAINT, linewidth=0.6, linestyle=(0, (1.5, 1.5)), zorder=0)
        drawing.finish_steps(axes, look.axis)
    all_axes[0].set_ylabel(r"$\|P_k g\|^2\,/\,\|(I - P_k)\, g\|^2$")
    drawing.plain_log_ticks(all_axes[0])
    _name_lines(all_axes[0])
    for axes, panel in zip(all_axes, panels, strict=True):
        drawing.label_ends(axes, [_end_label(line, look) for line in panel])


def _draw_ratio(axes: Axes, line: GradientRatio, look: Look) -> None:
    colour = look.styles[line.branch].colour
    for values in line.of_seed.values():
        axes.plot(line.steps, values, color=colour, linewidth=0.7, alpha=0.6)
    axes.plot(line.steps, line.predicted, color=drawing.INK, linewidth=1.1, linestyle=(0, (4, 1.5)))


def _name_lines(axes: Axes) -> None:
    from matplotlib.lines import Line2D

    measured = Line2D([], [], color="#6b6b6b", linewidth=0.9, label="measured, each seed")
    theory = Line2D([], [], color=drawing.INK, linewidth=1.1, linestyle=(0, (4, 1.5)))
    theory.set_label("theory")
    axes.legend(handles=[measured, theory], loc="upper center", frameon=False)


def _end_label(line: GradientRatio, look: Look) -> drawing.EndLabel:
    text = f"lr = {line.rate:g}"
    return text, float(line.predicted[-1]), look.styles[line.branch].colour


figures.add_named(
    Figure(
        name="quadratic-alignment",
        title="Phases of alignment, measured and predicted",
        caption="Squared norm of the gradient's dominant part over that of its bulk part, chi^2 / "
        "(1 - chi^2). Left: from a large initialization. Right: from its end, at a learning rate "
        "below and one above the critical step size. Dashed: ratio of the expected squares by "
        "theory, from the first step alone; dotted: equal parts.",
        needs=_NEEDS,
        curves=_ratios,
        draw=_draw_ratios,
        size=(2 * drawing.COLUMN_WIDTH, 2.4),
    )
)
