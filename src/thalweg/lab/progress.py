"""Say how a study goes: a live table on a terminal, plain lines elsewhere, nothing if asked.

Everything for people goes to standard error; results go to standard output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from thalweg.lab.schedule import Outcome, Task

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from thalweg.lab.estimate import Estimate
    from thalweg.lab.spec import Spec
    from thalweg.lab.store import StudyFolder
    from thalweg.lab.store.status import Status

REFRESH_SECONDS = 0.5


class Progress:
    """Shows the runs of a study while they go on.

    Args:
        console: where to; None says nothing.
    """

    def __init__(self, console: Console | None) -> None:
        self.console = console
        self._live: Live | None = None
        self._shown = 0.0
        self._begun = time.monotonic()
        self._finished: set[Task] = set()

    @classmethod
    def silent(cls) -> Progress:
        """Say nothing."""
        return cls(None)

    @classmethod
    def to_stderr(cls) -> Progress:
        """Say it on standard error; `NO_COLOR` is honoured."""
        from rich.console import Console

        return cls(Console(file=sys.stderr))

    def say(self, message: str) -> None:
        """One line."""
        if self.console is not None:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def begin(
        self,
        study: StudyFolder,
        spec: Spec,
        tasks: Sequence[Task],
        expected: Estimate | None,
        workers: int,
    ) -> None:
        """Say what will be done, and how long it should take."""
        self._study, self._spec, self._tasks, self._workers = study, spec, list(tasks), workers
        self._begun = time.monotonic()
        if not tasks:
            self.say(f"{study.path}: all runs are done")
            return
        self.say(f"{study.path}: {len(tasks)} runs, {workers} side by side")
        if expected is not None:
            for note in expected.notes:
                self.say(note)
            self.say(
                f"P = {expected.num_parameters:,} parameters, N = {expected.num_samples:,} samples,"
                f" k = {expected.k}; one gradient takes {1000 * expected.gradient:.1f} ms"
            )
            self.say(f"at most about {duration(expected.seconds(spec, workers))}")
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
        statuses = {t: self._study.run(t.seed, t.branch).status() for t in self._tasks}
        self._say_finished(statuses)
        if self._live is not None:
            self._live.update(self._table(running, statuses), refresh=True)

    def end(self, outcome: Outcome) -> None:
        """Say what ended badly, and how to go on."""
        if self._live is not None:
            self._live.stop()
        if self.console is None or not self._tasks:
            return
        self._say_finished({t: self._study.run(t.seed, t.branch).status() for t in self._tasks})
        for task in outcome.left_out:
            self.say(f"seed {task.seed} {task.branch}: not begun")
        if outcome.interrupted:
            self.say(f"interrupted; go on with: thalweg resume {self._study.path}")
        self.say(f"took {duration(time.monotonic() - self._begun)}")

    def _say_finished(self, statuses: dict[Task, Status | None]) -> None:
        for task, status in statuses.items():
            if status is None or task in self._finished or status.state in ("running", "waiting"):
                continue
            if status.state == "interrupted" and time.monotonic() - self._begun < 2:
                continue
            self._finished.add(task)
            loss = "" if status.loss is None else f", loss {status.loss:.4g}"
            message = f"; {status.message}" if status.message else ""
            self.say(
                f"seed {task.seed} {task.branch}: {status.state} at step {status.step}{loss},"
                f" {duration(status.seconds)}{message}"
            )

    def _table(
        self, running: Sequence[Task], statuses: dict[Task, Status | None]
    ) -> RenderableType:
        from rich.table import Table

        table = Table(box=None, pad_edge=False)
        for column in ("seed", "branch", "step", "of", "loss", "alignment", "sharpness"):
            table.add_column(column, justify="left" if column == "branch" else "right")
        for task in running:
            status = statuses[task]
            if status is not None:
                table.add_row(str(task.seed), task.branch, *_numbers(status))
        done = sum(1 for s in statuses.values() if s is not None and s.state == "done")
        table.caption = f"{done} of {len(self._tasks)} runs done, {self._remaining(statuses)}"
        return table

    def _remaining(self, statuses: dict[Task, Status | None]) -> str:
        """From the share of all steps that are made; bounds count where an end is a rule."""
        made = total = 0
        for task, status in statuses.items():
            phases = (
                self._spec.phases
                if task.branch == "trunk"
                else (self._spec.branch_phase(task.branch),)
            )
            steps = sum(phase.steps or 0 for phase in phases)
            done = status is not None and status.state == "done"
            own = 0 if status is None else max(0, status.step - (status.end_step or 0) + steps)
            made += steps if done else min(own, steps)
            total += steps
        if not made or not total:
            return "remaining time not known yet"
        passed = time.monotonic() - self._begun
        return f"about {duration(passed * (total - made) / made)} left"


def _numbers(status: Status) -> tuple[str, ...]:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.4g}"

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
