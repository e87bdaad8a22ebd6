"""The measured quantities, each stated once: column, label, unit, scale, and what it is.

Figures, the report's panels and the tables of the command line show them from here.

Example:
    >>> accuracy = quantities["test_accuracy"]
    >>> accuracy.axis, accuracy.factor
    ('test accuracy (%)', 100.0)
    >>> quantities["effective_lr_bulk"].needs
    ('lr_numerator_bulk', 'lr_denominator_bulk')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """One measured quantity, and how it is shown wherever it is.

    Args:
        name: its column of the metric table, or the name of what is computed from `columns`.
        label: what an axis calls it, in Unicode.
        short: its name beside others of its kind, in a legend or on a switch; empty: the label.
        what: one line on what it is.
        unit: of the values as shown; empty: none.
        factor: multiplies the values where they are shown (100 for per cent).
        logarithmic: shown on a logarithmic axis, its mean over seeds the geometric one.
        window: fraction of a run over which it is averaged, or its sums are taken; 0: not at all.
        limits: of its axis; None: those of the values.
        line: a value that matters, drawn across.
        columns: numerator and denominator of a ratio of sums; empty: it has a column of its own.
        groups: of a column of lists: how many times k its entries are, each a line; 0: of numbers.
        entries: of a column of lists that are not by rank: what each entry is called, each a line.
    """

    name: str
    label: str
    short: str = ""
    what: str = ""
    unit: str = ""
    factor: float = 1.0
    logarithmic: bool = False
    window: float = 0.0
    limits: tuple[float, float] | None = None
    line: float | None = None
    columns: tuple[str, str] | tuple[()] = ()
    groups: int = 0
    entries: tuple[str, ...] = ()

    @property
    def axis(self) -> str:
        """Title of an axis: label and unit."""
        return f"{self.label} ({self.unit})" if self.unit else self.label

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns of the metric table that it is made of."""
        return self.columns or (self.name,)


PARTS = ("dominant", "bulk")
BLOCKS: Mapping[str, str] = {
    "embedding": "embedding",
    "query_key": "query, key",
    "feed_forward": "feed-forward",
    "value_output": "value, output",
    "norm": "norm",
}
"""Blocks of a Transformer in the published order of their average sharpness, the flattest first."""

_FRACTION = (0.0, 1.02)
SHARES: Mapping[str, str] = {
    "gradient": "full gradient",
    "minibatch": "mini-batch gradient",
    "update": "proposed update",
}
"""The vectors whose shares above curvatures are measured."""
SHARE_THRESHOLDS = ("λ₁ / 2", "λ₁ / 5", "λ₁ / 10", "λ₁ / 20", "λ₁ / 50")
"""The curvatures above which they are, those of the probe `curvature_shares`."""

