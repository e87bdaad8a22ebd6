from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from tests.networks import Case, digits
from thalweg.errors import InvalidInput
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.optim.lockstep_sgd import LockstepSGD
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.tracking.lockstep_tracker import LockstepTracker

K, LR = 10, [0.1, 0.1, 0.05]
DOMINANT, BULK = [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]


@pytest.fixture(scope="module")
def trained() -> Case:
    return digits()


def lockstep(case: Case, *, replay: bool = False) -> LockstepSGD:
    objective = Objective(case.model, case.loss, case.data)
    runs = LockstepObjective(objective, vectorize_up_to=10**9, replay=replay)
    start = objective.theta().expand(len(LR), -1)
    return LockstepSGD(LockstepTracker(runs, K), start, LR, DOMINANT, BULK)


def batch(step: int) -> Tensor:
    return torch.randint(0, 1797, (50,), generator=torch.Generator().manual_seed(step))


def plain(case: Case, run: int, steps: int) -> Tensor:
    """The naive loop: one run, in float64, its subspace solved at every step."""
    exact = copy.deepcopy(case).to(torch.float64)
    objective = Objective(exact.model, exact.loss, exact.data)
    theta = objective.theta()
    for step in range(steps):
        gradient = objective.gradient(theta, batch(step))
        solved = top_eigenpairs(
            Hessian(objective, theta, keep_graph=True), K, tolerance=1e-5, check_repeated=0
        )
        dominant, bulk = solved.split(gradient)
        theta = theta - LR[run] * (DOMINANT[run] * dominant + BULK[run] * bulk)
    return theta


def test_every_run_goes_where_it_goes_by_itself(trained: Case) -> None:
    sgd, steps = lockstep(trained), 5
    begin = sgd.thetas.clone()
    travelled = torch.zeros(3)
    for step in range(steps):
        losses = sgd.step(batch(step).expand(3, -1))
        assert sgd.gradients is not None
        travelled += torch.tensor(LR) * sgd.gradients.norm(dim=1)
        if step == 0:
            inputs, targets = (part[batch(0)] for part in trained.data)
            expected = trained.loss(trained.model(inputs), targets).detach()
            assert torch.allclose(losses, expected.expand(3))
    for run in range(3):
        apart = float((sgd.thetas[run].double() - plain(trained, run, steps)).norm())
        # Plain SGD has rounding alone; a split adds at most 1 % of each step.
        allowed = 1e-5 if run == 0 else 0.01
        assert apart < allowed * float(travelled[run])
        assert float((sgd.thetas[run] - begin[run]).norm()) > 0.03 * float(travelled[run])


def test_mini_batches_may_be_common_or_all_samples(trained: Case) -> None:
    own, common, full, every = (lockstep(trained) for _ in range(4))
    for step in range(1):
        own.step(batch(step).expand(3, -1))
        common.step(batch(step))
        full.step(None)
        every.step(torch.arange(1797))
    assert torch.allclose(own.thetas, common.thetas, atol=1e-6)
    assert torch.allclose(full.thetas, every.thetas, atol=1e-6)
    assert not torch.allclose(own.thetas, full.thetas, atol=1e-4)


def test_a_restored_lockstep_goes_on_bit_for_bit(trained: Case) -> None:
    sgd = lockstep(trained)
    for step in range(4):
        sgd.step(batch(step).expand(3, -1))
    restored = lockstep(trained)
    restored.load_state_dict(copy.deepcopy(sgd.state_dict()))
    for step in range(4, 12):
        assert torch.equal(
            sgd.step(batch(step).expand(3, -1)), restored.step(batch(step).expand(3, -1))
        )
    assert torch.equal(sgd.thetas, restored.thetas)
    assert sgd.tracker.reports == restored.tracker.reports


@pytest.mark.gpu
def test_a_gpu_goes_where_the_cpu_goes(trained: Case) -> None:
    inputs, targets = trained.data
    moved = Case(copy.deepcopy(trained.model).cuda(), trained.loss, (inputs.cuda(), targets.cuda()))
    here, there = lockstep(trained), lockstep(moved, replay=True)
    begin = here.thetas.clone()
    for step in range(10):
        here.step(batch(step).expand(3, -1))
        there.step(batch(step).expand(3, -1))
    assert (here.thetas - there.thetas.cpu()).norm() < 0.01 * (here.thetas - begin).norm()


def test_numbers_that_are_not_one_for_each_run_are_refused(trained: Case) -> None:
    tracker, thetas = lockstep(trained).tracker, lockstep(trained).thetas
    with pytest.raises(InvalidInput, match="lr: got '2 numbers', allowed: one, or R = 3"):
        LockstepSGD(tracker, thetas, [0.1, 0.1])
    with pytest.raises(InvalidInput, match="dominant: got '4 numbers'"):
        LockstepSGD(tracker, thetas, 0.1, dominant=[1.0] * 4)
    with pytest.raises(InvalidInput, match="thetas"):
        LockstepSGD(tracker, thetas[0], 0.1)


def test_a_copy_goes_on_alike_and_a_step_that_fails_moves_no_run(trained: Case) -> None:
    sgd = lockstep(trained)
    for step in range(2):
        sgd.step(batch(step))
    copied = copy.deepcopy(sgd)
    before, gradients = sgd.thetas.clone(), sgd.gradients
    for step in range(2, 4):
        copied.step(batch(step))
    assert torch.equal(sgd.thetas, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sgd.tracker, "project", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            copy.copy(sgd).step(batch(2))
    assert torch.equal(sgd.thetas, before)
    assert sgd.gradients is gradients
    sgd = lockstep(trained)
    for step in range(4):
        sgd.step(batch(step))
    assert torch.equal(sgd.thetas, copied.thetas)
