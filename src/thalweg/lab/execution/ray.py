"""The "ray" executor: the jobs of a study or sweep as tasks of Ray, on one machine or many.

    pip install "thalweg[lab,ray]"

It uses the Ray cluster that there is (`ray start`, or the variable RAY_ADDRESS), or else starts one
on this machine. Each task does its job in a child process, so that a crash or a leak stays there.
Where a node is lost its jobs begin again on others, from the last checkpoints of their runs. All
nodes must see the same folders at the same paths.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from thalweg.errors import (
    Interrupted,
    InvalidInput,
    ThalwegError,
    invalid,
    require_extra,
    unknown_name,
)
from thalweg.interruption import on_stop_signals
from thalweg.lab.execution.jobs import Job, jobs_of
from thalweg.lab.execution.processes import Ending
from thalweg.lab.execution.schedule import Assignment, Outcome, Task, refuse_objects, takes_options
from thalweg.lab.execution.worker_command import run_worker, worker_arguments
from thalweg.lab.store import RunFolder
from thalweg.registry import executors

LOG = "ray.log"
"""Name of the file, in the folder of a study or sweep, that takes what Ray prints."""
WAIT_SECONDS = 0.5
LOOK_SECONDS = 5.0
"""Between two looks at which nodes there are."""
EXIT_CODES = {"done": 0, "failed": 1, "diverged": 3}


@executors.register("ray")
@takes_options(lambda options: Settings.of(options, "cpu"))
def run_on_ray(assignment: Assignment) -> Outcome:
    """Run the jobs as tasks of Ray, at most `workers` at a time; a wave after the one before it.

    Ctrl-C and SIGTERM are passed on: each run saves a checkpoint and ends with status 75. Asked a
    second time, they end at once. A job whose node is lost is begun again on another; one whose
    worker was killed is so as often as `retries` says. Options are those of `Settings`.

    Raises:
        MissingExtra: Ray is not installed.
        InvalidInput: no cluster at the given address, an option is not allowed, or the spec holds
            Python objects.
    """
    require_extra("ray", "ray")
    refuse_objects(assignment, "ray")
    settings = Settings.of(assignment.options, assignment.device)
    crew = _Crew(assignment, settings)
    with (
        on_stop_signals(crew.ask_to_stop),
        _connected(settings, assignment.study.path),
        on_stop_signals(crew.ask_to_stop),  # Ray hears SIGTERM itself from where it is connected
    ):
        crew.work()
    return crew.outcome


@dataclass(frozen=True)
class Settings:
    """How jobs use a cluster.

    Attributes:
        address: of the cluster; empty for the one that there is, or else one on this machine.
        gpus: how much of a GPU a job takes, such as 0.25; default: 1 where runs compute on GPUs.
        restarts: how often a job is begun again whose node was lost.
    """

    address: str = ""
    gpus: float = 0.0
    restarts: int = 20

    @classmethod
    def of(cls, options: Mapping[str, object], device: str) -> Settings:
        """Those that a user's options ask for.

        Raises:
            InvalidInput: an option that there is not, or a value that is none.
        """
        given = {name: str(value) for name, value in options.items()}
        for name in given:
            if name not in cls.__dataclass_fields__:
                known = cls.__dataclass_fields__
                raise unknown_name("option of executor 'ray'", name, known)
        gpus = given.get("gpus", "1" if device.startswith("cuda") else "0")
        restarts = given.get("restarts", str(cls.restarts))
        if not re.fullmatch(r"\d{1,9}", restarts):
            raise invalid("option restarts of executor 'ray'", restarts, "an integer >= 0")
        try:
            share = float(gpus)
        except ValueError:
            share = inf
        if not (0 <= share <= 1 or (share.is_integer() and share < inf)):
            raise invalid("option gpus of executor 'ray'", gpus, "0 to 1, or a whole number")
        return cls(given.get("address", ""), share, int(restarts))


@contextmanager
def _connected(settings: Settings, folder: Path) -> Iterator[None]:
    """Connected to a cluster; what Ray prints goes to a file, since results alone are printed.

    A connection that is there already is used, and left.
    """
    ray = _ray()

    # Ray tells its makers of each cluster that it starts, unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with (folder / LOG).open("a", encoding="utf-8") as log, redirect_stdout(log):
        is_ours = not ray.is_initialized()
        if is_ours:
            try:
                ray.init(
                    address=settings.address or None,
                    include_dashboard=None if settings.address else False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                )
            except (ConnectionError, ValueError, RuntimeError) as error:
                said = " ".join(str(error).split())
                raise InvalidInput(f"executor 'ray': no cluster: {said}") from error
        try:
            yield
        finally:
            if is_ours:
                ray.shutdown()


class _Crew:
    """The jobs of an assignment: begun, asked to stop, begun again, noted when they have ended."""

    def __init__(self, assignment: Assignment, settings: Settings) -> None:
        self.assignment = assignment
        self.settings = settings
        self.outcome = Outcome()
        self._waiting = sorted(jobs_of(assignment), key=lambda job: job.wave)
        self._tasks: dict[tuple[Path, int], list[Task]] = {}
        for task in assignment.tasks:
            place = (assignment.study_of(task).path, task.seed)
            self._tasks.setdefault(place, []).append(task)
        self._running: dict[Any, Job] = {}
        self._asked = self._passed_on = 0
        self._retried: Counter[Job] = Counter()
        self._nodes: set[str] = set()
        self._looked = -inf

    def ask_to_stop(self) -> None:
        """Heard from a signal, at any instant: the next look passes it on."""
        self._asked += 1

    def work(self) -> None:
        """Have all jobs done."""
        ray = _ray()

        self._say_what_cannot_be()
        self._begin()
        while self._running:
            self._pass_requests_on()
            self._notice_lost_nodes()
            self.assignment.watch(self._tasks_at_work())
            ended, _ = ray.wait(list(self._running), timeout=WAIT_SECONDS)
            for task in ended:
                self._note(self._running.pop(task), task)
            self._begin()
        for job in self._waiting:
            self.outcome.left_out += self._tasks_of(job)

    def _begin(self) -> None:
        """Begin what may be, as far as there are workers."""
        ray = _ray()

        waves = [job.wave for job in self._running.values()]
        while self._waiting and len(self._running) < self.assignment.workers and not self._asked:
            job = self._waiting[0]
            if waves and job.wave > min(waves):
                return
            waves.append(job.wave)
            self._waiting.pop(0)
            call = ray.remote(run_worker).options(
                name=_name(job),
                num_cpus=self.assignment.threads,
                num_gpus=self.settings.gpus,
                max_retries=self.settings.restarts,
            )
            words = worker_arguments(job, self.assignment)
            task = call.remote(words, self.assignment.threads, str(Path.cwd()))
            self._running[task] = job

    def _pass_requests_on(self) -> None:
        ray = _ray()

        while self._passed_on < self._asked:
            for task in self._running:
                # It raises KeyboardInterrupt in the task; by force, it ends its process.
                ray.cancel(task, force=self._passed_on > 0)
            self._passed_on += 1
            self.outcome.interrupted = True

    def _note(self, job: Job, task: Any) -> None:
        """Note how a job has ended, or let it wait to be begun again."""
        exit_code, said = _result(task)
        if exit_code < 0:
            if not self._asked and self._retried[job] < self.assignment.retries:
                self._retried[job] += 1
                count = f"{self._retried[job]} of {self.assignment.retries}"
                self.assignment.say(f"{_name(job)}: its worker was killed; begun again ({count})")
                self._waiting.insert(0, job)
                return
            exit_code = 75
        is_asked_for = exit_code == 75 and self._asked > 0
        tasks = self._tasks_of(job)
        folders = {one: self.assignment.folder_of(one) for one in tasks}
        found = {one: _ending(folder, self._asked > 0) for one, folder in folders.items()}
        endings = {one: ending for one, ending in found.items() if ending is not None}
        if exit_code and not is_asked_for and not any(e.exit_code for e in endings.values()):
            # Something was wrong before a run could say so.
            blamed = next((one for one in tasks if one not in endings), tasks[-1])
            endings[blamed] = Ending(exit_code, said or f"its worker ended with {exit_code}")
        self.outcome.endings |= endings
        self.outcome.left_out += [one for one in tasks if one not in endings]

    def _notice_lost_nodes(self) -> None:
        ray = _ray()

        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        there = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for _ in self._nodes - set(there):
            left = f"{len(there)} left" if there else "none left"
            self.assignment.say(
                f"a node of the Ray cluster is lost, {left}: its jobs begin again elsewhere"
            )
        self._nodes = set(there)

    def _say_what_cannot_be(self) -> None:
        """Say if no node can take a job now; one that can may join later."""
        ray = _ray()

        wanted = {"CPU": float(self.assignment.threads), "GPU": self.settings.gpus}
        for node in ray.nodes():
            has = node["Resources"] if node["Alive"] else {}
            if all(has.get(name, 0.0) >= number for name, number in wanted.items()):
                return
        words = " and ".join(f"{number:g} {name}" for name, number in wanted.items() if number)
        self.assignment.say(f"no node of the Ray cluster has {words} for a job; waiting for one")

    def _tasks_of(self, job: Job) -> list[Task]:
        return self._tasks[job.study, job.seed]

    def _tasks_at_work(self) -> list[Task]:
        tasks = [task for job in self._running.values() for task in self._tasks_of(job)]
        return [task for task in tasks if self.assignment.folder_of(task).state() == "running"]


def _ray() -> Any:
    """The package, which is an extra."""
    return importlib.import_module("ray")


def _name(job: Job) -> str:
    return f"{job.study.name} seed {job.seed}"


def _result(task: Any) -> tuple[int, str]:
    """Exit status of a job's worker, and the last line that it printed."""
    ray = _ray()
    try:
        exit_code, said = ray.get(task)
    # No worker could be started, such as without Thalweg there.
    except ray.exceptions.RayTaskError as error:
        return 1, str(error).strip().rpartition("\n")[2]
    # Cancelled before it began, or its nodes were lost too often.
    except ray.exceptions.RayError as error:
        return 75, str(error).strip().partition("\n")[0]
    return exit_code, said.rpartition("\n")[2]


def _ending(folder: RunFolder, is_asked_for: bool) -> Ending | None:
    """How a run has ended, by its folder; None where it was not begun.

    Args:
        is_asked_for: whether the interruption of a run was.
    """
    try:
        status = folder.status()
    except (ThalwegError, OSError) as error:
        return Ending.by_error(error)
    if status is None or status.state == "waiting":
        return None
    if status.state in ("interrupted", "running"):
        killed = not is_asked_for
        return Ending(75, status.message, kind=Interrupted.__name__, killed=killed)
    return Ending(EXIT_CODES[status.state], status.message)