_CATALOGUE = (
    Quantity(
        "loss", "training loss", "training", "loss over all training samples", logarithmic=True
    ),
    Quantity("test_loss", "test loss", "test", "loss over held-out samples", logarithmic=True),
    Quantity(
        "test_accuracy",
        "test accuracy",
        "accuracy",
        "fraction of held-out samples classified correctly",
        unit="%",
        factor=100.0,
    ),
    Quantity("learning_rate", "learning rate", "set", "learning rate that the optimizer has"),
    Quantity(
        "sharpness",
        "sharpness λ₁",
        "λ₁",
        "largest eigenvalue of the Hessian of the training loss",
        logarithmic=True,
    ),
    Quantity(
        "lr_sharpness",
        "lr · λ₁",
        what="learning rate times sharpness; plain gradient descent is unstable above 2",
        line=2.0,
    ),
    Quantity(
        "preconditioned_sharpness",
        "preconditioned sharpness",
        "preconditioned",
        "sharpness in the metric of the optimizer's preconditioner",
    ),
    Quantity(
        "batch_sharpness",
        "batch sharpness",
        "batch",
        "curvature that mini-batches feel along their own gradients",
    ),
    Quantity(
        "critical_sharpness",
        "critical sharpness",
        "critical",
        "2 over the learning rate at which the optimizer's own update would raise the loss",
    ),
    Quantity(
        "directional_sharpness_gradient",
        "directional sharpness, gradient",
        "along the gradient",
        "curvature along the full gradient",
    ),
    Quantity(
        "directional_sharpness_update",
        "directional sharpness, update",
        "along the update",
        "curvature along the update that was made",
    ),
    Quantity(
        "directional_margin",
        "directional margin",
        "along the gradient",
        "1 minus the curvature along the gradient over the threshold, in the optimizer's metric",
        line=0.0,
    ),
    Quantity(
        "gradient_noise_scale",
        "gradient noise scale",
        "noise scale",
        "batch size at which noise and signal of the gradient are as large",
        unit="samples",
        logarithmic=True,
    ),
    Quantity(
        "stability_ratio",
        "sharpness / threshold",
        "over threshold",
        "sharpness over the optimizer's own stability threshold; 1 is the edge of stability",
        line=1.0,
    ),
    Quantity(
        "solved_eigenvalues",
        "eigenvalue λᵢ",
        "solved, 2k",
        "the 2k largest eigenvalues of the Hessian, from a converged solve",
        logarithmic=True,
        groups=2,
    ),
    Quantity(
        "eigenvalues",
        "eigenvalue λᵢ",
        "tracked, k",
        "the k largest eigenvalues of the Hessian, followed from step to step",
        logarithmic=True,
        groups=1,
    ),
    *(
        Quantity(
            f"alignment_{vector}",
            f"χₖ of the {of}",
            short,
            f"fraction of the length of the {of} that lies in the dominant subspace",
            window=0.03,
            limits=(0.0, 1.005),
        )
        for vector, short, of in (
            ("gradient", "full gradient", "full gradient"),
            ("minibatch", "mini-batch gradient", "mini-batch gradient"),
            ("proposed", "proposed update", "proposed update"),
            ("update", "update made", "update made"),
            ("gradient_own_metric", "gradient, own metric", "gradient, optimizer's metric"),
            ("proposed_own_metric", "proposed, own metric", "update, optimizer's metric"),
        )
    ),
    *(
        Quantity(
            f"effective_lr_{part}",
            f"effective learning rate, {part} part",
            f"{part} part",
            f"how far the proposed updates go along the {part} part of the gradient",
            window=0.1,
            columns=(f"lr_numerator_{part}", f"lr_denominator_{part}"),
        )
        for part in PARTS
    ),
    *(
        Quantity(
            f"critical_lr_{part}",
            f"critical learning rate, {part} part",
            f"critical, {part}",
            f"learning rate at which a step of the {part} part leaves the expected loss as it is",
            logarithmic=True,
        )
        for part in PARTS
    ),
    Quantity(
        "noise_share_dominant",
        "fraction of the noise in Sₖ",
        "fraction",
        "fraction of the mini-batch gradient's variance that lies in the dominant subspace",
        limits=_FRACTION,
    ),
    Quantity(
        "noise_norm",
        "norm of the noise",
        "norm",
        "root of the mini-batch gradient's whole variance",
    ),
    *(
        Quantity(
            f"displacement_{part}",
            f"distance, {part} part",
            f"{part} part",
            f"distance from the branch point, the part {where} the dominant subspace there",
        )
        for part, where in (("dominant", "in"), ("bulk", "outside"))
    ),
    Quantity(
        "overlap_branch_point",
        "overlap with the branch point",
        "overlap",
        "mean squared cosine of the dominant subspace with that at the branch point",
        limits=_FRACTION,
    ),
    *(
        Quantity(
            f"{vector}_shares",
            f"share of the {of} above a curvature",
            of,
            f"part of the squared length of the {of} above parts of the largest curvature seen",
            limits=_FRACTION,
            entries=SHARE_THRESHOLDS,
        )
        for vector, of in SHARES.items()
    ),
    *(
        Quantity(
            f"{vector}_curvature",
            f"curvature along the {SHARES[vector]}",
            SHARES[vector],
            f"vᵀHv / ‖v‖² of the {SHARES[vector]} v",
            logarithmic=True,
        )
        for vector in ("gradient", "update")
    ),
    Quantity(
        "subspace_error",
        "estimated error",
        "error",
        "the tracker's own estimate of its error, relative to the gradient",
        unit="%",
        factor=100.0,
    ),
    Quantity(
        "subspace_gradients",
        "cost of a step",
        "cost",
        "what the subspace costs at a step, counted in full gradients",
        unit="gradients",
        window=0.05,
    ),
    *(
        Quantity(
            f"block_sharpness_{block}",
            f"average sharpness, {label}",
            label,
            "trace of the block's Hessian over its number of parameters",
            logarithmic=True,
        )
        for block, label in BLOCKS.items()
    ),
)

quantities: Mapping[str, Quantity] = {quantity.name: quantity for quantity in _CATALOGUE}
"""The catalogue, by name."""
