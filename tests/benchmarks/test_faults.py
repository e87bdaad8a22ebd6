"""The short form of `make faults`, and that what makes its table can fail."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.faults import files
from benchmarks.faults.fault import Attempt, Exhausted, Family, Unable, try_once
from benchmarks.faults.page import page
from benchmarks.reliability import FAMILIES, FAULTS, Turns

from tests.lab.test_whole_folders import FIXTURES, NAME

TRIES = 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("key", FAULTS)
def test_a_study_survives(key: str) -> None:
    for case in range(TRIES):
        tried = try_once(FAULTS[key], case)
        if tried.unable:
            pytest.skip(tried.unable)
        assert not tried.failure, f"case {case}: {tried.failure}"


@pytest.fixture
def finished(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The study of the tests is the one to be harmed: nothing has to be run."""
    folder = FIXTURES / "format-3" / NAME
    monkeypatch.setattr(files, "finished", lambda: folder)
    monkeypatch.setattr(files, "copied", lambda attempt: files.copy_of(folder, attempt, "runs"))
    return folder


@pytest.mark.usefixtures("finished")
def test_flipped_bits_are_found() -> None:
    assert [try_once(FAULTS["flipped_often"], case).failure for case in range(2)] == [""] * 2


@pytest.mark.usefixtures("finished")
def test_damage_that_nobody_finds_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "here", lambda *words: (0, "", ""))
    assert try_once(FAULTS["cut_short"], 0).failure


def test_time_is_shared_evenly_and_the_page_tells_what_failed() -> None:
    one, other = Family("One"), Family("Other")

    @one.fault("it breaks", survived="it is whole", lost="a day", unit="hours")
    def breaks(attempt: Attempt) -> float:
        assert attempt.case % 2 == 0, "broken"
        return 3.0

    @other.fault("two cases", survived="both", lost="nothing")
    def two(attempt: Attempt) -> None:
        if attempt.case == 2:
            raise Exhausted

    @other.fault("not on this machine", survived="-", lost="-")
    def never(attempt: Attempt) -> None:
        raise Unable("no disk")

    faults = {fault.key: fault for family in (one, other) for fault in family.faults}
    turns = Turns([one, other])
    for _ in range(12):
        turn = turns.next()
        assert turn is not None
        fault, case = turn
        tried = try_once(faults[fault.key], case)
        tried.seconds = 1.0
        turns.done(tried)
    counts = turns.counts
    assert {key: (c.tried, len(c.failures)) for key, c in counts.items()} == {
        "breaks": (8, 4), "two": (2, 0), "never": (0, 0),
    }  # fmt: skip
    text = page([one, other], counts, "made by a test", 3)
    measured = "a day; measured: 3 hours at most, 3 on average"
    assert f"| it breaks | 8 | **4** | it is whole | {measured} |" in text
    assert "| two cases | 2 (all) | 2 |" in text
    assert "| not on this machine | not possible here |" in text


def test_every_fault_has_a_key_of_its_own() -> None:
    assert len(FAULTS) == sum(len(family.faults) for family in FAMILIES)
