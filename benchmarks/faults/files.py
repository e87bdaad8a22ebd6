"""Files of a finished study that are not what was written: bits, ends, places, links."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.faults.fault import Attempt, Exhausted, Family
from benchmarks.faults.studies import COUNTER, LR, Harmed, compare_with_undisturbed, here, reference
from tests.lab.small_study import left

from thalweg.errors import ThalwegError
from thalweg.lab.store import StudyFolder, load
from thalweg.lab.store.checkpoint import list_checkpoints

FAMILY = Family("Damaged files")
FOUND = (
    "`check` names it, exit 4 (2 where `spec.toml` is no spec any more), and what is read is"
    " refused or the same numbers; or nothing is said and all numbers are the same"
)
OTHER_LR = 0.06
UNMARKED = ("log.txt", "report.html", "verdicts.json", ".lock")
"""Files without a digest, as docs/checking.md says; and the lock, which is written anew."""


def finished(lr: float = LR) -> Path:
    """A finished study, which is not to be changed."""
    return reference(lr).path


def copied(attempt: Attempt, lr: float = LR, into: str = "runs") -> Path:
    """A copy of the finished study, to be changed."""
    return copy_of(finished(lr), attempt, into)


def copy_of(source: Path, attempt: Attempt, into: str) -> Path:
    """A copy of a study's folder, in a folder of the attempt."""
    return Path(shutil.copytree(source, attempt.folder / into / source.name))


def files_of(folder: Path) -> list[Path]:
    """All files in a study's folder that are verified, by name."""
    every = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in every if path.name not in UNMARKED]


def measured(folder: Path) -> dict[str, Any]:
    """The rows of all runs.

    Raises:
        ThalwegError: they cannot be had.
    """
    return {str(name): repr(list(values)) for name, values in load(StudyFolder(folder)).items()}


def told(folder: Path) -> dict[str, Any]:
    """What last checkpoints and statuses hold, by run; a status that is missing says nothing."""
    study = StudyFolder(folder)
    found: dict[str, Any] = {}
    for run in study.runs():
        where = f"{run.seed} {run.branch}"
        status = run.status()
        if status is not None:
            found[f"status {where}"] = (
                status.state, status.step, status.end_step, status.seconds,
                status.loss, status.alignment, status.sharpness, status.rows,
            )  # fmt: skip
        if list_checkpoints(run.checkpoints):
            found |= {f"{where} {k}": v for k, v in left(study, run.branch, seed=run.seed).items()}
    return found


def either_found_or_harmless(folder: Path, harmed: list[Path], source: Path) -> bool:
    """Whether `check` finds damage, exit 4, in what was done to these files.

    It may also say, exit 2, that `spec.toml` cannot be read as a spec, or is of a later format.

    Raises:
        AssertionError: it names none of them; or a number is another one and nothing is said.
    """
    code, out, err = here("check", folder, "--plugin", COUNTER)
    names = {str(each) for path in harmed for each in (path, path.parent)} - {str(folder)}
    if code in (2, 4):
        assert any(name in out + err for name in names), f"{harmed}: not named in: {out} {err}"
    else:
        assert code == 0, f"check: exit {code}: {err}"
    for read in (measured, told):
        now, before = read_or_refused(read, folder), read(source)
        if now is None:
            assert code != 0, f"{harmed}: cannot be read, and check finds nothing"
            continue
        differs = sorted(name for name in now if now[name] != before.get(name))
        # The checkpoint before the last takes over from a damaged one: that is said, by check.
        if read is measured or code == 0:
            assert not differs, f"{harmed}: exit {code}, and other values of {differs[:4]}"
    return code == 4


def read_or_refused(read: Callable[[Path], dict[str, Any]], folder: Path) -> dict[str, Any] | None:
    """What is read; None where a documented error refuses it."""
    try:
        return read(folder)
    except ThalwegError:
        return None


def repaired(folder: Path) -> None:
    """Repair a study in which something was found.

    Raises:
        AssertionError: something is still found after it.
    """
    code, _, err = here("check", folder, "--repair", "--plugin", COUNTER)
    assert code == 0, f"check --repair: exit {code}: {err}"
    if (folder / "spec.toml").is_file():
        code, out, _ = here("check", folder, "--plugin", COUNTER)
        assert code == 0, f"check after --repair: exit {code}: {out}"


