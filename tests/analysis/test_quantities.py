from __future__ import annotations

import pytest

from thalweg import registry
from thalweg.analysis.quantities import SHARE_THRESHOLDS, Quantity, quantities
from thalweg.measure.curvature_shares import PARTS_OF_SHARPNESS

#: Columns of every row, and the parts of a row that no probe measures.
OF_EVERY_ROW = {"learning_rate"}


@pytest.mark.parametrize("quantity", quantities.values(), ids=quantities.keys())
def test_every_quantity_is_made_of_columns_that_a_probe_measures(quantity: Quantity) -> None:
    measured = {column for probe in registry.probes.values() for column in probe.columns}
    assert set(quantity.needs) <= measured | OF_EVERY_ROW


@pytest.mark.parametrize("quantity", quantities.values(), ids=quantities.keys())
def test_every_quantity_says_what_it_is_in_one_line(quantity: Quantity) -> None:
    assert quantity.what
    assert "\n" not in quantity.what
    assert quantity.what != quantity.label


def test_no_two_quantities_are_called_the_same() -> None:
    labels = [(quantity.label, quantity.short) for quantity in quantities.values()]
    assert len(set(labels)) == len(labels)


def test_the_title_of_an_axis_has_the_unit_of_the_values_shown() -> None:
    assert quantities["subspace_error"].axis == "estimated error (%)"
    assert quantities["loss"].axis == "training loss"


def test_the_thresholds_of_shares_are_those_of_the_probe() -> None:
    assert tuple(f"λ₁ / {1 / part:.0f}" for part in PARTS_OF_SHARPNESS) == SHARE_THRESHOLDS
