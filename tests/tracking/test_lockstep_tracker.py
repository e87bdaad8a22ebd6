from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.networks import Case, digits, mlp
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.tracking.lockstep_tracker import LockstepTracker
from thalweg.tracking.tracker import SubspaceTracker

K, RUNS, STEPS = 10, 3, 21
LR = 0.1


@pytest.fixture(scope="module")
def trained() -> Case:
    return digits()


def lockstep(case: Case, chunk_size: int | None = 1024) -> LockstepObjective:
    objective = Objective(case.model, case.loss, case.data, chunk_size=chunk_size)
    return LockstepObjective(objective, vectorize_up_to=10**9)


def beginnings(case: Case, runs: int = RUNS) -> Tensor:
    """Points near the trained one, a little apart."""
    generator = torch.Generator().manual_seed(6)
    theta = Objective(case.model, case.loss, case.data).theta()
    return theta + 0.01 * torch.randn(runs, len(theta), generator=generator)


def batches(step: int, runs: int = RUNS, size: int = 50) -> Tensor:
    """Each run's mini-batch, a function of run and step."""
    rows = [
        torch.randint(0, 1797, (size,), generator=torch.Generator().manual_seed(1000 * run + step))
        for run in range(runs)
    ]
    return torch.stack(rows)


def advance(tracker: LockstepTracker, thetas: Tensor, step: int) -> Tensor:
    """Track at thetas, then one step of SGD of each run."""
    samples = batches(step, len(thetas))
    _, gradients = tracker.objective.values_and_gradients(thetas, samples)
    tracker.update(thetas, gradients)
    return thetas - LR * gradients


def solved_projection(case: Case, theta: Tensor, vector: Tensor) -> Tensor:
    """P_k v in float64, from scratch."""
    exact = copy.deepcopy(case).to(torch.float64)
    hessian = Hessian(Objective(exact.model, exact.loss, exact.data), theta.double())
    solved = top_eigenpairs(hessian, K, tolerance=1e-6, max_matvecs=2000)
    return solved.project(vector.double())


