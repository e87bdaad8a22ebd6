"""Runs in lockstep: the numbers of each by itself, the same bits again, and its own end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.lab.small_study import PLUGIN, RAW, begin, differing, execute, left, small_spec
from thalweg.errors import Diverged, Interrupted, InvalidInput
from thalweg.lab.config import Spec
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.checkpoint import latest_checkpoint, load_checkpoint
from thalweg.lab.training import Run
from thalweg.lab.training.lockstep import LockstepRuns
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.registry import load_plugin

# The gap of the small study's Hessian closes now and then: of no matter here.
pytestmark = pytest.mark.filterwarnings("ignore::thalweg.GapClosed")

SPLITS: dict[str, Any] = {
    "sgd": {"steps": 12},
    "dom": {"steps": 12, "split": {"dominant": 1.0, "bulk": 0.0}},
    "bulk": {"steps": 12, "split": {"dominant": 0.0, "bulk": 1.0}},
    "dom-frozen": {"steps": 12, "split": {"dominant": 1.0, "bulk": 0.0, "basis": "frozen"}},
    "bulk-frozen": {"steps": 12, "split": {"dominant": 0.0, "bulk": 1.0, "basis": "frozen"}},
}
EXACT: dict[str, Any] = {
    "dtype": "float64",
    "branches": SPLITS,
    "probes": {"loss": 1, "minibatch_loss": 1, "test": 5, "sharpness": 6},
}
OF_THETA = ("loss", "test_loss", "minibatch_loss")
"""Columns in which no tracked S_k has a part."""
OF_COST = ("subspace_error", "subspace_gradients", "next_eigenvalue", "solved_residuals")
"""Columns that say how S_k was found."""
ROUNDING = 1e-10
"""Relative difference in float64 over the 12 steps."""


def in_lockstep(
    study: StudyFolder,
    spec: Spec,
    *branches: str,
    seeds: tuple[int, ...] = (0,),
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Exception | None]:
    """Take these runs to their ends in one computation, in this process."""
    runs = [
        Run(spec, study, seed, branch, should_stop=should_stop)
        for seed in seeds
        for branch in branches
    ]
    return LockstepRuns(runs).execute()


def both(folder: Path, spec: Spec, *branches: str) -> tuple[StudyFolder, StudyFolder]:
    """The study with these branches of seed 0 one by one, and in lockstep, from equal trunks."""
    alone, together = (begin(folder / name / "study", spec) for name in ("alone", "together"))
    execute(alone, spec, "trunk", *branches)
    execute(together, spec, "trunk")
    assert in_lockstep(together, spec, *branches) == [None for _ in branches]
    return alone, together


def theta_of(study: StudyFolder, branch: str) -> torch.Tensor:
    """The parameters at the end of a run of seed 0, (P,)."""
    newest = latest_checkpoint(study.run(0, branch).checkpoints)
    assert newest is not None
    tensors = load_checkpoint(newest).tensors
    named = [value for name, value in sorted(tensors.items()) if "parameters" in name]
    return torch.cat([value.flatten() for value in named])


def column(study: StudyFolder, branch: str, name: str, seed: int = 0) -> np.ndarray:
    return np.array(study.run(seed, branch).read_metrics()[name].to_pylist(), dtype=float)


def state_of(study: StudyFolder, branch: str, seed: int = 0) -> str:
    status = study.run(seed, branch).status()
    assert status is not None
    return status.state


def test_without_a_tracked_split_a_run_is_that_by_itself_within_rounding(quick_path: Path) -> None:
    branches = ("sgd", "dom-frozen", "bulk-frozen")
    alone, together = both(quick_path, small_spec(EXACT), *branches)
    for branch in branches:
        one, other = theta_of(alone, branch), theta_of(together, branch)
        assert float((one - other).norm() / one.norm()) < ROUNDING
        for name in OF_THETA:
            one, other = (column(study, branch, name) for study in (alone, together))
            np.testing.assert_allclose(other, one, rtol=ROUNDING)


@pytest.mark.slow
def test_where_each_subspace_is_solved_for_all_is_that_by_itself_within_rounding(
    quick_path: Path,
) -> None:
    probes = {**RAW["probes"], "minibatch_loss": 1}
    solved = {"subspace.error": 1e-5, "subspace.tolerance": 1e-9, "probes": probes}
    spec = small_spec({**EXACT, **solved})
    alone, together = both(quick_path, spec, *SPLITS)
    for branch in SPLITS:
        one, other = theta_of(alone, branch), theta_of(together, branch)
        assert float((one - other).norm() / one.norm()) < ROUNDING
        tables = [study.run(0, branch).read_metrics() for study in (alone, together)]
        assert tables[0].column_names == tables[1].column_names
        for name in set(tables[0].column_names) - {*OF_COST}:
            values = [
                np.array([v for v in t[name].to_pylist() if v is not None], dtype=float)
                for t in tables
            ]
            np.testing.assert_allclose(values[1], values[0], rtol=1e-7, atol=1e-9, err_msg=name)


@pytest.mark.slow
def test_with_a_tracked_split_each_update_is_off_by_the_target_error(quick_path: Path) -> None:
    spec = small_spec({**EXACT, "probes": {"norms": 1}})
    alone, together = both(quick_path, spec, "dom", "bulk")
    for branch in ("dom", "bulk"):
        parts = (column(alone, branch, f"proposed_norm_{part}") for part in ("dominant", "bulk"))
        proposed = np.nansum(np.hypot(*parts))
        one, other = theta_of(alone, branch), theta_of(together, branch)
        # Each of both is off by the target of what was proposed.
        assert float((one - other).norm()) < 2 * spec.subspace.error * proposed


def test_again_and_after_interruptions_and_crashes_it_is_the_same_to_the_last_bit(
    quick_path: Path,
) -> None:
    spec = small_spec({"seeds": [0, 1], "branches": SPLITS, "checkpoint.every_steps": 3})
    calm, troubled = (begin(quick_path / name / "study", spec) for name in ("calm", "troubled"))
    for study in (calm, troubled):
        assert in_lockstep(study, spec, "trunk", seeds=(0, 1)) == [None, None]
    names = ("sgd", "dom")
    assert in_lockstep(calm, spec, *names, seeds=(0, 1)) == [None] * 4

    def stops_after(steps: int, how: type[BaseException] | None) -> Callable[[], bool]:
        asked = 0

        def stop() -> bool:
            nonlocal asked
            asked += 1
            if asked > steps and how is not None:
                raise how
            return asked > steps

        return stop

    endings = in_lockstep(troubled, spec, *names, seeds=(0, 1), should_stop=stops_after(12, None))
    assert all(isinstance(error, Interrupted) for error in endings)
    assert state_of(troubled, "dom") == "interrupted"
    for _ in range(2):
        # As a kill: nothing is saved on the way out.
        stop = stops_after(20, KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            in_lockstep(troubled, spec, *names, seeds=(0, 1), should_stop=stop)
    assert in_lockstep(troubled, spec, *names, seeds=(0, 1)) == [None] * 4
    for seed in (0, 1):
        for name in names:
            one, other = (left(study, name, seed=seed) for study in (calm, troubled))
            assert differing(one, other) == []


@pytest.mark.slow
def test_an_extended_lockstep_is_the_longer_one_to_the_last_bit(quick_path: Path) -> None:
    short = {name: {**branch, "steps": 7} for name, branch in SPLITS.items()}
    long = small_spec({"branches": SPLITS})
    names = ("sgd", "dom", "bulk")
    once, twice = (begin(quick_path / name / "study", long) for name in ("once", "twice"))
    for study in (once, twice):
        execute(study, long, "trunk")
    assert in_lockstep(twice, small_spec({"branches": short}), *names) == [None] * 3
    for study in (once, twice):
        assert in_lockstep(study, long, *names) == [None] * 3
    for name in names:
        # The shorter one has measured its last step with all probes.
        one, other = (theta_of(study, name) for study in (once, twice))
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore::thalweg.TargetMissed")
def test_a_run_that_diverges_leaves_and_the_others_go_on(quick_path: Path) -> None:
    wild = {"steps": 12, "optimizer": {"name": "sgd", "lr": 1e100}}
    wild_bulk = {**wild, "split": {"dominant": 0.0, "bulk": 1.0}}
    changes = {**EXACT, "branches": {**SPLITS, "wild": wild, "wild-bulk": wild_bulk}}
    spec = small_spec(changes)
    alone, together = (begin(quick_path / name / "study", spec) for name in ("alone", "together"))
    calm = ("sgd", "dom", "bulk-frozen")
    execute(alone, spec, "trunk", *calm)
    execute(together, spec, "trunk")
    with pytest.raises(Diverged, match="at step 14: the mini-batch loss is inf"):
        execute(alone, spec, "wild")
    endings = in_lockstep(together, spec, "wild", *calm, "wild-bulk")
    assert [type(error) for error in endings] == [Diverged, *[type(None)] * 3, Diverged]
    assert str(endings[0]) == "at step 14: the mini-batch loss is inf"
    for name in ("wild", "wild-bulk"):
        assert state_of(together, name) == "diverged"
        assert np.isnan(column(together, name, "loss")[-1])
    for name in ("sgd", "bulk-frozen"):
        one, other = (column(study, name, "loss") for study in (alone, together))
        np.testing.assert_allclose(other, one, rtol=ROUNDING)
    one, other = theta_of(alone, "dom"), theta_of(together, "dom")
    assert float((one - other).norm() / (one - theta_of(alone, "trunk")).norm()) < 0.02


def test_a_probe_that_fails_fails_its_own_run(quick_path: Path) -> None:
    load_plugin(PLUGIN)
    broken = {"steps": 12, "probes": {"broken": 1}}
    spec = small_spec({"branches": {"sgd": {"steps": 12}, "broken": broken}})
    study = begin(quick_path / "study", spec)
    execute(study, spec, "trunk")
    fine, failed = in_lockstep(study, spec, "sgd", "broken")
    assert fine is None
    assert isinstance(failed, Exception)
    assert state_of(study, "sgd") == "done"
    assert state_of(study, "broken") != "done"


def test_what_fails_for_all_is_no_runs_fault_and_each_goes_on_by_itself(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small_spec({"seeds": [0, 1]})
    study = begin(quick_path / "study", spec)
    compute, calls = LockstepObjective.values_and_gradients, 0

    def short_of_memory(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise torch.OutOfMemoryError("out of memory")
        return compute(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(LockstepObjective, "values_and_gradients", short_of_memory)
        with pytest.raises(InvalidInput, match="OutOfMemoryError: out of memory"):
            in_lockstep(study, spec, "trunk", seeds=(0, 1))
    execute(study, spec, "trunk")
    run = study.run(0, "trunk")
    assert state_of(study, "trunk") == "done"
    log = (run.path / "log.txt").read_text()
    assert "leaves its lockstep at step" in log
    assert "goes on by itself after a lockstep" in log
    label, then = run.run_text.partition('maker = "')[2].partition('"')[0].split(", then ")
    assert "lockstep-" in label
    assert "lockstep-" not in then


@pytest.mark.slow
def test_rules_end_the_phases_of_each_run_at_its_own_step(quick_path: Path) -> None:
    rule = {"optimizer": {"name": "sgd", "lr": 0.3}, "batch_size": 20, "steps": 60}
    phases = [{**rule, "until_loss": 0.3}, {**rule, "name": "more", "steps": 3}]
    spec = small_spec({**EXACT, "seeds": [0, 1, 2], "phases": phases})
    alone, together = (begin(quick_path / name / "study", spec) for name in ("alone", "together"))
    for seed in spec.seeds:
        execute(alone, spec, "trunk", seed=seed)
    assert in_lockstep(together, spec, "trunk", seeds=tuple(spec.seeds)) == [None] * 3
    steps = [column(alone, "trunk", "step", seed)[-1] for seed in spec.seeds]
    assert len(set(steps)) > 1, "the seeds need other numbers of steps"
    assert [column(together, "trunk", "step", seed)[-1] for seed in spec.seeds] == steps
    for seed in spec.seeds:
        one, other = (column(study, "trunk", "loss", seed) for study in (alone, together))
        np.testing.assert_allclose(other, one, rtol=ROUNDING)


def test_a_model_that_draws_numbers_is_refused_before_anything_is_begun(quick_path: Path) -> None:
    load_plugin(PLUGIN)
    spec = small_spec({"problem.model": {"name": "noisy-mlp"}})
    study = begin(quick_path / "study", spec)
    with pytest.raises(InvalidInput, match="lockstep: got 'layer 2"):
        LockstepRuns([Run(spec, study, 0, "trunk")])
    assert study.run(0, "trunk").status() is None
