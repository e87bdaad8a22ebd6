from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.networks import Case, descend, digits, mlp
from tests.sampling import few
from thalweg.errors import Diverged, InvalidInput
from thalweg.linalg import orthonormalize
from thalweg.loss.objective import Objective
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.operators.preconditioned import Preconditioned
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.gap import GapClosed
from thalweg.spectrum.subspace import Subspace, random_subspace
from thalweg.tracking.power_step import PowerStep, power_step
from thalweg.tracking.source import FixedSubspace, Split, TargetMissed, TrackerReport
from thalweg.tracking.tracker import SubspaceTracker

K = 10


def symmetric(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these eigenvalues, and its eigenvectors as columns."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    vectors = torch.linalg.qr(normal)[0]
    return (vectors * torch.tensor(values, dtype=torch.float64)) @ vectors.T, vectors


def near(vectors: Tensor, distance: float, seed: int = 0) -> Tensor:
    """Rows that span nearly what the columns do."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(vectors.shape, generator=generator, dtype=torch.float64)
    return orthonormalize(vectors + distance * noise / noise.norm()).T


def distance(rows: Tensor, vectors: Tensor) -> float:
    """Sine of the largest angle between two spaces of one dimension."""
    return float(torch.linalg.matrix_norm(vectors - rows.T @ (rows @ vectors), 2))


POSITIVE = [9.0, 6.0, 4.0, *torch.linspace(-0.4, 0.4, 37).tolist()]
INDEFINITE = [5.0, 3.0, -0.2, *torch.linspace(-0.3, -4.0, 37).tolist()]


def test_power_steps_converge_to_the_eigenspace_at_the_rate_of_the_gap() -> None:
    matrix, vectors = symmetric(POSITIVE)
    rows = near(vectors[:, :3], 0.1)
    for _ in range(6):
        before = distance(rows, vectors[:, :3])
        rows = power_step(rows, rows @ matrix, 3).rows
        assert distance(rows, vectors[:, :3]) < 1.2 * (0.4 / 4.0) * before
    assert distance(rows, vectors[:, :3]) < 1e-6


def test_the_basis_after_a_power_step_is_orthonormal() -> None:
    for values in (POSITIVE, INDEFINITE):
        matrix, vectors = symmetric(values)
        rows = near(vectors[:, :5], 0.3)
        step = power_step(rows, rows @ matrix, 3)
        identity = torch.eye(3, dtype=torch.float64)
        assert torch.allclose(step.rows @ step.rows.T, identity, atol=1e-12)


def test_the_eigenvalues_of_a_power_step_belong_to_the_new_basis() -> None:
    # Against Rayleigh-Ritz on the new basis: of second order in the distance of the old one.
    matrix, vectors = symmetric(POSITIVE)
    errors = []
    for size in (0.04, 0.02):
        rows = near(vectors[:, :3], size)
        step = power_step(rows, rows @ matrix, 3)
        ritz = torch.linalg.eigvalsh(step.rows @ matrix @ step.rows.T).flip(0)
        old = torch.linalg.eigvalsh(rows @ matrix @ rows.T).flip(0)
        errors.append(float((step.eigenvalues - ritz).abs().max()))
        assert errors[-1] < 0.3 * float((old - ritz).abs().max())
    assert errors[1] < 0.3 * errors[0]


def test_guard_vectors_are_dropped_from_the_result() -> None:
    matrix, vectors = symmetric(POSITIVE)
    rows = near(vectors[:, :5], 0.05)
    assert power_step(rows, rows @ matrix, 3).rows.shape == (3, 40)


def test_an_eigenvalue_that_is_not_positive_among_the_top_k_is_handled() -> None:
    values = [5.0, 3.0, -0.2, *torch.linspace(-0.01, 0.01, 37).tolist()]
    matrix, vectors = symmetric(values)
    rows = near(vectors[:, :3], 0.05)
    step = power_step(rows, rows @ matrix, 3)
    assert torch.allclose(step.eigenvalues, torch.tensor(values[:3]).double(), atol=0.05)
    assert distance(step.rows, vectors[:, :3]) < 0.05


@pytest.fixture(scope="module")
def warm() -> Case:
    return digits()


@pytest.fixture
def trained(warm: Case) -> Case:
    return copy.deepcopy(warm)


def tracked(case: Case, **options: Any) -> SubspaceTracker:
    objective = Objective(case.model, case.loss, case.data, vectorize_up_to=0)
    return SubspaceTracker(objective, K, **options)


def along(case: Case, steps: int, begin: int = 1000) -> Iterator[int]:
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    for step in range(begin, begin + steps):
        yield step
        descend(case, optimizer, step)


def solved(case: Case) -> Subspace:
    """The subspace in float64, from scratch."""
    exact = copy.deepcopy(case).to(torch.float64)
    objective = Objective(exact.model, exact.loss, exact.data, vectorize_up_to=0)
    return top_eigenpairs(Hessian(objective, keep_graph=True), K, tolerance=1e-6, max_matvecs=2000)


def test_the_projection_of_the_gradient_is_followed_within_a_per_cent(trained: Case) -> None:
    tracker = tracked(trained)
    errors, estimates, costs = [], [], []
    for step in along(trained, 41):
        gradient = tracker.objective.gradient()
        subspace = tracker.update(vector=gradient)
        costs.append(tracker.report.subspace_cost)
        if step % 4 == 0 and step > 1000:
            reference = solved(trained).project(gradient.double())
            error = (subspace.project(gradient).double() - reference).norm() / gradient.norm()
            errors.append(float(error))
            estimates.append(tracker.report.error)
            assert not tracker.report.renewed or tracker.report.checked_error is not None
    median = sorted(errors)[len(errors) // 2]
    assert median < 0.005
    assert max(errors) < 0.015
    ratios = sorted(e / t for e, t in zip(estimates, errors, strict=True))
    assert 1 / 3 < ratios[len(ratios) // 2] < 3
    assert sum(costs[1:]) / 40 < 4


def test_a_stale_basis_would_not_do(trained: Case) -> None:
    # Otherwise the test above would show nothing.
    stale = solved(trained)
    list(along(trained, 40))
    gradient = tracked(trained).objective.gradient().double()
    now = solved(trained)
    error = (stale.project(gradient) - now.project(gradient)).norm() / gradient.norm()
    assert error > 0.02


def test_the_tracked_eigenvalues_are_those_of_the_hessian(trained: Case) -> None:
    tracker = tracked(trained)
    for _ in along(trained, 15):
        tracker.update()
    # `along` made one more step after the last update.
    subspace = tracker.update()
    reference = solved(trained).eigenvalues
    assert float(((subspace.eigenvalues - reference) / reference[0]).abs().max()) < 0.01


def test_refining_one_vector_improves_its_bulk_part(trained: Case) -> None:
    plain, refined = tracked(trained), tracked(trained, bulk_error=1e-4)
    for _ in along(trained, 13):
        gradient = plain.objective.gradient()
        plain.update(vector=gradient)
        refined.update(vector=gradient)
    # The last update's theta is a step behind the model: return to it.
    gradient = plain.objective.gradient()
    plain.update(vector=gradient)
    refined.update(vector=gradient)
    bulk = solved(trained).reject(gradient.double())
    before, after = plain.split(gradient), refined.split(gradient)
    assert (before.refined, after.refined) == (False, True)
    assert after.subspace_cost > 0
    error_before = float((before.bulk.double() - bulk).norm() / bulk.norm())
    error_after = float((after.bulk.double() - bulk).norm() / bulk.norm())
    assert error_after < 0.5 * error_before
    assert error_after < 0.02
    assert torch.allclose(after.dominant + after.bulk, gradient, atol=1e-6)


def test_a_refinement_shares_the_graph_of_the_gradient_at_its_theta(
    trained: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, other = tracked(trained, bulk_error=1e-4), tracked(trained, bulk_error=1e-4)
    for _ in along(trained, 3):
        tracker.update(vector=tracker.gradient())
        other.update(vector=other.objective.gradient())
    gradient = tracker.gradient()
    assert torch.allclose(gradient, tracker.objective.gradient(), atol=1e-7)
    tracker.update(vector=gradient)
    other.update(vector=gradient)
    parts, evaluated = [], []
    for each in (tracker, other):
        with monkeypatch.context() as patch:
            original, passes = each.objective.evaluations, []
            patch.setattr(
                each.objective,
                "evaluations",
                lambda *a, f=original, p=passes, **k: p.append(a) or f(*a, **k),
            )
            parts.append(each.split(gradient))
        evaluated.append([samples for _, samples in passes].count(None))
    assert evaluated == [0, 1]
    assert parts[0].refined
    assert torch.allclose(parts[0].bulk, parts[1].bulk, atol=1e-6)


def test_the_graph_of_a_gradient_serves_no_other_theta(trained: Case) -> None:
    tracker, other = tracked(trained, bulk_error=1e-4), tracked(trained, bulk_error=1e-4)
    stale = tracker.gradient()
    for _ in along(trained, 3):
        tracker.update(vector=stale)
        other.update(vector=stale)
        assert torch.equal(tracker.split(stale).bulk, other.split(stale).bulk)


def test_the_graph_of_a_gradient_is_given_up_where_the_tracker_moves_on(trained: Case) -> None:
    built: list[weakref.ref[Hessian]] = []

    def noted(*arguments: Any, **options: Any) -> Hessian:
        operator = Hessian(*arguments, **options)
        built.append(weakref.ref(operator))
        return operator

    tracker = tracked(trained, operator=noted)
    for step in along(trained, 2):
        if step == 1000:
            tracker.update(vector=tracker.gradient())
            assert built[0]() is not None
        else:
            tracker.update()
            assert built[0]() is None


def test_the_gradient_is_that_of_the_loss_in_whichever_metric_is_followed(trained: Case) -> None:
    def scaled(*arguments: Any, **options: Any) -> Preconditioned:
        hessian = Hessian(*arguments, **options)
        return Preconditioned(hessian, torch.full((hessian.shape[0],), 4.0))

    for operator in (scaled, GaussNewton, GradientCovariance):
        tracker = tracked(trained, operator=operator)
        assert torch.allclose(tracker.gradient(), tracker.objective.gradient(), atol=1e-7)


def test_exact_solves_at_every_update(trained: Case) -> None:
    tracker = tracked(trained, exact=True, tolerance=1e-4)
    for _ in along(trained, 3):
        subspace = tracker.update()
        assert subspace.overlap(solved(trained)) > 1 - 1e-5
        assert tracker.report.renewed
        assert tracker.report.subspace_cost > K


def test_every_n_keeps_the_basis_between(trained: Case) -> None:
    tracker = tracked(trained, every=4)
    bases, costs = [], []
    for _ in along(trained, 9):
        bases.append(tracker.update().basis)
        costs.append(tracker.report.subspace_cost)
    changed = [not torch.equal(a, b) for a, b in zip(bases[1:], bases[:-1], strict=True)]
    assert changed == [False, False, False, True, False, False, False, True]
    assert [cost > 0 for cost in costs] == [True, *changed]


@pytest.mark.parametrize(
    "options", few(2, [{"bulk_error": 0.02}, {"every": 3}, {}, {"exact": True}]), ids=str
)
def test_a_restored_tracker_goes_on_bit_for_bit(warm: Case, options: dict[str, Any]) -> None:
    undisturbed, resumed = copy.deepcopy(warm), copy.deepcopy(warm)
    first = tracked(undisturbed, seed=3, **options)
    for _ in along(undisturbed, 7):
        first.update()
    saved = copy.deepcopy(first.state_dict())
    second = tracked(resumed, seed=99, **options)
    second.load_state_dict(saved)
    resumed.model.load_state_dict(undisturbed.model.state_dict())
    pairs = zip(along(undisturbed, 8, 2000), along(resumed, 8, 2000), strict=True)
    for _ in pairs:
        one, two = first.update(), second.update()
        assert torch.equal(one.basis, two.basis)
        assert torch.equal(one.eigenvalues, two.eigenvalues)
        assert repr(first.report) == repr(second.report)
        gradient = first.objective.gradient()
        assert torch.equal(first.split(gradient).bulk, second.split(gradient).bulk)
        assert first.split(gradient).error == second.split(gradient).error


def test_a_tracker_restored_before_its_first_update_starts_alike(trained: Case) -> None:
    first, second = tracked(trained), tracked(trained, seed=5)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.update().basis, second.update().basis)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(warm: Case) -> None:
    def run(seed: int) -> list[Tensor]:
        case = copy.deepcopy(warm)
        tracker = tracked(case, seed=seed)
        return [tracker.update().basis for _ in along(case, 4)]

    first, again, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[-1], other[-1])


def test_tracking_disturbs_neither_model_nor_random_state(trained: Case) -> None:
    tracker = tracked(trained, bulk_error=1e-4)
    before, state = tracker.objective.theta(), torch.get_rng_state()
    for _ in range(3):
        tracker.update()
        tracker.split(torch.ones_like(before))
    assert torch.equal(tracker.objective.theta(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_unequally_weighted_samples_give_the_subspace_of_the_weighted_loss() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    inputs = torch.randn(400, 6, dtype=torch.float64)
    target = torch.where(inputs[:, 0] > 1, 0, torch.randint(1, 3, (400,)))
    loss = nn.CrossEntropyLoss(weight=torch.tensor([50.0, 1.0, 0.1], dtype=torch.float64))
    objective = Objective(model, loss, (inputs, target), vectorize_up_to=0)
    exact = top_eigenpairs(Hessian(objective), 2, tolerance=1e-9)
    tracker = SubspaceTracker(objective, 2, tolerance=1e-9)
    assert tracker.update().overlap(exact) > 1 - 1e-8
    for _ in range(30):
        assert tracker.update().overlap(exact) > 1 - 1e-6


def test_a_problem_of_few_samples_is_solved_exactly() -> None:
    case = mlp().to(torch.float64)
    few = (case.data[0][:5], case.data[1][:5])
    tracker = SubspaceTracker(Objective(case.model, case.loss, few), 2, tolerance=1e-7)
    tracker.update()
    exact = top_eigenpairs(Hessian(tracker.objective), 2, tolerance=1e-8)
    assert tracker.update().overlap(exact) > 1 - 1e-10


def test_an_untouched_vector_costs_nothing_and_has_no_error(trained: Case) -> None:
    tracker = tracked(trained)
    for _ in along(trained, 3):
        tracker.update()
    zero = torch.zeros(tracker.objective.num_parameters)
    assert tracker.estimate_error(zero) == 0
    assert not tracker.split(zero).dominant.any()


def test_a_diverged_theta_raises_and_is_not_taken_in(trained: Case) -> None:
    tracker = tracked(trained)
    basis = tracker.update().basis
    with pytest.raises(Diverged):
        tracker.update(torch.full_like(tracker.objective.theta(), float("nan")))
    assert torch.equal(tracker.subspace.basis, basis)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: got 0.*from 1 to"),
        ({"k": 54}, "k: got 54"),
        ({"k": 2, "error": 0.0}, "error: got 0.0"),
        ({"k": 2, "bulk_error": -1.0}, "error: got -1.0"),
        ({"k": 2, "every": 0}, "every: got 0"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    model = nn.Linear(4, 1)
    objective = Objective(model, nn.MSELoss(), (torch.ones(9, 4), torch.ones(9, 1)))
    with pytest.raises(InvalidInput, match=message):
        SubspaceTracker(objective, **options)


def test_asking_before_the_first_update_names_the_mend(trained: Case) -> None:
    for ask in (lambda t: t.subspace, lambda t: t.split(torch.zeros(1))):
        with pytest.raises(InvalidInput, match=r"call update\(\) first"):
            ask(tracked(trained))


def test_what_was_counted_can_be_read_by_its_former_name() -> None:
    report = TrackerReport.from_state(
        {"error": 0.0, "gradients": 2.5, "renewed": True, "subset": 0, "age": 0}
    )
    assert report.subspace_cost == 2.5
    for counted in (report, Split(torch.zeros(1), torch.zeros(1), 0.0, 0.0, True, 2.5)):
        with pytest.warns(DeprecationWarning, match="subspace_cost now"):
            assert counted.gradients == 2.5


def test_a_fixed_subspace_stays() -> None:
    space = random_subspace(6, 2, 0)
    source = FixedSubspace(space)
    vector = torch.arange(6.0)
    assert source.update(vector, vector) is space
    split = source.split(vector)
    assert torch.equal(split.dominant, space.project(vector))
    assert (split.error, source.report.subspace_cost) == (0.0, 0.0)
    other = FixedSubspace(random_subspace(6, 2, 1))
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.subspace.basis, space.basis)


def test_a_refinement_is_exact_to_second_order() -> None:
    # The formula of `split`.
    matrix, vectors = symmetric(POSITIVE)
    exact = Subspace(vectors[:, :3], torch.ones(3))
    vector = torch.ones(40, dtype=torch.float64)
    for size in (1e-2, 5e-3):
        block = near(vectors[:, :3], size)
        values, turn = torch.linalg.eigh(block @ matrix @ block.T)
        step = PowerStep(turn.flip(1).T @ block, values.flip(0))
        plain = step.project(vector) - exact.project(vector)
        refined = step.refined_projection(DenseOperator(matrix), vector)
        error = refined - exact.project(vector)
        # First order is damped by at most lambda_4 / lambda_3 = 0.1; nothing else is left.
        assert error.norm() < 0.12 * plain.norm()


def test_a_repeated_eigenvalue_is_tracked_with_its_copies() -> None:
    # Two outputs of a linear model have one Hessian each, and the same.
    torch.manual_seed(0)
    inputs = torch.randn(64, 3) * torch.tensor([3.0, 1.0, 1.0])
    objective = Objective(nn.Linear(3, 2), nn.MSELoss(), (inputs, torch.randn(64, 2)))
    tracker = SubspaceTracker(objective, 2)
    eigenvalues = tracker.update().eigenvalues
    expected = torch.linalg.eigvalsh(Hessian(objective) @ torch.eye(8)).flip(0)[:2]
    assert torch.allclose(expected[0], expected[1], rtol=1e-4)
    assert torch.allclose(eigenvalues, expected, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "k"), few(1, [(GaussNewton, 10), (GradientCovariance, 8)]))
def test_any_operator_of_the_loss_is_tracked(trained: Case, kind: Any, k: int) -> None:
    objective = Objective(trained.model, trained.loss, trained.data, vectorize_up_to=0)
    tracker = SubspaceTracker(objective, k, operator=kind)
    exact = copy.deepcopy(trained).to(torch.float64)
    errors = []
    for step in along(trained, 21):
        gradient = tracker.objective.gradient()
        subspace = tracker.update(vector=gradient)
        if step % 5 == 0 and step > 1000:
            exact.model.load_state_dict(trained.model.state_dict())
            copied = Objective(exact.model, exact.loss, exact.data, vectorize_up_to=0)
            operator = kind(copied, keep_graph=True)
            truth = top_eigenpairs(operator, k, tolerance=1e-6, max_matvecs=2000)
            difference = subspace.project(gradient).double() - truth.project(gradient.double())
            errors.append(float(difference.norm() / gradient.norm()))
    assert max(errors) < 0.02
    assert max(errors) > 1e-5


@pytest.mark.slow
def test_at_the_edge_of_stability_renewals_are_rare(warm: Case) -> None:
    case = copy.deepcopy(warm)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.4)

    def descend_all() -> None:
        optimizer.zero_grad()
        case.loss(case.model(case.data[0]), case.data[1]).backward()
        optimizer.step()

    for _ in range(150):
        descend_all()
    tracker, renewals, errors, turns = tracked(case), 0, [], []
    before = solved(case)
    for step in range(40):
        gradient = tracker.objective.gradient()
        subspace = tracker.update(vector=gradient)
        renewals += tracker.report.renewed
        if step % 4 == 1:
            truth = solved(case)
            projected = truth.project(gradient.double())
            norm = gradient.norm()
            errors.append(float((subspace.project(gradient) - projected).norm() / norm))
            turns.append(float((before.project(gradient.double()) - projected).norm() / norm))
        before = solved(case) if step % 4 == 0 else before
        descend_all()
    # The eigenspace turns at every step by more than the target allows for a basis left behind.
    assert sorted(turns)[len(turns) // 2] > 0.02
    assert sorted(errors)[len(errors) // 2] < 0.01
    assert renewals < 14


def test_an_eigenvector_that_overtakes_one_of_the_subspace_is_taken_in() -> None:
    # Along the first parameter the curvature of the second grows past that of the third.
    class Crossing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.theta = nn.Parameter(torch.tensor([0.0, 0.0, 0.0]))

        def forward(self, samples: Tensor) -> Tensor:
            a, b, c = self.theta
            return (samples * (b * b * (1 + a) + 1.5 * c * c)).mean() / 2

    objective = Objective(Crossing(), None, (torch.ones(40),))
    tracker = SubspaceTracker(objective, 1, gap_every=1)
    theta = torch.zeros(3)
    assert abs(float(tracker.update(theta).basis[2, 0])) > 0.99
    for a in torch.linspace(0.1, 1.5, 15):
        theta = torch.tensor([float(a), 0.0, 0.0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GapClosed)
            for _ in range(8):
                subspace = tracker.update(theta, torch.tensor([0.0, 1.0, 1.0]))
    assert abs(float(subspace.basis[1, 0])) > 0.99
    assert float(subspace.eigenvalues[0]) == pytest.approx(2.5, rel=1e-3)


def test_a_budget_bounds_the_first_solve_too_and_then_nothing_is_known() -> None:
    case = mlp().to(torch.float64)
    objective = Objective(case.model, case.loss, case.data)
    gradient = objective.gradient()
    for budget in (4.0, 8.0, 14.0, 20.0):
        tracker = SubspaceTracker(objective, 3, budget=budget)
        with pytest.warns(TargetMissed, match="the budget of"):
            tracker.update(vector=gradient)
        # Beyond it: the look beside the basis, and a fresh product.
        assert tracker.report.subspace_cost <= max(budget, 4.0) + 5
        assert (tracker.report.error, tracker.report.target_met) == (1.0, False)
        assert tracker.report.eigenvalue_errors == ()
        assert tracker.split(gradient).error == tracker.estimate_error(gradient) == 1.0
        restored = SubspaceTracker(objective, 3, budget=budget)
        restored.load_state_dict(copy.deepcopy(tracker.state_dict()))
        assert restored.estimate_error(gradient) == 1.0
        for each in (tracker, restored):
            each.budget = 100.0
            each.update(vector=gradient)
            assert each.report.target_met
        assert torch.equal(tracker.subspace.basis, restored.subspace.basis)
