"""A study of two seeds that takes two seconds, commands on it, and whether it is what it would be.

Commands are forked from a clean server that has imported everything, or started as people start
them (`started`), where imports are part of what is tried.
"""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from multiprocessing.util import Finalize
from pathlib import Path
from random import Random
from typing import Any

import tomli_w
from benchmarks.faults.fault import MEMORY, PATIENCE, Attempt
from benchmarks.faults.operations import STUDY
from tests.lab.small_study import RAW, differing, left

from thalweg.cli import main
from thalweg.lab.execution.processes import PRELOADED
from thalweg.lab.store import StudyFolder, find_studies

ROOT = Path(__file__).parents[2]
COUNTER = str(Path(__file__).with_name("steps_taken.py"))
"""A plugin: imported by its path alone, since a second import would register its probe again."""
STEP_TAKEN = "step taken"
WORKERS = 2
BRANCHES = ("trunk", "sgd", "bulk-sgd")
CHECKPOINT_EVERY = 3
LR = 0.05
SPEC: dict[str, Any] = {
    **RAW,
    "name": "harmed",
    "seeds": [0, 1],
    "claims": ["gradient-aligns"],
    "figures": [],
    "phases": [{"optimizer": {"name": "sgd", "lr": LR}, "batch_size": 20, "steps": 14}],
    "branches": {"sgd": {"steps": 8}, "bulk-sgd": {"steps": 8, "split": {"dominant": 0.0}}},
    "probes": {"loss": 1, "alignment_gradient": 2, "sharpness": 3, "steps_taken": 1},
    "checkpoint": {"every_steps": CHECKPOINT_EVERY, "every_seconds": 0.0},
}


def server() -> Any:
    """What processes are forked from: it has imported all that a study needs."""
    chosen = multiprocessing.get_context("forkserver")
    more = ["thalweg.cli.studying", "thalweg.lab.study", "thalweg.analysis.conclusion"]
    more += ["thalweg.analysis.report", "thalweg.analysis.figures"]
    more += ["benchmarks.faults.healthy", "benchmarks.faults.readers", "benchmarks.faults.watching"]
    more += ["benchmarks.faults.stops", "benchmarks.faults.page"]
    chosen.set_forkserver_preload([*PRELOADED, *more])
    return chosen


def _thalweg(words: Sequence[str], output: str, address: str) -> None:
    """The command, in a process of its own, all that it says in one file.

    Its own processes are forked from the same server, which saves the four seconds of the imports.
    """
    module: Any = forkserver
    module._forkserver._forkserver_address = address
    module._forkserver.ensure_running = module.ensure_running = lambda: None
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    main(words)


@dataclass
class Command:
    """A command at work.

    Attributes:
        process: a `multiprocessing.Process` or a `subprocess.Popen`.
        output: the file that takes all that it says.
    """

    process: Any
    output: Path

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it is at work; minus the number of the signal that ended it."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    @property
    def said(self) -> str:
        """All that it has said so far."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def send(self, number: int) -> None:
        """Send a signal, if it is still there."""
        if self.exit_code is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Wait for its end; return the exit status.

        Raises:
            TimeoutError: it did not end; it is killed.
        """
        deadline = time.monotonic() + seconds
        while self.exit_code is None:
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"a command did not end in {seconds:g} s; it said: {self.said}")
            time.sleep(0.01)
        assert self.exit_code is not None
        return self.exit_code


def forked(words: Sequence[str | Path], output: Path) -> Command:
    """Begin `thalweg WORDS`."""
    chosen = server()
    forkserver.ensure_running()
    address = vars(forkserver)["_forkserver"]._forkserver_address
    arguments = ([str(word) for word in words], str(output), address)
    process = chosen.Process(target=_thalweg, args=arguments, name=STUDY)
    process.start()
    return Command(process, output)


def started(words: Sequence[str | Path], output: Path) -> Command:
    """Begin `python -m thalweg WORDS`, leader of a process group, as a terminal does."""
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    with output.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "thalweg", *map(str, words)],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
    return Command(process, output)