def flip(path: Path, attempt: Attempt, bits: int = 1) -> None:
    """Flip random bits of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(bits):
        content[attempt.chance.randrange(len(content))] ^= 1 << attempt.chance.randrange(8)
    path.write_bytes(content)


def cut(path: Path, attempt: Attempt) -> None:
    """Cut a file short at a random place."""
    content = path.read_bytes()
    path.write_bytes(content[: attempt.chance.randrange(len(content))])


def harm_one(attempt: Attempt, harm: Callable[[Path, Attempt], None]) -> tuple[Path, Path]:
    """Harm one random file of a finished study, small ones as often as large ones."""
    folder = copied(attempt)
    path = attempt.chance.choice([file for file in files_of(folder) if file.stat().st_size])
    harm(path, attempt)
    return folder, path


@FAMILY.fault(
    "one flipped bit in any file of a finished study",
    survived=FOUND,
    lost="nothing; `--repair` goes back to the checkpoint before, or to the start of that run",
)
def flipped(attempt: Attempt) -> None:
    folder, path = harm_one(attempt, flip)
    if either_found_or_harmless(folder, [path], finished()):
        repaired(folder)


@FAMILY.fault("up to 64 flipped bits in one file", survived=FOUND, lost="as for one bit")
def flipped_often(attempt: Attempt) -> None:
    often = attempt.chance.randint(2, 64)
    folder, path = harm_one(attempt, lambda file, a: flip(file, a, often))
    if either_found_or_harmless(folder, [path], finished()):
        repaired(folder)


@FAMILY.fault("a file cut short, or emptied", survived=FOUND, lost="as for one bit")
def cut_short(attempt: Attempt) -> None:
    folder, path = harm_one(attempt, cut)
    if either_found_or_harmless(folder, [path], finished()):
        repaired(folder)


@FAMILY.fault(
    "a damaged file, then `check --repair` and `resume`",
    survived="all metrics and checkpoints bit for bit those of an undisturbed study",
    lost="the steps of that run after its newest good checkpoint, made again",
    unit="steps again",
)
def damaged_and_repaired(attempt: Attempt) -> float:
    folder, path = harm_one(attempt, attempt.chance.choice([flip, cut, lambda p, a: p.unlink()]))
    if either_found_or_harmless(folder, [path], finished()):
        repaired(folder)
    if path.name == "spec.toml" and path.is_file():
        return 0.0  # a name, a seed, more steps: what may be edited, and is another study
    harmed = Harmed(attempt)
    harmed.go_on()
    return max(0.0, compare_with_undisturbed(folder))


@FAMILY.fault(
    "each file of a finished study removed in turn",
    survived=FOUND + " (`status.json`, `env.json`, and what is drawn, may be missing)",
    lost="as for one bit",
)
def removed(attempt: Attempt) -> None:
    folder = copied(attempt)
    every = sorted(path for path in folder.rglob("*") if path.is_file())
    if attempt.case >= len(every):
        raise Exhausted
    path = every[attempt.case]
    path.unlink()
    if either_found_or_harmless(folder, [path], finished()):
        repaired(folder)


def exchange(one: Path, other: Path) -> None:
    """Let two files or folders change places."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@FAMILY.fault(
    "files or folders exchanged between seeds, branches, checkpoints or studies",
    survived=FOUND,
    lost="nothing, put back; else as for one bit",
)
def exchanged(attempt: Attempt) -> None:
    folder = copied(attempt)
    other = attempt.chance.choice([folder, copied(attempt, OTHER_LR, "others")])
    skipped = (*UNMARKED, "env.json")
    mine = [
        path
        for path in folder.rglob("*")
        if path.name not in skipped and path.is_relative_to(folder)
    ]
    one = attempt.chance.choice(sorted(mine))
    alike = [
        path
        for path in sorted(other.rglob("*"))
        if _kind(path) == _kind(one) and path != one and path.is_dir() == one.is_dir()
    ]
    if not alike:
        return
    two = attempt.chance.choice(alike)
    if two.is_relative_to(one) or one.is_relative_to(two):
        return
    exchange(one, two)
    either_found_or_harmless(folder, [one, two], finished())


