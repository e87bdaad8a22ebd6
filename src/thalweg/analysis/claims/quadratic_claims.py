"""Does SGD on a quadratic do what theory says: phases of alignment, critical learning rates?

Predictions are made from the first row of a branch alone, then held against what the branch does.
The formulas and their derivation are in `thalweg.problems.quadratic_theory`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from thalweg.analysis.claims.claim import Claim, Measurement, NotMeasurableError, Rule, SeedTables
from thalweg.analysis.claims.statistics import (
    last_tenth,
    late_half,
    measured,
    require_same_start,
    rows,
    start_and_end,
)
from thalweg.problems.quadratic_theory import critical_step_size
from thalweg.registry import claims

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

SOURCE = "Deng, Liao, Ouyang, Pang, Song, Yang 2026, arXiv 2601.11789"
#: Part of a branch over which the alignment is averaged before its lowest value is looked for.
SMOOTHING = 0.05
PARTS = ("dominant", "bulk")


def log_odds(chi: Vector) -> Vector:
    """log(chi^2 / (1 - chi^2)) = log(norm(P g)^2 / norm((I - P) g)^2); raises where it is infinite.

    The logarithm of the ratio that theory speaks of: chi near 1 would hide its changes.
    """
    if not ((chi > 0) & (chi < 1)).all():
        raise NotMeasurableError("an alignment of exactly 0 or 1 has no log-odds")
    return 2 * np.log(chi) - np.log1p(-(chi**2))


def measure_phases(seed: SeedTables) -> Measurement:
    """min(fall, rise) of the log-odds of the alignment: start to lowest, lowest to last tenth.

    The lowest is that of a running mean, so that one step does not decide.
    """
    _, chi = measured(seed, "plain", "alignment_gradient")
    odds = log_odds(chi)
    width = max(1, round(SMOOTHING * len(odds)))
    smooth = np.convolve(odds, np.full(width, 1 / width), mode="valid")
    late = last_tenth(odds)
    lowest = float(smooth.min())
    return Measurement(
        min(float(odds[0]) - lowest, late - lowest),
        {
            "chi at the start": float(chi[0]),
            "chi at its lowest": _chi(lowest),
            "chi in the last tenth": _chi(late),
        },
    )


def _chi(odds: float) -> float:
    return math.sqrt(1 / (1 + math.exp(-odds)))


def predicted_step_size(table: pd.DataFrame, name: str) -> float:
    """Critical step size of the alignment at the first row of a branch, from what it measured.

    a and b are the means of the top k and of the next k eigenvalues, the noise's variance in both
    parts is that of the mini-batches. Raises NotMeasurableError where something is missing.
    """
    first = table.iloc[0]
    spectrum = first["solved_eigenvalues"]
    columns = ("gradient_norm_dominant", "gradient_norm_bulk", "noise_share_dominant", "noise_norm")
    dominant, bulk, share, noise = (float(first[column]) for column in columns)
    if spectrum is None or np.ndim(spectrum) != 1 or len(spectrum) < 2:
        raise NotMeasurableError(f"eigenvalues at the start of {name} were not solved")
    if not (dominant > 0 and bulk > 0 and math.isfinite(share) and math.isfinite(noise)):
        raise NotMeasurableError(f"gradient or noise at the start of {name} was not measured")
    eigenvalues = np.asarray(spectrum, dtype=np.float64)
    k = len(eigenvalues) // 2
    return critical_step_size(
        steep=float(eigenvalues[:k].mean()),
        flat=float(eigenvalues[k:].mean()),
        dominant=dominant**2,
        bulk=bulk**2,
        noise_dominant=share * noise**2,
        noise_bulk=(1 - share) * noise**2,
    )


def measure_step_size(seed: SeedTables) -> Measurement:
    """min(fall at the small rate, rise at the large rate) of the log-odds of the alignment.

    From the branch point to the mean over the last half. Not measurable where the two learning
    rates do not lie on the two sides of the predicted step size.
    """
    require_same_start(seed, "small", "large")
    changes, rates = {}, {}
    for role in ("small", "large"):
        _, chi = measured(seed, role, "alignment_gradient")
        (late,) = late_half(seed, role, "alignment_gradient")
        changes[role] = float(log_odds(late).mean() - log_odds(chi[:1])[0])
        rates[role] = float(rows(seed, role)["learning_rate"].iloc[0])
    predicted = predicted_step_size(rows(seed, "small"), seed.names["small"])
    if not rates["small"] < predicted < rates["large"]:
        raise NotMeasurableError(
            f"the critical step size {predicted:.3g} is not between {rates['small']:g} and "
            f"{rates['large']:g}"
        )
    return Measurement(
        min(-changes["small"], changes["large"]),
        {
            "predicted critical step size": predicted,
            "change of log-odds, small rate": changes["small"],
            "change of log-odds, large rate": changes["large"],
        },
    )


def predicted_rates(seed: SeedTables, role: str) -> Mapping[str, float]:
    """The critical learning rates at a branch's first row, by part, and its own as `set`."""
    first = rows(seed, role).iloc[0]
    rates = {part: float(first[f"critical_lr_{part}"]) for part in PARTS}
    if any(math.isnan(rate) for rate in rates.values()):
        name = seed.names[role]
        raise NotMeasurableError(f"critical learning rates at the start of {name} not measured")
    return {**rates, "set": float(first["learning_rate"])}


