"""What a step costs is measured before time is spent: what is asked for, and within a budget."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests.lab.small_study import PLUGIN, small_spec
from thalweg.curvature import SubspaceTracker
from thalweg.lab import measuring, multiplying, subspace_costs
from thalweg.lab.measuring import Measurement
from thalweg.lab.processes import call
from thalweg.lab.run.building import build_setup
from thalweg.lab.spec import dump_spec
from thalweg.lab.subspace_costs import SubspaceCosts
from thalweg.lab.timing import Clock

NO_SPLIT = {"branches.dom-sgd": "unset", "branches.bulk-sgd": "unset"}


def measured(changes: dict[str, Any], *plugins: str) -> Measurement:
    text = dump_spec(small_spec(changes))
    return Measurement(**measuring._measure(text, "cpu", 1, plugins))


@pytest.fixture
def no_subspace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be followed or solved."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("nobody has asked for a subspace")

    monkeypatch.setattr(SubspaceTracker, "update", refuse)
    monkeypatch.setattr(subspace_costs, "solve", refuse)


@pytest.mark.usefixtures("no_subspace")
def test_a_subspace_that_nobody_asks_for_is_neither_followed_nor_solved() -> None:
    probes = {"loss": 1, "test": 5, "minibatch_loss": 1, "batch_sharpness": 5, "theta_norm": 1}
    costs = measured({**NO_SPLIT, "probes": probes}, PLUGIN)
    assert costs.subspace == SubspaceCosts()
    assert costs.subspace_probes == ()
    assert costs.probes.keys() == probes.keys()
    assert min(costs.gradient, costs.step, costs.test, costs.probes["batch_sharpness"]) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {**NO_SPLIT, "probes": {"loss": 1, "sharpness": 5}},
        {**NO_SPLIT, "probes": {"loss": 1}, "phases.0.until_alignment": 0.9},
        {**NO_SPLIT, "probes": {"overlap": 5}},
        {"branches.dom-sgd": "unset", "probes": {}},
        {"branches": {"a": {"steps": 1, "split": {"bulk": 0.0, "basis": "frozen"}}}, "probes": {}},
    ],
    ids=["probe", "rule", "branch point", "split", "frozen split"],
)
def test_a_subspace_that_is_asked_for_is_followed_and_no_more(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("nobody has asked for the next eigenvalues")

    monkeypatch.setattr(subspace_costs, "solve", refuse)
    costs = measured(changes).subspace
    assert min(costs.begin, costs.tracked, costs.settled) > 0
    assert costs.settled <= costs.tracked
    assert costs.solve == 0
    assert not costs.counted


def test_eigenvalues_that_are_solved_ask_for_no_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SubspaceTracker, "update", None)
    costs = measured({**NO_SPLIT, "probes": {"solved_eigenvalues": 10}}).subspace
    assert costs.solve > 0
    assert (costs.begin, costs.tracked) == (0.0, 0.0)


def test_each_probe_is_asked_what_it_asks_for() -> None:
    costs = measured({})
    assert set(costs.subspace_probes) == {
        "sharpness",
        "alignment_gradient",
        "alignment_update",
        "norms",
        "overlap",
        "subspace_cost",
    }
    assert costs.gradient_probes == ("alignment_gradient", "norms")


@pytest.mark.usefixtures("no_subspace")
def test_what_the_budget_has_no_time_for_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BUDGET_SECONDS", 0.0)
    costs = measured({}).subspace
    assert costs.counted
    # k = 3 of N = 200 samples: 32 of them a step, renewed at every step or at every 20th.
    a_step, renewal = 4 * 32 / 200, 3 * (1 + 1.5 * 32 / 200)
    ratio = (a_step + renewal) / (a_step + renewal / 20)
    assert costs.tracked / costs.settled == pytest.approx(ratio)
    assert costs.solve / costs.tracked == pytest.approx(6 * 6 / (a_step + renewal))
    assert costs.begin / costs.tracked == pytest.approx(1 + (3 * 3 + 15) / (a_step + renewal))


def test_the_parts_are_named_while_they_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "QUIET_SECONDS", 0.0)
    said: list[str] = []
    measuring._measure(dump_spec(small_spec({"probes": {}})), "cpu", 1, (), said.append)
    assert [line.split()[1] for line in said] == ["building", "how", "gradients", "probes", "the"]


def test_a_function_in_a_process_of_its_own_can_send_lines() -> None:
    said: list[str] = []
    assert call(_talk, (3,), said.append) == 9
    assert said == ["0", "1", "2"]


def _talk(count: int, say: Any) -> int:
    for number in range(count):
        say(str(number))
    return count**2


class TableClock(Clock):
    """Takes times from a table: overhead and seconds a sample of each chunk size."""

    def __init__(self, table: dict[int, tuple[float, float]], setup: Any) -> None:
        super().__init__("cpu", 1e9)
        self.table = table
        self.setup = setup
        self.tried: list[int] = []

    def seconds(self, function: Any, times: int = 1) -> float:
        assert isinstance(function, partial)
        chunk, size = self.setup.objective.chunk_size, function.args[2]
        self.tried.append(chunk)
        overhead, a_sample = self.table[chunk]
        return overhead * -(-size // chunk) + a_sample * size


@pytest.mark.parametrize(
    ("table", "chosen", "tried"),
    [
        # Overheads decide: the larger, the faster.
        ({64: (1e-2, 1e-5), 256: (1e-2, 1e-5), 1024: (1e-2, 1e-5)}, 1024, [64, 256, 1024]),
        # Within 15 % of each other: the largest.
        ({64: (0, 1e-5), 256: (0, 1.1e-5), 1024: (0, 1e-5)}, 1024, [64, 256, 1024]),
        # Out of the cache: no larger one is tried.
        ({64: (0, 1e-5), 256: (0, 2e-5), 1024: (0, 1e-5)}, 64, [64, 256]),
        # 256 samples take 2.6 s, and no overhead counts beside that.
        ({64: (0, 1e-2), 256: (0, 1e-2), 1024: (0, 1e-2)}, 64, [64]),
    ],
    ids=["overheads", "equal", "cache", "slow"],
)
def test_the_chunk_is_the_largest_that_is_not_clearly_slower(
    table: dict[int, tuple[float, float]],
    chosen: int,
    tried: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setup = build_setup(small_spec({"problem.samples": 600}), 0, "cpu")
    monkeypatch.setattr(multiplying, "_multiply", lambda *args: None)
    clock = TableClock(table, setup)
    block = torch.zeros(setup.objective.num_parameters, 3)
    chunk, a_sample = multiplying._fastest_chunk(setup, block, clock, tuple(table), table[64][1])
    assert (chunk, clock.tried) == (chosen, tried)
    assert a_sample < 1.2 * table[chosen][1] + 1e-3
