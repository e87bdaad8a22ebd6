"""No false alarm: studies to which nothing happened are good, wherever their folder went."""

from __future__ import annotations

import atexit
import functools
import shutil
import socket
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.faults.disks import small_disk
from benchmarks.faults.fault import Attempt, Exhausted, Family, Unable
from benchmarks.faults.files import copied
from benchmarks.faults.studies import COUNTER, here
from tests.lab.small_study import PLUGIN, small_spec
from tests.lab.test_checking import FORMER
from tests.lab.test_in_python import study as study_of_objects
from tests.lab.test_whole_folders import FIXTURES, NAME

from thalweg.lab.config import Spec, builtin_specs, builtin_studies, load_spec, load_study
from thalweg.lab.config.studies import has_own_problem
from thalweg.lab.study import run
from thalweg.registry import load_plugin

FAMILY = Family("No false alarm")
GOOD = "`thalweg check` exits with 0, without a finding"
NOTHING = "nothing"
SMALL: dict[str, Any] = {
    "problem.data": {"name": "digits"},
    "problem.model": {"name": "mlp", "hidden": [8], "activation": "tanh"},
    "problem.preprocess": "unit",
    "problem.samples": 600,
    "problem.test_samples": 20,
    "subspace.k": 2,
}
SHORT: dict[str, Any] = {
    "seeds": [0],
    "phases.*.steps": 4,
    "branches.*.steps": 4,
    "branches.*.warmup_steps": 0,
    "figures": [],
}


OF_A_TEXT: dict[str, Any] = {
    "problem.samples": 60,
    "problem.test_samples": 10,
    "problem.data.context": 16,
    "problem.model.width": 8,
    "problem.model.heads": 2,
    "problem.model.layers": 1,
}


def small_specs() -> dict[str, Callable[[], Spec]]:
    """Every built-in spec and study, but small: digits, a small network, 4 steps."""
    found: dict[str, Callable[[], Spec]] = {}
    for name in builtin_specs():
        found[name] = lambda name=name: load_spec(name, {**SMALL, **SHORT})
    for name in builtin_studies():
        found[f"study {name}"] = lambda name=name: _small_study(name)
    return found


def _small_study(name: str) -> Spec:
    """A study, but small; one that is about text on a text of its own."""
    if not has_own_problem(name):
        return load_study(name, None, {**SMALL, **SHORT})
    if load_study(name, None, SHORT).problem.data.registered_name != "tinyshakespeare":
        return load_study(name, None, SHORT)
    return load_study(name, None, {**OF_A_TEXT, **SHORT, "problem.data.data_dir": _text()})


@functools.cache
def _text() -> str:
    """A file of 20,000 characters that repeat themselves."""
    file = Path(tempfile.mkdtemp(prefix="thalweg-text-")) / "input.txt"
    file.write_text("A thalweg is the line along the bottom of a valley.\n" * 400)
    atexit.register(shutil.rmtree, file.parent, ignore_errors=True)
    return str(file)


def is_good(folder: Path, *plugins: str) -> str:
    """What `check` says of a folder on standard error.

    Raises:
        AssertionError: it finds something.
    """
    words = [word for plugin in plugins for word in ("--plugin", plugin)]
    code, out, err = here("check", folder, *words)
    assert (code, out) == (0, ""), f"exit {code}: {out} {err}"
    return err


