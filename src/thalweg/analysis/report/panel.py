"""What is a panel of interactive curves: quantities, and the lines of each.

Each `Panel` offers one or more quantities (the reader chooses) along all branches. `page_data.py`
turns them into the lists that the page's script draws. The panels themselves are in `panels.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from thalweg.analysis.figures.branch_style import branch_styles
from thalweg.analysis.figures.curves import Curve, Series, branches_of, column, entry, list_length
from thalweg.analysis.figures.saving import Source

#: Study -> (name of the line, key of its style, curve) of each line.
Lines = Callable[[Source], list[tuple[str, str, Curve | None]]]


@dataclass(frozen=True)
class Quantity:
    """One quantity that a panel can show.

    label    its name on the panel's switch
    needs    columns of the metric table
    lines    the lines to draw
    factor   multiplies the values (100 for per cent)
    """

    label: str
    axis_title: str
    needs: tuple[str, ...]
    lines: Lines
    factor: float = 1.0


@dataclass(frozen=True)
class Panel:
    """One plot of the report; `logarithmic` is its first scale, the reader can change it."""

    name: str
    title: str
    caption: str
    quantities: tuple[Quantity, ...]
    logarithmic: bool = False
    wide: bool = False


def per_branch(name: str, window: float = 0.0, *, logarithmic: bool = False) -> Lines:
    """One line for each branch, from a column of the metric table."""
    return of_branches(column(name, window), logarithmic=logarithmic)


def of_branches(series: Series, *, logarithmic: bool = False) -> Lines:
    """One line for each branch, from any series of its rows."""

    def lines(source: Source) -> list[tuple[str, str, Curve | None]]:
        branches = branches_of(source.data, source.roles)
        styles = branch_styles(branches, source.roles)
        return [
            (styles[branch].label, branch, source.curve(branch, series, logarithmic=logarithmic))
            for branch in branches
        ]

    return lines


def eigenvalue_lines(name: str, groups: int) -> Lines:
    """One line for each rank along trunk and plain branch; `groups` = 2 for 2k eigenvalues."""

    def lines(source: Source) -> list[tuple[str, str, Curve | None]]:
        count = list_length(source.data, name)
        wanted = ("trunk", source.roles.get("plain", ""))
        branches = [b for b in branches_of(source.data, source.roles) if b in wanted]
        return [
            (
                f"\N{GREEK SMALL LETTER LAMDA}<sub>{rank + 1}</sub>",
                "top k" if rank < count / groups else "next k",
                source.curve(branch, entry(name, rank), logarithmic=True),
            )
            for rank in range(count)
            for branch in branches
        ]

    return lines
