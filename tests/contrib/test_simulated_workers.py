from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tests.optim.local_training import (
    INPUTS,
    STEPS,
    TARGETS,
    backward,
    batch,
    build,
    closure_of,
    flat,
    network,
)
from tests.optim.resuming import save_and_restore
from thalweg.contrib.averaging_period import ConstantPeriod, QuadraticRule
from thalweg.contrib.simulated_workers import SimulatedWorkers
from thalweg.errors import InvalidInput
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.source import FixedSubspace

WORKERS = 3


def workers_of(model: nn.Module, kind: str, steps: int, count: int = WORKERS) -> SimulatedWorkers:
    return SimulatedWorkers([build(kind, model) for _ in range(count)], ConstantPeriod(steps))


def write(model: nn.Module, theta: Tensor) -> None:
    parts = theta.split([p.numel() for p in model.parameters()])
    with torch.no_grad():
        for p, part in zip(model.parameters(), parts, strict=True):
            p.copy_(part.reshape(p.shape))


@pytest.mark.parametrize("kind", ["sgd", "momentum"])
def test_averages_after_every_step_are_training_on_the_mean_gradient(kind: str) -> None:
    # Exact for what is linear in the gradients: the mean of the steps is the step of the mean.
    synchronous, model = network().double(), network().double()
    plain, optimizer = build(kind, synchronous), workers_of(model, kind, 1)
    for step in range(STEPS):
        together = torch.cat([batch(step, worker) for worker in range(WORKERS)])
        backward_in_double(synchronous, together)
        plain.step()
        optimizer.step(lambda worker, step=step: backward_in_double(model, batch(step, worker)))
        assert torch.allclose(flat(synchronous), flat(model), rtol=1e-12, atol=1e-14)


def backward_in_double(model: nn.Module, samples: Tensor) -> Tensor:
    model.zero_grad()
    output = model(INPUTS[samples].double())
    loss = nn.functional.mse_loss(output, TARGETS[samples].double())
    loss.backward()
    return loss


def test_on_quadratics_the_workers_are_where_the_closed_form_says() -> None:
    # Worker w descends on curvature_w (theta - center_w)^2 / 2: theta - center shrinks by
    # (1 - lr curvature_w) a step; after H steps the mean is taken.
    curvatures, centers = [0.5, 1.5, 3.0], [1.0, -2.0, 0.25]
    theta = nn.Parameter(torch.tensor([4.0], dtype=torch.float64))
    optimizers = [SGD([theta], lr=0.2) for _ in centers]
    workers = SimulatedWorkers(optimizers, ConstantPeriod(5))

    def closure(worker: int) -> Tensor:
        workers.zero_grad()
        loss = curvatures[worker] * (theta - centers[worker]).square().sum() / 2
        loss.backward()
        return loss

    start = 4.0
    for step in range(1, 13):
        workers.step(closure)
        done = step % 5 or 5
        ends = [
            c + (1 - 0.2 * h) ** done * (start - c)
            for h, c in zip(curvatures, centers, strict=True)
        ]
        assert theta.item() == pytest.approx(sum(ends) / 3, rel=1e-12)
        if done == 5:
            start = sum(ends) / 3


def test_each_worker_keeps_its_own_moments_through_an_average() -> None:
    model = network()
    optimizer = workers_of(model, "momentum", 2, count=2)
    copies = [network(), network()]
    separate = [build("momentum", one) for one in copies]
    for step in range(4):
        optimizer.step(closure_of(model, step))
        for worker, (one, its) in enumerate(zip(copies, separate, strict=True)):
            backward(one, batch(step, worker))
            its.step()
        if step % 2:
            mean = (flat(copies[0]) + flat(copies[1])) / 2
            for one in copies:
                write(one, mean)
    for own, its, one in zip(optimizer.optimizers, separate, copies, strict=True):
        for p, q in zip(model.parameters(), one.parameters(), strict=True):
            kept, expected = own.state[p]["momentum_buffer"], its.state[q]["momentum_buffer"]
            assert torch.equal(kept, expected)
    assert torch.equal(flat(model), flat(copies[0]))


def test_settings_of_the_first_worker_are_those_of_all() -> None:
    weight = nn.Parameter(torch.zeros(1))
    workers = SimulatedWorkers([SGD([weight], lr=0.1) for _ in range(2)], ConstantPeriod(1))
    workers.param_groups[0]["lr"] = 0.5
    scheduler = torch.optim.lr_scheduler.StepLR(workers, 1, gamma=0.5)

    def closure(worker: int) -> Tensor:
        workers.zero_grad()
        (-weight.sum()).backward()
        return weight

    for expected in (0.5, 0.75, 0.875):
        workers.step(closure)
        scheduler.step()
        assert weight.item() == expected


