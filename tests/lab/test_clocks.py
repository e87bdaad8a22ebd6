"""Nothing depends on the wall clock: it may jump a day back and forth at every look."""

from __future__ import annotations

import itertools
import re
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import thalweg
from tests.lab.small_study import begin, differing, execute, left, small_spec
from thalweg.lab import checking
from thalweg.lab.store import lock, status

SOURCE = Path(thalweg.__file__).parent
SHORT: dict[str, Any] = {
    "phases.0.steps": 5,
    "branches": {"sgd": {"steps": 3}},
    "probes": {"loss": 1},
}


class Jumping(datetime):
    """The date and time, a day early and a day late by turns."""

    looks = itertools.count()

    @classmethod
    def now(cls, tz: Any = None) -> Any:
        day = timedelta(days=1 if next(cls.looks) % 2 else -1)
        return datetime.now(tz) + day


def test_runs_locks_and_repairs_are_the_same_by_a_clock_that_jumps(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small_spec(SHORT)
    undisturbed = begin(quick_path / "undisturbed", spec)
    execute(undisturbed, spec, "trunk", "sgd")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + (1 if next(Jumping.looks) % 2 else -1) * 9e4)
    for module in (checking, lock, status):
        monkeypatch.setattr(module, "datetime", Jumping)
    study = begin(quick_path / "jumping", spec)
    execute(study, spec, "trunk")
    (study.run(0, "trunk").path / "status.json").write_text("damaged")
    _, first = checking.repair(study)
    (study.run(0, "trunk").path / "status.json").write_text("damaged again")
    _, second = checking.repair(study)
    assert first != second, "what is moved aside takes nothing's place"
    execute(study, spec, "trunk", "sgd")
    for branch in ("trunk", "sgd"):
        assert differing(left(study, branch), left(undisturbed, branch)) == []
    assert not checking.check(study).findings


def test_the_wall_clock_is_read_for_people_alone() -> None:
    of_time = r"\btime\.(time|time_ns|localtime|gmtime)\("
    reads = re.compile(rf"{of_time}|\.(now|utcnow)\(|st_[mac]time|getmtime")
    readers = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if reads.search(path.read_text(encoding="utf-8"))
    }
    # Who holds a lock since when, when a status was written, a folder for what is set aside; MLflow
    # has a time with each number.
    stores = {"lab/store/lock.py", "lab/store/status.py", "lab/checking.py"}
    assert readers == stores | {"integrations/mlflow.py"}
