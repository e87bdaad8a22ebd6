"""What does the toy valley show: which way does the gradient point, and which part advances?

The flat coordinate is the second entry of `position`; the dominant direction is the steep one.
"""

from __future__ import annotations

import math

import numpy as np

from thalweg.analysis.claims.claim import (
    Claim,
    Measurement,
    NonFiniteError,
    NotMeasurableError,
    Rule,
    SeedTables,
)
from thalweg.analysis.claims.statistics import last_tenth, late_half, require_same_start, rows
from thalweg.registry import claims

FLAT_COORDINATE = 1
SOURCE = "Song, Ahn, Yun 2025, on the toy valley"


def measure_directions(seed: SeedTables) -> Measurement:
    """min(chi of SGD, sqrt(1 - chi^2) of GD), each a mean over the last half of the branch.

    Both parts of the statement must hold, so the lesser decides: how far the gradient lies along
    the wall under SGD, and along the floor under GD.
    """
    (noisy,) = late_half(seed, "plain", "alignment_gradient")
    (calm,) = late_half(seed, "full-batch", "alignment_gradient")
    wall = float(noisy.mean())
    floor = float(np.sqrt(np.clip(1 - calm**2, 0, None)).mean())
    return Measurement(
        min(wall, floor), {"along the wall, SGD": wall, "along the floor, GD": floor}
    )


def flat_progress(seed: SeedTables, role: str) -> float:
    """log(abs(y_start) / abs(y_end)) of a branch, the end a geometric mean over its last tenth.

    Raises NotMeasurableError where y was not measured or is zero, NonFiniteError where it diverged.
    """
    name = seed.names[role]
    found = [
        float(row[FLAT_COORDINATE])
        for row in rows(seed, role)["position"]
        if row is not None and np.ndim(row) == 1 and len(row) > FLAT_COORDINATE
    ]
    if not found:
        raise NotMeasurableError(f"position of {name} was not measured")
    heights = np.abs(np.array(found))
    if not np.isfinite(heights).all():
        raise NonFiniteError(f"position of {name} becomes non-finite")
    if heights.min() == 0:
        raise NotMeasurableError(f"{name} is at y = 0, which has no logarithm")
    logs = np.log(heights)
    return float(logs[0]) - last_tenth(logs)


def measure_flat_progress(seed: SeedTables) -> Measurement:
    """min(r_bulk, 1 - abs(r_dominant)), r the progress along the floor in units of SGD's.

    1 where Bulk-SGD advances as SGD does and Dom-SGD stays where it is. Not measurable where SGD
    itself does not advance.
    """
    require_same_start(seed, "plain", "dominant", "bulk")
    plain = flat_progress(seed, "plain")
    if plain < math.log(1.02):
        raise NotMeasurableError(f"{seed.names['plain']} does not advance along the floor")
    bulk = flat_progress(seed, "bulk") / plain
    dominant = flat_progress(seed, "dominant") / plain
    return Measurement(
        min(bulk, 1 - abs(dominant)),
        {"progress of bulk / plain": bulk, "progress of dominant / plain": dominant},
    )


claims.add_named(
    Claim(
        name="valley-noise-aligns",
        statement="In the valley, the gradient points at the walls under SGD, along the floor "
        "under GD.",
        source=SOURCE,
        statistic="lesser of: fraction of the gradient's norm across the valley under SGD, along "
        "it under GD; means over the last half",
        measure=measure_directions,
        rule=Rule(0.9, "above"),
        refuted_by="components without the coupling term: then SGD is GD",
        needs_roles=("plain", "full-batch"),
        needs_columns=("alignment_gradient",),
    )
)

# Margin: with independent signs log(y) of SGD scatters by about a sixth of its progress.
claims.add_named(
    Claim(
        name="valley-flat-part-advances",
        statement="In the valley, the flat part of the updates makes all the progress.",
        source=SOURCE,
        statistic="lesser of: progress of Bulk-SGD along the floor, and 1 - that of Dom-SGD, in "
        "units of SGD's log-decrease of the flat coordinate",
        measure=measure_flat_progress,
        rule=Rule(0.75, "above"),
        refuted_by="a valley turned against the axes: then steps across it advance along y",
        needs_roles=("plain", "dominant", "bulk"),
        needs_columns=("loss", "position"),
    )
)
