"""Which runs share a process and a computation, and what becomes of them there."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.lab.small_study import PLUGIN, RAW, begin, differing, execute, left, small_spec
from thalweg import lab
from thalweg.lab.config import Spec
from thalweg.lab.execution import local
from thalweg.lab.execution.lockstep import Grouping, reason_alone, runs_in_lockstep, usual_executor
from thalweg.lab.execution.processes import Child
from thalweg.lab.execution.schedule import Assignment, Outcome, Task, run_tasks, tasks_of
from thalweg.lab.sharing import lockstep_of
from thalweg.lab.store import StudyFolder, list_runs
from thalweg.registry import load_plugin

KILLS = 8
SGD = {"name": "sgd", "lr": 0.05}
TWO_SEEDS: dict[str, Any] = {
    "seeds": [0, 1],
    "phases.0.steps": 4,
    "branches": {
        "sgd": {"steps": 3},
        "dom": {"steps": 3, "split": {"dominant": 1.0, "bulk": 0.0}},
        "adam": {"steps": 3, "optimizer": {"name": "adam", "lr": 0.001}},
    },
    "probes": {"loss": 1},
}


def assigned(study: StudyFolder, spec: Spec, workers: int = 1) -> Assignment:
    return Assignment(study, tasks_of(spec), workers, "cpu", 1)


def ran(study: StudyFolder, spec: Spec, **options: Any) -> tuple[Outcome, list[str]]:
    said: list[str] = []
    means: dict[str, Any] = {"workers": 1, "device": "cpu", "threads": 1, "say": said.append}
    tasks = options.pop("tasks", tasks_of(spec))
    return run_tasks(study, tasks, executor="lockstep", **{**means, **options}), said


def labels(study: StudyFolder, spec: Spec) -> dict[str, str]:
    """The lockstep that each run was made in, by seed and branch; empty of one by itself."""
    return {str(t): lockstep_of(study.run(t.seed, t.branch)) for t in tasks_of(spec)}


def test_runs_go_in_groups_and_others_by_themselves(quick_path: Path) -> None:
    spec = small_spec(TWO_SEEDS)
    study = begin(quick_path / "study", spec)
    outcome, said = ran(study, spec)
    assert (outcome.exit_code, outcome.left_out, said) == (0, [], [])
    assert {ending.exit_code for ending in outcome.endings.values()} == {0}
    found = labels(study, spec)
    trunks = {found[f"seed {seed} trunk"] for seed in (0, 1)}
    branches = {found[f"seed {seed} {name}"] for seed in (0, 1) for name in ("sgd", "dom")}
    assert len(trunks) == len(branches) == 1
    assert trunks != branches
    assert "" not in trunks | branches
    assert found["seed 0 adam"] == found["seed 1 adam"] == ""
    # What computed a run, and where it began, is written down; so it is taken for no other one.
    text = study.run(0, "adam").run_text
    assert re.search(r'maker = "thalweg .*, cpu, lockstep-\w{8}, then thalweg .*, cpu"', text)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"phases.0.optimizer": {"name": "adam", "lr": 0.001}}, "optimizer adam"),
        ({"phases.0.optimizer.momentum": 0.9}, "optimizer with momentum"),
        ({"phases.0.clip_norm": 1.0}, "clip_norm"),
        (
            {"phases.0.noise": {"batch_size": 10, "part": "all"}, "phases.0.batch_size": "all"},
            "noise",
        ),
        ({"subspace.source": "exact"}, "subspace source exact"),
        ({"subspace.samples": 50}, "subspace samples 50"),
        ({"subspace.bulk_error": 0.1}, "subspace bulk_error 0.1"),
        ({"subspace.k": "gap"}, "k by the gap of each seed"),
        ({"processes": 2}, "several processes share it"),
    ],
)
def test_why_a_run_goes_by_itself(changes: dict[str, Any], reason: str) -> None:
    assert reason_alone(small_spec(changes), Task(0, "trunk")) == reason


def test_one_line_says_which_do_and_which_do_not() -> None:
    spec = small_spec(TWO_SEEDS)
    line = runs_in_lockstep(tasks_of(spec), lambda task: spec)
    assert line == (
        "in lockstep: 6 of 8 runs, as far as they are ready together; by themselves: adam:"
        " optimizer adam"
    )


def test_groups_are_an_even_share_of_the_workers_and_go_on_as_they_were(quick_path: Path) -> None:
    spec = small_spec({**TWO_SEEDS, "seeds": [0, 1, 2, 3, 4]})
    study = begin(quick_path / "study", spec)
    grouping = Grouping(assigned(study, spec))
    trunks = [task for task in tasks_of(spec) if task.branch == "trunk"]
    assert len({grouping.key(task) for task in trunks}) == 1
    assert [grouping.together(trunks, workers) for workers in (1, 2, 4, 5)] == [5, 3, 2, 0]
    ran(study, spec, tasks=trunks[:2])
    execute(study, spec, "trunk", seed=2)
    keys = [grouping.key(task) for task in trunks]
    assert keys[0] == keys[1] != keys[3] == keys[4]
    assert keys[2] == "", "begun by itself"
    assert grouping.together(trunks[:2], 2) == 2, "a lockstep goes on as a whole"


def test_lockstep_is_usual_on_a_gpu_and_for_what_was_begun_so(quick_path: Path) -> None:
    spec = small_spec(TWO_SEEDS)
    study = begin(quick_path / "study", spec)
    trunks = [study.run(seed, "trunk") for seed in spec.seeds]
    assert usual_executor("cuda:0", trunks) == "lockstep"
    assert usual_executor("cpu", trunks) == "local"
    ran(study, spec, tasks=tasks_of(spec)[:2])
    assert usual_executor("cpu", trunks) == "lockstep"


def test_a_model_that_cannot_share_is_said_and_its_runs_go_by_themselves(quick_path: Path) -> None:
    load_plugin(PLUGIN)
    changes = {**TWO_SEEDS, "problem.model": {"name": "noisy-mlp"}, "branches": {}}
    spec = small_spec(changes)
    study = begin(quick_path / "study", spec)
    outcome, said = ran(study, spec, plugins=(PLUGIN,))
    assert outcome.exit_code == 0
    assert len(said) == 1
    assert said[0].startswith("2 runs go by themselves: lockstep: got 'layer 2, ")
    assert set(labels(study, spec).values()) == {""}


def test_points_of_a_sweep_share_a_trunk_that_was_made_in_lockstep(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    branches = {"a": {"steps": 2}, "b": {"steps": 2, "optimizer": {"lr": 0.01}}}
    phase = {"optimizer": SGD, "batch_size": 20, "steps": 3}
    own = {"probes": {"loss": 1}, "phases": [phase], "branches": branches, "figures": []}
    file.write_text(tomli_w.dumps({**RAW, **own}))
    grid = {"branches.b.optimizer.lr": [0.2, 0.3]}
    root = tmp_path / "runs"
    result = lab.sweep(file, grid=grid, seeds=(0, 1), root=root, executor="lockstep", workers=1)
    assert result.exit_code == 0
    runs = [run for run in list_runs(root) if run.branch in ("trunk", "a")]
    taken = [run for run in runs if "taken over from" in (run.path / "log.txt").read_text()]
    assert (len(runs), len(taken)) == (8, 4)
    assert all(lockstep_of(run) for run in runs)
    trunks = {lockstep_of(run) for run in runs if run.branch == "trunk"}
    assert len(trunks) == 1
    data = result.data
    assert data[data.branch == "trunk"].groupby(["seed", "step"]).loss.nunique().max() == 1


@pytest.mark.slow
def test_killed_again_and_again_it_leaves_what_an_undisturbed_one_leaves(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    branches = {
        name: {**branch, "steps": 40}
        for name, branch in TWO_SEEDS["branches"].items()
        if name != "adam"
    }
    # Divergence on the way, and a phase that each seed ends at a step of its own.
    branches["wild"] = {"steps": 40, "optimizer": {"name": "sgd", "lr": 1e30}}
    changes = {
        **TWO_SEEDS,
        "branches": branches,
        "phases.0.steps": 40,
        "phases.0.until_loss": 0.4,
        "probes": {"loss": 1, "sharpness": 7},
        "checkpoint.every_steps": 3,
    }
    spec = small_spec(changes)
    calm, killed = (begin(quick_path / name / "study", spec) for name in ("calm", "killed"))
    ran(calm, spec)
    kills, chance = 0, random.Random(0)

    class Killed(Child):
        """Killed after a while, eight times: between its checkpoints and within them."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.until = time.monotonic() + chance.uniform(0.05, 0.5)
            super().__init__(*arguments, **options)

        @property
        def is_running(self) -> bool:
            nonlocal kills
            running = super().is_running
            if running and kills < KILLS and time.monotonic() > self.until:
                kills += 1
                self.kill()
            return running

    monkeypatch.setattr(local, "Child", Killed)
    outcome, said = ran(killed, spec, retries=2 * KILLS)
    assert 0 < kills <= KILLS
    assert any("begun again from its last checkpoint" in line for line in said)
    codes = {task.branch: ending.exit_code for task, ending in outcome.endings.items()}
    assert codes == {"trunk": 0, "sgd": 0, "dom": 0, "wild": 3}
    for task in tasks_of(spec):
        if task.branch != "wild":
            one, other = (left(study, task.branch, seed=task.seed) for study in (calm, killed))
            assert differing(one, other) == []
