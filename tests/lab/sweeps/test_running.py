"""A sweep from its axes to its runs: extended, interrupted, shared; none lost, none made twice."""

from __future__ import annotations

import io
import os
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from rich.console import Console

from tests.lab.small_study import RAW
from tests.sampling import few
from thalweg import lab
from thalweg.analysis.regimes import conclusion
from thalweg.errors import IntegrityError, InvalidInput
from thalweg.lab.checking import repair
from thalweg.lab.execution.inline import run_inline
from thalweg.lab.execution.jobs import jobs_of
from thalweg.lab.execution.schedule import Assignment, Outcome
from thalweg.lab.means import Means
from thalweg.lab.progress import Progress
from thalweg.lab.store import StudyFolder, list_runs
from thalweg.lab.store.lock import locked
from thalweg.lab.sweeps.folder import read_sweep
from thalweg.lab.sweeps.running import conclude, resume_sweep

OWN = "branches.b.optimizer.lr"
"""A key of one branch alone: trunk and other branch are the same at all its values."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half of a small sweep's time, and are drawn in `tests/test_sweeping.py`."""
    monkeypatch.setattr(conclusion, "draw_all", lambda *given: conclusion.Pictures([], {}, {}))


@pytest.fixture
def spec(quick_path: Path) -> Path:
    """A spec whose runs take a part of a second."""
    file = quick_path / "small.toml"
    phase = {"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 20, "steps": 3}
    branches = {"a": {"steps": 2}, "b": {"steps": 2, "optimizer": {"lr": 0.01}}}
    own = {"probes": {"loss": 1}, "phases": [phase], "branches": branches, "figures": []}
    file.write_text(tomli_w.dumps({**RAW, **own}))
    return file


def swept(spec: Path, grid: dict[str, Any], **options: Any) -> Any:
    return lab.sweep(spec, grid=grid, root=spec.parent / "runs", executor="inline", **options)


def starts(root: Path) -> Counter[str]:
    """How often each run was begun at its first step; never, where it was copied."""
    found: Counter[str] = Counter()
    for run in list_runs(root):
        log = (run.path / "log.txt").read_text() if run.status() is not None else ""
        times = 0 if "taken over from" in log else log.count("started at step")
        found[str(run.path.relative_to(root))] = times
    return found


def test_a_grid_is_run_at_every_point_and_read_as_one_frame(spec: Path) -> None:
    result = swept(spec, {"lr": [0.05, 0.1], OWN: [0.2, 0.3]}, seeds=(0, 1))
    assert result.exit_code == 0
    assert len(result.sweep.points) == 4
    root = spec.parent / "runs"
    assert len(list_runs(root)) == 4 * 2 * 3
    assert all(run.status().state == "done" for run in list_runs(root))
    # Trunk and branch "a" at each learning rate are made once, "b" at every point.
    assert sum(starts(root).values()) == 2 * 2 * 2 + 4 * 2
    data = result.data
    assert data.groupby("study").seed.nunique().tolist() == [2, 2, 2, 2]
    last = data[data.branch == "b"].groupby(["lr", OWN, "seed"]).loss.last()
    assert len(last) == last.nunique() == 8
    assert set(data.lr) == {0.05, 0.1}


def test_more_values_and_seeds_extend_it(spec: Path) -> None:
    root = spec.parent / "runs"
    first = swept(spec, {"lr": [0.05, 0.1]})
    once = starts(root)
    second = swept(spec, {"lr": [0.1, 0.2]}, seeds=(0, 1))
    assert second.sweep.path == first.sweep.path
    assert [point.settings["lr"] for point in second.sweep.points] == [0.05, 0.1, 0.2]
    both = starts(root)
    assert all(both[run] == count for run, count in once.items())
    assert len(both) == len(once) + 3 + 2 * 3


def test_a_study_that_was_run_alone_is_a_point(spec: Path) -> None:
    root = spec.parent / "runs"
    alone = lab.run(spec, overrides=["--lr", "0.2"], root=root, executor="inline")
    result = swept(spec, {"lr": [0.1, 0.2]})
    assert alone.study in [point.study for point in result.sweep.points]
    assert set(starts(root).values()) == {1}
    # And the other way round: the folder of a point is that of the study.
    again = lab.run(spec, overrides=["--lr", "0.1"], root=root, executor="inline")
    assert again.study in [point.study for point in result.sweep.points]
    assert set(starts(root).values()) == {1}


def test_an_interrupted_sweep_goes_on_by_its_folder(spec: Path) -> None:
    result = swept_until(spec, {"lr": [0.05, 0.1], OWN: [0.2, 0.3]}, runs=5)
    assert result.exit_code == 75
    assert result.report is None
    root = spec.parent / "runs"
    means = Means(executor="inline")
    again = resume_sweep(result.sweep.path.name, root=root, means=means)
    assert again.exit_code == 0
    assert all(run.status().state == "done" for run in list_runs(root))
    assert max(starts(root).values()) == 1


def test_a_point_that_diverged_is_an_answer_and_not_tried_again(spec: Path) -> None:
    grid = {"lr": [0.05, 1e30]}
    result = swept(spec, grid)
    assert result.exit_code == 0
    root = spec.parent / "runs"
    states = Counter(run.status().state for run in list_runs(root) if run.status())
    assert states == {"done": 3, "diverged": 1}
    before = starts(root)

    def nothing(assignment: Assignment) -> Outcome:
        raise AssertionError(f"asked for {assignment.tasks}")

    again = lab.sweep(spec, grid=grid, root=root, executor=nothing)
    assert again.exit_code == 0
    assert starts(root) == before


def swept_until(spec: Path, grid: dict[str, Any], runs: int) -> Any:
    """A sweep whose executor stops after some runs."""

    def stopping(assignment: Assignment) -> Outcome:
        outcome = run_inline(replace(assignment, tasks=assignment.tasks[:runs]))
        return replace(outcome, left_out=list(assignment.tasks[runs:]), interrupted=True)

    return lab.sweep(spec, grid=grid, root=spec.parent / "runs", executor=stopping)


def test_workers_do_what_a_driver_has_planned(spec: Path) -> None:
    result = swept_until(spec, {"lr": [0.05, 0.1], OWN: [0.2, 0.3]}, runs=0)
    root = spec.parent / "runs"
    for point in reversed(result.sweep.points):
        assert lab.work(point.study.path, executor="inline").exit_code == 0
    assert all(run.status().state == "done" for run in list_runs(root))
    assert set(starts(root).values()) <= {0, 1}
    assert lab.work(result.sweep.path, executor="inline").exit_code == 0


def test_jobs_are_seeds_of_studies_in_waves(spec: Path) -> None:
    seen: list[Assignment] = []

    def looking(assignment: Assignment) -> Outcome:
        seen.append(assignment)
        return Outcome(left_out=list(assignment.tasks), submitted="nothing")

    grid = {"lr": [0.05, 0.1], OWN: [0.2, 0.3]}
    options = {"root": spec.parent / "runs", "executor": looking, "seeds": (0, 1)}
    result = lab.sweep(spec, grid=grid, **options)
    assert result.outcome.submitted == "nothing"
    jobs = jobs_of(seen[0])
    assert len(jobs) == len(set(jobs)) == 8
    # At each learning rate the second point copies the trunks of the first one.
    assert [job.wave for job in jobs] == [0, 0, 1, 1, 0, 0, 1, 1]
    assert {job.study for job in jobs} == {
        p.study.path for p in read_sweep(result.sweep.path).points
    }


def test_a_point_that_cannot_be_built_leaves_nothing_behind(spec: Path) -> None:
    with pytest.raises(InvalidInput, match="batch_size"):
        swept(spec, {"batch_size": [20, 100000]})
    with pytest.raises(InvalidInput, match="k"):
        swept(spec, {"k": [3, 100000]})
    assert not list((spec.parent / "runs").glob("*/spec.toml"))


def test_seeds_that_a_study_lacks_are_refused(spec: Path) -> None:
    result = swept_until(spec, {"lr": [0.05, 0.1]}, runs=0)
    study = result.sweep.points[0].study
    with pytest.raises(InvalidInput, match=r"seed: got \[7\], allowed: one of 0"):
        lab.work(study.path, seeds=[7])
    with pytest.raises(InvalidInput, match="planned"):
        lab.work(StudyFolder.create(spec.parent, "bare", study.spec_text).path)


def test_a_study_in_use_comes_last_also_where_the_sweep_is_named_like_it(spec: Path) -> None:
    study = swept_until(spec, {"lr": [0.05, 0.1]}, runs=0).sweep.points[0].study
    assert study.name.startswith("small")
    held, order = ExitStack(), list[Path]()
    held.enter_context(locked(study.path, "study"))

    def releasing(assignment: Assignment) -> Outcome:
        """As a process of its own would, that ends while the others run."""
        order.extend(dict.fromkeys(assignment.study_of(task).path for task in assignment.tasks))
        held.close()
        return run_inline(assignment)

    said = io.StringIO()
    options = {"root": spec.parent / "runs", "executor": releasing, "name": "small"}
    progress = Progress(Console(file=said, width=1000))
    result = lab.sweep(spec, grid={"lr": [0.05, 0.1]}, progress=progress, **options)
    assert result.exit_code == 0
    assert len(order) == 2
    assert order[-1] == study.path
    assert f"study {study.path}: in use by process {os.getpid()}" in said.getvalue()
    assert all(run.status().state == "done" for run in list_runs(spec.parent / "runs"))


HARMS: dict[str, Callable[[Path], object]] = {
    "status": lambda study: (study / "seed-0/trunk/status.json").write_text("{"),
    "spec": lambda study: (study / "spec.toml").write_text("seeds = ["),
    "deleted": shutil.rmtree,
}


@pytest.mark.parametrize("harm", few(1, HARMS))
def test_the_others_go_on_where_a_study_is_damaged(spec: Path, harm: str) -> None:
    grid = {"lr": [0.05, 0.1]}
    result = swept_until(spec, grid, runs=4)  # of 6: trunk and branches of one, a trunk
    bad, good = (point.study for point in result.sweep.points)
    HARMS[harm](bad.path)
    said = io.StringIO()
    means = Means(executor="inline", progress=Progress(Console(file=said, width=1000)))
    again = resume_sweep(result.sweep.path, means=means)
    assert all(run.status().state == "done" for run in good.runs())
    assert len(good.runs()) == 3
    assert list(again.left_out) == [bad]
    assert again.exit_code == (4 if harm == "status" else 2)
    assert again.report is not None
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith(bad.name)]
    if harm == "deleted":
        assert "makes it anew" in line
    else:
        assert f"thalweg check {bad.path} --repair" in line
        repair(bad)
    # Mended, or begun anew by the sweep's own command.
    assert swept(spec, grid).exit_code == 0
    assert all(run.status().state == "done" for run in list_runs(spec.parent / "runs"))


