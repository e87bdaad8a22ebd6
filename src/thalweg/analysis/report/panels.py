"""Which interactive curves does the report show, and which columns do they need?

A panel whose columns a study did not measure is left out.
"""

from __future__ import annotations

from thalweg.analysis.figures.curves import effective_rate
from thalweg.analysis.report.panel import (
    Lines,
    Panel,
    Quantity,
    eigenvalue_lines,
    of_branches,
    per_branch,
)
from thalweg.registry import panels

#: Window of running means and of ratios of sums, as a part of a run.
WINDOW = 0.05


def _one(
    name: str, label: str, axis_title: str, lines: Lines | None = None, factor: float = 1.0
) -> Quantity:
    """A quantity of one column; by default a line for each branch."""
    return Quantity(label, axis_title, (name,), lines or per_branch(name), factor)


def _effective(part: str) -> Quantity:
    above, below = f"lr_numerator_{part}", f"lr_denominator_{part}"
    series = effective_rate(above, below, WINDOW)
    return Quantity(
        f"{part} part",
        f"effective learning rate, {part}",
        (above, below),
        of_branches(series),
    )


panels.add(
    "loss",
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
    ),
)
panels.add(
    "alignment",
    Panel(
        name="alignment",
        title="Alignment with the dominant subspace",
        caption="χₖ(v) = ‖Pₖv‖ / ‖v‖. The proposed update is the optimizer's, before the split; "
        "its own metric is that of its preconditioner.",
        quantities=tuple(
            _one(
                f"alignment_{vector}",
                label,
                f"χₖ of the {title}",
            )
            for vector, label, title in (
                ("gradient", "full gradient", "full gradient"),
                ("minibatch", "mini-batch", "mini-batch gradient"),
                ("proposed", "proposed update", "proposed update"),
                ("update", "update made", "update made"),
                ("gradient_own_metric", "gradient, own metric", "gradient, optimizer's metric"),
                ("proposed_own_metric", "proposed, own metric", "update, optimizer's metric"),
            )
        ),
    ),
)
panels.add(
    "eigenvalues",
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
                eigenvalue_lines("solved_eigenvalues", 2),
            ),
            _one("eigenvalues", "tracked, k", "eigenvalue λᵢ", eigenvalue_lines("eigenvalues", 1)),
        ),
        logarithmic=True,
    ),
)
panels.add(
    "sharpness",
    Panel(
        name="sharpness",
        title="Sharpness",
        caption="lr · λ₁ is the learning rate times the sharpness: plain gradient descent is "
        "unstable where it exceeds 2. The sharpness (preconditioned, where the optimizer has a "
        "preconditioner) over the optimizer's own threshold: unstable above 1. Batch sharpness: "
        "the curvature that mini-batches feel along their own gradients.",
        quantities=(
            _one("lr_sharpness", "lr · λ₁", "lr · λ₁"),
            _one("sharpness", "λ₁", "sharpness λ₁"),
            _one("stability_ratio", "over threshold", "sharpness / threshold"),
            _one("preconditioned_sharpness", "preconditioned", "preconditioned sharpness"),
            _one("batch_sharpness", "batch", "batch sharpness"),
        ),
    ),
)
panels.add(
    "test-accuracy",
    Panel(
        name="test-accuracy",
        title="Test accuracy",
        caption="On held-out samples.",
        quantities=(
            _one(
                "test_accuracy", "accuracy", "test accuracy (%)", per_branch("test_accuracy"), 100.0
            ),
        ),
    ),
)
panels.add(
    "effective-learning-rates",
    Panel(
        name="effective-learning-rates",
        title="Effective learning rates",
        caption="Of the proposed update: ratio of sums over "
        f"{WINDOW:.0%} of a run. For plain SGD both are near the learning rate.",
        quantities=(_effective("dominant"), _effective("bulk")),
    ),
)
panels.add(
    "critical-learning-rates",
    Panel(
        name="critical-learning-rates",
        title="Critical learning rates",
        caption="Learning rate at which one step along a part alone leaves the expected loss as "
        "it is, in the quadratic approximation.",
        quantities=tuple(
            _one(
                name,
                label,
                f"{label} learning rate",
                per_branch(name, logarithmic=True),
            )
            for name, label in (
                ("critical_lr_dominant", "critical, dominant"),
                ("critical_lr_bulk", "critical, bulk"),
            )
        ),
        logarithmic=True,
    ),
)
panels.add(
    "noise",
    Panel(
        name="noise",
        title="Gradient noise",
        caption="Of the mini-batch gradient's variance: the share in the dominant subspace, and "
        "the root of the whole.",
        quantities=(
            _one("noise_share_dominant", "share", "share of the noise in Sₖ"),
            _one("noise_norm", "norm", "norm of the noise"),
        ),
    ),
)
panels.add(
    "displacement",
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
    ),
)
panels.add(
    "subspace",
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
    ),
)
