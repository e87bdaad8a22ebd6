"""The "slurm" executor: the jobs of a study or sweep as elements of Slurm's job arrays.

It writes one folder for each submission, hands its arrays to `sbatch`, and does not wait:

    <study or sweep>/slurm/20270131T093000Z/
        jobs.txt         one line a job: what its worker is called with
        array-1.sh       what each element runs; readable, and can be submitted by hand
        submitted.json   the number that Slurm gave each array
        17_0.log ...     what each element printed

Shortly before its time limit an element is told to stop: its run saves a checkpoint, and Slurm
queues the element again, as it does where a machine fails. All machines must see the same folders
at the same paths; locks on the run folders keep two elements from the same run.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any

from thalweg.errors import InvalidInput, invalid, shown
from thalweg.lab.execution.jobs import Job, jobs_of
from thalweg.lab.execution.schedule import Assignment, Outcome, refuse_objects, takes_options
from thalweg.lab.execution.slurm_queue import SUBMISSIONS, Array, Submission, ask, status
from thalweg.lab.execution.worker_command import worker_arguments
from thalweg.lab.store.durable import make_folder, write_file
from thalweg.lab.store.status import utc_now
from thalweg.registry import executors

FIXED_OPTIONS = (
    *("array", "chdir", "cpus-per-task", "dependency", "error", "job-name", "no-requeue", "ntasks"),
    *("open-mode", "output", "parsable", "requeue", "signal", "wrap"),
)
"""Options of `sbatch` that Thalweg sets itself."""
GPU_OPTIONS = ("gres", "gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task")
"""Options of `sbatch` that ask for GPUs."""
MAX_ARRAY_SIZE = 1001
"""Slurm's own default; numbers of elements are below it."""

SCRIPT = """\
#!/bin/bash
# Each element of this array does the job of one line of jobs.txt. It can be submitted again at any
# time: runs that are done are skipped, and interrupted ones go on from their last checkpoint.
{options}

folder={folder}
first_line={first_line}
most_restarts={most_restarts}
export OMP_NUM_THREADS={threads}

if [ "${{SLURM_RESTART_COUNT:-0}}" -gt "$most_restarts" ]; then
    echo "queued again $most_restarts times: given up; submit it again to go on"
    exit 75
fi
line=$((first_line + SLURM_ARRAY_TASK_ID))
eval "job=($(sed -n "${{line}}p" "$folder/jobs.txt"))"
{python} -m thalweg work "${{job[@]}}" &
worker=$!

# Near the time limit Slurm sends USR1, to this script alone. Where it cancels the element or queues
# it again itself, it sends TERM to the worker, too. Either way the run saves a checkpoint.
signals=0
cancelled=no
trap 'signals=$((signals + 1)); kill -USR1 "$worker"' USR1
trap 'signals=$((signals + 1)); cancelled=yes' TERM

# A signal ends `wait` while the worker is still there.
heard=none
until [ "$heard" = "$signals" ]; do
    heard=$signals
    wait "$worker"
    status=$?
done
# It ends a worker that is about to start.
if [ "$signals" -gt 0 ] && [ "$status" -gt 128 ]; then status=75; fi

if [ "$status" = 75 ] && [ "$cancelled" = no ]; then
    echo "interrupted: queued again"
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$status"
"""


@executors.register("slurm")
@takes_options(lambda options: Settings.of(options))
def submit_to_slurm(assignment: Assignment) -> Outcome:
    """Submit the jobs that are not in the queue yet, at most `workers` of them at a time.

    Each wave begins when the one before it has ended, however its elements ended. Options are those
    of `Settings`; all others are handed on to `sbatch`.

    Raises:
        InvalidInput: there is no Slurm here, it refuses (the message has its reason), an option is
            not allowed, or the spec holds Python objects.
    """
    refuse_objects(assignment, "slurm")
    if shutil.which("sbatch") is None:
        raise InvalidInput(
            "executor 'slurm': there is no sbatch on this machine's PATH; start it on a login node"
            " of the cluster, or take executor 'local'"
        )
    settings = Settings.of(assignment.options)
    folder = assignment.study.path.absolute()
    queued = [element for element in status(folder) if element.is_queued]
    known = {(element.study, element.seed) for element in queued}
    jobs = [job for job in jobs_of(assignment) if (job.study.absolute(), job.seed) not in known]
    there = f"in Slurm's queue already: {len(known)}"
    if not jobs:
        return Outcome(left_out=list(assignment.tasks), submitted=f"nothing; {there}")
    earlier = sorted({element.array for element in queued}, key=int)
    numbers = ", ".join(_submit(folder, jobs, assignment, settings, earlier))
    said = f"Slurm job {numbers}: {len(jobs)} elements" + (f"; {there}" if known else "")
    return Outcome(left_out=list(assignment.tasks), submitted=said)


