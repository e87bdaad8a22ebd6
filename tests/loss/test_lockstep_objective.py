from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests import dense
from tests.networks import CASES, Case, mlp
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective

RUNS = 3


def lockstep(case: Case, way: int | None = 0, chunk_size: int | None = None) -> LockstepObjective:
    objective = Objective(case.model, case.loss, case.data, chunk_size=chunk_size)
    return LockstepObjective(objective, vectorize_up_to=way)


def points(case: Case, runs: int = RUNS) -> Tensor:
    theta = dense.flat_parameters(case)
    return theta + 0.3 * torch.randn(runs, len(theta), dtype=theta.dtype)


def blocks(thetas: Tensor, k: int = 4) -> Tensor:
    return torch.randn(len(thetas), k, thetas.shape[1], dtype=thetas.dtype)


def loss_of(case: Case, samples: Tensor | None, run: int) -> dense.Loss:
    """One run's loss, written out."""
    if samples is None:
        return dense.flat_loss(case)
    return dense.flat_loss(case, rows=samples[run] if samples.dim() == 2 else samples)


def expected_products(case: Case, thetas: Tensor, rows: Tensor, samples: Tensor | None) -> Tensor:
    """Double backward, one run and one vector after another."""
    found = []
    for run, theta in enumerate(thetas):
        loss = loss_of(case, samples, run)
        found += [torch.autograd.functional.vhp(loss, theta, row)[1] for row in rows[run]]
    return torch.stack(found).reshape(rows.shape)


SAMPLES = {
    "all": None,
    "shared": torch.tensor([4, 1, 6, 2]),
    "own": torch.tensor([[4, 1, 6, 2], [0, 1, 3, 5], [7, 0, 2, 3]]),
}


@pytest.mark.parametrize("samples", list(SAMPLES.values()), ids=list(SAMPLES))
@pytest.mark.parametrize("name", few(2, list(CASES)))
def test_products_of_every_run_are_those_of_its_hessian(name: str, samples: Tensor | None) -> None:
    case = CASES[name]().to(torch.float64)
    thetas = points(case)
    rows = blocks(thetas)
    expected = expected_products(case, thetas, rows, samples)
    for way in (0, 10**9):
        for chunk_size in (None, 7):
            found = lockstep(case, way, chunk_size).hessian_products(thetas, rows, samples)
            for run in range(RUNS):
                assert dense.relative(found[run], expected[run]) < 1e-9


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("chunk_size", few(1, [7, None]))
def test_losses_and_gradients_of_every_run_are_its_own(name: str, chunk_size: int | None) -> None:
    case = CASES[name]().to(torch.float64)
    thetas, runs = points(case), lockstep(case, chunk_size=chunk_size)
    for samples in SAMPLES.values():
        values, gradients = runs.values_and_gradients(thetas, samples)
        for run in range(RUNS):
            loss = loss_of(case, samples, run)
            assert dense.relative(values[run], loss(thetas[run])) < 1e-12
            assert dense.relative(gradients[run], dense.gradient(loss, thetas[run])) < 1e-9


def test_the_faster_way_is_measured_and_every_model_has_one() -> None:
    for make in CASES.values():
        case = make().to(torch.float64)
        thetas, runs = points(case), lockstep(case, None)
        rows = blocks(thetas)
        expected = lockstep(case, 0).hessian_products(thetas, rows)
        assert dense.relative(runs.hessian_products(thetas, rows), expected) < 1e-9


def test_the_order_of_runs_is_that_of_the_results() -> None:
    case = mlp().to(torch.float64)
    thetas, runs = points(case, 5), lockstep(case, 10**9)
    rows, samples, order = blocks(thetas), torch.arange(10).reshape(5, 2), torch.randperm(5)
    products = runs.hessian_products(thetas, rows, samples)
    again = runs.hessian_products(thetas[order], rows[order], samples[order])
    assert dense.relative(again, products[order]) < 1e-13


def test_weights_of_batches_are_those_of_each_run() -> None:
    case = CASES["silu"]().to(torch.float64)
    weights = torch.tensor([1.0, 5.0, 0.5, 2.0], dtype=torch.float64)
    case = Case(case.model, nn.CrossEntropyLoss(weight=weights), case.data)
    thetas, own = points(case), torch.arange(12).reshape(3, 4)
    for chunk_size in (None, 6):
        values, gradients = lockstep(case, chunk_size=chunk_size).values_and_gradients(thetas, own)
        for run in range(RUNS):
            loss = dense.flat_loss(case, rows=own[run])
            assert dense.relative(values[run], loss(thetas[run])) < 1e-12
            assert dense.relative(gradients[run], dense.gradient(loss, thetas[run])) < 1e-9


