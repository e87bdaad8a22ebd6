"""Which figures does a study make for a paper?

Training loss, alignment, eigenvalues, effective learning rates and test accuracy, each over the
seeds of a study. A later study adds its own with `add_figure`; `save_figures` writes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from thalweg.errors import invalid
from thalweg.lab.claims.judgement import DEFAULT_ROLES
from thalweg.lab.figures import drawing
from thalweg.lab.figures.branch_style import branch_styles
from thalweg.lab.figures.curves import (
    Curve,
    branches_of,
    column,
    entry,
    list_length,
    ratio_of_sums,
    step_axis,
)
from thalweg.lab.figures.drawing import Look
from thalweg.lab.figures.saving import (
    Curves,
    Figure,
    SavedFigure,
    SavedFigures,
    Source,
    save_figure,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

__all__ = [
    "FIGURES",
    "Curves",
    "Figure",
    "SavedFigure",
    "SavedFigures",
    "Source",
    "add_figure",
    "save_figures",
]

FIGURES: dict[str, Figure] = {}

#: Windows as parts of a run: of the running mean of alignments, of the sums of learning rates.
ALIGNMENT_WINDOW, LEARNING_RATE_WINDOW = 0.03, 0.1
BAND = "Line: mean over seeds; band: lowest to highest seed."
LOG_BAND = "Line: geometric mean over seeds; band: lowest to highest seed."


def add_figure(figure: Figure) -> Figure:
    """Register a figure under its name; raises InvalidInput if the name is taken."""
    if figure.name in FIGURES:
        raise invalid("figure name", figure.name, "a name not used yet", "choose another name")
    FIGURES[figure.name] = figure
    return figure


def save_figures(
    data: pd.DataFrame,
    folder: Path,
    roles: Mapping[str, str] = DEFAULT_ROLES,
    figures: Iterable[Figure] | None = None,
) -> SavedFigures:
    """Draw the figures (all registered ones by default) into a folder, which is made if needed.

    A figure whose columns are missing, or were never measured, is left out and named in the result.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axis = step_axis(data)
    look = Look(axis, branch_styles(branches_of(data, roles), roles))
    saved: list[SavedFigure] = []
    skipped: dict[str, str] = {}
    for figure in FIGURES.values() if figures is None else figures:
        missing = [name for name in figure.needs if name not in data.columns]
        if missing:
            skipped[figure.name] = "no column " + ", ".join(missing)
            continue
        curves = figure.curves(Source(data, axis, roles))
        if not any(curves.values()):
            skipped[figure.name] = "never measured: " + ", ".join(figure.needs)
            continue
        saved.append(save_figure(figure, curves, look, folder))
    return SavedFigures(tuple(saved), skipped)


def _from_late_trunk(curves: Curves, look: Look) -> Curves:
    """The curves less the early trunk: two thirds of it stay, or half a branch's length if shorter.

    Early training changes so much more than a branch that it would flatten all that follows.
    """
    point = look.axis.branch_point
    ends = [line.steps[-1] for line in curves.values() if line and line.branch != "trunk"]
    if point is None or not ends:
        return curves
    trunk = [line.steps[0] for line in curves.values() if line and line.branch == "trunk"]
    first = min(trunk, default=point)
    start = max(point - (max(ends) - point) / 2, first + (point - first) / 3)
    return {name: line and line.since(start) for name, line in curves.items()}


def _draw_branches(
    axes: Axes, curves: Curves, look: Look, quantity: str, *, scale: float = 1.0
) -> list[tuple[str, float, str]]:
    """Draw the branches' curves of one quantity; returns the labels for the ends of the lines."""
    labels = []
    for name, line in curves.items():
        if line is None or name.partition("|")[0] != quantity:
            continue
        style = look.styles[line.branch]
        drawing.draw_curve(axes, line, style, scale=scale)
        if line.branch != "trunk":
            labels.append((style.label, float(line.center[-1]) * scale, style.colour))
    return labels


# Training loss


def _loss_curves(source: Source) -> Curves:
    return source.each_branch("loss", column("loss"), logarithmic=True)


def _draw_loss(canvas: Canvas, curves: Curves, look: Look) -> None:
    axes = canvas.subplots()
    axes.set_yscale("log")
    labels = _draw_branches(axes, _from_late_trunk(curves, look), look, "loss")
    axes.set_ylabel("training loss")
    drawing.mark_branch_point(axes, look.axis)
    drawing.finish_steps(axes, look.axis)
    drawing.plain_log_ticks(axes)
    drawing.label_ends(axes, labels)


