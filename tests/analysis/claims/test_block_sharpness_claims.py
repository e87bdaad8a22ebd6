from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.analysis.claims.branches import falling, table, verdict_of, without
from thalweg.analysis.claims.block_sharpness_claims import COLUMNS
from thalweg.analysis.quantities import BLOCKS
from thalweg.contrib.block_sharpness import MEASURED_BLOCKS


def blocks(*sharpness: float) -> pd.DataFrame:
    """One branch whose blocks have these sharpnesses, in the published order of blocks."""
    return table(adamw={"loss": falling(0.5), **dict(zip(COLUMNS, sharpness, strict=True))})


def test_the_order_is_that_of_the_probe() -> None:
    assert tuple(BLOCKS) == MEASURED_BLOCKS


@pytest.mark.parametrize(
    ("sharpness", "tau", "outcome"),
    [
        ((1e-4, 1e-3, 1e-2, 0.1, 1.0), 1.0, "holds"),
        ((1e-3, 1e-4, 1e-2, 0.1, 1.0), 0.8, "holds"),
        ((-1e-3, 1e-4, 1e-2, 0.1, 1.0), 1.0, "holds"),
        ((1e-3, 1e-4, 1e-2, 1.0, 0.1), 0.6, "does not hold"),
        ((1.0, 0.1, 1e-2, 1e-3, 1e-4), -1.0, "does not hold"),
        ((1.0, 1.0, 1.0, 1.0, 1.0), 0.0, "does not hold"),
    ],
)
def test_the_order_is_kendalls_tau(sharpness: tuple[float, ...], tau: float, outcome: str) -> None:
    verdict = verdict_of("blocks-in-order", blocks(*sharpness), plain="adamw")
    assert verdict.mean == pytest.approx(tau)
    assert verdict.outcome == outcome
    assert verdict.beside["norm"] == pytest.approx(sharpness[-1], rel=0.01)


def test_it_agrees_with_the_tau_of_scipy() -> None:
    kendalltau = pytest.importorskip("scipy.stats").kendalltau
    drawn = np.random.default_rng(0).standard_normal((5, 5))
    for row in drawn:
        verdict = verdict_of("blocks-in-order", blocks(*row), plain="adamw")
        assert verdict.mean == pytest.approx(kendalltau(np.arange(5), row).statistic)


def test_only_the_last_half_counts_and_seldom_measurements_will_do() -> None:
    def late(part: np.ndarray) -> np.ndarray:
        return np.where(part < 0.5, 10.0, 1e-4)

    data = blocks(1e-4, 1e-3, 1e-2, 0.1, 1.0)
    steps = data["step"].to_numpy()
    data[COLUMNS[0]] = late((steps - steps.min()) / (steps.max() - steps.min()))
    data = without(data, data["step"] % 50 != 0, *COLUMNS)
    assert verdict_of("blocks-in-order", data, plain="adamw").mean == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("end", "outcome"), [(0.4, "holds"), (0.6, "does not hold"), (0.5, "undecided")]
)
def test_rates_by_block_are_faster_where_the_loss_ends_lower(end: float, outcome: str) -> None:
    data = table(adamw={"loss": falling(0.5)}, blockwise={"loss": falling(end)})
    verdict = verdict_of("blockwise-rates-are-faster", data, plain="adamw", blockwise="blockwise")
    assert verdict.mean == pytest.approx(end / 0.5, rel=0.02)
    assert verdict.outcome == outcome
