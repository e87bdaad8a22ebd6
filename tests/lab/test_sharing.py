"""A run that another study has made already is taken over, exactly where it is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.lab.small_study import begin, differing, execute, left, small_spec
from thalweg.lab.schedule import Task, tasks_of
from thalweg.lab.sharing import content_hash, known_way_to_multiply, take_over

TRUNK, SGD = Task(0, "trunk"), Task(0, "sgd")


def test_what_another_study_has_done_is_copied_and_goes_on_from_there(quick_path: Path) -> None:
    one = small_spec({"branches.dom-sgd": "unset"})
    first = begin(quick_path / "one", one)
    execute(first, one, "trunk", "sgd")
    two = small_spec({"name": "other", "claims": ["gradient-aligns"]})
    second = begin(quick_path / "two", two)
    tasks = tasks_of(two)
    assert take_over(second, tasks) == [t for t in tasks if t not in (TRUNK, SGD)]
    assert not differing(left(first, "sgd"), left(second, "sgd"))
    execute(second, two, "bulk-sgd")
    assert take_over(second, tasks) == tasks  # begun runs stay as they are


def test_nothing_is_taken_over_from_a_run_that_is_not_done(quick_path: Path) -> None:
    spec = small_spec()
    begin(quick_path / "one", spec)
    second = begin(quick_path / "two", spec)
    assert take_over(second, [TRUNK]) == [TRUNK]


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"name": "other", "seeds": [0, 5]}, True),
        ({"branches.dom-sgd.steps": 99}, True),
        ({"branches.sgd.steps": 13}, False),
        ({"phases.0.steps": 13}, False),
        ({"probes.loss": 2}, False),
        ({"subspace.k": 4}, False),
        ({"branches.sgd.subspace.k": 4}, False),
        ({"problem.samples": 150}, False),
        ({"problem.chunk_size": 128}, False),
    ],
)
def test_the_hash_holds_all_that_determines_the_numbers(
    changes: dict[str, Any], same: bool
) -> None:
    one, other = content_hash(small_spec(), SGD, "f"), content_hash(small_spec(changes), SGD, "f")
    assert (one == other) == same
    assert content_hash(small_spec(), SGD, "g") != one


def test_the_way_to_multiply_is_that_of_an_earlier_study_of_the_problem(quick_path: Path) -> None:
    spec = small_spec()
    begin(quick_path / "one", spec)
    open_spec = small_spec({"problem.chunk_size": "unset", "problem.vectorize_up_to": "unset"})
    assert known_way_to_multiply(open_spec, quick_path) == (256, 0)
    assert known_way_to_multiply(small_spec({"problem.samples": 99}), quick_path) is None