def test_damaged_rows_keep_no_other_study_from_its_verdicts(spec: Path) -> None:
    grid = {"lr": [0.05, 0.1]}
    bad, good = (point.study for point in swept(spec, grid).sweep.points)
    for study in (bad, good):
        (study.path / "verdicts.json").unlink()
    for file in bad.path.glob("seed-0/*/metrics/segment-*"):
        file.write_bytes(b"")
    again = swept(spec, grid)
    assert (again.exit_code, list(again.left_out)) == (4, [bad])
    assert good.read_verdicts() is not None
    assert bad.read_verdicts() is None


def test_only_damaged_studies_are_an_error(spec: Path) -> None:
    result = swept_until(spec, {"lr": [0.05, 0.1]}, runs=0)
    for point in result.sweep.points:
        (point.study.path / "seed-0/trunk/status.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"status\.json"):
        resume_sweep(result.sweep.path, means=Means(executor="inline"))


def test_a_sweep_without_its_studies_keeps_its_report(spec: Path) -> None:
    result = swept(spec, {"lr": [0.05, 0.1]})
    alone = spec.parent / "moved" / result.sweep.path.name
    shutil.copytree(result.sweep.path, alone)
    page = (alone / "report.html").read_text()
    with pytest.raises(InvalidInput, match=f"none is in {alone.parent}"):
        conclude(read_sweep(alone))
    assert (alone / "report.html").read_text() == page