@dataclass(frozen=True)
class Settings:
    """How jobs are submitted.

    Attributes:
        python: what starts Python on the cluster's machines, in words; default: the interpreter
            that submits.
        restarts: how often an element is queued again at the most.
        stop_before: seconds before the time limit at which a run is told to stop.
        sbatch: options that are handed on, by name.
    """

    python: str = shlex.quote(sys.executable)
    restarts: int = 20
    stop_before: int = 120
    sbatch: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, options: Mapping[str, object]) -> Settings:
        """Those that a user's options ask for.

        Raises:
            InvalidInput: an option that Thalweg sets itself, or a value that is none.
        """
        left = {name.removeprefix("--"): str(value) for name, value in options.items()}
        own: dict[str, Any] = {}
        if "python" in left:
            own["python"] = _words(left.pop("python"))
        for name in ("restarts", "stop-before"):
            if name in left:
                own[name.replace("-", "_")] = _whole_number(name, left.pop(name))
        for name, value in left.items():
            if name in FIXED_OPTIONS:
                raise invalid("option of sbatch", name, "one that Thalweg does not set itself")
            if not re.fullmatch("[a-z][a-z0-9-]*", name) or not value.isprintable():
                allowed = "a name such as time or mem-per-cpu, and a value of one line"
                raise invalid("option of sbatch", f"{name}={value}", allowed)
        return cls(**own, sbatch=left)


def _words(value: str) -> str:
    """Words as a shell takes them, each quoted."""
    try:
        words = shlex.split(value)
    except ValueError:
        words = []
    if not words or not value.isprintable():
        allowed = "what starts Python, in words quoted as for a shell"
        raise invalid("option python of executor 'slurm'", value, allowed)
    return shlex.join(words)


def _whole_number(name: str, value: str) -> int:
    if not re.fullmatch(r"\d{1,9}", value):
        raise invalid(f"option {name} of executor 'slurm'", value, "an integer >= 0")
    return int(value)


def _submit(
    folder: Path,
    jobs: Sequence[Job],
    assignment: Assignment,
    settings: Settings,
    earlier: Sequence[str],
) -> list[str]:
    """Write the files of a submission, and hand its arrays to `sbatch`; returns their numbers.

    Args:
        earlier: arrays in the queue, which may make runs that later waves copy.
    """
    jobs = sorted(jobs, key=lambda job: job.wave)
    submission = Submission(_new_folder(folder))
    lines = [shlex.join(worker_arguments(job, assignment)) + "\n" for job in jobs]
    write_file(submission.jobs_file, "".join(lines))
    arrays: list[Array] = []
    for wave, first, size in _arrays(jobs, _max_array_size()):
        script = submission.path / f"array-{len(arrays) + 1}.sh"
        options = _options(folder.name, submission.path, size, assignment, settings)
        write_file(script, _script(submission.path, first, options, assignment, settings))
        before = [*(earlier if wave else ()), *(array.number for array in arrays[-1:])]
        words = [f"--dependency=afterany:{':'.join(before)}"] if before else []
        try:
            said = ask("sbatch", "--parsable", *words, str(script))
        except InvalidInput as error:
            numbers = ", ".join(array.number for array in arrays)
            hint = f"; submitted already: {numbers}" if arrays else ""
            raise InvalidInput(f"{error}{hint}") from error
        arrays.append(Array(_number_in(said), first, size))
        submission.write(arrays)
    return [array.number for array in arrays]


def _new_folder(folder: Path) -> Path:
    """A folder for a submission, named by the time, and by a number where that is taken."""
    stamp = re.sub("[-:]", "", utc_now())
    names = chain([stamp], (f"{stamp}-{number}" for number in count(2)))
    path = next(path for name in names if not (path := folder / SUBMISSIONS / name).exists())
    make_folder(path)
    return path


def _arrays(jobs: Sequence[Job], most: int) -> Iterator[tuple[int, int, int]]:
    """Wave, first line (from 1) and number of lines of each array; a wave may need several.

    Args:
        most: elements of one array.
    """
    first = 1
    for wave, group in groupby(jobs, key=lambda job: job.wave):
        left = len(list(group))
        while left:
            size = min(left, most)
            yield wave, first, size
            first, left = first + size, left - size


def _max_array_size() -> int:
    """How many elements an array of this cluster can have."""
    said = ask("scontrol", "show", "config")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", said, re.MULTILINE)
    return max(1, int(found[1])) if found else MAX_ARRAY_SIZE


def _number_in(said: str) -> str:
    """The number in what `sbatch --parsable` prints: "17", or "17;cluster"."""
    found = re.search(r"^(\d+)(;.*)?$", said, re.MULTILINE)
    if found is None:
        raise InvalidInput(f"sbatch: it named no job, but said {shown(said.strip())}")
    return found[1]


def _script(
    path: Path, first: int, options: Sequence[str], assignment: Assignment, settings: Settings
) -> str:
    return SCRIPT.format(
        options="\n".join(f"#SBATCH {option}" for option in options),
        folder=shlex.quote(str(path)),
        first_line=first,
        most_restarts=settings.restarts,
        threads=assignment.threads,
        python=settings.python,
    )


def _options(
    name: str, path: Path, size: int, assignment: Assignment, settings: Settings
) -> list[str]:
    """The options of `sbatch` as they stand in a script, those of the user last."""
    options = {
        "job-name": f"thalweg-{name}",
        "array": f"0-{size - 1}%{assignment.workers}",
        "chdir": str(Path.cwd()),
        "output": str(path).replace("%", "%%") + "/%A_%a.log",
        "open-mode": "append",
        "ntasks": "1",
        "cpus-per-task": str(assignment.threads),
        "signal": f"B:USR1@{settings.stop_before}",
        "requeue": "",
    }
    if assignment.device.startswith("cuda") and not settings.sbatch.keys() & set(GPU_OPTIONS):
        options["gres"] = "gpu:1"
    every = (options | dict(settings.sbatch)).items()
    return [f"--{key}=" + shlex.quote(value) if value else f"--{key}" for key, value in every]