def test_every_run_is_followed_within_a_per_cent(trained: Case) -> None:
    tracker, thetas = LockstepTracker(lockstep(trained), K), beginnings(trained)
    errors, estimates, costs, renewals = [], [], [], 0
    for step in range(STEPS):
        samples = batches(step)
        _, gradients = tracker.objective.values_and_gradients(thetas, samples)
        tracker.update(thetas, gradients)
        costs.append(max(report.subspace_cost for report in tracker.reports))
        renewals += tracker.reports[0].renewed
        assert len({report.renewed for report in tracker.reports}) == 1
        if step % 7 == 6:
            projected = tracker.project(gradients)
            for run in range(RUNS):
                truth = solved_projection(trained, thetas[run], gradients[run])
                off = (projected[run].double() - truth).norm() / gradients[run].norm()
                errors.append(float(off))
                estimates.append(tracker.reports[run].error)
        thetas = thetas - LR * gradients
    assert sorted(errors)[len(errors) // 2] < 0.006
    assert max(errors) < 0.015
    ratios = sorted(e / t for e, t in zip(estimates, errors, strict=True))
    assert 1 / 3 < ratios[len(ratios) // 2] < 3
    assert 1 < renewals < STEPS
    # The first step solves; then at most a few gradients.
    assert sum(costs[1:]) / (STEPS - 1) < 4


def test_subspace_and_eigenvalues_are_those_of_a_solve(trained: Case) -> None:
    tracker, thetas = LockstepTracker(lockstep(trained), K), beginnings(trained)
    for step in range(5):
        thetas = advance(tracker, thetas, step)
    advance(tracker, thetas, 5)
    for run in range(RUNS):
        objective = tracker.objective.objective
        solved = top_eigenpairs(Hessian(objective, thetas[run], keep_graph=True), K)
        assert torch.allclose(tracker.eigenvalues()[run], solved.eigenvalues, rtol=0.03)
        assert tracker.subspace(run).overlap(solved) > 0.999


def test_one_run_in_lockstep_is_followed_as_the_tracker_of_one_run_follows_it(
    trained: Case,
) -> None:
    runs, thetas = lockstep(trained), beginnings(trained, 1)
    tracker, alone = LockstepTracker(runs, K), SubspaceTracker(runs.objective, K)
    for step in range(20):
        gradients = runs.values_and_gradients(thetas, batches(step, 1))[1]
        tracker.update(thetas, gradients)
        subspace = alone.update(thetas[0], gradients[0])
        apart = tracker.project(gradients)[0] - subspace.project(gradients[0])
        allowed = 3 * (tracker.reports[0].error + alone.report.error)
        assert float(apart.norm() / gradients.norm()) < allowed < 0.06
        thetas = thetas - LR * gradients
    assert tracker.state_dict().keys() & alone.state_dict().keys() == {
        *("generator", "reports", "edges", "escalation", "solve_cost", "bare", "contents"),
        *("biased", "step", "loss"),
    }


@pytest.mark.slow
def test_the_order_of_runs_and_the_chunk_size_do_not_matter(trained: Case) -> None:
    order = torch.tensor([2, 0, 1])
    found = {}
    for name, chunk_size, picked in (
        ("plain", 1024, torch.arange(RUNS)),
        ("in chunks", 100, torch.arange(RUNS)),
        ("in another order", 1024, order),
    ):
        tracker = LockstepTracker(lockstep(trained, chunk_size), K)
        thetas, vectors = beginnings(trained)[picked], torch.eye(RUNS, 1510)[picked]
        for step in range(8):
            gradients = tracker.objective.values_and_gradients(thetas, batches(step)[picked])[1]
            tracker.update(thetas, gradients)
            thetas = thetas - LR * gradients
        found[name] = torch.empty(RUNS, 1510)
        found[name][picked] = tracker.project(vectors)
    for name in ("in chunks", "in another order"):
        assert (found[name] - found["plain"]).norm() < 1e-3 * found["plain"].norm()


def test_a_restored_tracker_goes_on_bit_for_bit(trained: Case) -> None:
    tracker, thetas = LockstepTracker(lockstep(trained), K), beginnings(trained)
    for step in range(5):
        thetas = advance(tracker, thetas, step)
    restored = LockstepTracker(lockstep(trained), K)
    # As a file keeps tensors: without their strides.
    state = tree_map_only(Tensor, lambda t: t.contiguous().clone(), tracker.state_dict())
    restored.load_state_dict(state)
    assert restored.reports == tracker.reports
    other, renewed = thetas.clone(), []
    assert torch.equal(restored.project(other), tracker.project(thetas))
    for step in range(5, 30):
        thetas, other = advance(tracker, thetas, step), advance(restored, other, step)
        renewed.append(tracker.reports[0].renewed)
        assert torch.equal(restored.project(other), tracker.project(thetas))
        assert torch.equal(other, thetas)
    assert any(renewed)


def test_a_run_whose_basis_turns_far_gets_a_second_power_step(trained: Case) -> None:
    tracker, thetas = LockstepTracker(lockstep(trained), K), beginnings(trained)
    thetas = advance(tracker, thetas, 0)
    tracker.update(thetas, tracker.objective.values_and_gradients(thetas)[1])
    assert not tracker.reports[0].renewed
    calm = tracker.reports[0].subspace_cost
    far = thetas.clone()
    far[1] += 0.05 * torch.randn(far.shape[1], generator=torch.Generator().manual_seed(7))
    tracker.update(far, tracker.objective.values_and_gradients(far)[1])
    assert tracker.reports[1].subspace_cost >= 2 * calm


def test_a_run_that_diverged_is_named(trained: Case) -> None:
    tracker, thetas = LockstepTracker(lockstep(trained), K), beginnings(trained)
    thetas = advance(tracker, thetas, 0)
    gradients = torch.ones_like(thetas)
    thetas[2, 0] = torch.nan
    with pytest.raises(Diverged, match="in run 2"):
        tracker.update(thetas, gradients)


@pytest.mark.gpu
def test_a_step_waits_for_the_gpu_once(trained: Case) -> None:
    inputs, targets = trained.data
    moved = Case(copy.deepcopy(trained.model).cuda(), trained.loss, (inputs.cuda(), targets.cuda()))
    objective = Objective(moved.model, moved.loss, moved.data)
    tracker = LockstepTracker(LockstepObjective(objective, replay=True), K, error=0.1)
    thetas = beginnings(trained).cuda()
    gradients = tracker.objective.values_and_gradients(thetas)[1]
    for _ in range(3):
        tracker.update(thetas, gradients)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # It warns of itself, too.
        torch.cuda.set_sync_debug_mode("warn")
        try:
            tracker.update(thetas, gradients)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert not tracker.reports[0].renewed
    assert sum("synchronizing CUDA operation" in str(each.message) for each in caught) == 1


def test_settings_and_shapes_that_do_not_fit_are_refused(trained: Case) -> None:
    runs, thetas = lockstep(trained), beginnings(trained)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"k": 0}, "k: got 0"),
        ({"k": 10**6}, "k: got 1000000"),
        ({"k": 2, "error": 0.0}, "error: got 0.0"),
    ]
    for options, message in cases:
        with pytest.raises(InvalidInput, match=message):
            LockstepTracker(runs, **options)
    few = Objective(mlp().model, mlp().loss, tuple(part[:7] for part in mlp().data))
    with pytest.raises(InvalidInput, match="7 samples"):
        LockstepTracker(LockstepObjective(few), 2)
    tracker = LockstepTracker(runs, 2)
    with pytest.raises(InvalidInput, match=r"call update\(\) first"):
        tracker.project(thetas)
    with pytest.raises(InvalidInput, match="thetas and vectors"):
        tracker.update(thetas, thetas[:2])
    with pytest.raises(InvalidInput, match="thetas and vectors"):
        tracker.update(thetas[0], thetas[0])
    tracker.update(thetas, thetas)
    with pytest.raises(InvalidInput, match="thetas and vectors"):
        tracker.update(thetas[:2], thetas[:2])
