from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from thalweg.analysis.claims.claim import NonFiniteError, NotMeasurableError, SeedTables
from thalweg.analysis.claims.statistics import (
    last_tenth,
    late_half,
    log_ratio,
    measured,
    ratio,
    start_and_end,
    stops_by_divergence,
)


def one(**columns: Any) -> SeedTables:
    """Tables of one branch in the role plain, named sgd, with a row each ten steps."""
    length = len(next(iter(columns.values())))
    table = pd.DataFrame({"step": 10 * np.arange(length), **columns})
    return SeedTables(0, {"plain": table}, {"plain": "sgd"})


def test_rows_without_a_value_are_left_out() -> None:
    steps, a, b = measured(one(a=[1, np.nan, 3, 4], b=[5, 6, np.nan, 8]), "plain", "a", "b")
    assert steps.tolist() == [0, 30]
    assert (a.tolist(), b.tolist()) == ([1, 4], [5, 8])


def test_none_is_not_measured_as_nan_is() -> None:
    # What a table of several runs holds where one of them lacks the probe.
    seed = one(a=pd.Series([1.0, None, 3.0], dtype=object))
    assert measured(seed, "plain", "a")[1].tolist() == [1, 3]


def test_a_column_never_measured_is_named() -> None:
    with pytest.raises(NotMeasurableError, match="a of sgd was not measured"):
        measured(one(a=[np.nan] * 3, loss=[1, 2, 3]), "plain", "a")


@pytest.mark.parametrize("values", [[1, 2, np.inf], [1, 2, *[np.nan] * 5]])
def test_values_that_stop_being_numbers_are_a_divergence(values: list[float]) -> None:
    with pytest.raises(NonFiniteError, match="a of sgd becomes non-finite"):
        measured(one(a=values, loss=np.ones(len(values))), "plain", "a")


@pytest.mark.parametrize(
    ("last", "diverged"),
    [
        ({"loss": np.nan, "sharpness": np.nan}, True),
        ({"loss": np.nan, "sharpness": 2.0}, False),
        ({"loss": 1.0, "sharpness": np.nan}, False),
    ],
)
def test_a_diverged_run_ends_with_a_row_of_nothing(last: dict[str, float], diverged: bool) -> None:
    table = pd.DataFrame([{"step": 0, "learning_rate": 0.1, "loss": 1.0, "sharpness": 2.0}])
    table = pd.concat([table, pd.DataFrame([{"step": 7, "learning_rate": 0.1, **last}])])
    table["eigenvalues"] = [[2.0, 1.0], None]
    assert stops_by_divergence(table) == diverged
    seed = SeedTables(0, {"plain": table.reset_index(drop=True)}, {"plain": "sgd"})
    if diverged:
        with pytest.raises(NonFiniteError, match="diverged at step 7"):
            measured(seed, "plain", "sharpness")
    else:
        assert len(measured(seed, "plain", "sharpness")[0]) >= 1


def test_windows_are_of_steps_and_of_rows() -> None:
    values = np.arange(21.0)
    seed = one(a=values)
    assert late_half(seed, "plain", "a")[0].tolist() == values[10:].tolist()
    assert start_and_end(seed, "plain", "a") == (0.0, np.mean(values[-3:]))
    assert last_tenth(np.array([3.0])) == 3.0


def test_ratios_refuse_what_has_none() -> None:
    assert ratio(0.0, 2.0, "a loss") == 0
    assert log_ratio(2.0, 1.0, "a loss") == pytest.approx(np.log(2))
    for upper, lower in ((1.0, 0.0), (-1.0, 1.0), (1.0, -1.0), (np.nan, 1.0)):
        with pytest.raises(NotMeasurableError, match="a loss of"):
            ratio(upper, lower, "a loss")
    with pytest.raises(NotMeasurableError, match="no log-ratio"):
        log_ratio(0.0, 1.0, "a loss")
