"""Does Langevin sampling block by block reach a given accuracy with fewer gradients?

The table, written by `examples/subspace_langevin.py`, has the exact error of each chain's
covariance along its steps, each chain with the step size at which it ends at an error of 0.05. The
accuracy asked for is 0.1. A step on r of P eigenvectors counts as r / P of a gradient.
"""

from __future__ import annotations

import numpy as np

from thalweg.analysis.claims.claim import Claim, Measurement, NotMeasurableError, Rule, SeedTables
from thalweg.analysis.claims.statistics import Statistic, measured, ratio
from thalweg.registry import claims

SOURCE = "Maunu, Yao 2024"
ACCURACY = 0.1


def gradients_needed(seed: SeedTables, role: str) -> float:
    """Gradients after which the error is at most ACCURACY to the end, between rows by logarithms.

    Raises NotMeasurableError where it is not reached, or from the first row on.
    """
    _, gradients, errors = measured(seed, role, "gradients", "covariance_error")
    above = np.flatnonzero(errors > ACCURACY)
    if not len(above) or above[-1] == len(errors) - 1:
        where = "within the first row" if not len(above) else f"in {gradients[-1]:.0f} gradients"
        raise NotMeasurableError(
            f"{seed.names[role]}: an error of {ACCURACY:g} is reached "
            + (where if not len(above) else f"not {where}")
        )
    pair = slice(above[-1], above[-1] + 2)
    # np.interp wants ascending abscissas, and errors fall.
    logs = np.interp(np.log(ACCURACY), np.log(errors[pair])[::-1], np.log(gradients[pair])[::-1])
    return float(np.exp(logs))


def gradients_over(reference: str) -> Statistic:
    """Gradients that the subspace version needs / those of another."""

    def measure(seed: SeedTables) -> Measurement:
        own, other = (gradients_needed(seed, role) for role in ("subspace", reference))
        beside = {
            f"gradients of {seed.names['subspace']}": own,
            f"gradients of {seed.names[reference]}": other,
        }
        return Measurement(ratio(own, other, "gradients"), beside)

    return measure


claims.add_named(
    Claim(
        name="subspace-langevin-saves-gradients",
        statement="On an ill-conditioned target, subspace Langevin needs a tenth of the gradients "
        "of plain Langevin, or fewer.",
        source=SOURCE,
        statistic="gradients to an error of 0.1 in the covariance, over those of plain Langevin",
        measure=gradients_over("plain"),
        rule=Rule(0.1, "below"),
        refuted_by="blocks that precondition nothing, such as random coordinates",
        needs_roles=("plain", "subspace"),
        needs_columns=("gradients", "covariance_error"),
        logarithmic=True,
        same_end=False,
    )
)

claims.add_named(
    Claim(
        name="subspace-langevin-matches-preconditioned",
        statement="Block by block, preconditioned Langevin needs at most twice the gradients of "
        "all blocks at once.",
        source=SOURCE,
        statistic="gradients to an error of 0.1 in the covariance, over those of preconditioned "
        "Langevin",
        measure=gradients_over("preconditioned"),
        rule=Rule(2.0, "below"),
        refuted_by="blocks of a worse preconditioner, such as random coordinates",
        needs_roles=("preconditioned", "subspace"),
        needs_columns=("gradients", "covariance_error"),
        logarithmic=True,
        same_end=False,
    )
)