@FAMILY.fault("every built-in spec and study, made small and run", survived=GOOD, lost=NOTHING)
def built_in(attempt: Attempt) -> None:
    specs = small_specs()
    if attempt.case >= len(specs):
        raise Exhausted
    name = list(specs)[attempt.case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(specs[name](), root=attempt.folder, executor="inline")
    assert result.exit_code == 0, f"{name}: {result.outcome}"
    said = is_good(result.study.path)
    assert "not verifiable" not in said, said
    moved_about(attempt, result.study.path)


@FAMILY.fault(
    "a study of Python objects, and one of a plugin's data, model and probe",
    survived=GOOD,
    lost=NOTHING,
)
def of_ones_own(attempt: Attempt) -> None:
    if attempt.case >= 2:
        raise Exhausted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if attempt.case == 0:
            result = run(study_of_objects(), root=attempt.folder)
            is_good(result.study.path)
            return
        load_plugin(PLUGIN)
        problem = {"data": "waves", "model": {"name": "noisy-mlp"}, "loss": "mse"}
        spec = small_spec({"problem": problem, "subspace.k": 2, "probes": {"theta_norm": 1}})
        result = run(spec, root=attempt.folder, plugins=[PLUGIN], executor="inline")
    is_good(result.study.path, PLUGIN)


@FAMILY.fault(
    "folders of formats 1 and 2",
    survived="`check` exits with 0 and says that they are not verifiable",
    lost=NOTHING,
)
def former(attempt: Attempt) -> None:
    forms = ("format-1", "format-2")
    if attempt.case >= len(forms):
        raise Exhausted
    folder = attempt.folder / FORMER
    shutil.copytree(FIXTURES / forms[attempt.case] / FORMER, folder)
    assert is_good(folder).count("not verifiable") == 3


def _renamed(folder: Path, attempt: Attempt) -> Path:
    return folder.rename(folder.with_name(f"results {attempt.case}"))


def _moved(folder: Path, attempt: Attempt) -> Path:
    target = attempt.folder / "else" / "where" / folder.name
    target.parent.mkdir(parents=True)
    return Path(shutil.move(folder, target))


def _zipped(folder: Path, attempt: Attempt) -> Path:
    kind = attempt.chance.choice(["zip", "gztar"])
    archive = shutil.make_archive(str(attempt.folder / "packed"), kind, folder.parent, folder.name)
    shutil.unpack_archive(
        archive, attempt.folder / "unpacked", filter="data" if kind != "zip" else None
    )
    return attempt.folder / "unpacked" / folder.name


def _without_rights(folder: Path, attempt: Attempt) -> Path:
    for part in folder.rglob("*"):
        part.chmod(0o555 if part.is_dir() else 0o444)
    return folder


def _copied_without_times(folder: Path, attempt: Attempt) -> Path:
    return Path(shutil.copytree(folder, attempt.folder / "copy", copy_function=shutil.copyfile))


MOVES = (_renamed, _moved, _zipped, _without_rights, _copied_without_times)


def moved_about(attempt: Attempt, folder: Path, *plugins: str) -> None:
    """Do one thing after another to a folder that leaves its files as they are."""
    for move in attempt.chance.sample(MOVES, attempt.chance.randint(1, 3)):
        folder = move(folder, attempt)
        with mock.patch.object(socket, "gethostname", return_value="another-machine"):
            is_good(folder, *plugins)
        for part in folder.rglob("*"):
            part.chmod(0o755 if part.is_dir() else 0o644)


@FAMILY.fault(
    "folders copied, moved, renamed, zipped and unzipped, without rights to write, on another"
    " machine",
    survived=GOOD,
    lost=NOTHING,
)
def carried_about(attempt: Attempt) -> None:
    if attempt.chance.random() < 0.5:
        moved_about(attempt, copied(attempt), COUNTER)
        return
    source = FIXTURES / "format-3" / NAME
    moved_about(attempt, Path(shutil.copytree(source, attempt.folder / "runs" / NAME)))


@FAMILY.fault("a folder on a file system mounted read-only", survived=GOOD, lost=NOTHING)
def read_only(attempt: Attempt) -> None:
    if attempt.case >= 3:
        raise Exhausted
    disk = attempt.folder / "disk"
    with small_disk(disk, "size=16m"):
        folder = Path(shutil.copytree(copied(attempt), disk / "study"))
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        try:
            (folder / "x").touch()
        except OSError:
            is_good(folder, COUNTER)
            assert here("list", "--root", disk)[0] == 0
        else:
            raise Unable("a file system cannot be made read-only here")