def _kind(path: Path) -> tuple[int, str]:
    """Depth and what it is: two of a kind can be mistaken for one another."""
    depth = len(path.parts) - next(i for i, part in enumerate(path.parts) if "-digits-" in part)
    name = path.name.partition("-")[0] if "-" in path.name and path.suffix != ".toml" else path.name
    return depth, name if path.is_file() or name in ("seed", "step") else "folder"


@FAMILY.fault(
    "a link or a pipe in the place of each file and folder",
    survived="resume, report, show and check exit with 4 and name it; list shows the others; "
    "what a link points to is not touched; nobody waits; `--repair` moves it aside",
    lost="what stood there",
)
def linked(attempt: Attempt) -> None:
    folder = copied(attempt)
    every = sorted(path for path in folder.rglob("*"))
    if attempt.case >= 2 * len(every):
        raise Exhausted
    path, kind = every[attempt.case // 2], ("link", "pipe")[attempt.case % 2]
    outside = attempt.folder / "outside"
    path.rename(outside)
    before = _state(outside)
    if kind == "link":
        path.symlink_to(outside)
    else:
        os.mkfifo(path)
    for verb in ("resume", "report", "show", "check"):
        plugin = [] if verb == "show" else ["--plugin", COUNTER]
        code, out, err = here(verb, folder, *plugin)
        lost_spec = path == folder / "spec.toml" and kind == "pipe"
        assert code == (2 if lost_spec and verb != "check" else 4), f"{verb}: {code}: {out} {err}"
        assert str(path) in out + err or lost_spec, f"{verb}: {out} {err}"
    code, out, err = here("list", "--root", folder.parent)
    assert code == 0, err
    code, _, err = here("check", folder, "--repair", "--plugin", COUNTER)
    assert code == 0, err
    assert _state(outside) == before, "what the link points to was touched"


def _state(path: Path) -> list[tuple[str, int, int]]:
    every = [path, *sorted(path.rglob("*"))]
    return [(str(each), each.stat().st_mtime_ns, each.stat().st_size) for each in every]


@FAMILY.fault(
    "an interrupted study with a flipped bit or a cut in any file, then `resume`",
    survived="exit 4 with the file's name, after `check --repair` too; or bit for bit the same",
    lost="the steps of that run after its newest good checkpoint, made again",
    unit="steps again",
)
def interrupted_and_damaged(attempt: Attempt) -> float:
    folder = copied(attempt)
    study = StudyFolder(folder)
    run = attempt.chance.choice(study.runs())
    # Back to what a kill before the end leaves: its last checkpoint is not there yet.
    shutil.rmtree(list_checkpoints(run.checkpoints)[-1])
    (run.path / "status.json").unlink()
    for after in study.runs():
        if run.branch == "trunk" and after.seed == run.seed and after.branch != "trunk":
            shutil.rmtree(after.path)
    harm = attempt.chance.choice([flip, cut])
    path = attempt.chance.choice([f for f in files_of(folder) if stat.S_ISREG(f.stat().st_mode)])
    before = path.read_bytes()
    harm(path, attempt)
    if path.name in ("spec.toml", "env.json") and path.read_bytes() != before:
        code, out, err = here("check", folder, "--plugin", COUNTER)
        assert code in (0, 2, 4), err
        return 0.0
    harmed = Harmed(attempt)
    with contextlib.suppress(AssertionError):
        harmed.go_on()
    code, out, err = here("check", folder, "--plugin", COUNTER)
    if code:
        # Of a run that is done, resume reads no more than manifests and footers.
        assert code == 4, f"check: exit {code}: {out} {err}"
        names = (str(path), str(path.parent), str(path.parent.parent / "metrics"))
        assert any(name in out for name in names), f"{path}: not named in: {out}"
        repaired(folder)
        harmed.go_on()
    return max(0.0, compare_with_undisturbed(folder))
