"""Say how a sweep goes: a line that is renewed on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from thalweg.lab.execution.schedule import Outcome, Task
from thalweg.lab.progress import ENDED, VERBS, Progress, duration
from thalweg.lab.store import StudyFolder
from thalweg.lab.sweeps.points import Sweep

if TYPE_CHECKING:
    from rich.live import Live

LOOK_SECONDS = 2.0
"""Between two looks at what has ended; more where a look takes long."""
LINE_SECONDS = 30.0
"""Between two lines where there is no terminal."""
SHARE_OF_LOOKING = 0.02
SHOWN_FAILURES = 10


class SweepProgress:
    """Shows the runs of a sweep while they continue.

    Args:
        progress: where lines go.
        sweep: what is run.
        tasks: the runs that are left to do.
        total: all runs of the sweep.
    """

    def __init__(self, progress: Progress, sweep: Sweep, tasks: Sequence[Task], total: int) -> None:
        self._progress = progress
        self._sweep = sweep
        self._open = list(tasks)
        self._asked = len(tasks)
        self._total = total
        self._states: Counter[str] = Counter(done=total - len(tasks))
        self._begun = self._looked = self._told = time.monotonic()
        self._pause = LOOK_SECONDS
        self._live: Live | None = None

    def begin(self, workers: int, plugins: Sequence[str]) -> None:
        """Say what will be done."""
        words = [word for plugin in plugins for word in ("--plugin", plugin)]
        self._command = shlex.join(["thalweg", "resume", str(self._sweep.path), *words])
        left, points = len(self._open), len(self._sweep.points)
        done = self._total - left
        already = f", {done} of {self._total} done already" if done else ""
        self._progress.say(f"{points} points, {left} runs{already}, {workers} at a time")
        console = self._progress.console
        if console is not None and console.is_terminal:
            from rich.live import Live

            self._live = Live(console=console, auto_refresh=False, transient=True)
            self._live.start()

    def show(self, running: Sequence[Task]) -> None:
        """Refresh, if it is time; called often."""
        now = time.monotonic()
        if self._progress.console is None or now - self._looked < self._pause:
            return
        self._look(set(running))
        self._looked = time.monotonic()
        self._pause = max(LOOK_SECONDS, (self._looked - now) / SHARE_OF_LOOKING)
        if self._live is not None:
            self._live.update(self._line(running), refresh=True)
        elif now - self._told >= LINE_SECONDS:
            self._told = now
            self._progress.say(self._line(running))

    def stop(self) -> None:
        """Take the live line away, whatever happened."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def end(self, outcome: Outcome) -> None:
        """Say what ended badly and why, and how to continue."""
        self.stop()
        if outcome.submitted:
            self._progress.say(f"submitted: {outcome.submitted}")
            self._progress.say(f"how it goes: thalweg sweep status {self._sweep.path}")
            return
        bad = {task: end for task, end in outcome.endings.items() if end.exit_code not in (0, 75)}
        killed = {task: end for task, end in outcome.endings.items() if end.killed}
        for task, ending in list({**bad, **killed}.items())[:SHOWN_FAILURES]:
            verb = "killed" if ending.killed else VERBS.get(ending.exit_code, "failed")
            reason = " ".join(ending.message.split())
            self._progress.warn(f"{task}: {verb}: {reason}")
        if (more := len({**bad, **killed}) - SHOWN_FAILURES) > 0:
            self._progress.warn(f"... and {more} more: thalweg sweep status {self._sweep.path}")
        if outcome.left_out:
            reason = "interrupted" if outcome.interrupted else "their start did not end well"
            self._progress.warn(f"{len(outcome.left_out)} runs not begun: {reason}")
        if outcome.can_continue:
            self._progress.warn(f"to continue: {self._command}")
        self._progress.say(f"took {duration(time.monotonic() - self._begun)}")

    def _look(self, running: set[Task]) -> None:
        """Which runs have ended since the last look?"""
        still_open: list[Task] = []
        for task in self._open:
            state = "waiting" if task in running else _state(task)
            if state in ENDED:
                self._states[state] += 1
            else:
                still_open.append(task)
        self._open = still_open

    def _line(self, running: Sequence[Task]) -> str:
        ended = {state: self._states[state] for state in ("diverged", "failed")}
        others = "".join(f", {count} {state}" for state, count in ended.items() if count)
        done = f"{self._states['done']} of {self._total} runs done{others}"
        return f"{done}, {len(running)} running{self._left()}"

    def _left(self) -> str:
        """How long the open runs will take, by those that have ended since the beginning."""
        ended, elapsed = self._asked - len(self._open), time.monotonic() - self._begun
        return f", about {duration(elapsed / ended * len(self._open))} left" if ended else ""


def _state(task: Task) -> str:
    assert task.study is not None
    return StudyFolder(task.study).run(task.seed, task.branch).state()
