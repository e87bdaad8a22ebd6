"""Which interactive curves does the report show, and which columns do they need?

Each `Panel` offers one or more quantities (the reader chooses) along all branches. `page_data.py`
turns them into the lists that the page's script draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from thalweg.errors import invalid
from thalweg.lab.figures.branch_style import branch_styles
from thalweg.lab.figures.curves import (
    Curve,
    branches_of,
    column,
    entry,
    list_length,
    ratio_of_sums,
)
from thalweg.lab.figures.saving import Source

#: Window of running means and of ratios of sums, as a part of a run.
WINDOW = 0.05

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


PANELS: dict[str, Panel] = {}


def add_panel(panel: Panel) -> Panel:
    """Register a panel under its name; raises InvalidInput if the name is taken."""
    if panel.name in PANELS:
        raise invalid("panel name", panel.name, "a name not used yet", "choose another name")
    PANELS[panel.name] = panel
    return panel


def per_branch(name: str, window: float = 0.0, *, logarithmic: bool = False) -> Lines:
    """One line for each branch, from a column of the metric table."""
    return _of_branches(lambda: column(name, window), logarithmic=logarithmic)


def _of_branches(series: Callable[[], Any], *, logarithmic: bool = False) -> Lines:
    def lines(source: Source) -> list[tuple[str, str, Curve | None]]:
        branches = branches_of(source.data, source.roles)
        styles = branch_styles(branches, source.roles)
        return [
            (styles[branch].label, branch, source.curve(branch, series(), logarithmic=logarithmic))
            for branch in branches
        ]

    return lines


def _eigenvalues(name: str, groups: int) -> Lines:
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


def _one(name: str, label: str, axis_title: str, lines: Lines, factor: float = 1.0) -> Quantity:
    return Quantity(label, axis_title, (name,), lines, factor)


def _effective(part: str) -> Quantity:
    above, below = f"lr_numerator_{part}", f"lr_denominator_{part}"
    series = ratio_of_sums(above, below, WINDOW)
    return Quantity(
        f"{part} part",
        f"effective learning rate, {part}",
        (above, below),
        _of_branches(lambda: series),
    )


add_panel(
    Panel(
        name="loss",
        title="Loss",
        caption="All branches start from one checkpoint and see the same mini-batches.",
        quantities=(
            _one("loss", "training", "training loss", per_branch("loss", logarithmic=True)),
            _one("test_loss", "test", "test loss", per_branch("test_loss", logarithmic=True)),
        ),
        logarithmic=True,
        wide=True,
    )
)
add_panel(
    Panel(
        name="alignment",
        title="Alignment with the dominant subspace",
        caption="χₖ(v) = ‖Pₖv‖ / ‖v‖. The proposed update is the optimizer's, before the split.",
        quantities=tuple(
            _one(
                f"alignment_{vector}",
                label,
                f"χₖ of the {title}",
                per_branch(f"alignment_{vector}"),
            )
            for vector, label, title in (
                ("gradient", "full gradient", "full gradient"),
                ("minibatch", "mini-batch", "mini-batch gradient"),
                ("proposed", "proposed update", "proposed update"),
                ("update", "update made", "update made"),
            )
        ),
    )
)
add_panel(
    Panel(
        name="eigenvalues",
        title="Eigenvalues of the Hessian",
        caption="Along the unsplit run; solid: the top k, dashed: the next k. Solved: converged "
        "from scratch; tracked: followed from step to step.",
        quantities=(
            _one(
                "solved_eigenvalues",
                "solved, 2k",
                "eigenvalue λᵢ",
                _eigenvalues("solved_eigenvalues", 2),
            ),
            _one("eigenvalues", "tracked, k", "eigenvalue λᵢ", _eigenvalues("eigenvalues", 1)),
        ),
        logarithmic=True,
    )
)
add_panel(
    Panel(
        name="sharpness",
        title="Sharpness",
        caption="lr · λ₁ is the learning rate times the sharpness: plain gradient descent is "
        "unstable where it exceeds 2.",
        quantities=(
            _one(
                "lr_sharpness",
                "lr · λ₁",
                "lr · λ₁",
                per_branch("lr_sharpness"),
            ),
            _one("sharpness", "λ₁", "sharpness λ₁", per_branch("sharpness")),
        ),
    )
)
add_panel(
    Panel(
        name="test-accuracy",
        title="Test accuracy",
        caption="On held-out samples.",
        quantities=(
            _one(
                "test_accuracy", "accuracy", "test accuracy (%)", per_branch("test_accuracy"), 100.0
            ),
        ),
    )
)
add_panel(
    Panel(
        name="effective-learning-rates",
        title="Effective learning rates",
        caption="Of the proposed update: ratio of sums over "
        f"{WINDOW:.0%} of a run. For plain SGD both are near the learning rate.",
        quantities=(_effective("dominant"), _effective("bulk")),
    )
)
add_panel(
    Panel(
        name="displacement",
        title="Distance from the branch point",
        caption="Of the parameters from those at the branch point, split on the dominant subspace "
        "there.",
        quantities=tuple(
            _one(
                f"displacement_{part}",
                f"{part} part",
                f"distance, {part} part",
                per_branch(f"displacement_{part}"),
            )
            for part in ("bulk", "dominant")
        ),
    )
)
add_panel(
    Panel(
        name="subspace",
        title="The tracked subspace",
        caption="Overlap: mean squared cosine with the subspace at the branch point. Error: the "
        "tracker's own estimate. Cost: products of a step, counted in full gradients, running "
        "mean.",
        quantities=(
            _one(
                "overlap_branch_point",
                "overlap",
                "overlap with the branch point",
                per_branch("overlap_branch_point"),
            ),
            _one(
                "subspace_error",
                "error",
                "estimated error (%)",
                per_branch("subspace_error"),
                100.0,
            ),
            _one(
                "subspace_gradients",
                "cost",
                "cost of a step (gradients)",
                per_branch("subspace_gradients", WINDOW),
            ),
        ),
    )
)
