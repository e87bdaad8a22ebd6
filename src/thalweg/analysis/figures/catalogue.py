"""Which figures does a study make for a paper?

The built-in figures in the order of a report, a module for each theme. A plugin adds its own with
`@register.figure(name)`; `save_figures` writes all of them, or those asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg import registry
from thalweg.analysis.claims.judgement import DEFAULT_ROLES
from thalweg.analysis.figures.alignment import (
    ALIGNMENT,
    ALIGNMENT_OF_BRANCHES,
    BATCH_SIZE,
    OWN_METRIC,
)
from thalweg.analysis.figures.all_methods import ALL_METHODS
from thalweg.analysis.figures.block_sharpness import BLOCK_SHARPNESS
from thalweg.analysis.figures.branch_style import branch_styles
from thalweg.analysis.figures.comparison import BRANCH_COMPARISON
from thalweg.analysis.figures.curves import branches_of, step_axis
from thalweg.analysis.figures.displacement import DISTANCE, OVERLAP
from thalweg.analysis.figures.drawing import Look
from thalweg.analysis.figures.gradient_noise import NOISE
from thalweg.analysis.figures.learning_rates import (
    CRITICAL_LEARNING_RATES,
    EFFECTIVE_LEARNING_RATE_RATIO,
    EFFECTIVE_LEARNING_RATES,
)
from thalweg.analysis.figures.quadratic import QUADRATIC_ALIGNMENT, QUADRATIC_RATES
from thalweg.analysis.figures.registry import figures_named
from thalweg.analysis.figures.saving import (
    Curves,
    Figure,
    NotDrawableError,
    SavedFigure,
    SavedFigures,
    Source,
    save_figure,
)
from thalweg.analysis.figures.spectrum import (
    EIGENVALUES,
    SHARPNESS,
    SHARPNESS_OF_BRANCHES,
    STABILITY,
)
from thalweg.analysis.figures.training import TEST_ACCURACY, TRAINING_LOSS
from thalweg.analysis.figures.valley import VALLEY

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Curves",
    "Figure",
    "NotDrawableError",
    "SavedFigure",
    "SavedFigures",
    "Source",
    "figures_named",
    "save_figures",
]

for built_in in (
    TRAINING_LOSS,
    BRANCH_COMPARISON,
    ALIGNMENT,
    ALIGNMENT_OF_BRANCHES,
    BATCH_SIZE,
    OWN_METRIC,
    EIGENVALUES,
    SHARPNESS,
    SHARPNESS_OF_BRANCHES,
    STABILITY,
    EFFECTIVE_LEARNING_RATES,
    EFFECTIVE_LEARNING_RATE_RATIO,
    CRITICAL_LEARNING_RATES,
    DISTANCE,
    OVERLAP,
    NOISE,
    TEST_ACCURACY,
    VALLEY,
    QUADRATIC_RATES,
    QUADRATIC_ALIGNMENT,
    BLOCK_SHARPNESS,
    ALL_METHODS,
):
    registry.figures.add(built_in.name, built_in)


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
    folder.mkdir(parents=True, exist_ok=True)
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