def here(*words: str | Path) -> tuple[int, str, str]:
    """The exit status, standard output and standard error of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            return int(ended.code or 0), out.getvalue(), err.getvalue()
    raise AssertionError("the command did not end with an exit status")


@dataclass(frozen=True)
class Harmed:
    """The study of one attempt, in the attempt's folder.

    Attributes:
        attempt: whose.
        lr: learning rate of the trunk.
    """

    attempt: Attempt
    lr: float = LR

    @property
    def root(self) -> Path:
        """Folder of the study's folder."""
        return self.attempt.folder / "runs"

    @property
    def path(self) -> Path | None:
        """The study's folder; None before it has a spec."""
        found = find_studies(self.root)
        return found[0].path if found else None

    def words(self, *plugins: Path | str) -> list[str | Path]:
        """The command that begins it."""
        spec = self.attempt.folder / "spec.toml"
        raw = copy.deepcopy(SPEC)
        raw["phases"][0]["optimizer"]["lr"] = self.lr
        spec.write_text(tomli_w.dumps(raw))
        return ["run", spec, "--root", self.root, *_means(plugins)]

    def begin(
        self, *plugins: Path | str, start: Callable[[Sequence[str | Path], Path], Command] = forked
    ) -> Command:
        """Begin it."""
        return start(self.words(*plugins), self.attempt.folder / "said.txt")

    def go_on(self) -> str:
        """Take it to its end as a user would: resume, or the same command where nothing is there.

        Runs whose study was killed save a checkpoint first: until then they are in use.

        Raises:
            AssertionError: it does not come to its end.
        """
        output, said = self.attempt.folder / "resumed.txt", ""
        for _ in range(60):
            path = self.path
            words = ["resume", path, *_means(())] if path else self.words()
            output.unlink(missing_ok=True)
            command = forked(words, output)
            code, said = command.wait(), command.said
            if code == 0:
                return said
            assert code in (1, 2), f"resume: exit {code}: {said}"
            assert "in use by" in said, f"resume: exit {code}: {said}"
            time.sleep(0.5)
        raise AssertionError(f"runs stay in use: {said}")

    def settle(self) -> None:
        """Wait until no run is at work any more."""
        deadline = time.monotonic() + PATIENCE
        while self.path and "running now" in here("check", self.path, "--plugin", COUNTER)[2]:
            assert time.monotonic() < deadline, "a run whose study is gone goes on"
            time.sleep(0.1)

    def check_no_false_alarm(self) -> None:
        """What a fault leaves behind is unfinished, not damaged."""
        if self.path is None:
            return
        code, out, err = here("check", self.path, "--plugin", COUNTER)
        assert code == 0, f"check after the fault: exit {code}: {out} {err}"

    def recovered(self) -> float:
        """Go on, and compare all with an undisturbed study; return how many steps were made twice.

        Raises:
            AssertionError: something differs.
        """
        self.settle()
        self.check_no_false_alarm()
        self.go_on()
        assert self.path is not None
        return compare_with_undisturbed(self.path)


def compare_with_undisturbed(path: Path) -> float:
    """Compare a finished study with an undisturbed one; return how many steps were made twice.

    Raises:
        AssertionError: something differs, or `thalweg check` finds something.
    """
    undisturbed = reference()
    study = StudyFolder(path)
    for seed in (0, 1):
        for branch in BRANCHES:
            found = differing(left(study, branch, seed=seed), undisturbed.left[seed, branch])
            assert not found, f"seed {seed} {branch} differs in {found}"
    code, out, err = here("check", path, "--plugin", COUNTER)
    assert code == 0, f"check: {out} {err}"
    return steps_of(path) - undisturbed.steps


@dataclass(frozen=True)
class Reference:
    """What an undisturbed study leaves.

    Attributes:
        path: its folder.
        left: of each run, by seed and branch, to the last bit.
        steps: how many were measured.
        seconds: of the whole command.
    """

    path: Path
    left: dict[tuple[int, str], dict[str, str]]
    steps: int
    seconds: float


@cache
def reference(lr: float = LR) -> Reference:
    """The undisturbed study, made once in each process."""
    place = MEMORY if MEMORY.is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="thalweg-reference-", dir=place))
    # Unlike `atexit`, also at the end of a process of a pool.
    Finalize(None, shutil.rmtree, (folder, True), exitpriority=0)
    made = Harmed(Attempt(0, Random(0), folder), lr)
    ready = server().Process(target=int)
    ready.start()
    ready.join()  # from here on, no import is part of a command's time
    begun = time.monotonic()
    command = made.begin()
    assert command.wait() == 0, command.said
    seconds = time.monotonic() - begun
    assert made.path is not None
    study = StudyFolder(made.path)
    lefts = {(s, branch): left(study, branch, seed=s) for s in (0, 1) for branch in BRANCHES}
    return Reference(made.path, lefts, steps_of(made.path), seconds)


def steps_of(path: Path) -> int:
    """How many steps the runs of a study have said that they took, all sittings together."""
    logs = path.glob("seed-*/*/log.txt")
    return sum(log.read_text(errors="replace").count(STEP_TAKEN) for log in logs)


def _means(plugins: Sequence[Path | str]) -> list[str | Path]:
    words: list[str | Path] = ["--workers", str(WORKERS)]
    for plugin in (COUNTER, *plugins):
        words += ["--plugin", plugin]
    return words


def wait_until(condition: Callable[[], bool], command: Command) -> bool:
    """Wait for something while a command is at work; False where it has ended before."""
    deadline = time.monotonic() + PATIENCE
    while command.exit_code is None:
        if condition():
            return True
        assert time.monotonic() < deadline, f"waited for too long: {command.said}"
        time.sleep(0.002)
    return condition()


def is_polite(command: Command) -> str:
    """What a command has said, without a traceback.

    Raises:
        AssertionError: there is one.
    """
    said = command.said
    assert "Traceback" not in said, said
    return said