def test_it_returns_the_loss_of_each_worker_at_its_own_parameters() -> None:
    model = network()
    workers = workers_of(model, "sgd", 4, count=2)
    copies = [network(), network()]
    separate: list[Optimizer] = [build("sgd", one) for one in copies]
    for step in range(3):
        expected = [backward(one, batch(step, w)) for w, one in enumerate(copies)]
        for one in separate:
            one.step()
        assert workers.step(closure_of(model, step)) == expected


def test_workers_whose_optimizer_needs_a_closure_are_given_one() -> None:
    model, alone = network(), network()
    workers = SimulatedWorkers(
        [SAM(SGD(model.parameters(), lr=0.1), rho=0.2) for _ in range(2)], ConstantPeriod(3)
    )
    sam = SAM(SGD(alone.parameters(), lr=0.1), rho=0.2)
    for step in range(3):
        workers.step(lambda worker, step=step: backward(model, batch(step, 0)))
        backward(alone, batch(step, 0))
        sam.step(lambda step=step: backward(alone, batch(step, 0)))
    assert torch.equal(flat(alone), flat(model))


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adamw"])
def test_its_state_can_be_saved_in_the_middle_of_a_round(kind: str) -> None:
    def build() -> tuple[nn.Module, SimulatedWorkers]:
        model = network()
        return model, workers_of(model, kind, 4)

    def step(model: nn.Module, optimizer: SimulatedWorkers, number: int) -> None:
        optimizer.step(closure_of(model, number))

    save_and_restore(build, step, saved_after=6, steps=STEPS)


def test_the_state_of_a_bare_optimizer_is_each_workers_own_from_then_on() -> None:
    model = network()
    base = AdamW(model.parameters(), lr=0.02)
    backward(model, batch(0, 0))
    base.step()
    before = copy.deepcopy(base.state_dict()["state"])
    workers = workers_of(model, "adamw", 4, count=2)
    workers.load_state_dict(base.state_dict())
    workers.step(closure_of(model, 1))
    first, second = (o.state_dict()["state"][0]["exp_avg"] for o in workers.optimizers)
    assert not torch.equal(first, second)
    assert torch.equal(base.state_dict()["state"][0]["exp_avg"], before[0]["exp_avg"])
    # A bare optimizer can take the state of the first worker in turn.
    base.load_state_dict(copy.deepcopy(workers.state_dict()))
    assert torch.equal(base.state_dict()["state"][0]["exp_avg"], first)


def test_a_split_around_it_is_of_the_update_of_the_mean() -> None:
    model = network().double()
    space = random_subspace(26, 3, 0, dtype=torch.float64)
    split = SplitUpdate(
        workers_of(model, "sgd", 3),
        FixedSubspace(space),
        0.0,
        1.0,
        parameters=list(model.parameters()),
    )
    start = flat(model)
    for step in range(5):
        before = flat(model)
        split.step(lambda worker, step=step: backward_in_double(model, batch(step, worker)))
        assert split.proposed is not None
        in_space = space.project(split.proposed)
        assert float(in_space.norm()) > 1e-3
        assert torch.allclose(flat(model), before + split.proposed - in_space, atol=1e-14)
    # What was left out at one step does not come back at the next.
    assert float(space.project(flat(model) - start).norm()) < 1e-13


def test_workers_begin_a_round_where_the_model_was_put() -> None:
    model, other = network(), network(seed=1)
    workers, fresh = workers_of(model, "sgd", 2), workers_of(other, "sgd", 2)
    for step in range(2):
        workers.step(closure_of(model, step))
    write(model, flat(other))
    for step in range(2, 4):
        workers.step(closure_of(model, step))
        fresh.step(closure_of(other, step))
    assert torch.equal(flat(model), flat(other))


def test_what_cannot_be_used_is_refused() -> None:
    model = network()
    with pytest.raises(InvalidInput, match="at least one optimizer"):
        SimulatedWorkers([], ConstantPeriod(2))
    with pytest.raises(InvalidInput, match="over different parameters"):
        SimulatedWorkers([build("sgd", model), build("sgd", network())], ConstantPeriod(2))
    with pytest.raises(InvalidInput, match="total_steps"):
        SimulatedWorkers([build("sgd", model)], QuadraticRule(0.1, 2))
    with pytest.raises(InvalidInput, match="no closure"):
        workers_of(model, "sgd", 2).step()
    with pytest.raises(InvalidInput, match=r"got '2 workers'.*3 workers"):
        workers_of(model, "sgd", 2).load_state_dict(workers_of(model, "sgd", 2, 2).state_dict())
