"""Disks that are full, have no inodes left, or fail: real small file systems, and single errors."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from benchmarks.faults.fault import Attempt, Family, Unable
from benchmarks.faults.kills import MOST, at_most, harmed_at_an_operation, let_run
from benchmarks.faults.studies import Command, Harmed, is_polite, reference

FAMILY = Family("Disks")
SAME = "exit 0, 1, 2 or 75, no traceback; once the disk is well: resumed, the same"
LOST = "steps since the last checkpoint of each run at work"
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "EMFILE", "ENOMEM", "ESTALE")
BLOCK = 4096


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[None]:
    """A file system in memory of its own at a folder.

    Raises:
        Unable: nothing can be mounted here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unable("nothing can be mounted here") from error
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def ended_well(command: Command) -> None:
    """What a study on a disk that fails may end with.

    Raises:
        AssertionError: another exit status, or a traceback.
    """
    code = command.wait()
    assert code in (0, 1, 2, 75), f"exit {code}: {command.said}"
    said = is_polite(command)
    assert code == 0 or said.strip(), "it failed without a word"


@FAMILY.fault(
    "a real disk that fills up at a random instant", survived=SAME, lost=LOST, unit="steps again"
)
def fills_up(attempt: Attempt) -> float:
    harmed = Harmed(attempt)
    with small_disk(harmed.root, "size=16m"):
        command = harmed.begin()
        let_run(attempt, command)
        ballast = harmed.root / "ballast"
        disk = os.statvfs(harmed.root)
        left = attempt.chance.randrange(12) * BLOCK
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(BLOCK, disk.f_bavail * disk.f_frsize - left))
        ended_well(command)
        harmed.settle()
        ballast.unlink()
        return at_most(harmed.recovered(), MOST)


@FAMILY.fault(
    "a real disk without inodes from a random instant on",
    survived=SAME,
    lost=LOST,
    unit="steps again",
)
def no_inodes(attempt: Attempt) -> float:
    harmed = Harmed(attempt)
    with small_disk(harmed.root, "size=16m,nr_inodes=2000"):
        command = harmed.begin()
        let_run(attempt, command)
        ballast = harmed.root / "ballast"
        ballast.mkdir()
        free = os.statvfs(harmed.root).f_ffree - attempt.chance.randrange(4)
        for number in range(free):
            try:
                (ballast / str(number)).touch()
            except OSError:
                break
        ended_well(command)
        harmed.settle()
        for path in ballast.iterdir():
            path.unlink()
        return at_most(harmed.recovered(), MOST)


@FAMILY.fault(
    "a disk that is too small from the start",
    survived="exit 1 or 2 before the first step, the bytes needed and free are named; "
    "with more room the same command runs the study",
    lost="nothing",
)
def too_small(attempt: Attempt) -> float:
    harmed = Harmed(attempt)
    with small_disk(harmed.root, f"size={attempt.chance.randrange(1, 500)}k"):
        command = harmed.begin()
        code = command.wait()
        said = is_polite(command)
        assert code in (1, 2), f"exit {code}: {said}"
        assert "free" in said or "disk" in said, said
        assert "step taken" not in said
        subprocess.run(
            ["mount", "-o", "remount,size=16m", str(harmed.root)], check=True, capture_output=True
        )
        return at_most(harmed.recovered(), 0)


def one_error(attempt: Attempt, where: Literal["study", "run"]) -> float:
    """An error at the n-th operation on files: once, or from then on."""
    kind = attempt.chance.choice(ERRORS)
    lasting = attempt.case % 2 == 1
    harmed, said, code = harmed_at_an_operation(attempt, kind, where, lasting)
    words = said()
    assert code in (0, 1, 2, 4, 75), f"exit {code}: {words}"
    assert code == 0 or words.strip()
    most = len(reference().left) * MOST
    return at_most(harmed.recovered(), most)


@FAMILY.fault(
    "EIO, ENOSPC, EDQUOT, EROFS, EACCES, EMFILE, ENOMEM or ESTALE at the n-th operation on files of"
    " the study's process, once or from then on",
    survived=SAME,
    lost=LOST,
    unit="steps again",
)
def error_in_the_study(attempt: Attempt) -> float:
    return one_error(attempt, "study")


@FAMILY.fault("the same in each run's process", survived=SAME, lost=LOST, unit="steps again")
def error_in_a_run(attempt: Attempt) -> float:
    return one_error(attempt, "run")
