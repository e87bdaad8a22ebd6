import copy
import math

import pytest
import torch

from tests import dense, networks
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.optim.split import SplitUpdate
from thalweg.optim.stability import edge_of_stability
from thalweg.spectrum.threshold_split import split_at
from thalweg.tracking.preconditioner import preconditioner
from thalweg.tracking.threshold_source import FRACTIONS, ThresholdSource, _Plan


def silu() -> tuple[networks.Case, Objective]:
    case = networks.silu().to(torch.float64)
    return case, Objective(case.model, case.loss, case.data)


def regression(samples: int = 512) -> tuple[networks.Case, Objective]:
    """A linear model: its Hessian is the same everywhere, so that a reference never ages."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([4.0, 3.0, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1])
    inputs = torch.randn(samples, 8, generator=generator) * scale
    targets = torch.randn(samples, 1, generator=generator)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1, bias=False)
    case = networks.Case(model, torch.nn.MSELoss(), (inputs, targets)).to(torch.float64)
    # The way to multiply is not chosen by timing: runs are compared to the last bit.
    return case, Objective(case.model, case.loss, case.data, vectorize_up_to=0)


def filtered(matrix: torch.Tensor, vector: torch.Tensor, tau: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (torch.sigmoid((values - tau) / (0.1 * tau)) * (vectors.T @ vector))


def test_a_split_is_that_of_the_dense_hessian_and_costs_nothing_twice() -> None:
    case, objective = silu()
    source = ThresholdSource(objective, 0.2, relative=True, error=1e-6)
    gradient = objective.gradient()
    source.update(objective.theta(), gradient)
    matrix = dense.hessian(dense.flat_loss(case), objective.theta())
    tau = 0.2 * float(torch.linalg.eigvalsh(matrix)[-1])
    assert source.threshold == pytest.approx(tau, rel=1e-6)
    parts = source.split(gradient)
    true = filtered(matrix, gradient, tau)
    assert float((parts.dominant - true).norm() / gradient.norm()) < 1e-5
    assert parts.subspace_cost == 0
    other = source.split(gradient + 1)
    assert other.subspace_cost > 0
    true = filtered(matrix, gradient + 1, tau)
    assert float((other.dominant - true).norm() / (gradient + 1).norm()) < 1e-5
    assert torch.allclose(other.dominant + other.bulk, gradient + 1)


def test_in_the_optimizers_metric() -> None:
    case, objective = silu()
    adam = torch.optim.Adam(case.model.parameters(), lr=1e-3)
    source = ThresholdSource(objective, 0.3, relative=True, optimizer=adam, error=1e-7)
    optimizer = SplitUpdate(adam, source, dominant=1.0, bulk=0.0)
    before = objective.theta()
    case.loss(case.model(case.data[0]), case.data[1]).backward()
    optimizer.step()
    root = preconditioner(adam).sqrt()
    matrix = dense.hessian(dense.flat_loss(case), before) / root / root[:, None]
    proposed = optimizer.proposed
    assert proposed is not None
    tau = 0.3 * float(torch.linalg.eigvalsh(matrix)[-1])
    true = filtered(matrix, root * proposed, tau) / root
    moved = objective.theta() - before
    assert float((moved - true).norm() / true.norm()) < 1e-4


def test_beyond_the_edge_follows_the_learning_rate() -> None:
    case, objective = silu()
    sgd = torch.optim.SGD(case.model.parameters(), lr=0.5)
    source = ThresholdSource(objective, edge_of_stability(sgd, 0.1))
    source.update()
    assert source.threshold == pytest.approx(0.4)
    sgd.param_groups[0]["lr"] = 1.0
    source.update()
    assert source.threshold == pytest.approx(0.2)


def test_few_samples_serve_where_the_hessian_stays() -> None:
    case, objective = regression()
    source = ThresholdSource(objective, 0.3, relative=True, error=0.02)
    generator = torch.Generator().manual_seed(1)
    matrix = dense.hessian(dense.flat_loss(case), objective.theta())
    tau = 0.3 * float(torch.linalg.eigvalsh(matrix)[-1])
    reports = []
    for _ in range(12):
        vector = torch.randn(8, generator=generator).double()
        source.update(vector=vector)
        off = float((source.split(vector).dominant - filtered(matrix, vector, tau)).norm())
        assert off / float(vector.norm()) < 3 * source.report.error + 1e-9
        reports.append(source.report)
    assert reports[0].renewed
    assert all(not report.renewed and report.target_met for report in reports[1:])
    assert max(report.subspace_cost for report in reports[1:]) < reports[0].subspace_cost / 8


def test_where_few_samples_do_not_serve_all_are_taken_and_the_attempts_end() -> None:
    case, objective = regression()
    source = ThresholdSource(objective, 0.3, relative=True, error=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(8):
        # Each update is of another problem: nothing of the last one is left.
        with torch.no_grad():
            case.data[0].copy_(torch.randn(512, 8, generator=generator).double())
        vector = torch.randn(8, generator=generator).double()
        source.update(vector=vector)
        matrix = dense.hessian(dense.flat_loss(case), objective.theta())
        tau = source.threshold
        off = float((source.split(vector).dominant - filtered(matrix, vector, tau)).norm())
        assert off / float(vector.norm()) < 3e-3
        assert source.report.renewed
    assert source._plan.at == len(FRACTIONS)


def test_the_plan_goes_to_more_samples_and_rests() -> None:
    plan = _Plan(tries=True)
    assert plan.renewed(10) == FRACTIONS[0]
    plan.spent, plan.kept = 0.5, 20
    assert plan.renewed(10) == FRACTIONS[0]
    plan.kept = 0
    assert plan.renewed(10) == FRACTIONS[1]
    assert [plan.renewed(10) for _ in range(2)] == [FRACTIONS[2], None]
    assert [plan.renewed(10) for _ in range(100)][-1] == FRACTIONS[0]


def test_the_state_continues_bit_for_bit() -> None:
    def run(steps: int, source: ThresholdSource, first: int = 0) -> list[torch.Tensor]:
        found = []
        for step in range(first, steps):
            generator = torch.Generator().manual_seed(step)
            vector = torch.randn(8, generator=generator).double()
            source.update(vector=vector)
            found.append(source.split(vector).dominant)
        return found

    def source() -> ThresholdSource:
        return ThresholdSource(regression()[1], 0.3, relative=True, error=0.02, seed=3)

    whole = run(8, source())
    first, second = source(), source()
    run(4, first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.report == first.report
    assert torch.equal(second.subspace.basis, first.subspace.basis)
    for one, other in zip(whole[4:], run(8, second, 4), strict=True):
        assert torch.equal(one, other)


def test_both_parts_of_an_optimizer() -> None:
    """Dom- and Bulk- add up to the optimizer's own update."""
    moved = []
    for parts in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        case, objective = silu()
        source = ThresholdSource(objective, 0.2, relative=True, error=1e-4)
        sgd = torch.optim.SGD(case.model.parameters(), lr=0.1)
        optimizer = SplitUpdate(sgd, source, *parts)
        before = objective.theta()
        case.loss(case.model(case.data[0]), case.data[1]).backward()
        optimizer.step()
        moved.append(objective.theta() - before)
    assert torch.allclose(moved[0] + moved[1], moved[2])


