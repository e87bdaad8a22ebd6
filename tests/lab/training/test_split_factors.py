"""Splits whose factors change over a branch, or that follow a cheap space, in whole runs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import thalweg
from tests.lab.small_study import begin, differing, execute, left, small_spec
from tests.sampling import few
from thalweg.errors import Interrupted
from thalweg.lab.config import Spec
from thalweg.lab.store import StudyFolder
from thalweg.lab.training import Run

pytestmark = pytest.mark.filterwarnings("ignore::thalweg.GapClosed")

SPLITS: dict[str, dict[str, Any]] = {
    "factors on a line": {"dominant": 1.0, "dominant_end": 0.25, "bulk_end": 2.0},
    "updates": {"bulk": 2.0, "source": {"name": "updates", "k": 2, "window": 4, "every": 3}},
    "gradients": {"bulk": 2.0, "source": {"name": "gradients", "k": 2, "window": 8, "every": 3}},
}


def spec_with(split: dict[str, Any]) -> Spec:
    probes = {"loss": 1, "norms": 1, "alignment_update": 1}
    return small_spec({"branches.bulk-sgd.split": split, "probes": probes})


def study_with_trunk(folder: Path, spec: Spec) -> StudyFolder:
    study = begin(folder, spec)
    execute(study, spec, "trunk")
    return study


@pytest.mark.parametrize("kind", few(1, ["updates", "gradients", "factors on a line"]))
@pytest.mark.parametrize("stopped_after", few(1, [7, 2]))
def test_a_stopped_run_goes_on_bit_for_bit(quick_path: Path, kind: str, stopped_after: int) -> None:
    spec = spec_with(SPLITS[kind])
    stopped = study_with_trunk(quick_path / "stopped", spec)
    shutil.copytree(stopped.path, quick_path / "undisturbed")
    undisturbed = StudyFolder(quick_path / "undisturbed")
    execute(undisturbed, spec, "bulk-sgd")
    asked = iter([False] * stopped_after + [True])
    with pytest.raises(Interrupted):
        Run(spec, stopped, 0, "bulk-sgd", should_stop=lambda: next(asked)).execute()
    execute(stopped, spec, "bulk-sgd")
    assert differing(left(stopped, "bulk-sgd"), left(undisturbed, "bulk-sgd")) == []


def test_the_parts_of_the_update_are_scaled_by_the_factors_of_the_step(quick_path: Path) -> None:
    spec = spec_with(SPLITS["factors on a line"])
    study = study_with_trunk(quick_path / "line", spec)
    execute(study, spec, "bulk-sgd")
    data = thalweg.load(study)
    rows = data[(data.branch == "bulk-sgd") & data.update_norm_bulk.notna()]
    steps = np.arange(12)
    for part, end in (("dominant", 0.25), ("bulk", 2.0)):
        ratio = rows[f"update_norm_{part}"] / rows[f"proposed_norm_{part}"]
        np.testing.assert_allclose(ratio, 1 + steps / 11 * (end - 1), rtol=1e-4)


def test_probes_keep_the_hessians_subspace_where_the_split_has_its_own(quick_path: Path) -> None:
    spec = spec_with({**SPLITS["gradients"], "dominant": 0.0})
    study = study_with_trunk(quick_path / "own", spec)
    execute(study, spec, "bulk-sgd")
    data = thalweg.load(study)
    made = data[data.branch == "bulk-sgd"].alignment_update.dropna()
    # Split on S_k itself the update made would have none.
    assert (made > 1e-3).all()
    run = Run(spec, study, 0, "bulk-sgd")
    assert type(run.source).__name__ == "SubspaceTracker"
