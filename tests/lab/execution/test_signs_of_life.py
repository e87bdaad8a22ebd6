"""Silence is what a process does not do while its parent is awake."""

from __future__ import annotations

from thalweg.cli.parser import HUNG_AFTER as HUNG_AFTER_OF_COMMANDS
from thalweg.lab.execution.signs_of_life import AWAKE_SECONDS, HUNG_AFTER, SignsOfLife


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def signs() -> tuple[Clock, SignsOfLife]:
    clock = Clock()
    return clock, SignsOfLife(clock)


def wait(clock: Clock, watched: SignsOfLife, seconds: float, step: float = 0.1) -> float:
    """Look every tenth of a second; the silence at last."""
    for _ in range(round(seconds / step)):
        clock.now += step
        watched.silence()
    return watched.silence()


def test_what_tells_nothing_is_silent_from_its_start() -> None:
    clock, watched = signs()
    assert abs(wait(clock, watched, 60) - 60) < 0.01


def test_telling_the_same_again_is_no_sign_of_life_and_something_new_is() -> None:
    clock, watched = signs()
    watched.note(3)
    wait(clock, watched, 10)
    watched.note(3)
    assert watched.silence() > 9
    watched.note(4)
    assert watched.silence() == 0


def test_a_night_of_the_parent_counts_as_two_seconds() -> None:
    clock, watched = signs()
    wait(clock, watched, 10)
    clock.now += 8 * 3600
    assert watched.silence() <= 10.1 + AWAKE_SECONDS


def test_the_command_line_has_the_default_of_the_lab() -> None:
    assert HUNG_AFTER_OF_COMMANDS == HUNG_AFTER
