"""Workers in processes, the same workers in one process, and synchronous training."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LinearLR

from tests.optim.local_training import (
    CASES,
    STEPS,
    alone,
    backward,
    batch,
    build,
    flat,
    in_processes,
    network,
    simulated,
)
from thalweg.contrib.averaging_period import ConstantPeriod, QuadraticRule
from thalweg.contrib.local_sgd import LocalSGD
from thalweg.errors import InvalidInput
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.source import FixedSubspace


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    return in_processes(tmp_path_factory.mktemp("two"), 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_the_simulation_bit_for_bit(
    two: list[dict[str, Tensor]], name: str
) -> None:
    first, second = (found[name] for found in two)
    expected = simulated(name, 2)
    assert torch.equal((first + second) / 2, expected)
    apart = (first != second).any(dim=1).tolist()
    ends = {"sgd": [3, 7, 10], "momentum": [2, 5, 8, 10], "adamw, growing rounds": [3, 10]}
    assert [step for step in range(STEPS) if not apart[step]] == ends[name]


@pytest.mark.slow
def test_all_workers_are_told_that_one_begins_elsewhere(two: list[dict[str, Tensor]]) -> None:
    assert [bool(found["refused"]) for found in two] == [True, True]


@pytest.mark.slow
def test_three_processes_are_the_simulation_to_rounding(tmp_path: Path) -> None:
    found = in_processes(tmp_path, 3)
    for name in CASES:
        mean = torch.stack([worker[name] for worker in found]).mean(dim=0)
        assert torch.allclose(mean, simulated(name, 3), rtol=1e-5, atol=1e-6)


def test_one_worker_alone_is_the_wrapped_optimizer() -> None:
    bare, model = network(), network()
    plain = build("momentum", bare)
    with alone():
        optimizer = LocalSGD(build("momentum", model), ConstantPeriod(2))
        schedulers = [LinearLR(one, 1.0, 0.1, 6) for one in (plain, optimizer)]
        for step in range(6):
            for one, its in ((bare, plain), (model, optimizer)):
                backward(one, batch(step, 0))
                its.step()
            for scheduler in schedulers:
                scheduler.step()
            assert torch.equal(flat(bare), flat(model))


def test_its_state_can_be_saved_in_the_middle_of_a_round() -> None:
    def train(model: nn.Module, optimizer: LocalSGD, steps: range) -> list[int]:
        found = []
        for step in steps:
            backward(model, batch(step, 0))
            optimizer.step()
            found.append(optimizer.rounds.done)
        return found

    with alone():
        model, resumed = network(), network()
        optimizer, restored = (
            LocalSGD(AdamW(m.parameters(), lr=0.01), QuadraticRule(0.02, 1), 9)
            for m in (model, resumed)
        )
        assert train(model, optimizer, range(6)) == [1, 2, 3, 0, 1, 2]
        resumed.load_state_dict(model.state_dict())
        restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert train(model, optimizer, range(6, 9)) == [3, 0, 0]
        assert train(resumed, restored, range(6, 9)) == [3, 0, 0]
        assert torch.equal(flat(model), flat(resumed))
        assert optimizer.state_dict()["rounds"] == {"steps": 9, "period": 1, "done": 0}


def test_the_state_of_a_bare_optimizer_begins_a_first_round() -> None:
    model = network()
    base = build("momentum", model)
    backward(model, batch(0, 0))
    base.step()
    with alone():
        optimizer = LocalSGD(build("momentum", model), ConstantPeriod(3))
        backward(model, batch(1, 0))
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(base.state_dict()))
        assert optimizer.rounds.state_dict() == {"steps": 0, "period": 0, "done": 0}
        weight = next(model.parameters())
        kept = optimizer.state[weight]["momentum_buffer"]
        assert torch.equal(kept, base.state[weight]["momentum_buffer"])


def test_it_goes_around_a_split_and_around_sam() -> None:
    bare, model = network(), network()
    space = FixedSubspace(random_subspace(26, 3, 0))

    def split(own: nn.Module) -> SplitUpdate:
        base = SAM(SGD(own.parameters(), lr=0.1), rho=0.1)
        return SplitUpdate(base, space, 0.0, 1.0, parameters=list(own.parameters()))

    with alone():
        plain, optimizer = split(bare), LocalSGD(split(model), ConstantPeriod(2))
        assert optimizer.needs_closure
        for step in range(3):
            for one, its in ((bare, plain), (model, optimizer)):
                backward(one, batch(step, 0))
                its.step(lambda one=one, step=step: backward(one, batch(step, 0)))
        assert torch.equal(flat(bare), flat(model))


def test_parameters_of_several_kinds_are_averaged_each_in_its_own() -> None:
    parameters = [
        nn.Parameter(torch.tensor([[1.5, -2.5]], dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    ]
    with alone():
        LocalSGD(SGD(parameters, lr=0.1), ConstantPeriod(1)).average()
    for parameter in parameters:
        assert parameter.tolist() == [[1.5, -2.5]]


def test_without_a_process_group_it_says_what_to_do() -> None:
    with pytest.raises(InvalidInput, match=r"init_process_group.*SimulatedWorkers"):
        LocalSGD(build("sgd", network()), ConstantPeriod(2))
