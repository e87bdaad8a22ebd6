from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from tests.analysis import synthetic
from thalweg import registry
from thalweg.analysis.claims import judge


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return synthetic.study()


@pytest.mark.parametrize(
    "spectrum",
    [
        np.full(20, 2.0),
        np.geomspace(5.0, 0.01, 20),
        1 / np.arange(1, 21),
        1 / np.arange(1, 21) ** 2,
        np.linspace(2.0, 0.1, 20),
        np.r_[50.0, np.geomspace(2.0, 1.0, 19)],
    ],
    ids=["flat", "geometric", "power 1", "power 2", "linear", "one outlier"],
)
def test_a_spectrum_without_a_gap_at_k_has_no_gap(spectrum: np.ndarray) -> None:
    verdict = judge(registry.claims["spectrum-gap"], synthetic.with_spectrum(spectrum))
    assert verdict.outcome == "does not hold"


def test_a_bulk_of_zero_or_negative_eigenvalues_is_a_gap() -> None:
    spectrum = np.r_[np.linspace(3, 1, 10), np.linspace(1e-9, -0.2, 10)]
    assert (
        judge(registry.claims["spectrum-gap"], synthetic.with_spectrum(spectrum)).outcome == "holds"
    )


def test_a_gap_for_two_classes_is_seen() -> None:
    spectrum = np.array([4.0, 2.5, 0.4, 0.35])
    verdict = judge(registry.claims["spectrum-gap"], synthetic.with_spectrum(spectrum))
    assert verdict.outcome == "holds"
    assert verdict.mean == pytest.approx(2.5**2 / (4.0 * 0.4))
