"""Figure that compares all branches at once: final loss over that of the unsplit branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from thalweg.analysis.figures.branch_style import branch_label
from thalweg.analysis.figures.curves import branches_of
from thalweg.analysis.figures.dot_drawing import DotRow, Mark, draw_rows, name_marks, size_of_rows
from thalweg.analysis.figures.dots import Dots
from thalweg.analysis.figures.families import base_of, part_of
from thalweg.analysis.figures.saving import Figure, NotDrawableError, Size, Source
from thalweg.analysis.figures.windows import ratio_of_means, seed_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from thalweg.analysis.figures.drawing import Look

_LATE = 0.1
_MARKS: Mapping[str | None, tuple[str, Mark]] = {
    # Also those that scale both parts, each by its own factor.
    None: ("whole or mixed", Mark("#0072b2", "D")),
    "dominant": ("Dom", Mark("#d55e00", "s")),
    "bulk": ("Bulk", Mark("#009e73", "o")),
}
#: Within a family: these first, dominant, bulk.
_ORDER = list(_MARKS)


def _ratios(source: Source) -> dict[str, Dots | None]:
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
            and (ratio := ratio_of_means(table, tables[base][seed], "loss", _LATE)) is not None
        }
        if ratios:
            dots[f"loss_ratio|{branch}"] = Dots(branch, ratios, base, logarithmic=True)
    if not dots:
        raise NotDrawableError("no branch to compare with an unsplit one over the same steps")
    return dots


def _rows(dots: Mapping[str, Dots | None], roles: Mapping[str, str]) -> list[DotRow]:
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
            mark = _MARKS[part_of(drawn.branch, roles)][1]
            rows.append(DotRow(branch_label(drawn.branch), [(drawn, mark)]))
    return rows


def _draw(canvas: Canvas, dots: Mapping[str, Dots | None], look: Look) -> None:
    axes = canvas.subplots()
    draw_rows(axes, _rows(dots, look.roles), logarithmic=True, line=1.0)
    parts = {part_of(drawn.branch, look.roles) for drawn in dots.values() if drawn is not None}
    name_marks(axes, {text: mark for part, (text, mark) in _MARKS.items() if part in parts})
    against = {drawn.against for drawn in dots.values() if drawn is not None}
    whose = branch_label(against.pop()) if len(against) == 1 else "the unsplit branch"
    # Centred under a narrow panel beside long names it would leave the page.
    axes.set_xlabel(f"training loss / that of {whose}", loc="right")


def _size(dots: Mapping[str, Dots | None], look: Look) -> Size:
    return size_of_rows(len(_rows(dots, look.roles)))


BRANCH_COMPARISON = Figure(
    name="branch-comparison",
    title="Final loss of each branch over that of the unsplit one",
    caption="Mean training loss over the last tenth of the steps that a branch and its unsplit "
    "branch have in common, divided by that of the unsplit branch of the same seed; line: 1. Dots: "
    "seeds; tick and bar: geometric mean and its 95 % t-interval.",
    needs=("loss",),
    curves=_ratios,
    draw=_draw,
    size=_size,
)
