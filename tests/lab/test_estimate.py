"""Times and disk that are said beforehand, and the time that is left."""

from __future__ import annotations

import pytest

from tests.lab.small_study import small_spec
from thalweg.lab.estimate import (
    START_SECONDS,
    disk_of,
    longest_first,
    makespan,
    seconds_of,
    time_left,
)
from thalweg.lab.measuring import Measurement
from thalweg.lab.schedule import Task, tasks_of
from thalweg.lab.store.status import Status
from thalweg.lab.subspace_costs import SubspaceCosts

COSTS = Measurement(
    start=0.0,
    gradient=0.1,
    step=0.01,
    subspace=SubspaceCosts(begin=1.0, tracked=0.2, settled=0.05, solve=2.0, samples=200),
    test=0.0,
    vectorize_up_to=0,
    chunk_size=256,
    num_parameters=1000,
    num_samples=200,
    k=10,
    optimizer_vectors=1,
    fingerprint="",
    probes={"block_sharpness": 3.0},
    gradient_probes=("alignment_gradient",),
    subspace_probes=("alignment_gradient",),
)
TRUNK, SGD, DOM = Task(0, "trunk"), Task(0, "sgd"), Task(0, "dom-sgd")
ONCE = START_SECONDS + COSTS.subspace.begin


def test_a_step_costs_what_is_asked_for_at_it() -> None:
    spec = small_spec({"probes": {"alignment_gradient": 10}})
    assert seconds_of(spec, SGD, COSTS) == pytest.approx(ONCE + 12 * (0.01 + 0.03))
    assert seconds_of(spec, DOM, COSTS) == pytest.approx(ONCE + 12 * (0.01 + 0.01 + 0.2))
    silent = small_spec({"probes": {}})
    assert seconds_of(silent, SGD, COSTS) == pytest.approx(START_SECONDS + 12 * 0.01)
    by_rule = small_spec({"probes": {}, "phases.0.until_alignment": 0.9})
    assert seconds_of(by_rule, TRUNK, COSTS) == pytest.approx(ONCE + 12 * 0.31)


def test_a_probes_own_cost_and_solves_are_counted_as_often_as_it_is_due() -> None:
    own = small_spec({"probes": {"block_sharpness": 6}})
    assert seconds_of(own, SGD, COSTS) == pytest.approx(START_SECONDS + 12 * (0.01 + 0.5))
    solving = small_spec({"probes": {"solved_eigenvalues": 4}})
    assert seconds_of(solving, SGD, COSTS) == pytest.approx(START_SECONDS + 12 * (0.01 + 0.5))


def test_a_branch_point_asks_for_the_subspace_once_in_the_run_that_ends_there() -> None:
    spec = small_spec({"probes": {"displacement": 5}})
    assert seconds_of(spec, TRUNK, COSTS) == pytest.approx(ONCE + 12 * 0.01)
    assert seconds_of(spec, SGD, COSTS) == pytest.approx(START_SECONDS + 12 * 0.01)
    own = small_spec({"probes": {"displacement": 5}, "branches.sgd.subspace.k": 5})
    assert seconds_of(own, SGD, COSTS) == pytest.approx(ONCE + 12 * 0.01)


def test_following_costs_less_once_it_has_settled_and_less_when_seldom() -> None:
    spec = small_spec({"probes": {}})
    assert seconds_of(spec, DOM, COSTS, settled=True) == pytest.approx(ONCE + 12 * (0.01 + 0.05))
    seldom = small_spec({"probes": {}, "subspace.every": 4})
    assert seconds_of(seldom, DOM, COSTS) == pytest.approx(ONCE + 12 * (0.01 + 0.05))
    exact = small_spec({"probes": {}, "subspace.source": "exact"})
    assert seconds_of(exact, DOM, COSTS) == pytest.approx(ONCE + 12 * (0.01 + 1.0))


def test_a_solve_over_a_mini_batch_costs_its_share_of_one_over_all_samples() -> None:
    own = {"source": "exact", "samples": "batch"}
    spec = small_spec({"probes": {}, "branches.dom-sgd.subspace": own})
    # 20 of 200 samples.
    assert seconds_of(spec, DOM, COSTS) == pytest.approx(ONCE + 12 * (0.01 + 0.1))