def test_a_chunk_whose_targets_are_all_ignored_is_refused() -> None:
    case = CASES["silu"]()
    targets = case.data[1].clone()
    targets[:2] = -100
    case = Case(case.model, case.loss, (case.data[0], targets))
    with pytest.raises(InvalidInput, match="raise chunk_size"):
        lockstep(case, chunk_size=6).values_and_gradients(
            points(case), torch.arange(12).reshape(3, 4)
        )


class OneByOne(nn.Linear):
    """Looks at a value, which no `vmap` allows."""

    def forward(self, input: Tensor) -> Tensor:
        out = super().forward(input)
        return out.tanh() if float(out.detach().sum()) > -1e9 else out


def test_a_model_without_vmap_is_evaluated_run_by_run() -> None:
    torch.manual_seed(5)
    data = (torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))
    case = Case(OneByOne(3, 2).double(), nn.MSELoss(), data)
    thetas, runs = points(case), lockstep(case, None)
    rows = blocks(thetas)
    products = runs.hessian_products(thetas, rows)
    assert dense.relative(products, expected_products(case, thetas, rows, None)) < 1e-9


def test_a_product_leaves_no_trace_in_the_model() -> None:
    case = mlp()
    before = dense.flat_parameters(case)
    lockstep(case).hessian_products(points(case), blocks(points(case)))
    assert torch.equal(dense.flat_parameters(case), before)
    assert all(p.grad is None for p in case.model.parameters())


def test_layers_that_make_the_loss_random_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    with pytest.raises(InvalidInput, match="Dropout"):
        Objective(model, nn.MSELoss(), mlp().data)

    class Functional(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(input), 0.5)

    case = Case(Functional(4, 3), nn.MSELoss(), mlp().data)
    with pytest.raises(InvalidInput, match="draws random numbers"):
        lockstep(case).values_and_gradients(points(case))


def test_all_runs_go_through_the_model_at_once() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            Counting.calls += 1
            return super().forward(input)

    case = Case(Counting(4, 3), nn.MSELoss(), mlp().data)
    runs = lockstep(case)
    runs.values_and_gradients(points(case))  # which looks at a few samples first
    before = Counting.calls
    runs.values_and_gradients(points(case))
    assert Counting.calls == before + 1


def test_a_loss_that_depends_on_no_parameter_is_refused() -> None:
    case = Case(mlp().model, lambda output, target: target.mean(), mlp().data)
    thetas = points(case)
    for replay in (False, True):
        for way in (0, 10**9):
            objective = Objective(case.model, case.loss, case.data)
            runs = LockstepObjective(objective, vectorize_up_to=way, replay=replay)
            with pytest.raises(InvalidInput, match="does not depend on any parameter"):
                runs.values_and_gradients(thetas)
            with pytest.raises(InvalidInput, match="does not depend on any parameter"):
                runs.hessian_products(thetas, blocks(thetas))


def test_shapes_that_do_not_fit_are_refused() -> None:
    case = mlp()
    runs, thetas = lockstep(case), points(case)
    with pytest.raises(InvalidInput, match=r"thetas: got \(83,\)"):
        runs.values_and_gradients(thetas[0])
    with pytest.raises(InvalidInput, match="thetas"):
        runs.values_and_gradients(thetas[:, :-1])
    with pytest.raises(InvalidInput, match=r"rows: got \(2, 4, 83\)"):
        runs.hessian_products(thetas, blocks(thetas[:2]))
    with pytest.raises(InvalidInput, match=r"samples: got \(2, 4\)"):
        runs.values_and_gradients(thetas, torch.zeros(2, 4, dtype=torch.int64))
    for samples in (torch.full((3, 2), 11), torch.zeros(3, 2), torch.zeros(3, 2, 2).long()):
        with pytest.raises(InvalidInput, match="samples"):
            runs.values_and_gradients(thetas, samples)


def test_own_samples_need_data_that_can_be_joined() -> None:
    tokens = [torch.randint(0, 7, (4, length)) for length in (5, 6)]
    batches = [(t[:, :-1], t[:, 1:]) for t in tokens]
    case = CASES["attention"]()
    runs = LockstepObjective(Objective(case.model, case.loss, batches))
    assert runs.values_and_gradients(points(case))[0].shape == (RUNS,)
    with pytest.raises(InvalidInput, match="cannot be joined"):
        runs.values_and_gradients(points(case), torch.tensor([[0, 4], [1, 5], [2, 6]]))


@pytest.mark.gpu
def test_a_gpu_gives_the_same_products() -> None:
    case = mlp()
    thetas = points(case)
    rows, own = blocks(thetas), torch.arange(6).reshape(3, 2)
    expected = lockstep(case).hessian_products(thetas, rows, own)
    inputs, targets = case.data
    moved = Case(case.model.cuda(), case.loss, (inputs.cuda(), targets.cuda()))
    for way in (0, 10**9):
        products = lockstep(moved, way).hessian_products(thetas.cuda(), rows.cuda(), own.cuda())
        assert dense.relative(products.cpu(), expected) < 1e-4
