"""The commands of sweeps: what they print, and what they refuse in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.lab.small_study import RAW
from tests.test_cli import Command
from thalweg.lab.execution.launched import SAID
from thalweg.lab.store import find_studies

GRID = ("--grid", "lr=0.05,0.1")


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture
def here(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small spec, in which commands are given."""
    phase = {"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 20, "steps": 3}
    own = {"probes": {"loss": 1}, "phases": [phase], "branches": {"a": {"steps": 2}}}
    own |= {"figures": [], "claims": [], "seeds": [0, 1]}
    (quick_path / "small.toml").write_text(tomli_w.dumps({**RAW, **own}))
    monkeypatch.chdir(quick_path)
    return quick_path


def test_a_sweep_from_its_first_run_to_its_report(here: Path, command: Command) -> None:
    estimate = command("sweep", "small.toml", *GRID, "--dry-run", "--json")
    said: dict[str, Any] = json.loads(estimate.out)
    assert (said["points"], said["runs"], said["done"]) == (2, 8, 0)
    # Each seed a trunk of 3 steps and a branch of 2, at both points.
    assert said["steps"] == 2 * 2 * (3 + 2)
    assert said["seconds_of_a_step"] > 0
    assert not (here / "runs").exists()

    ended = command("sweep", "small.toml", *GRID, "--executor", "inline", "--json")
    assert ended.status == 0, ended.err
    sweep = json.loads(ended.out)["sweep"]
    assert Path(json.loads(ended.out)["report"]).is_file()
    assert len(find_studies("runs")) == 2

    status = json.loads(command("sweep", "status", sweep, "--json").out)
    assert [point["states"] for point in status["points"]] == [{"done": 4}, {"done": 4}]
    assert [point["settings"]["lr"] for point in status["points"]] == [0.05, 0.1]
    assert command("sweep", "status", sweep).out.splitlines()[-1] == "all: 8 done"
    assert "nothing of it was left to a queue" in command("sweep", "cancel", sweep).error

    assert command("resume", "sweep-small", "--json").status == 0
    answer = command("report", sweep, "--statistic", "learning_rate", "--branch", "a")
    assert answer.out == f"report   {Path(sweep) / 'report.html'}\n"
    assert command("work", sweep, "--seed", "1").status == 0


def test_studies_that_are_damaged_or_not_there_are_told(here: Path, command: Command) -> None:
    swept = command("sweep", "small.toml", *GRID, "--executor", "inline", "--name", "rates")
    assert swept.status == 0, swept.err
    first, second = find_studies("runs")
    (first.path / "seed-0/trunk/status.json").write_text("{")
    told = command("sweep", "collect", "rates")
    assert told.status == 4
    assert f"{first.name}: left out: " in told.err
    assert f"thalweg check {first.path} --repair" in told.err
    shutil.rmtree(first.path)
    for action in ("status", "collect"):
        told = command("sweep", action, "rates")
        assert told.status == 0
        assert f"1 of 2 studies of runs/rates are not in runs: {first.name}" in told.err
    shutil.rmtree(second.path)
    assert "none is in runs" in command("sweep", "collect", "rates").err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["small.toml"], "no axis"),
        (["small.toml", "--grid", "lr"], "--grid: got 'lr'"),
        (["small.toml", "--grid", "lr=a,b"], "lr"),
        (["small.toml", "--grid", "learnin.rate=1,2"], "learnin"),
        (["small.toml", "more.toml", *GRID], "allowed: one spec"),
        (["none.toml", *GRID], "no such file"),
        (["small.toml", *GRID, "--executor", "slrum"], "did you mean 'slurm'?"),
        (["small.toml", *GRID, "--executor", "slrum", "--dry-run"], "did you mean 'slurm'?"),
        (["small.toml", *GRID, "--executor-option", "time=1"], "options of executor 'local'"),
        (
            ["small.toml", *GRID, "--executor", "slurm", "--executor-option", "array=0-3"],
            "option of sbatch: got 'array'",
        ),
        (
            ["small.toml", *GRID, "--executor", "ray", "--executor-option", "gpu=1", "--dry-run"],
            "did you mean 'gpus'?",
        ),
        (
            ["small.toml", "--random", "lr=0.05,0.1", "--search", "2", "--of", "b"],
            "branch: got 'b'",
        ),
        (["small.toml", *GRID, "--search", "3"], "--search: allowed with --random"),
        (["small.toml", *GRID, "--maximize", "loss"], "--search TRIALS"),
        (["small.toml", *GRID, "--problem", "mnist"], "--problem"),
        (["small.toml", *GRID, "--name", "../out"], "name"),
        (["small.toml", *GRID, "--processes", "2"], "sweep: processes: got 2, allowed: 1"),
        (["small.toml", *GRID, "--processes", "2", "--dry-run"], "torchrun -m thalweg run"),
        (["status", "nothing"], "there is none in runs"),
        (["collect"], "give one sweep"),
    ],
)
def test_a_mistake_is_one_line(here: Path, command: Command, words: list[str], says: str) -> None:
    answer = command("sweep", *words)
    assert answer.status == 2
    assert says in answer.error
    assert not (here / "runs").exists()


def test_processes_of_a_launcher_are_told_what_they_can_share(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(SAID, ("0", "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    for words in ((), ("--dry-run",)):
        answer = command("sweep", "small.toml", *GRID, *words)
        assert answer.status == 2
        assert "sweep: got '2 processes of a launcher', allowed: one process" in answer.error
    assert not (here / "runs").exists()


def test_work_that_was_not_planned_is_refused(here: Path, command: Command) -> None:
    assert command("work", "nothing").status == 2


def test_a_smoke_sweep_says_what_it_is(here: Path, command: Command) -> None:
    words = ("sweep", "small.toml", *GRID, "--smoke", "--seeds", "0", "--executor", "inline")
    answer = command(*words, "--quiet")
    assert answer.status == 0
    assert "smoke run" in answer.err
    (page,) = here.glob("runs/*/report.html")
    assert "This is a smoke run" in page.read_text(encoding="utf-8")
