from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.analysis import synthetic
from thalweg.analysis.figures import save_figures

ROLES = {"plain": "sgd", "dominant": "dom-sgd", "bulk": "bulk-sgd"}


@pytest.mark.slow
def test_a_study_of_many_branches_is_drawn_over_both_columns_with_all_in_the_csv(
    tmp_path: Path,
) -> None:
    from PIL import Image

    data = synthetic.variants(1)
    figure = save_figures(data, tmp_path, figures=["training-loss"]).saved[0]
    assert set(pd.read_csv(figure.csv)["branch"]) == set(data["branch"])
    with Image.open(figure.png) as image:
        assert image.width == 1400


def test_many_branches_of_one_family_are_drawn_in_one_panel(tmp_path: Path) -> None:
    from PIL import Image

    variants = {f"sgd-batch-{size}": "sgd" for size in (1, 2, 5, 10, 200, 500, 1000)}
    data = synthetic.with_branches(synthetic.study(1, 20), variants)
    figure = save_figures(data, tmp_path, ROLES, ["training-loss"]).saved[0]
    assert set(variants) < set(pd.read_csv(figure.csv)["branch"])
    with Image.open(figure.png) as image:
        assert image.width == 680