def test_branches_wait_for_their_trunk_and_share_the_workers() -> None:
    durations = {TRUNK: 2.0, SGD: 3.0, DOM: 3.0, Task(0, "bulk-sgd"): 3.0}
    assert makespan(durations, 1) == 11.0
    assert makespan(durations, 2) == 8.0
    assert makespan(durations, 3) == 5.0
    assert makespan({}, 2) == 0.0


def test_what_most_waits_for_goes_first() -> None:
    spec = small_spec({"probes": {}})
    ordered = longest_first(spec, [SGD, Task(1, "sgd"), DOM, Task(1, "trunk"), TRUNK], COSTS)
    # The trunk of seed 1 has the short branch alone to wait for it.
    assert ordered == [TRUNK, DOM, Task(1, "trunk"), SGD, Task(1, "sgd")]


def test_the_time_left_goes_by_the_runs_own_rates() -> None:
    spec = small_spec()
    statuses = dict.fromkeys(tasks_of(spec), Status("done", step=24, end_step=24, seconds=24.0))
    assert time_left(spec, statuses, 2, COSTS) == 0.0
    # Half of 12 steps in 6 seconds: 6 seconds more.
    statuses[SGD] = Status("running", step=18, end_step=24, seconds=6.0)
    assert time_left(spec, statuses, 2, COSTS) == pytest.approx(6.0)
    statuses[DOM] = Status("diverged", step=18, end_step=24, seconds=6.0)
    assert time_left(spec, statuses, 2, COSTS) == pytest.approx(6.0)


def test_a_run_that_has_hardly_begun_has_no_rate_of_its_own() -> None:
    spec = small_spec({"branches.sgd.steps": 1000})
    statuses = dict.fromkeys(tasks_of(spec), Status("done", step=24, end_step=24, seconds=2.4))
    # Its first solve took 5 seconds; going by it, 999 steps would take more than an hour.
    statuses[SGD] = Status("running", step=13, end_step=1012, seconds=5.0)
    left = time_left(spec, statuses, 2, COSTS)
    assert left is not None
    assert left < 1000


def test_before_the_first_rate_the_measurement_counts() -> None:
    spec = small_spec()
    statuses = dict.fromkeys(tasks_of(spec))
    expected = makespan({task: seconds_of(spec, task, COSTS) for task in statuses}, 2)
    assert time_left(spec, statuses, 2, COSTS) == pytest.approx(expected)
    assert time_left(spec, statuses, 2, None) is None


def test_a_trunk_in_its_first_phase_has_not_made_all_its_steps() -> None:
    phase = {"optimizer": {"name": "sgd", "lr": 0.1}, "batch_size": 20, "steps": 100}
    phases = [{**phase, "name": "one"}, {**phase, "name": "two"}]
    spec = small_spec({"phases": phases, "branches": {}})
    statuses = {TRUNK: Status("running", step=50, end_step=None, seconds=50.0)}
    assert time_left(spec, statuses, 1, COSTS) == pytest.approx(150.0)


def test_disk_grows_with_checkpoints_and_saved_bases() -> None:
    spec = small_spec()
    plain = disk_of(spec, tasks_of(spec), COSTS)
    with_bases = small_spec({"checkpoint.save_bases": True})
    # 12 steps, every 4: 3 regular and the last.
    more = disk_of(with_bases, tasks_of(with_bases), COSTS) - plain
    assert more == 4 * 4 * COSTS.k * COSTS.num_parameters * 4
    assert disk_of(small_spec({"checkpoint.keep": 5}), tasks_of(spec), COSTS) > plain


def test_the_vectors_of_a_split_on_updates_take_room_in_checkpoints() -> None:
    split = {"bulk": 2.0, "source": {"name": "updates", "window": 16}}
    cheap = small_spec({"branches.bulk-sgd.split": split})
    plain = disk_of(small_spec(), tasks_of(cheap), COSTS)
    more = disk_of(cheap, tasks_of(cheap), COSTS) - plain
    # 16 vectors and 4 directions of float32 numbers in each of three checkpoints.
    assert more >= 3 * 20 * 4 * COSTS.num_parameters
