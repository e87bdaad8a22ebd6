"""The processes that a launcher has started (`torchrun`): together they make each run of a study.

Each has a part of the samples in every sum over them. The first one does what a study's process
does (plans, writes, judges), and tells the others which run is next; they make the same steps and
write nothing. Runs follow one another. Whichever process ends before its time ends all: the others
notice within seconds, and the same command goes on from the last checkpoint.

A launcher says what it has started by the environment of each process, as described in the
documentation of `torchrun`.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.errors import Diverged, Interrupted, InvalidInput, ProcessLost, invalid
from thalweg.interruption import on_stop_signals
from thalweg.lab.execution.inline import one_after_another
from thalweg.lab.execution.processes import Ending
from thalweg.lab.execution.schedule import Assignment, Outcome, Task
from thalweg.lab.execution.worker import execute_run
from thalweg.lab.store import StudyFolder

if TYPE_CHECKING:
    from thalweg.lab.config import Spec
    from thalweg.loss.reduce import Reduction

SAID = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of the environment by which a launcher tells a process its place."""
TIMEOUT = timedelta(hours=1)
"""For a process that is there and does not answer, as while the first builds the problem. One that
has ended is noticed at once."""


class LaunchedProcesses:
    """This process among those of its launcher; the executor of their first one.

    Args:
        rank, size: the number of this process, and of all.
    """

    reduction: Reduction

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        # Whether the others wait to be told what is next.
        self._at_rest = False

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which tells the others what is next."""
        return self.rank == 0

    def join(self, device: str) -> None:
        """Wait for the others; on GPUs each process takes one of its own.

        Args:
            device: where runs compute.
        """
        import torch
        import torch.distributed as dist

        from thalweg.loss.reduce import AcrossProcesses

        on_gpus = device.startswith("cuda")
        if on_gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if on_gpus else "gloo"
            dist.init_process_group(backend, timeout=TIMEOUT)
        assert dist.group.WORLD is not None
        self.reduction = AcrossProcesses(dist.group.WORLD)
        self._at_rest = True

    def __call__(self, assignment: Assignment) -> Outcome:
        """Run the tasks one after another, in all processes."""

        def begin(task: Task) -> None:
            self._tell(
                study=str(assignment.study_of(task).path.absolute()),
                seed=task.seed,
                branch=task.branch,
                device=assignment.device,
                threads=assignment.threads,
            )
            self._at_rest = False

        def goes_on(ending: Ending) -> bool:
            nonlocal stopped
            # These all processes raise together; whatever else has happened has happened in one.
            self._at_rest = ending.exit_code == 0 or ending.kind in ("Diverged", "Interrupted")
            stopped = ending.kind == "Interrupted"
            return self._at_rest and not stopped

        stopped = False
        outcome = one_after_another(assignment, begin, goes_on)
        outcome.interrupted = outcome.interrupted or stopped
        for task, ending in outcome.endings.items():
            if ending.kind == ProcessLost.__name__:
                outcome.interrupted = True
                assignment.say(f"{task}: killed: {ending.message}")
        # What is left, such as figures, the first process does alone.
        self.dismiss(outcome.exit_code)
        return outcome

    def dismiss(self, exit_code: int) -> None:
        """Let the others end, with this exit status, if they wait for a run."""
        if self._at_rest:
            self._at_rest = False
            self._tell(exit_code=exit_code)

    def follow(self, plugins: tuple[str, ...]) -> tuple[StudyFolder, Outcome]:
        """Make every run that the first process tells of, until it says that all is done.

        Args:
            plugins: as the first process has them.

        Raises:
            ProcessLost: another process has ended before its time.
            ThalwegError: what goes wrong in this process alone.
        """
        asked, outcome, study = 0, Outcome(), StudyFolder(Path())

        def stop() -> None:
            nonlocal asked
            asked += 1
            if asked > 1:
                raise KeyboardInterrupt

        while True:
            told: dict[str, Any] = json.loads(self.reduction.gathered("")[0])
            if "exit_code" in told:
                if told["exit_code"]:
                    outcome.endings[Task(0, "")] = Ending(told["exit_code"])
                return study, outcome
            study = StudyFolder(Path(told.pop("study")))
            try:
                with on_stop_signals(stop):
                    execute_run(study, **told, plugins=plugins, should_stop=lambda: asked > 0)
            except ProcessLost:
                raise
            except (Diverged, Interrupted):
                continue  # as in the first process, which knows what comes next

    def _tell(self, **what: Any) -> None:
        self.reduction.gathered(json.dumps(what))


def launched() -> LaunchedProcesses | None:
    """The processes of which this is one; None where it was started alone."""
    if not all(name in os.environ for name in SAID):
        return None
    rank, size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    return LaunchedProcesses(rank, size) if size > 1 else None


def shared_by_launched(spec: Spec) -> Spec:
    """The spec with the number of the launcher's processes, where it names none itself."""
    group = launched()
    if group is None or spec.processes != 1:
        return spec
    return spec.model_copy(update={"processes": group.size})


def refuse_other_number(spec: Spec, group: LaunchedProcesses | None) -> None:
    """Refuse to go on with a study in other processes than it was begun with.

    Raises:
        InvalidInput: the spec is of another number; it holds Python objects.
    """
    size = 1 if group is None else group.size
    if spec.processes != size:
        start = f"torchrun --nproc-per-node {spec.processes} -m thalweg ..."
        hint = "start it without torchrun" if spec.processes == 1 else f"start it by {start}"
        raise invalid("processes", size, f"the {spec.processes} of the spec", hint)
    if group is not None and spec.holds_objects:
        raise InvalidInput(
            "several processes: the spec holds Python objects; write it as TOML, and register them"
            " in a --plugin file"
        )


def refuse_sharing(spec: Spec, command: str) -> None:
    """Refuse processes that share a run where each run has one of its own.

    Args:
        command: "sweep" or "work".

    Raises:
        InvalidInput: a launcher has started several processes; the spec is of several.
    """
    hint = "torchrun -m thalweg run and resume share the runs of one study"
    if (group := launched()) is not None:
        raise invalid(command, f"{group.size} processes of a launcher", "one process", hint)
    if spec.processes != 1:
        own = "1, as each run has a process of its own"
        raise invalid(f"{command}: processes", spec.processes, own, hint)
