"""Programs with the names of Slurm's: they keep what they were called with, and run jobs here.

`sbatch` runs all elements of an array, one after another, and again what asked to be queued again.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

SBATCH = """
import json, os, pathlib, re, subprocess, sys

state = pathlib.Path(__file__).parent
with (state / "sbatch.calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
number = len((state / "sbatch.calls").read_text().splitlines()) + 16
if (state / "refuses").exists() and number > int((state / "refuses").read_text()):
    sys.exit("sbatch: error: invalid partition specified: none")
print(number)
text = pathlib.Path(sys.argv[-1]).read_text()
if (state / "holds").exists():
    sys.exit()
for index in range(int(re.search("--array=['0-]*-([0-9]+)%", text)[1]) + 1):
    again = state / f"{number}_{index}"
    for restarts in range(50):
        again.unlink(missing_ok=True)
        known = {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index}
        known |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
        environment = os.environ | {name: str(value) for name, value in known.items()}
        done = subprocess.run(
            ["bash", sys.argv[-1]], env=environment, capture_output=True, text=True
        )
        with (state / "elements.jsonl").open("a") as file:
            said = done.stdout + done.stderr
            file.write(json.dumps([f"{number}_{index}", done.returncode, said]) + "\\n")
        if not again.exists():
            break
"""
SCONTROL = """
import pathlib, sys

state = pathlib.Path(__file__).parent
if sys.argv[1] == "show":
    size = state / "max_array_size"
    print("MaxArraySize            = " + (size.read_text() if size.exists() else "1001"))
else:
    (state / sys.argv[2]).touch()
"""
SQUEUE = """
import pathlib, sys

state = pathlib.Path(__file__).parent
asked = sys.argv[sys.argv.index("-j") + 1].split(",")
queue = state / "queue"
lines = queue.read_text().splitlines() if queue.exists() else []
found = [line for line in lines if line.partition("_")[0] in asked]
print(*found, sep="\\n")
if not found:
    sys.exit("slurm_load_jobs error: Invalid job id specified")
"""
SCANCEL = """
import pathlib, sys

pathlib.Path(__file__).with_name("cancelled").write_text(" ".join(sys.argv[1:]))
pathlib.Path(__file__).with_name("queue").unlink()
"""
WORKER = """#!/bin/bash
# In place of Python: what is called, and then what the file says that is named by the seed.
here=$(dirname "$0")
echo "$*" >> "$here/worker.calls"
seed=$(echo "$*" | sed 's/.*--seed \\([0-9]*\\).*/\\1/')
[ -f "$here/seed-$seed.sh" ] && . "$here/seed-$seed.sh"
exit 0
"""


class FakeSlurm:
    """The programs, in a folder that comes first on the PATH."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        self.folder = folder
        programs = {"sbatch": SBATCH, "scontrol": SCONTROL, "squeue": SQUEUE, "scancel": SCANCEL}
        for name, text in programs.items():
            self._write(name, f"#!{sys.executable} -IS\n{text}")
        self._write("worker", WORKER)
        monkeypatch.setenv("PATH", str(folder), prepend=":")

    @property
    def worker(self) -> str:
        """What to give for the option `python`."""
        return shlex.quote(str(self.folder / "worker"))

    @property
    def submitted(self) -> list[list[str]]:
        """The arguments of each `sbatch`."""
        file = self.folder / "sbatch.calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def called(self) -> list[str]:
        """What each worker was called with."""
        return (self.folder / "worker.calls").read_text().splitlines()

    @property
    def elements(self) -> list[tuple[str, int, str]]:
        """Number, exit status and words of each element that was run."""
        lines = (self.folder / "elements.jsonl").read_text().splitlines()
        return [tuple(json.loads(line)) for line in lines]

    def set(self, name: str, content: str) -> None:
        """Set what a program is to do."""
        (self.folder / name).write_text(content)

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)
