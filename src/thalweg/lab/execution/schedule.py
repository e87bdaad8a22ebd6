"""Which runs does a study have, in which order are they run, and by which executor?

An `Executor` is anything that can be called with an `Assignment`: it runs the tasks, each after the
run that it starts from, and returns how each ended. Those that have a name are registered:

    @register.executor("my-cluster")
    def on_my_cluster(assignment: Assignment) -> Outcome: ...
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from thalweg import registry
from thalweg.errors import InvalidInput, invalid
from thalweg.lab.config import TRUNK, PhaseSpec, Spec
from thalweg.lab.execution.processes import Ending
from thalweg.lab.execution.signs_of_life import HUNG_AFTER
from thalweg.lab.store import RunFolder, StudyFolder

Argument = TypeVar("Argument")
Run = TypeVar("Run", bound=Callable[..., object])
CheckOptions = Callable[[Mapping[str, object]], object]
"""Raises `InvalidInput` for options that an executor does not take."""

STEPS_OF_A_SOLVE = 20
"""Solving for S_k takes about as many products as following it for so many steps."""


@dataclass(frozen=True)
class Task:
    """One run to be done: a seed of a branch, or of the trunk.

    Attributes:
        after: the run at whose end a branch starts: the trunk, or another branch.
        study: the folder of its study, among tasks of several; None: that of the assignment.
        same_as: a task of another study that makes the same run, to be copied once it is done.
    """

    seed: int
    branch: str
    after: str = field(default=TRUNK, compare=False)
    study: Path | None = None
    same_as: Task | None = field(default=None, compare=False)

    @property
    def needs(self) -> Task | None:
        """The run that must be done before this one."""
        return None if self.branch == TRUNK else Task(self.seed, self.after, study=self.study)

    def phases(self, spec: Spec) -> tuple[PhaseSpec, ...]:
        """What the run goes through."""
        return spec.phases if self.branch == TRUNK else (spec.branch_phase(self.branch),)

    def most_steps(self, spec: Spec, num_samples: int) -> int:
        """The bound on the steps that the run makes itself, over `num_samples` samples."""
        return sum(phase.most_steps(num_samples) for phase in self.phases(spec))

    def __str__(self) -> str:
        study = "" if self.study is None else f"{self.study.name} "
        return f"{study}seed {self.seed} {self.branch}"


@dataclass
class Outcome:
    """What became of the tasks.

    Attributes:
        endings: how each ended that was begun, or found done.
        left_out: those never begun: for want of their start, or after an interruption.
        interrupted: whether somebody asked to stop.
        submitted: what an executor has left to a queue, in words; it does not wait for them.
    """

    endings: dict[Task, Ending] = field(default_factory=dict)
    left_out: list[Task] = field(default_factory=list)
    interrupted: bool = False
    submitted: str = ""

    @property
    def exit_code(self) -> int:
        """0: all done; 75: interrupted, or a run was killed; else the first failure's."""
        codes = [ending.exit_code for ending in self.endings.values() if ending.exit_code]
        if 75 in codes or (self.interrupted and (self.left_out or codes)):
            return 75
        return codes[0] if codes else 0

    @property
    def can_continue(self) -> bool:
        """Whether something is left to do that does not diverge again by the same steps."""
        again = {task for task, ending in self.endings.items() if ending.exit_code == 3}
        waiting = [t for t in self.left_out if not self._waits_for(t, again)]
        return bool(waiting) or any(e.exit_code not in (0, 3) for e in self.endings.values())

    def _waits_for(self, task: Task, ended: set[Task]) -> bool:
        needed = task.needs
        if needed is None or needed in ended:
            return needed is not None
        return any(self._waits_for(t, ended) for t in self.left_out if t == needed)


def tasks_of(spec: Spec, seeds: Sequence[int] | None = None) -> list[Task]:
    """All runs of a study, or of some seeds: the trunks first, since the branches wait for them."""
    seeds = spec.seeds if seeds is None else seeds
    trunks = [Task(seed, TRUNK) for seed in seeds]
    return trunks + [
        Task(seed, name, branch.starts_from or TRUNK)
        for seed in seeds
        for name, branch in spec.branches.items()
    ]


def longest_first(spec: Spec, tasks: Sequence[Task], num_samples: int) -> list[Task]:
    """The tasks by the steps to the end of all that waits for them: cores stay busy to the end.

    Steps are those that follow a subspace; one that solves for it counts as many.
    """
    path: dict[Task, float] = {}
    following = {task: [t for t in tasks if t.needs == task] for task in tasks}

    def steps(task: Task) -> float:
        if task not in path:
            subspace = spec.of_branch(task.branch).subspace
            solves = subspace.source in ("exact", "next")
            weight = 1 + STEPS_OF_A_SOLVE / subspace.every if solves else 1
            after = max(map(steps, following[task]), default=0.0)
            path[task] = weight * task.most_steps(spec, num_samples) + after
        return path[task]

    return sorted(tasks, key=lambda task: -steps(task))


def makespan(durations: Mapping[Task, float], workers: int) -> float:
    """When the last task is done, each begun in order as soon as a worker and its start are."""
    free = [0.0] * max(1, workers)
    done: dict[Task, float] = {}
    for task in sorted(durations, key=lambda task: task.branch != TRUNK):
        ready = done.get(task.needs, 0.0) if task.needs else 0.0
        done[task] = max(heapq.heappop(free), ready) + durations[task]
        heapq.heappush(free, done[task])
    return max(done.values(), default=0.0)


