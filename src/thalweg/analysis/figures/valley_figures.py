"""Figure of the toy valley: trajectories over contours, the gradient's direction, the flat part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from thalweg.analysis.figures import drawing
from thalweg.analysis.figures.curves import branches_of, seed_tables
from thalweg.analysis.figures.figure import Figure, NotDrawableError, Source
from thalweg.registry import figures

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas
    from numpy.typing import NDArray

    from thalweg.analysis.figures.drawing import Look

    Vector = NDArray[np.float64]

_CONTOUR = "#c4c4c4"


@dataclass(frozen=True)
class Trajectory:
    """One run in the plane: steps after its start, x, y, loss and alignment, all (n,)."""

    branch: str
    seed: int
    steps: Vector
    x: Vector
    y: Vector
    loss: Vector
    alignment: Vector

    def rows(self, quantity: str) -> pd.DataFrame:
        """A row a step."""
        import pandas as pd

        return pd.DataFrame(
            {
                "quantity": quantity,
                "branch": self.branch,
                "seed": self.seed,
                "step": self.steps,
                "x": self.x,
                "y": self.y,
                "loss": self.loss,
                "alignment": self.alignment,
            }
        )


def _trajectory(branch: str, seed: int, table: pd.DataFrame) -> Trajectory | None:
    """None where no position in the plane was measured."""
    in_plane = [row is not None and np.shape(row) == (2,) for row in table["position"]]
    known = table.loc[in_plane, :]
    if known.empty:
        return None
    x, y = np.array([list(row) for row in known["position"]], dtype=np.float64).T
    steps, loss, alignment = (
        known[name].to_numpy(dtype=np.float64) for name in ("step", "loss", "alignment_gradient")
    )
    return Trajectory(branch, seed, steps - steps[0], x, y, loss, alignment)


def _trajectories(source: Source) -> dict[str, Trajectory | None]:
    """The first seed of each branch; one run each, as a mean of trajectories is none."""
    found: dict[str, Trajectory | None] = {}
    for branch in branches_of(source.data, source.roles):
        tables = seed_tables(source.data, branch)
        seed = min(tables)
        # A trunk of no steps is the common start, which every branch has too.
        if branch != "trunk" or len(tables[seed]) > 1:
            found[f"trajectory|{branch}"] = _trajectory(branch, seed, tables[seed])
    if not any(found.values()):
        raise NotDrawableError("no trajectory in a plane: the model does not have two parameters")
    return found


def curvatures(trajectories: list[Trajectory]) -> tuple[float, float]:
    """(a, b) of L = (a x^2 + b y^2) / 2, by least squares over all measured points."""
    x, y, loss = (
        np.concatenate([getattr(line, name) for line in trajectories])
        for name in ("x", "y", "loss")
    )
    known = np.isfinite(x) & np.isfinite(y) & np.isfinite(loss)
    squares = np.stack([x[known] ** 2, y[known] ** 2], axis=1) / 2
    a, b = np.linalg.lstsq(squares, loss[known], rcond=None)[0]
    return float(a), float(b)


def _draw(canvas: Canvas, curves: Mapping[str, Trajectory | None], look: Look) -> None:
    lines = [line for line in curves.values() if line is not None]
    grid = canvas.add_gridspec(2, 2, width_ratios=(1.0, 1.15))
    plane = canvas.add_subplot(grid[:, 0])
    upper, lower = canvas.add_subplot(grid[0, 1]), canvas.add_subplot(grid[1, 1])
    _draw_plane(plane, lines, look)
    _draw_alignment(upper, lines, look)
    _draw_flat_coordinate(lower, lines, look)
    handles = [_handle(line, look) for line in lines]
    canvas.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)


def _handle(line: Trajectory, look: Look) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=look.styles[line.branch].label, **_line_style(line, look))


def _line_style(line: Trajectory, look: Look) -> dict[str, Any]:
    style = look.styles[line.branch]
    dashes = (0, style.dash) if style.dash else "solid"
    return {"color": style.colour, "linestyle": dashes, "linewidth": style.width}


def _draw_plane(axes: Axes, lines: list[Trajectory], look: Look) -> None:
    for line in lines:
        colour = look.styles[line.branch].colour
        axes.plot(line.x, line.y, color=colour, linewidth=0.35, alpha=0.35)
        axes.plot(
            line.x,
            line.y,
            linestyle="none",
            marker=".",
            markersize=2.2,
            color=colour,
            markeredgewidth=0,
        )
    start = lines[0]
    axes.plot(
        start.x[0],
        start.y[0],
        "o",
        markersize=5,
        markerfacecolor="white",
        markeredgecolor=drawing.INK,
        markeredgewidth=1.0,
        zorder=5,
    )
    _draw_contours(axes, *curvatures(lines))
    axes.set_xlabel("steep coordinate $x$")
    axes.set_ylabel("flat coordinate $y$")


def _draw_contours(axes: Axes, a: float, b: float) -> None:
    """Levels of the loss, each twice the last, behind all else and within the limits there are."""
    left, right = axes.get_xlim()
    bottom, top = axes.get_ylim()
    bottom = min(bottom, 0.0)
    x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    loss = (a * x**2 + b * y**2) / 2
    levels = loss.max() * 2.0 ** -np.arange(9.0, -0.5, -1.0)
    axes.contour(x, y, loss, levels=levels, colors=_CONTOUR, linewidths=0.5, zorder=0)
    axes.set(xlim=(left, right), ylim=(bottom, top))


def _draw_alignment(axes: Axes, lines: list[Trajectory], look: Look) -> None:
    for line in lines:
        axes.plot(line.steps, line.alignment, **_line_style(line, look))
    axes.set_ylim(-0.03, 1.05)
    axes.set_ylabel(r"alignment $\chi_1$")
    axes.tick_params(labelbottom=False)


def _draw_flat_coordinate(axes: Axes, lines: list[Trajectory], look: Look) -> None:
    for line in lines:
        axes.plot(line.steps, np.abs(line.y), **_line_style(line, look))
    axes.set_yscale("log")
    drawing.plain_log_ticks(axes)
    axes.set_ylabel("flat coordinate $|y|$")
    axes.set_xlabel("steps after the start")


figures.add_named(
    Figure(
        name="valley",
        title="Trajectories in a valley of two parameters",
        caption="Left: iterates of each branch from one start (circle) over contours of the loss, "
        "each level twice the last. Right: alignment of the full gradient with the steep "
        "direction, and the flat coordinate. The first seed.",
        needs=("position", "loss", "alignment_gradient"),
        curves=_trajectories,
        draw=_draw,
        size=(2 * drawing.COLUMN_WIDTH, 3.0),
    )
)
