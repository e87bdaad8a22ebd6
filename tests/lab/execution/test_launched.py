"""A study by processes that `torchrun` has started has the numbers of one, also after a kill."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.lab.small_study import differing, left, small_spec
from thalweg.errors import InvalidInput
from thalweg.lab.config import dump_spec, spec_hash
from thalweg.lab.execution.launched import LaunchedProcesses, launched, refuse_other_number
from thalweg.lab.identity import run_hash
from thalweg.lab.store import StudyFolder, find_studies
from thalweg.lab.study import run

PLUGIN = Path(__file__).with_name("plugin_of_processes.py")
SECONDS = 400
BRANCHES = ("trunk", "sgd", "dom-sgd", "bulk-sgd")


def spec_text(**changes: Any) -> str:
    probes = {"loss": 1, "sharpness": 3, "alignment_gradient": 3, "subspace_cost": 3, "mortal": 1}
    spec = small_spec({"dtype": "float64", "probes": probes} | changes)
    # The number of processes is that of the launcher.
    lines = dump_spec(spec).splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("processes"))


def start(
    root: Path, text: str, *words: str, count: int = 2, **environment: str
) -> subprocess.Popen[str]:
    file = root / "spec.toml"
    root.mkdir(exist_ok=True)
    file.write_text(text)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = ["-m", "thalweg", "run", str(file), "--plugin", str(PLUGIN), "--root", str(root)]
    return subprocess.Popen(
        [sys.executable, *launcher, *command, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=SECONDS)
    return process.returncode, said


def study_in(root: Path) -> StudyFolder:
    (study,) = find_studies(root)
    return study


def columns(study: StudyFolder, branch: str) -> dict[str, list[Any]]:
    return study.run(0, branch).read_metrics().to_pydict()


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS)
def test_a_study_of_processes_is_that_of_one_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    text = spec_text()
    code, said = ended(start(tmp_path / "whole", text))
    assert code == 0, said
    whole = study_in(tmp_path / "whole")

    # Of the branch Bulk-SGD, in the second process, between two checkpoints.
    noted = tmp_path / "killed"
    begun = start(tmp_path / "cut", text, KILL_AT=f"1,18,{noted}")
    code, said = ended(begun)
    assert code != 0
    assert time.time() - float(noted.read_text()) < 60
    told = [line for line in said.splitlines() if "has lost another process" in line]
    assert len(told) == 1, said
    assert "killed: rank 0 has lost another process of its group" in told[0]
    assert "torchrun --nproc-per-node 2 -m thalweg resume" in said
    # What torchrun says of it comes after.
    assert "Traceback" not in said.partition("failed (exitcode")[0], said
    code, said = ended(start(tmp_path / "cut", text))
    assert code == 0, said
    for branch in BRANCHES:
        cut = left(study_in(tmp_path / "cut"), branch)
        assert differing(left(whole, branch), cut) == [], branch

    (file := tmp_path / "one.toml").write_text(text)
    alone = run(file, root=tmp_path / "one", plugins=[str(PLUGIN)], executor="inline")
    assert alone.study.path.name != whole.path.name
    for branch in BRANCHES:
        together, table = columns(whole, branch), columns(alone.study, branch)
        # A solver stops within its tolerance, and rounding decides where.
        for column, within in (("loss", 1e-4), ("sharpness", 1e-3), ("alignment_gradient", 0.01)):
            found, expected = (
                numpy.array([x for x in t[column] if x is not None]) for t in (together, table)
            )
            within = 1e-12 if column == "loss" and branch in ("trunk", "sgd") else within
            assert numpy.allclose(found, expected, rtol=within, atol=0), (branch, column)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
def test_processes_share_the_gradient_of_all_samples(tmp_path: Path) -> None:
    phases = [{"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": "all", "steps": 6}]
    text = spec_text(phases=phases, branches={}, samples=100)
    code, said = ended(start(tmp_path / "two", text))
    assert code == 0, said
    (file := tmp_path / "one.toml").write_text(text)
    alone = run(file, root=tmp_path / "one", plugins=[str(PLUGIN)], executor="inline")
    found = columns(study_in(tmp_path / "two"), "trunk")["loss"]
    expected = columns(alone.study, "trunk")["loss"]
    assert numpy.allclose(found, expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
def test_a_run_that_diverges_ends_in_all_processes_and_the_others_go_on(tmp_path: Path) -> None:
    wild = {"optimizer": {"name": "sgd", "lr": 1e200}, "steps": 12}
    text = spec_text(branches={"wild": wild, "sgd": {"steps": 4}})
    code, said = ended(start(tmp_path / "two", text))
    assert code != 0
    assert "wild: diverged" in said
    assert "lost" not in said
    states = {r.branch: r.status() for r in study_in(tmp_path / "two").runs()}
    assert states["sgd"] is not None
    assert states["sgd"].state == "done"


def test_a_process_knows_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    given = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    found = launched()
    assert found is not None
    assert (found.rank, found.size, found.leads) == (1, 3, False)
    # A study of another number, workers side by side, an executor.
    with pytest.raises(InvalidInput, match="processes: got 3, allowed: the 1 of the spec"):
        refuse_other_number(small_spec(), found)
    with pytest.raises(InvalidInput, match="torchrun --nproc-per-node 2 -m thalweg"):
        refuse_other_number(small_spec({"processes": 2}), None)
    with pytest.raises(InvalidInput, match="workers: got 2"):
        run(small_spec({"processes": 3}), workers=2)
    with pytest.raises(InvalidInput, match="executor: got 'inline'"):
        run(small_spec({"processes": 3}), executor="inline")


def test_the_number_of_processes_is_part_of_what_a_run_is() -> None:
    one, two = small_spec(), small_spec({"processes": 2})
    assert spec_hash(one) != spec_hash(two)
    assert run_hash(one, 0, "sgd", "") != run_hash(two, 0, "sgd", "")


def test_the_others_are_let_go_once_and_only_where_they_wait() -> None:
    told: list[dict[str, Any]] = []

    class Noting(LaunchedProcesses):
        def _tell(self, **what: Any) -> None:
            told.append(what)

    leader = Noting(0, 2)
    leader.dismiss(0)
    leader._at_rest = True
    leader.dismiss(3)
    leader.dismiss(3)
    assert told == [{"exit_code": 3}]
