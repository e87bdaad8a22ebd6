"""With what runs are run: refused alike by a study, a sweep and a worker, before all else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.lab.small_study import RAW, small_spec
from thalweg import lab
from thalweg.errors import InvalidInput
from thalweg.lab.config import dump_spec
from thalweg.lab.store import StudyFolder


def call(name: str, folder: Path) -> Callable[..., Any]:
    """A call of the lab that would run something."""
    if name == "work":
        study = StudyFolder.create(folder, "planned", dump_spec(small_spec()))
        return partial(lab.work, study.path)
    if name == "run":
        return partial(lab.run, small_spec(), root=folder / "runs")
    (folder / "small.toml").write_text(tomli_w.dumps(RAW))
    axes = {"grid": {"lr": [0.1, 0.2]}}
    return partial(lab.sweep, folder / "small.toml", root=folder / "runs", **axes)


@pytest.mark.parametrize("name", ["run", "sweep", "work"])
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"workers": 0}, "workers: got 0, allowed: an integer >= 1"),
        ({"retries": -1}, "retries: got -1, allowed: an integer >= 0"),
        ({"hung_after": nan}, "hung_after: got nan, allowed: minutes, or 0 for never"),
        ({"executor": "locl"}, "did you mean 'local'?"),
    ],
)
def test_means_that_cannot_be_are_refused(
    tmp_path: Path, name: str, given: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        call(name, tmp_path)(**given)
    assert says in str(refused.value)
    assert not (tmp_path / "runs").exists()
