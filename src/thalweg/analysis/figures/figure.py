"""A figure: what it needs of a study, what it draws, and the files that it leaves.

A `Figure` turns the metric table into curves and draws them. It is saved as PNG (200 dpi) and PDF,
with what is drawn as CSV beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from thalweg import registry
from thalweg.analysis.claims.judgement import DEFAULT_ROLES
from thalweg.analysis.figures import drawing
from thalweg.analysis.figures.branch_style import branch_styles
from thalweg.analysis.figures.curves import (
    Curve,
    Drawn,
    Series,
    StepAxis,
    branches_of,
    curve,
    series_of,
    step_axis,
    tidy,
)
from thalweg.analysis.figures.drawing import Look
from thalweg.analysis.figures.families import unsplit
from thalweg.analysis.quantities import Quantity
from thalweg.lab.store.durable import make_folder, remove_unfinished, write_file

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure as Canvas

#: Curves by name, `quantity|branch`; None where a branch never measured the quantity.
Curves = Mapping[str, Curve | None]

#: What a figure draws: curves along steps, dots of branches, or something of its own.
T = TypeVar("T", bound=Drawn)
Size = tuple[float, float]
_ENDINGS = ("png", "pdf", "csv")


class NotDrawableError(Exception):
    """A study has nothing for a figure to show; the message says why and reaches the report."""


@dataclass(frozen=True)
class Source:
    """What the curves of a figure are made of."""

    data: pd.DataFrame
    axis: StepAxis
    roles: Mapping[str, str]

    def curve(self, branch: str, series: Series, *, logarithmic: bool = False) -> Curve | None:
        """The quantity along one branch; None where it was never measured."""
        return curve(self.data, branch, series, self.axis, logarithmic=logarithmic)

    def each_branch(
        self, quantity: Quantity, window: float | None = None
    ) -> dict[str, Curve | None]:
        """The curve of a quantity along each branch, by `quantity|branch`.

        window   of the running mean, in place of the quantity's own
        """
        series, logarithmic = series_of(quantity, window), quantity.logarithmic
        return {
            f"{quantity.name}|{branch}": self.curve(branch, series, logarithmic=logarithmic)
            for branch in branches_of(self.data, self.roles)
        }

    def plain_and_trunk(self) -> list[str]:
        """The unsplit run from its start: trunk and plain branch, or the first unsplit branch."""
        branches = branches_of(self.data, self.roles)
        plain = self.roles.get("plain")
        if plain not in branches:
            plain = next(iter(unsplit(branches, self.roles)), None)
        return [name for name in branches if name in ("trunk", plain)]


@dataclass(frozen=True)
class Figure(Generic[T]):
    """One figure: what it needs, what it shows, how it is drawn.

    needs    columns of the metric table; without one of them the figure is skipped
    curves   study -> what is drawn, by name; may raise NotDrawableError
    draw     draws it on an empty matplotlib figure
    size     width and height in inches, or what gives them for the curves of a study
    """

    name: str
    title: str
    caption: str
    needs: tuple[str, ...]
    curves: Callable[[Source], Mapping[str, T | None]]
    draw: Callable[[Canvas, Mapping[str, T | None], Look], None]
    size: Size | Callable[[Mapping[str, T | None], Look], Size] = (drawing.COLUMN_WIDTH, 2.3)


@dataclass(frozen=True)
class SavedFigure:
    """Files of one figure."""

    name: str
    title: str
    caption: str
    png: Path
    pdf: Path
    csv: Path

    @classmethod
    def inside(cls, folder: Path, name: str, title: str, caption: str) -> SavedFigure:
        """The files that a figure of this name has in a folder."""
        return cls(name, title, caption, *(folder / f"{name}.{end}" for end in _ENDINGS))


@dataclass(frozen=True)
class SavedFigures:
    """Figures written, and those left out with the reason (name -> reason)."""

    saved: tuple[SavedFigure, ...]
    skipped: Mapping[str, str]


def save_figure(
    figure: Figure[T], curves: Mapping[str, T | None], look: Look, folder: Path
) -> SavedFigure:
    """Draw one figure and write its three files; see `save_drawing`."""
    size = figure.size(curves, look) if callable(figure.size) else figure.size
    return save_drawing(
        SavedFigure.inside(folder, figure.name, figure.title, figure.caption),
        size,
        lambda canvas: figure.draw(canvas, curves, look),
        tidy(curves),
    )


def save_drawing(
    files: SavedFigure, size: Size, draw: Callable[[Canvas], None], data: pd.DataFrame
) -> SavedFigure:
    """Draw on a canvas of this size and write its three files; an earlier version is replaced.

    Each is made in memory and is there whole or not at all.

    Args:
        data: what is drawn, as the CSV file has it.

    Returns:
        `files`.

    Raises DiskFull where there is no room for one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with drawing.paper_style():
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasAgg(canvas)
        draw(canvas)
        canvas.draw_without_rendering()
        # The layout is found: each file would find it again, most of the time of small panels.
        canvas.set_layout_engine("none")
        # The files hold no date: the same data give the same bytes.
        for path, left_out in ((files.png, "Software"), (files.pdf, "CreationDate")):
            drawn = BytesIO()
            metadata = {"Title": files.title, left_out: None}
            canvas.savefig(drawn, format=path.suffix[1:], metadata=metadata)
            write_file(path, drawn.getvalue(), flush=False)
    write_file(files.csv, data.to_csv(index=False), flush=False)
    return files


def save_figures(
    data: pd.DataFrame,
    folder: Path,
    roles: Mapping[str, str] = DEFAULT_ROLES,
    figures: Iterable[str | Figure[Any]] | None = None,
) -> SavedFigures:
    """Draw figures (names, or figures; all registered ones by default) into a folder.

    The folder is made if needed. A figure whose columns are missing, or were never measured, or
    that has nothing to show in this study, is left out and named in the result.

    Raises InvalidInput for a name that is not registered.
    """
    chosen = figures_named(figures)
    make_folder(folder)
    remove_unfinished(folder)
    axis = step_axis(data)
    look = Look(axis, branch_styles(branches_of(data, roles), roles), roles)
    saved: list[SavedFigure] = []
    skipped: dict[str, str] = {}
    for figure in chosen:
        missing = [name for name in figure.needs if name not in data.columns]
        if missing:
            skipped[figure.name] = "no column " + ", ".join(missing)
            continue
        try:
            curves = figure.curves(Source(data, axis, roles))
        except NotDrawableError as error:
            skipped[figure.name] = str(error)
            continue
        if not any(curves.values()):
            skipped[figure.name] = "never measured: " + ", ".join(figure.needs)
            continue
        saved.append(save_figure(figure, curves, look, folder))
    return SavedFigures(tuple(saved), skipped)


def figures_named(names: Iterable[str | Figure[Any]] | None) -> list[Figure[Any]]:
    """The figures of these names, in their order; None: all. A figure itself stays as it is.

    Raises InvalidInput for a name that is not registered, with the nearest one.
    """
    if names is None:
        return list(registry.figures.values())
    return [registry.figures.find(name) if isinstance(name, str) else name for name in names]
