"""A study on the CPU and on a GPU: run, stopped, gone on with, reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from tests.lab.small_study import RAW, begin, differing, left, small_spec
from thalweg.cli import main
from thalweg.errors import Interrupted
from thalweg.lab.config import Spec
from thalweg.lab.execution.machine import resolve_device
from thalweg.lab.execution.processes import Child
from thalweg.lab.execution.worker import work
from thalweg.lab.store import StudyFolder, find_studies
from thalweg.lab.training import Run

# The gap of the small study's Hessian closes now and then: of no matter here.
pytestmark = pytest.mark.filterwarnings("ignore::thalweg.GapClosed")

# What other tests show on the CPU already takes long there.
LONG = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param("cuda:0", marks=pytest.mark.gpu),
    ],
    indirect=True,
)
SHORT: dict[str, Any] = {
    "phases.0.steps": 5,
    "phases.0.optimizer": {"name": "adam", "lr": 0.003},
    "branches.bulk-sgd.steps": 5,
    "branches.bulk-sgd.split.basis": "frozen",
}
CNN = {"name": "cnn", "width": 4, "depth": 2, "pooling": "none", "stride": 2}


def stopped_at(step: int, spec: Spec, study: StudyFolder, branch: str, name: str) -> None:
    """A run in this process that is asked to stop after so many steps, and does."""
    looks = iter(range(10**6))
    run = Run(spec, study, 0, branch, device=name, should_stop=lambda: next(looks) == step)
    with pytest.raises(Interrupted):
        run.execute()


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_numbers(
    device: torch.device, quick_path: Path
) -> None:
    spec = small_spec(SHORT)
    undisturbed, stopped = (begin(quick_path / name, spec) for name in ("whole", "stopped"))
    for branch in ("trunk", "bulk-sgd"):
        Run(spec, undisturbed, 0, branch, device=str(device)).execute()
        stopped_at(3, spec, stopped, branch, str(device))
        Run(spec, stopped, 0, branch, device=str(device)).execute()
        assert differing(left(stopped, branch), left(undisturbed, branch)) == []


def test_a_run_begun_on_the_cpu_goes_on_elsewhere(device: torch.device, quick_path: Path) -> None:
    spec = small_spec({**SHORT, "dtype": "float64"})
    whole, study = (begin(quick_path / name, spec) for name in ("whole", "stopped"))
    expected = Run(spec, whole, 0, "trunk")
    expected.execute()
    stopped_at(3, spec, study, "trunk", "cpu")
    run = Run(spec, study, 0, "trunk", device=str(device))
    run.execute()
    theta = run.setup.objective.theta()
    assert theta.device == device
    assert torch.allclose(theta.cpu(), expected.setup.objective.theta(), rtol=1e-6, atol=1e-8)


@LONG
def test_processes_of_their_own_compute_the_same_numbers(
    device: torch.device, quick_path: Path
) -> None:
    spec = small_spec({**SHORT, "problem.model": CNN})
    first, again = (begin(quick_path / name, spec) for name in ("first", "again"))
    for study in (first, again):
        log = study.run(0, "trunk").path / "log.txt"
        child = Child(work, (str(study.path), 0, "trunk", str(device), 1, ()), log)
        ending = child.ending()
        assert ending.exit_code == 0, ending.message
    assert differing(left(first, "trunk"), left(again, "trunk")) == []


@LONG
def test_the_command_line_runs_and_reports(
    device: torch.device, quick_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw: dict[str, Any] = {
        **RAW,
        "claims": ["gradient-aligns"],
        "phases": [{"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 20, "steps": 4}],
        "branches": {"bulk-sgd": {"steps": 4, "split": {"dominant": 0.0}}},
        "probes": {"loss": 1, "alignment_gradient": 2, "sharpness": 2},
    }
    spec = quick_path / "spec.toml"
    spec.write_text(tomli_w.dumps(raw), encoding="utf-8")
    root = quick_path / "runs"
    words = ["run", str(spec), "--device", str(device), "--root", str(root), "--json", "--quiet"]
    with pytest.raises(SystemExit) as ending:
        main(words)
    assert ending.value.code == 0
    answer = capsys.readouterr()
    assert json.loads(answer.out)
    (study,) = find_studies(root)
    assert f'device = "{device}"' in study.spec_text
    assert (study.path / "report.html").stat().st_size > 10_000
    for branch in ("trunk", "bulk-sgd"):
        assert study.run(0, branch).status().state == "done"  # type: ignore[union-attr]


def test_auto_is_a_gpu_where_there_is_one(device: torch.device) -> None:
    assert resolve_device(str(device)) == str(device)
    if device.type == "cuda":
        assert resolve_device("auto") == "cuda"
