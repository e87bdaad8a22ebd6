"""What does training do to a change of the initial parameters: amplify, carry through, forget?

The table has one row a seed and branch, written by `examples/training_jacobian.py`. Every claim
about "the bulk" means singular values within 0.01 of 1, the widest of the distances in use; the
fractions at 1e-3 and 1e-6 stand beside. Overlaps are compared with chance: two random subspaces of
dimensions k <= m in P have the mean squared cosine m / P.
"""

from __future__ import annotations

from thalweg.analysis.claims.claim import Claim, Measurement, NotMeasurableError, Rule, SeedTables
from thalweg.analysis.claims.statistics import Statistic, measured, ratio
from thalweg.registry import claims

SOURCE = "Belrose, Scherlis 2024"
BESIDE = ("bulk_share_1e-03", "bulk_share_1e-06", "chaotic_share", "stable_share")


def value(seed: SeedTables, role: str, column: str) -> float:
    """A column in the last row of a branch; raises as `measured` does."""
    return float(measured(seed, role, column)[1][-1])


def last(column: str, *beside: str) -> Statistic:
    """A column of the run on the data, with others beside it."""

    def measure(seed: SeedTables) -> Measurement:
        shown = {name: value(seed, "plain", name) for name in beside}
        return Measurement(value(seed, "plain", column), shown)

    return measure


def above_chance(overlap: str, chance: str) -> Statistic:
    """(overlap - chance) / (1 - chance): 0 for random subspaces, 1 for equal ones."""

    def measure(seed: SeedTables) -> Measurement:
        found, expected = value(seed, "plain", overlap), value(seed, "plain", chance)
        if not expected < 1:
            raise NotMeasurableError("the bulk is all of parameter space: any two overlap")
        return Measurement(
            (found - expected) / (1 - expected), {"overlap": found, "of random subspaces": expected}
        )

    return measure


def measure_inputs(seed: SeedTables) -> Measurement:
    """Fraction of the bulk on white-noise inputs / fraction on the data."""
    noise, plain = (value(seed, role, "bulk_share_1e-02") for role in ("white-noise", "plain"))
    return Measurement(
        ratio(noise, plain, "bulk"),
        {"fraction on white noise": noise, "fraction on the data": plain},
    )


def measure_restricted(seed: SeedTables) -> Measurement:
    """min(1 - p_bulk, p_rest), p the decrease of the training loss in units of free training's.

    Beside it the same of a random subspace of the bulk's dimension, on which the claim must fail.
    """
    start, free = value(seed, "plain", "loss_start"), value(seed, "plain", "loss_end")
    if not free < start:
        raise NotMeasurableError(f"training takes the loss from {start:.4g} to {free:.4g}")
    inside, outside, in_random, out_of_random = (
        (start - value(seed, "plain", f"loss_{name}")) / (start - free)
        for name in ("in_bulk", "out_of_bulk", "in_random", "out_of_random")
    )
    return Measurement(
        min(1 - inside, outside),
        {
            "progress in the bulk": inside,
            "progress in its complement": outside,
            "the statistic of a random subspace": min(1 - in_random, out_of_random),
        },
    )


claims.add_named(
    Claim(
        name="jacobian-has-a-bulk",
        statement="Most singular values of the training Jacobian are within 0.01 of 1.",
        source=SOURCE,
        statistic="fraction of the singular values with abs(sigma - 1) <= 0.01",
        measure=last("bulk_share_1e-02", *BESIDE),
        rule=Rule(0.5, "above"),
        refuted_by="inputs without constant or dependent directions, such as white noise",
        needs_roles=("plain",),
        needs_columns=("bulk_share_1e-02", *BESIDE),
    )
)

claims.add_named(
    Claim(
        name="jacobian-is-chaotic",
        statement="Some directions of the initial parameters are amplified by an order of "
        "magnitude or more.",
        source=SOURCE,
        statistic="largest singular value of the training Jacobian",
        measure=last("singular_value_max"),
        rule=Rule(10.0, "above"),
        refuted_by="a learning rate so small that training is the flow of a convex loss",
        needs_roles=("plain",),
        needs_columns=("singular_value_max",),
        logarithmic=True,
    )
)

claims.add_named(
    Claim(
        name="jacobian-carries-the-bulk",
        statement="Along the bulk a change of the initial parameters comes through unchanged: "
        "left and right singular vectors nearly coincide.",
        source=SOURCE,
        statistic="mean cosine of left and right singular vectors in the bulk",
        measure=last("bulk_cosine", "outside_cosine"),
        rule=Rule(0.9, "above"),
        refuted_by="training that turns directions it does not stretch",
        needs_roles=("plain",),
        needs_columns=("bulk_cosine", "outside_cosine"),
    )
)

claims.add_named(
    Claim(
        name="jacobian-bulk-is-shared",
        statement="The bulks of runs from different initial parameters overlap substantially.",
        source=SOURCE,
        statistic="mean squared cosine between the bulks of two seeds, above chance",
        measure=above_chance("overlap_seeds", "chance_seeds"),
        rule=Rule(0.5, "above"),
        refuted_by="random subspaces of the bulk's dimension: 0",
        needs_roles=("plain",),
        needs_columns=("overlap_seeds", "chance_seeds"),
    )
)

claims.add_named(
    Claim(
        name="jacobian-bulk-ignores-labels",
        statement="The bulk is nearly the same where the labels are shuffled.",
        source=SOURCE,
        statistic="mean squared cosine between the bulks with true and shuffled labels, above "
        "chance",
        measure=above_chance("overlap_shuffled", "chance_shuffled"),
        rule=Rule(0.5, "above"),
        refuted_by="random subspaces of the bulk's dimension: 0",
        needs_roles=("plain",),
        needs_columns=("overlap_shuffled", "chance_shuffled"),
    )
)

claims.add_named(
    Claim(
        name="jacobian-bulk-needs-the-inputs",
        statement="With white-noise inputs the bulk shrinks.",
        source=SOURCE,
        statistic="fraction of the bulk on white-noise inputs over that on the data",
        measure=measure_inputs,
        rule=Rule(0.5, "below"),
        refuted_by="a bulk that comes from the architecture alone",
        needs_roles=("plain", "white-noise"),
        needs_columns=("bulk_share_1e-02",),
        logarithmic=True,
        same_end=False,
    )
)

claims.add_named(
    Claim(
        name="jacobian-bulk-cannot-learn",
        statement="Training restricted to the bulk fails; restricted to its complement it works.",
        source=SOURCE,
        statistic="lesser of: 1 - progress in the bulk, and progress in its complement, in units "
        "of the loss decrease of free training",
        measure=measure_restricted,
        rule=Rule(0.75, "above"),
        refuted_by="random subspaces of the same dimensions",
        needs_roles=("plain",),
        needs_columns=tuple(
            f"loss_{name}"
            for name in ("start", "end", "in_bulk", "out_of_bulk", "in_random", "out_of_random")
        ),
    )
)