def loss_change(seed: SeedTables, role: str) -> float:
    """log(L_end / L_start), the end a mean over the last tenth of the branch."""
    start, end = start_and_end(seed, role)
    if min(start, end) <= 0:
        raise NotMeasurableError(f"a loss of {seed.names[role]} is not positive")
    return math.log(end / start)


def measure_between(seed: SeedTables) -> Measurement:
    """min(log(L_dominant / L_0), log(L_0 / L_bulk)) at a learning rate between the critical ones.

    Not measurable where it is not between them.
    """
    require_same_start(seed, "dominant", "bulk")
    rates = predicted_rates(seed, "dominant")
    if not rates["dominant"] < rates["set"] < rates["bulk"]:
        raise NotMeasurableError(
            f"the learning rate {rates['set']:g} is not between the critical ones, "
            f"{rates['dominant']:.3g} and {rates['bulk']:.3g}"
        )
    dominant, bulk = loss_change(seed, "dominant"), loss_change(seed, "bulk")
    return Measurement(
        min(dominant, -bulk),
        {
            "loss of dominant, end / start": math.exp(dominant),
            "loss of bulk, end / start": math.exp(bulk),
            "critical rate, dominant": rates["dominant"],
            "critical rate, bulk": rates["bulk"],
        },
    )


RATE_ROLES = tuple(f"{part}-{place}" for place in ("low", "between", "high") for part in PARTS)


def measure_signs(seed: SeedTables) -> Measurement:
    """Least over six branches of the log-change of the loss, in the direction predicted.

    Predicted is a rise where the branch's learning rate is above the critical one of its part, at
    its first row. Not measurable unless the pairs lie below, between and above the two.
    """
    require_same_start(seed, *RATE_ROLES)
    agreement: dict[str, float] = {}
    for role in RATE_ROLES:
        part, place = role.split("-")
        rates = predicted_rates(seed, role)
        rises = rates["set"] > rates[part]
        if rises != (place == "high" or (place == "between" and part == "dominant")):
            raise NotMeasurableError(
                f"learning rate {rates['set']:g} of {seed.names[role]} is on the other side of "
                f"the critical one, {rates[part]:.3g}"
            )
        agreement[role] = loss_change(seed, role) * (1 if rises else -1)
    return Measurement(
        min(agreement.values()),
        {f"{role}, log-change as predicted": value for role, value in agreement.items()},
    )


claims.add_named(
    Claim(
        name="alignment-phases",
        statement="From a large initialization alignment first falls, then rises and stays high.",
        source=SOURCE,
        statistic="lesser of fall and rise of log(chi^2 / (1 - chi^2)): start to lowest, lowest "
        "to last tenth",
        measure=measure_phases,
        rule=Rule(2.0, "above"),
        refuted_by="gradient descent, whose alignment falls and does not come back; a start on "
        "the floor, from where it only rises",
        needs_roles=("plain",),
        needs_columns=("alignment_gradient",),
    )
)

claims.add_named(
    Claim(
        name="critical-step-size",
        statement="Alignment falls at learning rates below the critical step size, rises above.",
        source=SOURCE,
        statistic="lesser of fall below and rise above of log(chi^2 / (1 - chi^2)), branch point "
        "to last half",
        measure=measure_step_size,
        rule=Rule(0.5, "above"),
        refuted_by="alignment that moves the same way at both learning rates",
        needs_roles=("small", "large"),
        needs_columns=(
            "alignment_gradient",
            "loss",
            "gradient_norm_dominant",
            "gradient_norm_bulk",
            "noise_share_dominant",
            "noise_norm",
            "solved_eigenvalues",
        ),
    )
)

claims.add_named(
    Claim(
        name="bulk-lowers-dominant-raises",
        statement="Between the two critical learning rates the bulk part of the updates lowers "
        "the loss, and the dominant part raises it.",
        source=SOURCE,
        statistic="lesser of log(L_dominant / L_0) and log(L_0 / L_bulk), last tenth of the branch",
        measure=measure_between,
        rule=Rule(0.05, "above"),
        refuted_by="a dominant branch that lowers the loss, or a bulk branch that raises it",
        needs_roles=PARTS,
        needs_columns=("loss", "critical_lr_dominant", "critical_lr_bulk"),
    )
)

claims.add_named(
    Claim(
        name="critical-rates",
        statement="Each part of the updates lowers the loss below its critical learning rate and "
        "raises it above.",
        source=SOURCE,
        statistic="least of six log-changes of the loss in the predicted direction, last tenth of "
        "the branches",
        measure=measure_signs,
        rule=Rule(0.02, "above"),
        refuted_by="a loss that changes against the prediction at any of the learning rates",
        needs_roles=RATE_ROLES,
        needs_columns=("loss", "critical_lr_dominant", "critical_lr_bulk"),
    )
)
