"""What is handed to Slurm, and what its elements do; with programs that only have Slurm's names."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.lab.execution.fake_slurm import FakeSlurm
from thalweg.errors import IntegrityError, InvalidInput
from thalweg.lab.execution.schedule import Assignment, Outcome, Task
from thalweg.lab.execution.slurm import submit_to_slurm
from thalweg.lab.execution.slurm_queue import cancel, status
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.status import Status

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no bash")


@pytest.fixture
def slurm(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(quick_path / "it's bin", monkeypatch)


def tasks_of_sweep(root: Path, seeds: int = 2, *, shared: bool = False) -> list[Task]:
    """A trunk and a branch of each seed of two studies; the second one's trunk is the first's."""
    found: list[Task] = []
    for seed in range(seeds):
        first = Task(seed, "trunk", study=root / "first")
        second = Task(seed, "trunk", study=root / "second", same_as=first if shared else None)
        branches = [Task(seed, "sgd", study=root / name) for name in ("first", "second")]
        found += [first, second, *branches]
    return found


def submit(
    slurm: FakeSlurm,
    sweep: Path,
    tasks: list[Task],
    options: Mapping[str, object] | None = None,
    **means: Any,
) -> Outcome:
    sweep.mkdir(exist_ok=True)
    given: dict[str, Any] = {"workers": 3, "device": "cpu", "threads": 1, **means}
    every = {"python": slurm.worker, **(options or {})}
    return submit_to_slurm(Assignment(StudyFolder(sweep), tasks, options=every, **given))


def only_submission(sweep: Path) -> Path:
    (found,) = (sweep / "slurm").iterdir()
    return found


def test_each_seed_of_each_study_is_an_element_that_calls_a_worker(
    slurm: FakeSlurm, quick_path: Path
) -> None:
    sweep, plugin = quick_path / "a 100% sweep", quick_path / "it's mine.py"
    tasks = tasks_of_sweep(quick_path)
    outcome = submit(slurm, sweep, tasks, plugins=[str(plugin), "mine.problems"])
    assert outcome.submitted == "Slurm job 17: 4 elements"
    assert outcome.left_out == tasks
    assert (outcome.endings, outcome.exit_code) == ({}, 0)
    plugins = f"--retries 0 --hung-after 30 --plugin {plugin} --plugin mine.problems"
    assert slurm.called == [
        f"-m thalweg work {quick_path / name} --seed {seed} {plugins}"
        for seed in (0, 1)
        for name in ("first", "second")
    ]
    assert [(number, code) for number, code, _ in slurm.elements] == [
        (f"17_{index}", 0) for index in range(4)
    ]
    folder = only_submission(sweep)
    assert json.loads((folder / "submitted.json").read_text()) == {
        "arrays": [{"number": "17", "first": 1, "count": 4}]
    }


def test_the_script_says_to_slurm_what_was_asked_for(slurm: FakeSlurm, quick_path: Path) -> None:
    sweep = quick_path / "a 100% sweep"
    options = {"time": "1:00:00", "mem": "4G", "partition": "short", "exclusive": "", "nice": 5}
    submit(slurm, sweep, tasks_of_sweep(quick_path), {**options, "stop-before": 60}, threads=2)
    folder = only_submission(sweep)
    script = (folder / "array-1.sh").read_text()
    asked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]
    assert [shlex.split(line)[0] for line in asked] == [
        "--job-name=thalweg-a 100% sweep",
        "--array=0-3%3",
        f"--chdir={Path.cwd()}",
        f"--output={str(folder).replace('%', '%%')}/%A_%a.log",
        "--open-mode=append",
        "--ntasks=1",
        "--cpus-per-task=2",
        "--signal=B:USR1@60",
        "--requeue",
        "--time=1:00:00",
        "--mem=4G",
        "--partition=short",
        "--exclusive",
        "--nice=5",
    ]
    assert "export OMP_NUM_THREADS=2" in script.splitlines()
    assert slurm.submitted == [["--parsable", str(folder / "array-1.sh")]]


def test_a_run_on_a_gpu_asks_for_one_unless_the_user_has(
    slurm: FakeSlurm, quick_path: Path
) -> None:
    tasks = tasks_of_sweep(quick_path)
    submit(slurm, quick_path / "one", tasks, device="cuda")
    submit(slurm, quick_path / "two", tasks, {"gpus-per-task": "h100:1"}, device="cuda")
    one, two = (
        (only_submission(quick_path / name) / "array-1.sh").read_text() for name in ("one", "two")
    )
    assert "#SBATCH --gres=gpu:1\n" in one
    assert "--gres" not in two
    assert "#SBATCH --gpus-per-task=h100:1\n" in two


def test_an_interrupted_element_is_queued_again_until_it_is_done(
    slurm: FakeSlurm, quick_path: Path
) -> None:
    slurm.set("seed-1.sh", '[ "$SLURM_RESTART_COUNT" = 2 ] || exit 75')
    submit(slurm, quick_path / "sweep", tasks_of_sweep(quick_path)[:5])
    codes = [(number, code) for number, code, _ in slurm.elements]
    assert codes == [("17_0", 0), ("17_1", 0), ("17_2", 75), ("17_2", 75), ("17_2", 0)]


def test_an_element_is_not_queued_again_for_ever(slurm: FakeSlurm, quick_path: Path) -> None:
    slurm.set("seed-0.sh", "exit 75")
    submit(slurm, quick_path / "sweep", tasks_of_sweep(quick_path)[:1], {"restarts": 2})
    assert [code for _, code, _ in slurm.elements] == [75] * 4
    assert len(slurm.called) == 3
    assert slurm.elements[-1][2].startswith("queued again 2 times: given up")


@pytest.mark.parametrize("status", [1, 3])
def test_what_fails_or_diverges_is_not_queued_again(
    slurm: FakeSlurm, quick_path: Path, status: int
) -> None:
    slurm.set("seed-0.sh", f"exit {status}")
    submit(slurm, quick_path / "sweep", tasks_of_sweep(quick_path)[:1])
    assert [code for _, code, _ in slurm.elements] == [status]


# The worker has Slurm send a signal to its script; a checkpoint takes it a while.
SAVES = "trap 'sleep 0.3; echo saved; exit 75' USR1 TERM\n"
FIRST = '[ -z "$SLURM_RESTART_COUNT" ] || exit 0\n'


def test_the_signal_before_the_time_limit_reaches_the_worker_and_the_element_goes_on(
    slurm: FakeSlurm, quick_path: Path
) -> None:
    slurm.set("seed-0.sh", FIRST + SAVES + "kill -USR1 $PPID; while true; do sleep 0.05; done")
    submit(slurm, quick_path / "sweep", tasks_of_sweep(quick_path)[:1])
    assert [code for _, code, _ in slurm.elements] == [75, 0]
    assert slurm.elements[0][2] == "saved\ninterrupted: queued again\n"


# Slurm sends TERM to the script and to all that it has started.
CANCELLED = SAVES + "kill -TERM $PPID; kill -TERM $$"
LATE = SAVES + "trap 'kill -TERM $PPID; sleep 0.3; echo saved; exit 75' USR1\nkill -USR1 $PPID"


@pytest.mark.parametrize("ends", [CANCELLED, LATE], ids=["at once", "near its time limit"])
def test_a_cancelled_element_is_waited_for_and_not_queued_again(
    slurm: FakeSlurm, quick_path: Path, ends: str
) -> None:
    slurm.set("seed-0.sh", FIRST + ends + "\nwhile true; do sleep 0.05; done")
    submit(slurm, quick_path / "sweep", tasks_of_sweep(quick_path)[:1])
    assert [(code, said) for _, code, said in slurm.elements] == [(75, "saved\n")]


def test_a_worker_that_a_signal_ends_before_it_hears_signals_is_begun_again(
    slurm: FakeSlurm, quick_path: Path
) -> None:
    slurm.set("seed-0.sh", FIRST + "kill -USR1 $PPID; while true; do sleep 0.05; done")
    submit(slurm, quick_path / "sweep", tasks_of_sweep(quick_path)[:1])
    assert [code for _, code, _ in slurm.elements] == [75, 0]


def test_jobs_that_copy_runs_begin_after_those_that_make_them(
    slurm: FakeSlurm, quick_path: Path
) -> None:
    sweep = quick_path / "sweep"
    outcome = submit(slurm, sweep, tasks_of_sweep(quick_path, shared=True))
    assert outcome.submitted == "Slurm job 17, 18: 4 elements"
    folder = only_submission(sweep)
    assert slurm.submitted == [
        ["--parsable", str(folder / "array-1.sh")],
        ["--parsable", "--dependency=afterany:17", str(folder / "array-2.sh")],
    ]
    assert [line.split()[3] for line in slurm.called] == [
        str(quick_path / name) for name in ("first", "first", "second", "second")
    ]


def test_an_array_is_no_larger_than_the_cluster_allows(slurm: FakeSlurm, quick_path: Path) -> None:
    slurm.set("max_array_size", "3")
    outcome = submit(slurm, quick_path / "sweep", tasks_of_sweep(quick_path))
    assert outcome.submitted == "Slurm job 17, 18: 4 elements"
    assert slurm.submitted[1][1] == "--dependency=afterany:17"
    assert [number for number, _, _ in slurm.elements] == ["17_0", "17_1", "17_2", "18_0"]
    assert len(set(slurm.called)) == 4


def test_what_is_in_the_queue_already_is_not_submitted_again(
    slurm: FakeSlurm, quick_path: Path
) -> None:
    slurm.set("holds", "")
    sweep, tasks = quick_path / "sweep", tasks_of_sweep(quick_path, shared=True)
    submit(slurm, sweep, tasks[:1])
    slurm.set("queue", "17_0|RUNNING|None\n")
    outcome = submit(slurm, sweep, tasks)
    assert outcome.submitted == ("Slurm job 18, 19: 3 elements; in Slurm's queue already: 1")
    # What copies a run waits for the one in the queue that may make it, too.
    assert slurm.submitted[2][1] == "--dependency=afterany:17:18"
    slurm.set("queue", "".join(f"{n}|PENDING|Priority\n" for n in ("17_0", "18_0", "19_0", "19_1")))
    outcome = submit(slurm, sweep, tasks)
    assert outcome.submitted == "nothing; in Slurm's queue already: 4"
    assert len(slurm.submitted) == 3


def test_status_says_what_slurm_and_the_run_folders_know(
    slurm: FakeSlurm, quick_path: Path
) -> None:
    slurm.set("holds", "")
    sweep = quick_path / "sweep"
    assert status(sweep) == []
    submit(slurm, sweep, tasks_of_sweep(quick_path))
    study = StudyFolder(quick_path / "first")
    study.run(0, "trunk").create("seed = 0\n").write_status(Status("done"))
    study.run(0, "sgd").create("seed = 0\n")
    slurm.set("queue", "17_0|RUNNING|None\n17_3|PENDING|JobArrayTaskLimit\n")
    found = {element.number: element for element in status(sweep)}
    assert {number: element.queue for number, element in found.items()} == {
        "17_0": "RUNNING",
        "17_1": "",
        "17_2": "",
        "17_3": "PENDING (JobArrayTaskLimit)",
    }
    first = found["17_0"]
    assert (first.study, first.seed) == (quick_path / "first", 0)
    assert first.runs == {"trunk": "done", "sgd": "waiting"}


def test_a_machine_without_slurm_knows_the_runs_alone(
    slurm: FakeSlurm, quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.set("holds", "")
    sweep = quick_path / "sweep"
    submit(slurm, sweep, tasks_of_sweep(quick_path))
    StudyFolder(quick_path / "first").run(0, "trunk").create("seed = 0\n")
    monkeypatch.setenv("PATH", str(quick_path))
    found = status(sweep)
    assert [(element.queue, element.ended) for element in found] == [("", "")] * 4
    assert found[0].runs == {"trunk": "waiting"}
    with pytest.raises(InvalidInput, match="squeue: not on this machine's PATH"):
        cancel(sweep)


def test_cancel_takes_out_of_the_queue_what_is_in_it(slurm: FakeSlurm, quick_path: Path) -> None:
    slurm.set("holds", "")
    sweep = quick_path / "sweep"
    submit(slurm, sweep, tasks_of_sweep(quick_path, shared=True))
    slurm.set("queue", "18_1|PENDING|Dependency\n99_0|RUNNING|None\n")
    assert [element.number for element in cancel(sweep)] == ["18_1"]
    assert (slurm.folder / "cancelled").read_text() == "18"
    assert cancel(sweep) == []


def test_what_slurm_refuses_is_said_with_what_was_submitted_before(
    slurm: FakeSlurm, quick_path: Path
) -> None:
    slurm.set("refuses", "17")
    said = "sbatch: status 1: sbatch: error: invalid partition specified: none"
    sweep = quick_path / "sweep"
    with pytest.raises(InvalidInput, match=f"^{said}; submitted already: 17$"):
        submit(slurm, sweep, tasks_of_sweep(quick_path, shared=True))
    assert [element.number for element in status(sweep)] == ["17_0", "17_1"]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("submitted.json", "{}"),
        ("submitted.json", '{"arrays": [{"number": "-1", "first": 1, "count": 4}]}'),
        ("submitted.json", '{"arrays": [{"number": "17", "first": 2, "count": 4}]}'),
        ("jobs.txt", "study --seed\n"),
        ("jobs.txt", "it's --seed 0\n"),
    ],
)
def test_a_damaged_submission_is_named(
    slurm: FakeSlurm, quick_path: Path, file: str, content: str
) -> None:
    slurm.set("holds", "")
    sweep = quick_path / "sweep"
    submit(slurm, sweep, tasks_of_sweep(quick_path))
    (only_submission(sweep) / file).write_text(content)
    with pytest.raises(IntegrityError, match=r"slurm/.*: damaged"):
        status(sweep)


def test_without_slurm_it_says_where_to_start_it(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(quick_path))
    assignment = Assignment(StudyFolder(quick_path), [], 1, "cpu", 1)
    with pytest.raises(InvalidInput, match="no sbatch on this machine's PATH; start it on a login"):
        submit_to_slurm(assignment)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"array": "0-5"}, "array', allowed: one that Thalweg does not set itself"),
        ({"--output": "x"}, "output', allowed: one that Thalweg does not set itself"),
        ({"time": "1\n#SBATCH --uid=0"}, "allowed: a name such as time"),
        ({"Time Limit": "1"}, "allowed: a name such as time"),
        ({"python": "it's"}, "python of executor 'slurm': got \"it's\", allowed: what starts"),
        ({"restarts": "often"}, "restarts of executor 'slurm': got 'often', allowed: an integer"),
    ],
)
def test_options_that_cannot_be_are_refused(
    slurm: FakeSlurm, quick_path: Path, options: dict[str, object], said: str
) -> None:
    with pytest.raises(InvalidInput, match=said):
        submit(slurm, quick_path / "sweep", tasks_of_sweep(quick_path), options)
    assert slurm.submitted == []
