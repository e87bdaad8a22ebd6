"""A run that another study has made already is taken over, exactly where it is the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import thalweg
from tests.lab.small_study import begin, differing, execute, left, small_spec
from thalweg.lab.execution.schedule import Task, tasks_of
from thalweg.lab.preparing import create_runs
from thalweg.lab.sharing import (
    content_hash,
    known_way_to_multiply,
    made_otherwise,
    maker_of,
    take_over,
    this_maker,
)
from thalweg.lab.store.status import Status

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
        ({"branches.dom-sgd.probes.loss": 2}, True),
        ({"branches.sgd.probes.loss": 2}, False),
        ({"branches.sgd.probes.loss": 1}, True),
        ({"subspace.k": 4}, False),
        ({"branches.sgd.subspace.k": 4}, False),
        ({"problem.samples": 150}, False),
        ({"problem.chunk_size": 128}, False),
    ],
)
def test_the_hash_holds_all_that_determines_the_numbers(
    changes: dict[str, Any], same: bool
) -> None:
    one = content_hash(small_spec(), SGD, "data", "version")
    assert (one == content_hash(small_spec(changes), SGD, "data", "version")) == same
    assert content_hash(small_spec(), SGD, "other", "version") != one
    assert content_hash(small_spec(), SGD, "data", "other") != one


def test_branches_that_measure_otherwise_leave_the_trunk_to_be_shared() -> None:
    other = small_spec({"branches.sgd.probes": {"solved_eigenvalues": "off"}})
    trunks = [content_hash(spec, TRUNK, "data", "version") for spec in (small_spec(), other)]
    assert trunks[0] == trunks[1]


def test_what_computes_here_is_versions_device_and_the_users_own_code(tmp_path: Path) -> None:
    versions = f"thalweg {thalweg.__version__}, torch {torch.__version__.partition('+')[0]}"
    assert this_maker("cuda").partition("+")[0].startswith(versions)
    assert this_maker("cuda").endswith(", cuda")
    plugin = tmp_path / "mine.py"
    plugin.write_text("one = 1\n", encoding="utf-8")
    before = this_maker("cpu", [str(plugin), "json"])
    assert before.startswith(this_maker("cpu") + ", mine.py ")
    plugin.write_text("one = 2\n", encoding="utf-8")
    assert this_maker("cpu", [str(plugin), "json"]) != before


def test_nothing_is_taken_over_from_another_version(quick_path: Path) -> None:
    spec = small_spec({"branches": {}, "probes": {}})
    first = begin(quick_path / "one", spec)
    execute(first, spec, "trunk")
    second = begin(quick_path / "two", spec)
    create_runs(second, spec, [TRUNK], "", "thalweg 9.9", [TRUNK])
    assert take_over(second, [TRUNK]) == [TRUNK]
    create_runs(second, spec, [TRUNK], "", this_maker("cpu"), [TRUNK])
    assert take_over(second, [TRUNK]) == []


def test_a_run_says_every_version_that_took_part_in_it(quick_path: Path) -> None:
    spec = small_spec({"branches": {"b": {"steps": 2, "starts_from": "a"}, "a": {"steps": 2}}})
    a, b = Task(0, "a"), Task(0, "b", "a")
    study = begin(quick_path / "one", spec)
    for task, maker in ((TRUNK, "one"), (a, "two")):
        create_runs(study, spec, [task], "", maker, [task])
        study.run(0, task.branch).write_status(Status("done", step=12))
    tasks = tasks_of(spec)
    assert maker_of(study, spec, TRUNK, "three", []) == "one"
    assert maker_of(study, spec, a, "three", [b]) == "one, then two"
    assert maker_of(study, spec, b, "three", [b]) == "one, then two, then three"
    # A branch that is extended by the version that began it is that version's still.
    assert maker_of(study, spec, a, "two", [a]) == "one, then two"
    said = made_otherwise(study, [TRUNK, a], "one")
    assert said.startswith("1 run is kept as made by one, then two; this is one;")
    assert made_otherwise(study, [TRUNK], "one") == ""
    create_runs(study, spec, tasks, "", "three", [b])
    assert made_otherwise(study, [TRUNK], "one") == "", "the maker of a done run stays"


def test_the_way_to_multiply_is_that_of_an_earlier_study_of_the_problem(quick_path: Path) -> None:
    spec = small_spec()
    begin(quick_path / "one", spec)
    open_spec = small_spec({"problem.chunk_size": "unset", "problem.vectorize_up_to": "unset"})
    assert known_way_to_multiply(open_spec, quick_path) == (256, 0)
    assert known_way_to_multiply(small_spec({"problem.samples": 99}), quick_path) is None
