"""What cannot be built is refused before there is a folder; the way to multiply is chosen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lab.small_study import PLUGIN, small_spec
from thalweg.errors import InvalidInput
from thalweg.lab import problem_facts
from thalweg.lab.problem_facts import ProblemFacts, examine_here
from thalweg.lab.study import run
from thalweg.lab.training.building import build_setup
from thalweg.measure.clock import Clock
from thalweg.registry import load_plugin
from thalweg.tracking.tracker import SubspaceTracker

FREE = {"problem.chunk_size": None, "problem.vectorize_up_to": None}


def facts_of(changes: dict[str, Any], *plugins: str) -> ProblemFacts:
    return examine_here(small_spec(changes), plugins, "cpu")


def test_the_size_of_a_problem_is_known_and_its_subspace_neither_followed_nor_solved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SubspaceTracker, "update", None)
    facts = facts_of({})
    assert (facts.num_parameters, facts.num_samples, facts.k) == (910, 200, 3)
    assert len(facts.fingerprint) == 64


@pytest.mark.parametrize(
    ("optimizer", "kept"),
    [
        ({"name": "sgd", "lr": 0.1}, 0),
        ({"name": "sgd", "lr": 0.1, "momentum": 0.9}, 1),
        ({"name": "adam", "lr": 0.1}, 2),
    ],
    ids=["SGD", "momentum", "Adam"],
)
@pytest.mark.parametrize("size", [20, "all"])
def test_the_vectors_that_an_optimizer_keeps_are_counted(
    optimizer: dict[str, Any], kept: int, size: int | str
) -> None:
    changes = {"phases.0.optimizer": optimizer, "phases.0.batch_size": size}
    assert facts_of(changes).optimizer_vectors == kept


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"subspace.k": 1000}, r"subspace\.k: got 1000, allowed: at most the number of parameters"),
        ({"branches.sgd.subspace.k": 1000}, r"subspace\.k: got 1000"),
        ({"branches.sgd.subspace.samples": 999}, r"subspace\.samples: got 999"),
        ({"branches.sgd.batch_size": 999}, r"batch_size: got 999"),
        ({"problem.data": {"name": "mnist", "data_dir": "/nowhere"}}, "/nowhere"),
    ],
    ids=["k", "a branch's k", "a branch's Hessian", "a branch's batch", "data"],
)
def test_what_cannot_be_built_leaves_no_folder_and_is_said_in_one_line(
    changes: dict[str, Any], said: str, quick_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=said) as error:
        run(small_spec(changes), root=quick_path / "runs")
    assert "\n" not in str(error.value)
    assert not (quick_path / "runs").exists()


def test_a_plugin_of_the_user_is_loaded_where_the_problem_is_built() -> None:
    load_plugin(PLUGIN)
    problem = {"data": "waves", "model": {"name": "noisy-mlp"}, "loss": "mse"}
    facts = facts_of({"problem": problem, "subspace.k": 2}, PLUGIN)
    assert (facts.num_samples, facts.k) == (120, 2)


def test_what_the_spec_says_on_multiplying_stays_and_the_rest_is_chosen() -> None:
    given = facts_of({"problem.chunk_size": 50, "problem.vectorize_up_to": 16})
    assert (given.chunk_size, given.vectorize_up_to) == (50, 16)
    half = facts_of({"problem.chunk_size": 50, "problem.vectorize_up_to": None})
    assert half.chunk_size == 50
    assert half.vectorize_up_to >= 0
    free = facts_of(FREE)
    assert free.chunk_size >= 64
    assert free.vectorize_up_to >= 0


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
    monkeypatch.setattr(problem_facts, "_multiply", lambda *args: None)
    clock = TableClock(table, setup)
    block = torch.zeros(setup.objective.num_parameters, 3)
    chunk = problem_facts._fastest_chunk(setup, block, clock, tuple(table), table[64][1])
    assert (chunk, clock.tried) == (chosen, tried)
