"""What has been submitted to Slurm, and what has become of it?

Slurm says where each element of an array is, the run folders say how far its runs are. Slurm
forgets elements that have ended, unless it keeps accounts (`sacct`); the run folders do not.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from thalweg.errors import IntegrityError, InvalidInput
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.durable import read_json, to_json, write_file
from thalweg.limits import read_bytes

SUBMISSIONS = "slurm"
"""Name of the folder, in that of a study or sweep, that holds a folder for each submission."""
SECONDS = 60.0
"""For Slurm to answer."""


@dataclass(frozen=True)
class Array:
    """A job array: the number that Slurm gave it, and which lines of `jobs.txt` its elements do.

    Attributes:
        first: the line of element 0; lines are counted from 1.
        count: of elements.
    """

    number: str
    first: int
    count: int


@dataclass(frozen=True)
class Submission:
    """The folder of one submission."""

    path: Path

    @property
    def jobs_file(self) -> Path:
        """One line a job: the arguments of its worker, quoted as for a shell."""
        return self.path / "jobs.txt"

    def write(self, arrays: Sequence[Array]) -> None:
        """Keep which arrays have been submitted."""
        content = to_json({"arrays": [asdict(array) for array in arrays]})
        write_file(self.path / "submitted.json", content)

    def arrays(self) -> list[Array]:
        """The arrays that have been submitted.

        Raises:
            IntegrityError: what says so is damaged.
        """
        file = self.path / "submitted.json"
        try:
            return [_array(table) for table in read_json(file)["arrays"]]
        except FileNotFoundError:
            return []
        except (TypeError, LookupError, ValueError) as error:
            raise IntegrityError(
                f"{file}: damaged ({error}); remove it, then submit again"
            ) from error

    def jobs(self) -> list[tuple[Path, int]]:
        """Study and seed of each job, by lines.

        Raises:
            IntegrityError: the file is damaged.
        """
        content = read_bytes(self.jobs_file, "text_bytes", error=IntegrityError)
        try:
            words = [shlex.split(line) for line in content.decode().rstrip("\n").split("\n")]
            return [(Path(line[0]), int(line[line.index("--seed") + 1])) for line in words]
        except (LookupError, ValueError) as error:
            raise IntegrityError(f"{self.jobs_file}: damaged ({error})") from error

    def elements(self) -> Iterator[tuple[tuple[Path, int], tuple[str, int]]]:
        """Study and seed of each job, with the array and the index of its element.

        Raises:
            IntegrityError: a file is damaged.
        """
        jobs = self.jobs()
        for array in self.arrays():
            if array.first - 1 + array.count > len(jobs):
                raise IntegrityError(f"{self.jobs_file}: damaged, it has {len(jobs)} lines")
            for index in range(array.count):
                yield jobs[array.first - 1 + index], (array.number, index)


@dataclass(frozen=True)
class Element:
    """One element of an array, and the runs of its job.

    Attributes:
        array, index: its number is `array_index`, such as 17_3.
        study, seed: of its job.
        queue: where it is, in Slurm's words, such as "RUNNING" or "PENDING (Dependency)"; empty
            once it has left the queue, and on a machine without Slurm.
        ended: how it ended, in Slurm's words, such as "COMPLETED" or "TIMEOUT"; empty where Slurm
            does not know.
        runs: the state of each run of the job by branch; "waiting" before it begins.
    """

    array: str
    index: int
    study: Path
    seed: int
    queue: str
    ended: str
    runs: Mapping[str, str]

    @property
    def number(self) -> str:
        """As Slurm's commands name it."""
        return f"{self.array}_{self.index}"

    @property
    def is_queued(self) -> bool:
        """Whether it waits or runs."""
        return bool(self.queue)


