"""A run that was killed, stopped or extended leaves what an undisturbed one leaves, bit for bit."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.lab.small_study import PLUGIN, begin, differing, execute, in_a_process, left, small_spec
from thalweg.errors import IntegrityError
from thalweg.lab.config import Spec
from thalweg.lab.execution.processes import Child
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.checkpoint import list_checkpoints
from thalweg.lab.store.metrics import MetricsWriter, read_metrics
from thalweg.lab.training.recording import Recorder
from thalweg.registry import load_plugin

PATIENCE = 60.0
PARENT = """
import sys
from pathlib import Path
from tests.lab.small_study import in_a_process
from thalweg.lab.store import StudyFolder
if __name__ == "__main__":
    in_a_process(StudyFolder(Path(sys.argv[1])), "trunk").ending()
"""

# The gap of the small study's Hessian closes now and then: of no matter here.
pytestmark = pytest.mark.filterwarnings("ignore::thalweg.GapClosed")

PLAIN: dict[str, Any] = {
    # Never reached, so that the rule's average and its tracker live through the kills.
    "phases.0.until_alignment": 1.0,
    "phases.0.steps": 40,
    "checkpoint.every_steps": 3,
    "branches.sgd.steps": 30,
    "branches.dom-sgd.steps": 30,
    "branches.bulk-sgd.steps": 30,
    "branches.bulk-sgd.split.basis": "frozen",
}
NOISY: dict[str, Any] = {
    **PLAIN,
    "problem.model": {"name": "noisy-mlp"},
    "phases.0.until_alignment": "unset",
    "phases.0.optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "branches.dom-sgd.optimizer": {"name": "adam", "lr": 0.003},
    "branches.bulk-sgd.split.basis": "live",
    "subspace.bulk_error": 0.05,
}
BRIEF: dict[str, Any] = {
    "phases.0.steps": 9,
    "branches.sgd.steps": 8,
    "branches.dom-sgd.steps": 8,
    "branches.bulk-sgd.steps": 8,
}


def wait_for_a_checkpoint(child: Child, folder: Path, known: list[Path]) -> bool:
    """Whether the run goes on after having saved one more checkpoint."""
    deadline = time.monotonic() + PATIENCE
    while child.is_running and list_checkpoints(folder) == known:
        assert time.monotonic() < deadline, "no checkpoint in a minute"
        time.sleep(0.001)
    return child.is_running


def kill_now_and_then(study: StudyFolder, branch: str, kills: int, chance: random.Random) -> int:
    """Take a run to its end, killed up to `kills` times on the way; returns how many times."""
    folder = study.run(0, branch).checkpoints
    done = 0
    while True:
        known = list_checkpoints(folder)
        child = in_a_process(study, branch, plugins=(PLUGIN,))
        if done < kills and wait_for_a_checkpoint(child, folder, known):
            time.sleep(chance.uniform(0.0, 0.03))
            if child.is_running:
                child.kill()
                child.ending()
                done += 1
                continue
        ending = child.ending()
        assert ending.exit_code == 0, ending.message
        return done


def study_of(folder: Path, spec: Spec, *done: str) -> StudyFolder:
    study = begin(folder, spec)
    execute(study, spec, *done)
    return study


@pytest.mark.parametrize(
    ("changes", "branch"),
    [
        pytest.param(PLAIN, "trunk", id="trunk with the rule", marks=pytest.mark.slow),
        pytest.param(PLAIN, "dom-sgd", id="dominant", marks=pytest.mark.slow),
        pytest.param(PLAIN, "bulk-sgd", id="bulk on a frozen basis", marks=pytest.mark.slow),
        pytest.param(NOISY, "trunk", id="dropout, batch norm and momentum"),
        pytest.param(NOISY, "dom-sgd", id="dominant part of Adam", marks=pytest.mark.slow),
        pytest.param(NOISY, "bulk-sgd", id="refined bulk with momentum", marks=pytest.mark.slow),
        pytest.param(
            {**PLAIN, "dtype": "float64"}, "dom-sgd", id="float64", marks=pytest.mark.slow
        ),
    ],
)
def test_a_killed_run_leaves_what_an_undisturbed_one_leaves(
    quick_path: Path, changes: dict[str, Any], branch: str
) -> None:
    load_plugin(PLUGIN)
    spec = small_spec(changes)
    before = () if branch == "trunk" else ("trunk",)
    undisturbed = study_of(quick_path / "undisturbed", spec, *before, branch)
    killed = study_of(quick_path / "killed", spec, *before)
    assert kill_now_and_then(killed, branch, 2, random.Random(branch)) == 2
    assert differing(left(killed, branch), left(undisturbed, branch)) == []


@pytest.mark.slow
def test_twenty_kills_change_nothing(quick_path: Path) -> None:
    load_plugin(PLUGIN)
    spec = small_spec({**NOISY, "phases.0.steps": 120, "branches.bulk-sgd.steps": 120})
    undisturbed = study_of(quick_path / "undisturbed", spec, "trunk", "bulk-sgd")
    killed = begin(quick_path / "killed", spec)
    chance = random.Random(0)
    kills = [kill_now_and_then(killed, branch, 10, chance) for branch in ("trunk", "bulk-sgd")]
    assert kills == [10, 10]
    for branch in ("trunk", "bulk-sgd"):
        assert differing(left(killed, branch), left(undisturbed, branch)) == []


def test_a_stopped_run_says_so_and_goes_on_identically(quick_path: Path) -> None:
    spec = small_spec(PLAIN)
    undisturbed = study_of(quick_path / "undisturbed", spec, "trunk")
    study = begin(quick_path / "stopped", spec)
    child = in_a_process(study, "trunk")
    assert wait_for_a_checkpoint(child, study.run(0, "trunk").checkpoints, [])
    child.ask_to_stop()
    ending = child.ending()
    assert (ending.exit_code, ending.message[:26]) == (75, "stopped on request at step")
    status = study.run(0, "trunk").status()
    assert status is not None
    assert status.state == "interrupted"
    assert in_a_process(study, "trunk").ending().exit_code == 0
    assert differing(left(study, "trunk"), left(undisturbed, "trunk")) == []


@pytest.mark.slow
def test_a_run_stops_when_its_parent_has_died(quick_path: Path) -> None:
    spec = small_spec({"phases.0.steps": 100_000, "probes.loss": 1000})
    study = begin(quick_path / "orphan", spec)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(study.path)], cwd=Path(__file__).parents[2]
    )
    deadline = time.monotonic() + PATIENCE
    run = study.run(0, "trunk")
    while not list_checkpoints(run.checkpoints):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    while (status := run.status()) is None or status.state == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert status.state == "interrupted"
    assert status.message.startswith("stopped on request")


def test_an_extended_branch_is_the_longer_run(quick_path: Path) -> None:
    short, long = (
        small_spec({"phases.0.steps": 5, "branches.dom-sgd.steps": steps}) for steps in (5, 9)
    )
    undisturbed = study_of(quick_path / "long", long, "trunk", "dom-sgd")
    extended = study_of(quick_path / "extended", short, "trunk", "dom-sgd")
    execute(extended, long, "dom-sgd")
    assert differing(left(extended, "dom-sgd"), left(undisturbed, "dom-sgd")) == []


def test_what_is_measured_leaves_the_trajectory_alone(quick_path: Path) -> None:
    load_plugin(PLUGIN)
    watched = small_spec({**NOISY, **BRIEF, "checkpoint.save_bases": True})
    ignored = watched.model_copy(update={"probes": {}, "checkpoint": small_spec(NOISY).checkpoint})
    parameters = []
    for name, spec in (("watched", watched), ("ignored", ignored)):
        study = study_of(quick_path / name, spec, "trunk", "sgd", "dom-sgd")
        parameters.append(
            {
                (branch, key): value
                for branch in ("trunk", "sgd")
                for key, value in left(study, branch).items()
                if key.startswith(("tensor parameters", "tensor optimizer", "tensor random"))
            }
        )
    assert differing(*parameters) == []
    assert any("running_mean" in key for _, key in parameters[0])


def test_the_plain_branch_goes_on_as_the_trunk_would_have(quick_path: Path) -> None:
    load_plugin(PLUGIN)
    spec = small_spec({**NOISY, "phases.0.steps": 5, "branches.sgd.steps": 4})
    longer = small_spec({**NOISY, "phases.0.steps": 9})
    study = study_of(quick_path / "branch", spec, "trunk", "sgd")
    undisturbed = study_of(quick_path / "trunk", longer, "trunk")
    branch, trunk = left(study, "sgd"), left(undisturbed, "trunk")
    names = [name for name in trunk if name.startswith(("tensor parameters", "tensor random"))]
    assert names
    assert [name for name in names if branch[name] != trunk[name]] == []


def test_a_kill_between_checkpoint_and_last_row_loses_no_row(quick_path: Path) -> None:
    spec = small_spec()
    study = study_of(quick_path / "study", spec, "trunk")
    whole = left(study, "trunk")
    run = study.run(0, "trunk")
    with MetricsWriter(run.metrics, Recorder(spec.probes).columns, run.hash) as metrics:
        metrics.truncate(12)  # the row at the end is measured after the checkpoint there
    assert 12 not in read_metrics(run.metrics)["step"].to_pylist()
    execute(study, spec, "trunk")
    assert differing(left(study, "trunk"), whole) == []


def test_rows_that_were_measured_before_a_checkpoint_are_missed(quick_path: Path) -> None:
    spec = small_spec()
    study = study_of(quick_path / "study", spec, "trunk")
    for file in study.run(0, "trunk").metrics.iterdir():
        file.unlink()
    with pytest.raises(IntegrityError, match=r"0 of the 12 rows .* thalweg check"):
        execute(study, spec, "trunk")


def test_batches_depend_on_seed_and_step_alone() -> None:
    import torch

    from thalweg.lab.training.step import minibatch

    first = minibatch(3, 7, 20, 200)
    torch.manual_seed(1)
    torch.rand(5)
    assert torch.equal(minibatch(3, 7, 20, 200), first)
    assert not torch.equal(minibatch(4, 7, 20, 200), first)


def test_every_epoch_has_every_sample_once_also_across_uneven_batches() -> None:
    from thalweg.lab.training.step import minibatch

    drawn = list(itertools.chain(*(minibatch(0, step, 7, 20).tolist() for step in range(20))))
    for epoch in range(7):
        assert sorted(drawn[20 * epoch : 20 * (epoch + 1)]) == list(range(20))
