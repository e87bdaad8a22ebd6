"""Panels of interactive curves: which the report shows, and what the page's script draws of them.

A `Panel` offers quantities of the catalogue along all branches; the reader chooses one. Quantities
that a study did not measure are left out, and panels without any.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thalweg import registry
from thalweg.analysis.figures.branch_style import IN_ORDER, branch_styles
from thalweg.analysis.figures.curves import Curve, branches_of, entry, list_length, step_axis
from thalweg.analysis.figures.figure import Source
from thalweg.analysis.quantities import PARTS, SHARES, Quantity, quantities

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

#: Points drawn of one curve; of longer ones every n-th measured step is drawn.
MOST_POINTS = 1500


@dataclass(frozen=True)
class Panel:
    """One plot of the report.

    quantities    those that the reader chooses from; a plugin may bring its own
    logarithmic   its first scale, which the reader can change
    every_step    each measured step is shown where a running mean is drawn for papers
    """

    name: str
    title: str
    caption: str
    quantities: tuple[Quantity, ...]
    logarithmic: bool = False
    wide: bool = False
    every_step: bool = False


def _of(*names: str) -> tuple[Quantity, ...]:
    return tuple(quantities[name] for name in names)


registry.panels.add_named(
    Panel(
        "loss",
        "Loss",
        "All branches start from one checkpoint and see the same mini-batches.",
        _of("loss", "test_loss"),
        logarithmic=True,
        wide=True,
    )
)
registry.panels.add_named(
    Panel(
        "alignment",
        "Alignment with the dominant subspace",
        "χₖ(v) = ‖Pₖv‖ / ‖v‖. The proposed update is the optimizer's, before the split; its own "
        "metric is that of its preconditioner.",
        tuple(q for name, q in quantities.items() if name.startswith("alignment_")),
        every_step=True,
    )
)
registry.panels.add_named(
    Panel(
        "eigenvalues",
        "Eigenvalues of the Hessian",
        "Along the unsplit run; solid: the top k, dashed: the next k. Solved: converged from "
        "scratch; tracked: followed from step to step.",
        _of("solved_eigenvalues", "eigenvalues"),
        logarithmic=True,
    )
)
registry.panels.add_named(
    Panel(
        "curvature-shares",
        "Where the gradient lies in the spectrum",
        "Along the unsplit run: the part of a vector's squared length at curvatures above λ₁ / 2, "
        "/ 5, / 10, / 20 and / 50 (the lines, from dark to light), without a k and without a gap.",
        _of(*(f"{vector}_shares" for vector in SHARES)),
    )
)
registry.panels.add_named(
    Panel(
        "curvature-along",
        "Curvature along the gradient and the update",
        "vᵀHv / ‖v‖², between 0 and λ₁ where the Hessian is positive.",
        _of("gradient_curvature", "update_curvature"),
        logarithmic=True,
    )
)
registry.panels.add_named(
    Panel(
        "sharpness",
        "Sharpness",
        "lr · λ₁ is the learning rate times the sharpness: plain gradient descent is unstable "
        "where it exceeds 2. The sharpness (preconditioned, where the optimizer has a "
        "preconditioner) over the optimizer's own threshold: unstable above 1. Batch sharpness: "
        "the curvature that mini-batches feel along their own gradients.",
        _of(
            "lr_sharpness",
            "sharpness",
            "stability_ratio",
            "preconditioned_sharpness",
            "batch_sharpness",
        ),
    )
)
registry.panels.add_named(
    Panel(
        "test-accuracy",
        "Test accuracy",
        "On held-out samples.",
        _of("test_accuracy"),
    )
)
registry.panels.add_named(
    Panel(
        "effective-learning-rates",
        "Effective learning rates",
        "Of the proposed update: ratio of sums over "
        f"{quantities['effective_lr_bulk'].window:.0%} of a run. For plain SGD both are near the "
        "learning rate.",
        _of(*(f"effective_lr_{part}" for part in PARTS)),
    )
)
registry.panels.add_named(
    Panel(
        "critical-learning-rates",
        "Critical learning rates",
        "Learning rate at which one step along a part alone leaves the expected loss as it is, in "
        "the quadratic approximation.",
        _of(*(f"critical_lr_{part}" for part in PARTS)),
        logarithmic=True,
    )
)
registry.panels.add_named(
    Panel(
        "noise",
        "Gradient noise",
        "Of the mini-batch gradient's variance: the fraction in the dominant subspace, and the "
        "root of the whole.",
        _of("noise_share_dominant", "noise_norm"),
    )
)
registry.panels.add_named(
    Panel(
        "displacement",
        "Distance from the branch point",
        "Of the parameters from those at the branch point, split on the dominant subspace there.",
        _of("displacement_bulk", "displacement_dominant"),
    )
)
registry.panels.add_named(
    Panel(
        "subspace",
        "The tracked subspace",
        "Overlap: mean squared cosine with the subspace at the branch point. Error: the tracker's "
        "own estimate. Cost: products of a step, counted in full gradients, running mean.",
        _of("overlap_branch_point", "subspace_error", "subspace_gradients"),
    )
)


def page_data(data: pd.DataFrame, roles: Mapping[str, str]) -> dict[str, Any]:
    """Everything the page's script draws, as plain lists and strings; null stands for NaN.

    Quantities whose columns are missing or were never measured are left out, and panels without
    any quantity.
    """
    axis = step_axis(data)
    source = Source(data, axis, roles)
    branches = branches_of(data, roles)
    styles = {
        name: {
            "label": style.label,
            "light": style.colour,
            "dark": style.colour_on_dark,
            "dash": ",".join(f"{length}px" for length in style.dash) or "solid",
        }
        for name, style in branch_styles(branches, roles).items()
    }
    groups = {
        "top k": {"label": "top k", "light": "#0072b2", "dark": "#56b4e9", "dash": "solid"},
        "next k": {"label": "next k", "light": "#d55e00", "dark": "#ff9150", "dash": "3px,1.5px"},
    }
    groups |= {
        f"entry {place}": {"label": "", "light": light, "dark": dark, "dash": "solid"}
        for place, (light, dark) in enumerate(IN_ORDER)
    }
    panels = [_panel(panel, source) for panel in registry.panels.values()]
    return {
        "axisTitle": axis.label,
        "branchPoint": axis.branch_point,
        "branches": branches,
        "styles": styles | groups,
        "panels": [panel for panel in panels if panel["quantities"]],
    }


def _panel(panel: Panel, source: Source) -> dict[str, Any]:
    shown = []
    for quantity in panel.quantities:
        if any(name not in source.data.columns for name in quantity.needs):
            continue
        lines = [
            _line(name, style, line, quantity.factor)
            for name, style, line in _lines(panel, quantity, source)
            if line is not None
        ]
        if lines:
            label = quantity.short or quantity.label
            shown.append({"label": label, "axisTitle": quantity.axis, "lines": lines})
    return {
        "name": panel.name,
        "title": panel.title,
        "caption": panel.caption,
        "log": panel.logarithmic,
        "wide": panel.wide,
        "quantities": shown,
    }


def _lines(
    panel: Panel, quantity: Quantity, source: Source
) -> Iterable[tuple[str, str, Curve | None]]:
    """Name, key of the style, and curve: of each branch, or of each rank of a list."""
    branches = branches_of(source.data, source.roles)
    if quantity.groups:
        count = list_length(source.data, quantity.name)
        wanted = ("trunk", source.roles.get("plain", ""))
        for rank in range(count):
            for branch in (name for name in branches if name in wanted):
                yield (
                    f"λ<sub>{rank + 1}</sub>",
                    "top k" if rank < count / quantity.groups else "next k",
                    source.curve(branch, entry(quantity.name, rank), logarithmic=True),
                )
        return
    if quantity.entries:
        for place, name in enumerate(quantity.entries):
            for branch in source.plain_and_trunk():
                line = source.curve(branch, entry(quantity.name, place))
                yield f"above {name}", f"entry {place % len(IN_ORDER)}", line
        return
    styles = branch_styles(branches, source.roles)
    for name, curve in source.each_branch(quantity, 0.0 if panel.every_step else None).items():
        branch = name.partition("|")[2]
        yield styles[branch].label, branch, curve


def _line(name: str, style: str, line: Curve, factor: float) -> dict[str, Any]:
    stride = math.ceil(len(line.steps) / MOST_POINTS)
    # Counted from the end, so that the last point always stays.
    kept = slice((len(line.steps) - 1) % stride, None, stride)
    return {
        "name": name,
        "style": style,
        "x": _rounded(line.steps[kept], digits=9),
        "mean": _rounded(line.center[kept] * factor),
        "low": _rounded(line.low[kept] * factor),
        "high": _rounded(line.high[kept] * factor),
        "seeds": {
            str(seed): _rounded(values[kept] * factor) for seed, values in line.of_seed.items()
        },
    }


def _rounded(values: NDArray[np.float64], digits: int = 5) -> Sequence[float | None]:
    """Values with five significant digits, as short as JSON can have them; None for NaN."""
    return [
        None if not math.isfinite(value) else float(f"{value:.{digits}g}")
        for value in values.tolist()
    ]


def embedded_json(value: object) -> str:
    """JSON that cannot end the script element around it, nor open a comment or an entity."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
