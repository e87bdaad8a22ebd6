"""What only the page of all studies has; the rest is in `tests/lab/test_collection.py`."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from thalweg.analysis.figures.drawing import COLUMN_WIDTH, PAGE_WIDTH
from thalweg.analysis.report.collection import _figure


@pytest.mark.parametrize(("inches", "wide"), [(COLUMN_WIDTH, False), (PAGE_WIDTH, True)])
def test_a_figure_as_wide_as_a_page_spans_it(tmp_path: Path, inches: float, wide: bool) -> None:
    png = tmp_path / "training-loss.png"
    Figure(figsize=(inches, 2)).savefig(png, dpi=200)
    assert _figure(png)["wide"] == wide
