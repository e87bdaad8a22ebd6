"""Say how a study goes: a live table on a terminal, plain lines elsewhere, nothing if asked.

Everything for people goes to standard error; results go to standard output.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from thalweg.errors import without_controls
from thalweg.lab.config import TRUNK
from thalweg.lab.execution.schedule import Outcome, Task, makespan

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from thalweg.lab.config import Spec
    from thalweg.lab.problem_facts import ProblemFacts
    from thalweg.lab.store import StudyFolder
    from thalweg.lab.store.status import Status

REFRESH_SECONDS = 0.5
RATE_SECONDS, RATE_STEPS = 2.0, 20
"""A run's own rate counts once it has lasted so long: its first solve is no step."""
ENDED = ("done", "diverged", "failed")
VERBS = {3: "diverged", 75: "stopped"}


class Progress:
    """Shows the runs of a study while they continue.

    Args:
        console: where to; None says nothing.
        failures: where runs that did not end well are named even if `console` is None.
        command: what goes on with all of it; default: `thalweg resume` of the study.
    """

    def __init__(
        self,
        console: Console | None,
        failures: Console | None = None,
        command: str | None = None,
    ) -> None:
        self.console = console
        self._given_command = command
        self.failures = failures or console
        self._live: Live | None = None
        self._tasks: list[Task] = []
        self._shown = 0.0
        self._begun = time.monotonic()
        self._finished: set[Task] = set()

    @classmethod
    def silent(cls) -> Progress:
        """Say nothing."""
        return cls(None)

    @classmethod
    def to_stderr(cls, *, quiet: bool = False, command: str | None = None) -> Progress:
        """Say it on standard error; `NO_COLOR` is honoured. If quiet, only what went wrong."""
        from rich.console import Console

        console = Console(file=sys.stderr)
        return cls(None if quiet else console, console, command)

    def say(self, message: str) -> None:
        """One line."""
        _line(self.console, message)

    def warn(self, message: str) -> None:
        """One line on what went wrong, also if quiet."""
        _line(self.failures, message)

    def begin(
        self,
        study: StudyFolder,
        spec: Spec,
        tasks: Sequence[Task],
        facts: ProblemFacts,
        workers: int,
        plugins: Sequence[str] = (),
        space: str = "",
    ) -> None:
        """Say what will be done, and how much disk it takes."""
        words = [word for plugin in plugins for word in ("--plugin", plugin)]
        command = ["thalweg"]
        if spec.processes > 1:
            command = ["torchrun", "--nproc-per-node", str(spec.processes), "-m", "thalweg"]
        resume = shlex.join([*command, "resume", str(study.path), *words])
        self._command = self._given_command or resume
        self._study, self._spec, self._tasks, self._workers = study, spec, list(tasks), workers
        self._num_samples = facts.num_samples
        self._begun = time.monotonic()
        for note in facts.notes:
            self.say(note)
        self.say(
            f"P = {facts.num_parameters:,} parameters, N = {facts.num_samples:,} samples,"
            f" k = {facts.k}"
        )
        if space:
            self.say(space)
        count = f"{len(tasks)} runs" if len(tasks) > 1 else "1 run"
        self.say(f"{count}, {workers} at a time")
        if self.console is not None and self.console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def show(self, running: Sequence[Task]) -> None:
        """Refresh, if it is time; called often."""
        now = time.monotonic()
        if self.console is None or now - self._shown < REFRESH_SECONDS:
            return
        self._shown = now
        statuses = self._statuses()
        self._say_finished({t: s for t, s in statuses.items() if t not in running})
        if self._live is not None:
            self._live.update(self.table(running, statuses), refresh=True)

    def stop(self) -> None:
        """Take the live table away, whatever happened."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def end(self, outcome: Outcome) -> None:
        """Say what ended badly and why, and how to continue."""
        self.stop()
        if self.console is not None:
            self._say_finished(self._statuses())
        for task, ending in outcome.endings.items():
            if ending.exit_code != 0 and not (ending.exit_code == 75 and outcome.interrupted):
                log = self._study.run(task.seed, task.branch).path / "log.txt"
                reason = " ".join(ending.message.split())
                verb = "killed" if ending.killed else VERBS.get(ending.exit_code, "failed")
                self.warn(f"{task}: {verb}: {reason}; see {log}")
        for task in outcome.left_out:
            reason = "interrupted" if outcome.interrupted else f"{task.after} did not end well"
            self.warn(f"{task}: not begun, {reason}")
        if outcome.can_continue:
            self.warn(f"to continue: {self._command}")
        again = [str(task) for task, ending in outcome.endings.items() if ending.exit_code == 3]
        if again:
            self.warn(
                f"what would diverge again with these settings (a lower lr?): {', '.join(again)}"
            )
        self.say(f"took {duration(time.monotonic() - self._begun)}")

    def table(
        self, running: Sequence[Task], statuses: Mapping[Task, Status | None]
    ) -> RenderableType:
        """The runs that continue now, and how long all will take."""
        from rich.table import Table

        done = sum(1 for s in statuses.values() if s is not None and s.state in ENDED)
        left = time_left(self._spec, statuses, self._workers, self._num_samples)
        remaining = "" if left is None else f", {left} left"
        table = Table(box=None, pad_edge=False, title_justify="left", caption_justify="left")
        table.caption = f"{done} of {len(self._tasks)} runs done{remaining}"
        for column in ("run", "step", "of", "loss", "alignment", "sharpness"):
            justify = "left" if column == "run" else "right"
            table.add_column(column, justify=justify, no_wrap=True)
        for task in running:
            status = statuses[task]
            if status is not None and status.state == "running":
                table.add_row(str(task), *_numbers(status))
            else:
                table.add_row(str(task), "starts")
        return table

    def _statuses(self) -> dict[Task, Status | None]:
        return {task: self._study.run(task.seed, task.branch).status() for task in self._tasks}

    def _say_finished(self, statuses: Mapping[Task, Status | None]) -> None:
        """A line for each run that has ended since the last look; failures are said at the end."""
        for task, status in statuses.items():
            if status is None or task in self._finished or status.state != "done":
                continue
            self._finished.add(task)
            loss = "" if status.loss is None else f", loss {status.loss:.4g}"
            message = f"; {status.message}" if status.message else ""
            self.say(
                f"{task}: done at step {status.step}{loss}, {duration(status.seconds)}{message}"
            )


@dataclass(frozen=True)
class TimeLeft:
    """Time until all runs are done.

    Attributes:
        seconds: of the runs whose rate is known.
        is_all: whether that of every run is.
    """

    seconds: float
    is_all: bool

    def __str__(self) -> str:
        return f"{'about' if self.is_all else 'more than'} {duration(self.seconds)}"


def time_left(
    spec: Spec, statuses: Mapping[Task, Status | None], workers: int, num_samples: int
) -> TimeLeft | None:
    """Time until all tasks are done, from the steps made and left; None while nothing is known.

    A run that is under way continues at its own rate; one that waits goes at the mean rate of the
    same branch in other seeds, and takes no time as long as none is known.
    """
    own: dict[Task, float] = {}
    left: dict[Task, int] = {}
    for task, status in statuses.items():
        made, total = _steps(spec, task, status, num_samples)
        enough = made >= max(1, min(RATE_STEPS, total // 4))
        if status is not None and enough and status.seconds >= RATE_SECONDS:
            own[task] = status.seconds / made
        if status is None or status.state not in ENDED:
            left[task] = max(0, total - made)
    if left and not own:
        return None
    rates = {task: rate for task in left if (rate := _rate(task, own)) is not None}
    durations = {task: steps * rates.get(task, 0.0) for task, steps in left.items()}
    return TimeLeft(makespan(durations, workers), is_all=len(rates) == len(left))


def _rate(task: Task, own: Mapping[Task, float]) -> float | None:
    """Seconds a step of a run, by its own steps or else by those of its kind; None if unknown."""
    if task in own:
        return own[task]
    alike = [rate for other, rate in own.items() if other.branch == task.branch]
    return sum(alike) / len(alike) if alike else None


def _steps(spec: Spec, task: Task, status: Status | None, num_samples: int) -> tuple[int, int]:
    """Steps a run has made, and will have made at the most."""
    total = task.most_steps(spec, num_samples)
    if status is None:
        return 0, total
    if task.branch == TRUNK:
        return min(status.step, total), total
    if status.end_step is None:
        return 0, total
    return max(0, min(status.step - (status.end_step - total), total)), total


def _line(console: Console | None, message: str) -> None:
    if console is not None:
        # A terminal that was closed, or a pipe that nobody reads, ends no study.
        with contextlib.suppress(OSError, ValueError):
            console.print(without_controls(message), highlight=False, markup=False, soft_wrap=True)


def _numbers(status: Status) -> tuple[str, ...]:
    def text(value: float | None) -> str:
        return "" if value is None or math.isnan(value) else f"{value:.4g}"

    end = "" if status.end_step is None else str(status.end_step)
    return (
        str(status.step),
        end,
        text(status.loss),
        text(status.alignment),
        text(status.sharpness),
    )


def duration(seconds: float) -> str:
    """A time for people: 45 s, 3 min, 1 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