add_figure(
    Figure(
        name="training-loss",
        title="Training loss of the branches",
        caption="Full training loss before the branch point and along the branches, which share "
        "checkpoint and mini-batches; early training is left out (the CSV file has it). "
        + LOG_BAND,
        needs=("loss",),
        curves=_loss_curves,
        draw=_draw_loss,
    )
)


# Alignment: three vectors along trunk and plain branch. Split branches would show 0 or 1 for the
# update by construction; their gradient is in the report.

_VECTORS = (
    ("alignment_gradient", "full gradient", "#0072b2", ()),
    ("alignment_minibatch", "mini-batch gradient", "#e69f00", (4.0, 1.5)),
    ("alignment_update", "update", "#cc79a7", (1.2, 1.2)),
)


def _plain_and_trunk(source: Source) -> list[str]:
    wanted = ("trunk", source.roles.get("plain", ""))
    return [name for name in branches_of(source.data, source.roles) if name in wanted]


def _alignment_curves(source: Source) -> Curves:
    return {
        f"{name}|{branch}": source.curve(branch, column(name, ALIGNMENT_WINDOW))
        for name, *_ in _VECTORS
        if name in source.data.columns
        for branch in _plain_and_trunk(source)
    }


def _draw_alignment(canvas: Canvas, curves: Curves, look: Look) -> None:
    axes = canvas.subplots()
    labels: dict[str, tuple[str, float, str]] = {}
    for name, text, colour, dash in _VECTORS:
        for key, line in curves.items():
            if line is not None and key.partition("|")[0] == name:
                drawing.draw_curve(axes, line, drawing.BranchStyle(text, colour, colour, dash))
                labels[name] = (text, float(line.center[-1]), colour)
    axes.set_ylim(0, 1.005)
    axes.set_ylabel(r"alignment $\chi_k$")
    drawing.mark_branch_point(axes, look.axis)
    drawing.finish_steps(axes, look.axis)
    drawing.label_ends(axes, labels.values())


add_figure(
    Figure(
        name="alignment",
        title="Alignment with the dominant subspace",
        caption="chi_k, the part of a vector's length that lies in the dominant subspace, along "
        "the unsplit run: of the full gradient, of the mini-batch gradient, of the update. Running "
        f"mean over {ALIGNMENT_WINDOW:.0%} of a run. " + BAND,
        needs=("alignment_gradient",),
        curves=_alignment_curves,
        draw=_draw_alignment,
    )
)


# Eigenvalues


def _spectrum_curves(source: Source) -> Curves:
    both = list_length(source.data, "solved_eigenvalues")
    return {
        f"lambda_{index + 1}|{branch}": source.curve(
            branch, entry("solved_eigenvalues", index), logarithmic=True
        )
        for index in range(both)
        for branch in _plain_and_trunk(source)
    }