def status(folder: Path | str) -> list[Element]:
    """What Slurm and the run folders say of each element that was submitted for a study or sweep.

    Of a job that was submitted several times, the last element. On a machine without Slurm, the
    run folders alone say something; see `knows_slurm`.

    Raises:
        InvalidInput: Slurm does not answer.
        IntegrityError: what was kept of a submission is damaged.
    """
    submitted: dict[tuple[Path, int], tuple[str, int]] = {}
    for submission in _submissions(Path(folder)):
        submitted.update(submission.elements())
    arrays = sorted({array for array, _ in submitted.values()}, key=int)
    asks = bool(arrays) and knows_slurm()
    queued, ended = (_queued(arrays), _ended(arrays)) if asks else ({}, {})
    runs = {study: _states(study) for study in {study for study, _ in submitted}}
    return [
        Element(
            *(array, index, study, seed),
            queue=queued.get(f"{array}_{index}", ""),
            ended=ended.get(f"{array}_{index}", ""),
            runs=runs[study].get(seed, {}),
        )
        for (study, seed), (array, index) in submitted.items()
    ]


def cancel(folder: Path | str) -> list[Element]:
    """Take all that waits or runs out of the queue; returns these elements.

    A run has until Slurm ends its process, 30 seconds by Slurm's default, to save a checkpoint.

    Raises:
        InvalidInput: there is no Slurm here, or it does not answer.
        IntegrityError: what was kept of a submission is damaged.
    """
    arrays = {array.number for one in _submissions(Path(folder)) for array in one.arrays()}
    found = _queued(sorted(arrays, key=int)) if arrays else {}
    if waiting := sorted({number.partition("_")[0] for number in found}, key=int):
        ask("scancel", *waiting)
    return [element for element in status(folder) if element.number in found]


def knows_slurm() -> bool:
    """Whether this machine can ask Slurm for its queue."""
    return shutil.which("squeue") is not None


def ask(program: str, *arguments: str) -> str:
    """What one of Slurm's programs answers.

    Raises:
        InvalidInput: it is not there, refuses, or does not answer; the message has its own words.
    """
    if shutil.which(program) is None:
        raise InvalidInput(
            f"{program}: not on this machine's PATH; ask on a login node of the Slurm cluster"
        )
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidInput(f"{program}: Slurm did not answer within {SECONDS:g} s") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise InvalidInput(f"{program}: status {done.returncode}: {said}")
    return done.stdout


def _array(table: Mapping[str, Any]) -> Array:
    array = Array(str(table["number"]), int(table["first"]), int(table["count"]))
    if not (array.number.isdecimal() and array.first >= 1):
        raise ValueError(f"no array: {table}")
    return array


def _submissions(folder: Path) -> Iterator[Submission]:
    """The submissions for a study or sweep, in order."""
    for file in sorted(folder.glob(f"{SUBMISSIONS}/*/submitted.json")):
        yield Submission(file.parent)


def _queued(arrays: Sequence[str]) -> dict[str, str]:
    """Where each element is that waits or runs."""
    try:
        said = ask("squeue", "-h", "-r", "-j", ",".join(arrays), "-o", "%F_%K|%T|%r")
    except InvalidInput as error:
        if "Invalid job id" in str(error):  # Slurm has forgotten all of them
            return {}
        raise
    found: dict[str, str] = {}
    for line in said.splitlines():
        number, state, reason = line.split("|", 2)
        found[number] = state if reason == "None" else f"{state} ({reason})"
    return found


def _ended(arrays: Sequence[str]) -> dict[str, str]:
    """How each element has ended, on a cluster that keeps accounts."""
    try:
        said = ask("sacct", "-n", "-P", "-X", "-j", ",".join(arrays), "-o", "JobID,State")
    except InvalidInput:
        return {}
    return dict(line.split("|", 1) for line in said.splitlines() if "|" in line)


def _states(study: Path) -> dict[int, dict[str, str]]:
    """The state of each run of a study, by seed and branch."""
    found: dict[int, dict[str, str]] = {}
    for run in StudyFolder(study).runs():
        found.setdefault(run.seed, {})[run.branch] = run.state()
    return found
