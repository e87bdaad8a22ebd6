"""`watch` in a training of one's own: whatever happens to it, the training is as it is alone."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from benchmarks.faults.fault import PATIENCE, Attempt, Family
from benchmarks.faults.studies import server
from tests.measure.test_watching_failures import ERRORS, LOSS, data, raises, watched_like_unwatched
from torch import nn

from thalweg.measure.watch import watch

FAMILY = Family("Watching")
ALONE = (
    "parameters, gradients, optimizer, buffers, modes and random generators bit for bit those of"
    " the training alone"
)
STEPS = 40


@FAMILY.fault(
    "reports that raise: torch's errors, out of memory, MemoryError, a class of one's own",
    survived=ALONE,
    lost="the rows of those reports, which say why; after three in a row, the later ones",
    unit="rows",
)
def reports_raise(attempt: Attempt) -> float:
    chance = attempt.chance
    errors = {
        step: chance.choice(list(ERRORS.values())) for step in range(12) if chance.random() < 0.4
    }

    def before(model: Any, _: Any, step: int) -> None:
        model.broken = raises(errors[step]) if step in errors else None

    kind = chance.choice([torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
    watcher = watched_like_unwatched(before, steps=12, kind=kind)
    return float(12 - sum(row["failure"] is None for row in watcher.history))


@FAMILY.fault(
    "sinks that raise, and a closed standard error",
    survived=ALONE + "; other sinks get every row",
    lost="what that sink did not take",
)
def sinks_raise(attempt: Attempt) -> None:
    chance, rows = attempt.chance, []
    kinds = (errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF)

    def fails(row: Any, step: int) -> None:
        if chance.random() < 0.5:
            raise chance.choice(
                [OSError(chance.choice(kinds), "sink"), MemoryError(), KeyError("x")]
            )

    sinks = [fails, lambda row, step: rows.append(step), f"csv:{attempt.folder / 'rows.csv'}"]
    chance.shuffle(sinks)
    error = sys.stderr
    closed = chance.choice([None, (attempt.folder / "closed").open("w")])
    if closed is not None:
        closed.close()
    try:
        sys.stderr = closed
        watcher = watched_like_unwatched(sinks=sinks, quiet=chance.random() < 0.5)
    finally:
        sys.stderr = error
    assert rows == [row["step"] for row in watcher.history]


def train(folder: Path, *, watched: bool, quiet: bool = True, pause: float = 0.0) -> None:
    """A training that saves itself every 5 steps and goes on from there, watched or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    inputs, targets = data()
    saved, begin = folder / "saved.pt", 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begin = state["step"]
    rows = folder / "rows.csv"
    options: dict[str, Any] = {"every": 1, "k": 2, "quiet": quiet}
    options |= {"file": rows, "resume_at": begin if rows.exists() else None}
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if watched:
            stack.enter_context(watch(model, LOSS, (inputs, targets), optimizer, **options))
        for step in range(begin, STEPS):
            if step % 5 == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "step": step}, folder / "saving.pt")
                (folder / "saving.pt").replace(saved)
            optimizer.zero_grad()
            LOSS(model(inputs), targets).backward()
            optimizer.step()
            time.sleep(pause)
    torch.save(model.state_dict(), folder / "end.pt")


def _with_a_broken_pipe(folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for number in (1, 2):
        os.dup2(writing, number)
    train(folder, watched=True, quiet=False)


def in_a_process(function: Callable[..., None], *arguments: Any, **options: Any) -> Any:
    """Begin it."""
    process = server().Process(target=function, args=arguments, kwargs=options)
    process.start()
    return process


def same_as_alone(attempt: Attempt, folder: Path) -> None:
    """Compare the end of a training with that of the same one without `watch`.

    Raises:
        AssertionError: a parameter differs.
    """
    alone = attempt.folder / "alone"
    alone.mkdir()
    train(alone, watched=False)
    one, other = torch.load(alone / "end.pt"), torch.load(folder / "end.pt")
    assert all(torch.equal(one[name], other[name]) for name in one), "the training is another one"


@FAMILY.fault(
    "standard error and output are pipes that nobody reads",
    survived="the same parameters, bit for bit; every row in the file",
    lost="the lines on the console",
)
def broken_pipe(attempt: Attempt) -> None:
    folder = attempt.folder / "watched"
    folder.mkdir()
    process = in_a_process(_with_a_broken_pipe, folder)
    process.join(PATIENCE)
    assert (folder / "end.pt").exists(), f"the training ended with status {process.exitcode}"
    same_as_alone(attempt, folder)
    assert steps_in(folder / "rows.csv") == list(range(STEPS + 1)) or steps_in(
        folder / "rows.csv"
    ) == list(range(STEPS))


def steps_in(path: Path) -> list[int]:
    """The steps of the rows in a CSV file."""
    with path.open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


@FAMILY.fault(
    "a watched training killed at a random instant, its CSV cut at a random byte, then resumed",
    survived="the same parameters, bit for bit; no step has two rows",
    lost="rows of the cut that lie before the training's own checkpoint",
    unit="rows",
)
def killed_and_torn(attempt: Attempt) -> float:
    folder, chance = attempt.folder / "watched", attempt.chance
    folder.mkdir()
    process = in_a_process(train, folder, watched=True, pause=0.005)
    rows = folder / "rows.csv"
    _wait_for(lambda: rows.exists() and rows.stat().st_size > 0, process)
    time.sleep(chance.uniform(0.0, 1.0))
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    content = rows.read_bytes()
    header = content.index(b"\n") + 1
    kept = _cut(content, header, chance)
    rows.write_bytes(kept)
    train(folder, watched=True)
    same_as_alone(attempt, folder)
    found = steps_in(rows)
    assert found == sorted(set(found)), f"steps twice or out of order: {found}"
    whole = set(range(STEPS))
    return float(len(whole - set(found)))


def _cut(content: bytes, header: int, chance: Random) -> bytes:
    """What is left of the file; half of the time no more than the last line is torn."""
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    begin = max(header, last) if chance.random() < 0.5 else header
    return content[: chance.randint(min(begin, len(content)), len(content))]


def _wait_for(condition: Callable[[], bool], process: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition() and process.exitcode is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