def _draw_spectrum(canvas: Canvas, curves: Curves, look: Look) -> None:
    axes = canvas.subplots()
    axes.set_yscale("log")
    lines = [(int(name.partition("|")[0][7:]), line) for name, line in curves.items() if line]
    k = max(index for index, _ in lines) // 2
    ends: dict[bool, list[float]] = {True: [], False: []}
    for index, line in lines:
        top = index <= k
        colour = "#0072b2" if top else "#d55e00"
        style = drawing.BranchStyle("", colour, colour, () if top else (3.0, 1.0), 0.8)
        drawing.draw_curve(axes, line, style, band=False)
        axes.plot(line.steps, line.center, ".", color=colour, markersize=3.6, markeredgewidth=0)
        if line.branch != "trunk" or look.axis.branch_point is None:
            ends[top].append(float(line.center[-1]))
    axes.set_ylabel(r"eigenvalue $\lambda_i$ of the Hessian")
    drawing.mark_branch_point(axes, look.axis)
    drawing.finish_steps(axes, look.axis)
    drawing.plain_log_ticks(axes)
    names = {True: rf"$\lambda_1 \ldots \lambda_{{{k}}}$"}
    names[False] = rf"$\lambda_{{{k + 1}}} \ldots \lambda_{{{2 * k}}}$"
    colours = {True: "#0072b2", False: "#d55e00"}
    drawing.label_ends(
        axes,
        [
            (names[top], sorted(values)[len(values) // 2], colours[top])
            for top, values in ends.items()
            if values
        ],
    )


add_figure(
    Figure(
        name="eigenvalues",
        title="Eigenvalues of the Hessian, top k against next k",
        caption="The 2k largest eigenvalues along the unsplit run, each from a converged solve "
        "(dots). Geometric mean over seeds at each rank.",
        needs=("solved_eigenvalues",),
        curves=_spectrum_curves,
        draw=_draw_spectrum,
    )
)


# Effective learning rates

_PARTS = ("dominant", "bulk")


def _learning_rate_curves(source: Source) -> Curves:
    curves: dict[str, Curve | None] = {}
    for part in _PARTS:
        series = ratio_of_sums(
            f"lr_numerator_{part}", f"lr_denominator_{part}", LEARNING_RATE_WINDOW
        )
        curves |= source.each_branch(f"effective_lr_{part}", series)
    return curves | source.each_branch("learning_rate", column("learning_rate"))


def _draw_learning_rates(canvas: Canvas, curves: Curves, look: Look) -> None:
    panels = canvas.subplots(2, 1, sharex=True, sharey=True)
    per_panel = []
    for axes, part in zip(panels, _PARTS, strict=True):
        for name, line in curves.items():
            if line is not None and name.startswith("learning_rate|"):
                axes.plot(line.steps, line.center, color=drawing.FAINT, linewidth=0.7, zorder=0)
        per_panel.append(_draw_branches(axes, curves, look, f"effective_lr_{part}"))
        axes.set_ylabel(f"effective learning rate,\n{part} part")
        drawing.mark_branch_point(axes, look.axis, label=axes is panels[0])
    panels[0].set_ylim(*_central_range(curves))
    for axes in panels:
        drawing.finish_steps(axes, look.axis, label=axes is panels[-1])
    for axes, labels in zip(panels, per_panel, strict=True):
        drawing.label_ends(axes, labels)


def _central_range(curves: Curves) -> tuple[float, float]:
    """Limits that hold the lines, and half to one and a half times the learning rate.

    Small noise must not look large; nor may an outlier, further from the central 98 % than these
    are wide, flatten all others.
    """
    import numpy as np

    values = np.concatenate([line.center for line in curves.values() if line is not None])
    rates = [line.center for name, line in curves.items() if line and name.startswith("learn")]
    around = np.concatenate([rate * factor for rate in rates for factor in (0.5, 1.5)])
    low, high = np.nanpercentile(values, [1, 99])
    near = values[(values > 2 * low - high) & (values < 2 * high - low)]
    shown = np.concatenate([near, around])
    margin = 0.03 * float(shown.max() - shown.min())
    return float(shown.min()) - margin, float(shown.max()) + margin


add_figure(
    Figure(
        name="effective-learning-rates",
        title="Effective learning rates of the proposed update",
        caption="-<Q delta, Q g> / norm(Q g)^2 of the proposed update delta for the dominant and "
        f"the bulk projector Q, as ratio of sums over {LEARNING_RATE_WINDOW:.0%} of a run; grey: "
        "the learning rate set. " + BAND,
        needs=(
            "learning_rate",
            *(f"lr_{side}_{part}" for part in _PARTS for side in ("numerator", "denominator")),
        ),
        curves=_learning_rate_curves,
        draw=_draw_learning_rates,
        size=(drawing.COLUMN_WIDTH, 3.4),
    )
)


# Test accuracy


def _accuracy_curves(source: Source) -> Curves:
    return source.each_branch("test_accuracy", column("test_accuracy"))


def _draw_accuracy(canvas: Canvas, curves: Curves, look: Look) -> None:
    axes = canvas.subplots()
    shown = _from_late_trunk(curves, look)
    labels = _draw_branches(axes, shown, look, "test_accuracy", scale=100)
    axes.set_ylabel("test accuracy (%)")
    drawing.mark_branch_point(axes, look.axis)
    drawing.finish_steps(axes, look.axis)
    drawing.label_ends(axes, labels)


add_figure(
    Figure(
        name="test-accuracy",
        title="Test accuracy of the branches",
        caption="Accuracy on held-out samples; early training is left out (the CSV file has it). "
        + BAND,
        needs=("test_accuracy",),
        curves=_accuracy_curves,
        draw=_draw_accuracy,
    )
)
