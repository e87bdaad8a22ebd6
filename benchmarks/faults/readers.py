"""Readers: of what is being written, and of whatever anyone puts into a file."""

from __future__ import annotations

import os
import resource
import sys
import traceback
from pathlib import Path

from benchmarks.faults.fault import PATIENCE, Attempt, Family
from benchmarks.faults.studies import (
    COUNTER,
    Harmed,
    compare_with_undisturbed,
    here,
    reference,
    server,
)
from tests.test_fuzzing import LIMITS, TARGETS, fuzz

from thalweg.lab.store import StudyFolder, load

FAMILY = Family("Reading")
EXAMPLES = 60
BEYOND = 600 * 2**20
"""Bytes that a reader may take beyond what the imports took."""


@FAMILY.fault(
    "`list`, `show`, `check` and `load` again and again while a study runs",
    survived="each succeeds; rows are a beginning of the final ones; the study's numbers are the"
    " same",
    lost="nothing",
    unit="steps again",
)
def read_while_written(attempt: Attempt) -> float:
    harmed = Harmed(attempt)
    whole = load(StudyFolder(reference().path)).set_index(["seed", "branch", "step"])
    command = harmed.begin()
    while command.exit_code is None:
        code, _, err = here("list", "--root", harmed.root)
        assert code == 0, f"list: {err}"
        path = harmed.path
        if path is None:
            continue
        code, out, err = here("check", path, "--plugin", COUNTER)
        assert code == 0, f"check: exit {code}: {out} {err}"
        code, _, err = here("show", path)
        assert code == 0, f"show: {err}"
        rows = load(path).set_index(["seed", "branch", "step"])
        assert rows.equals(whole.loc[rows.index, rows.columns]), "rows that are not the final ones"
    assert command.wait() == 0, command.said
    assert harmed.path is not None
    return compare_with_undisturbed(harmed.path)


def _fuzz(target: str, case: int, output: str) -> None:
    """Fuzz one reader in a process that can take little more memory than it has."""
    os.environ["THALWEG_LIMITS"] = LIMITS
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + BEYOND
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        fuzz(target, EXAMPLES, seed=case)
    except BaseException:
        Path(output).write_text(traceback.format_exc())
        sys.exit(1)


@FAMILY.fault(
    "any bytes for each reader of files, specs and command lines, under a bound on memory",
    survived="read, or refused by a documented error of bounded length, within 600 MB",
    lost="nothing",
)
def hostile(attempt: Attempt) -> None:
    target = list(TARGETS)[attempt.case % len(TARGETS)]
    output = attempt.folder / "said.txt"
    process = server().Process(target=_fuzz, args=(target, attempt.case, str(output)))
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
    said = output.read_text()[-1500:] if output.exists() else ""
    assert process.exitcode == 0, f"{target}: {process.exitcode}: {said}"