def test_the_subspace_is_what_was_seen_above_the_threshold() -> None:
    _, objective = silu()
    source = ThresholdSource(objective, 0.2, relative=True, error=1e-8)
    space = source.update()
    assert float(space.eigenvalues.min()) > source.threshold
    gradient = objective.gradient()
    found = split_at(objective, gradient, source.threshold, error=1e-8)
    assert found.profile is not None
    share = found.profile.share_above(source.threshold)
    assert share.lower - 1e-6 <= space.alignment(gradient) ** 2 <= share.upper + 1e-6


@pytest.mark.parametrize(
    ("threshold", "settings", "words"),
    [
        (0.0, {}, "threshold"),
        (1.5, {"relative": True}, "part of lambda_1"),
        (0.5, {"error": 0.0}, "error"),
        (0.5, {"width": 0.0}, "width"),
    ],
)
def test_settings_out_of_range_are_refused(
    threshold: float, settings: dict[str, float], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        ThresholdSource(silu()[1], threshold, **settings)  # type: ignore[arg-type]


def test_nothing_to_split_before_the_first_update() -> None:
    source = ThresholdSource(silu()[1], 0.5)
    assert math.isnan(source.threshold)
    with pytest.raises(InvalidInput, match="call update"):
        source.split(torch.ones(3))
    with pytest.raises(InvalidInput, match="call update"):
        _ = source.subspace