@dataclass(frozen=True)
class Assignment:
    """The runs of a study, or of many, that an executor is to do, and what it may use for them.

    Attributes:
        study: the folder of the study, or of the sweep where each task names its study.
        tasks: in the order in which they should begin, each with a run folder that has its
            `run.toml`. A task begins once the run that it `needs` is done, if that one is among
            the tasks; and once the one that it is `same_as` has ended.
        workers: the most runs at a time.
        device: where each run computes, such as "cpu" or "cuda:1".
        threads: of each run.
        plugins: modules or files to load before a run.
        spec: the study's spec where it holds Python objects, which no other process can read; None
            where the study's `spec.toml` says all.
        watch: to be called a few times a second with the running tasks, to show progress.
        say: takes a line on what happens on the way, such as a run that is begun again.
        retries: how often a run is begun again, from its last checkpoint, whose process was killed.
        hung_after: minutes without a sign of life after which a run's process is ended; 0: never.
        options: what a user asks of the executor, by name, such as `{"partition": "gpu"}`.
    """

    study: StudyFolder
    tasks: Sequence[Task]
    workers: int
    device: str
    threads: int
    plugins: Sequence[str] = ()
    spec: Spec | None = None
    watch: Callable[[Sequence[Task]], None] = lambda running: None
    say: Callable[[str], None] = lambda line: None
    retries: int = 0
    hung_after: float = HUNG_AFTER
    options: Mapping[str, object] = field(default_factory=dict)

    def study_of(self, task: Task) -> StudyFolder:
        """The folder of a task's study."""
        return self.study if task.study is None else StudyFolder(task.study)

    def folder_of(self, task: Task) -> RunFolder:
        """The folder of a task's run."""
        return self.study_of(task).run(task.seed, task.branch)


class Executor(Protocol):
    """What runs the tasks of a study: processes of this machine, or a cluster's queue."""

    def __call__(self, assignment: Assignment, /) -> Outcome:
        """Run the tasks, and return how each ended.

        An interruption is passed on to the runs, which save a checkpoint and end with status 75.
        """
        ...


def run_tasks(
    study: StudyFolder,
    tasks: Sequence[Task],
    *,
    workers: int,
    device: str,
    threads: int,
    plugins: Sequence[str] = (),
    spec: Spec | None = None,
    watch: Callable[[Sequence[Task]], None] = lambda running: None,
    executor: str | Executor = "local",
    say: Callable[[str], None] = lambda line: None,
    retries: int = 0,
    hung_after: float = HUNG_AFTER,
    options: Mapping[str, object] | None = None,
) -> Outcome:
    """Have the tasks run by an executor; see `Assignment` for the other arguments.

    Args:
        executor: its name, "local" for processes of this machine, or an executor itself.

    Raises:
        InvalidInput: no executor has that name; it has no such option.
    """
    check_options(executor, options or {})
    run = registry.executors.find(executor) if isinstance(executor, str) else executor
    means = (workers, device, threads, plugins, spec)
    callbacks = (_harmless(watch), _harmless(say))
    return run(
        Assignment(study, tasks, *means, *callbacks, retries, hung_after, options or {}),
    )


def refuse_objects(assignment: Assignment, executor: str) -> None:
    """Refuse a spec that other processes cannot read.

    Raises:
        InvalidInput: the spec holds Python objects.
    """
    if assignment.spec is not None:
        raise InvalidInput(
            f"executor {executor!r}: the spec holds Python objects, which another process cannot"
            " read; take executor 'inline', or register them in a --plugin file"
        )


def takes_options(check: CheckOptions) -> Callable[[Run], Run]:
    """Decorator of an executor whose options can be checked before anything is planned.

    Args:
        check: raises `InvalidInput` for options that the executor does not take.
    """

    def checked(run: Run) -> Run:
        run.check_options = check  # type: ignore[attr-defined]
        return run

    return checked


def no_options(executor: str) -> CheckOptions:
    """The check of an executor that takes none."""

    def refuse(options: Mapping[str, object]) -> None:
        if options:
            raise invalid(f"options of executor {executor!r}", ", ".join(options), "none")

    return refuse


def check_options(executor: str | Executor, options: Mapping[str, object]) -> None:
    """Refuse options that an executor does not take, where it says which it does.

    Raises:
        InvalidInput: one of them; no executor has that name.
    """
    run = registry.executors.find(executor) if isinstance(executor, str) else executor
    check: CheckOptions | None = getattr(run, "check_options", None)
    if check is not None:
        check(options)


def _harmless(callback: Callable[[Argument], None]) -> Callable[[Argument], None]:
    """The same without errors: what cannot be shown, as on a closed terminal, ends no run."""

    def without_errors(argument: Argument) -> None:
        with suppress(Exception):
            callback(argument)

    return without_errors


def next_ready(waiting: list[Task], outcome: Outcome, asked: Collection[Task]) -> Task | None:
    """Take the next task that can begin off the waiting ones.

    Its start is done, in this call or before it, and a run that is the same has ended.

    Args:
        asked: all tasks of this call, as a set where there are many.
    """
    for number, task in enumerate(waiting):
        if _is_done(task.needs, outcome, asked) and _has_ended(task.same_as, outcome, asked):
            return waiting.pop(number)
    return None


def _is_done(task: Task | None, outcome: Outcome, asked: Collection[Task]) -> bool:
    if task in outcome.endings:
        return outcome.endings[task].exit_code == 0
    return task is None or task not in asked


def _has_ended(task: Task | None, outcome: Outcome, asked: Collection[Task]) -> bool:
    return task is None or task in outcome.endings or task not in asked
