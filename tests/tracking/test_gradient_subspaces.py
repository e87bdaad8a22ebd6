from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.tracking.block_subspace import principal_directions
from thalweg.tracking.gradient_subspaces import GradientSubspace, UpdateSubspace

INPUTS = torch.linspace(-1, 1, 120, dtype=torch.float64).reshape(40, 3).mul(7).sin()
TARGETS = torch.linspace(1, 0, 80, dtype=torch.float64).reshape(40, 2).mul(5).cos()
BLOCKS = (12, 4, 8, 2)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def objective(model: nn.Module) -> Objective:
    return Objective(model, nn.MSELoss(), (INPUTS, TARGETS), vectorize_up_to=0)


def updates(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 26, generator=generator, dtype=torch.float64)


def test_directions_are_those_of_the_last_updates_and_are_renewed_in_time() -> None:
    source, given = UpdateSubspace(2, window=4, every=3, blocks=BLOCKS), updates(12)
    renewals = []
    for number, vector in enumerate(given, start=1):
        source.update(vector=vector)
        if source.report.renewed:
            renewals.append(number)
            window = given[number - 4 : number]
            expected = principal_directions(window, 2, blocks=BLOCKS)
            # A window that has gone round holds the same vectors in another order.
            torch.testing.assert_close(
                source.subspace.basis @ source.subspace.basis.T, expected.basis @ expected.basis.T
            )
    assert renewals == [4, 7, 10]
    assert source.report.age == 2


def test_until_the_window_is_full_all_of_a_vector_is_dominant() -> None:
    source, given = UpdateSubspace(2, window=4, blocks=BLOCKS), updates(4)
    with pytest.raises(InvalidInput, match="no subspace yet"):
        source.update()
    for vector in given[:3]:
        assert source.update(vector=vector).k == 0
        parts = source.split(vector)
        assert torch.equal(parts.dominant, vector)
        assert not parts.bulk.any()
    source.update(vector=given[3])
    parts = source.split(given[3])
    assert parts.bulk.any()
    assert abs(float(parts.dominant @ parts.bulk)) < 1e-10
    torch.testing.assert_close(parts.dominant + parts.bulk, given[3])
    # Asked for without an update, as a probe does, it stays as it is.
    assert source.update(torch.zeros(26)) is source.subspace


def split_of(name: str, model: nn.Module) -> SplitUpdate:
    source: Any
    if name == "updates":
        source = UpdateSubspace(2, window=4, every=3, blocks=BLOCKS)
    else:
        source = GradientSubspace(objective(model), 2, samples=10, every=3, blocks=BLOCKS)
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    parameters = list(model.parameters())
    return SplitUpdate(base, source, dominant=1.0, bulk=2.0, parameters=parameters)


def step(model: nn.Module, optimizer: SplitUpdate, number: int) -> None:
    rows = (torch.arange(10) * 7 + number) % 40
    optimizer.zero_grad()
    nn.functional.mse_loss(model(INPUTS[rows]), TARGETS[rows]).backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["updates", "gradients"])
def test_the_update_made_is_the_one_proposed_with_its_bulk_scaled(name: str) -> None:
    model = network()
    optimizer = split_of(name, model)
    for number in range(6):
        before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        step(model, optimizer, number)
        after = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        assert optimizer.split is not None
        assert optimizer.proposed is not None
        expected = optimizer.split.dominant + 2 * optimizer.split.bulk
        torch.testing.assert_close(after - before, expected)
        in_the_bulk = after - before - optimizer.proposed
        torch.testing.assert_close(in_the_bulk, optimizer.split.bulk)
    assert optimizer.split is not None
    assert optimizer.split.bulk.norm() > 0.1 * optimizer.split.dominant.norm()


@pytest.mark.parametrize("name", ["updates", "gradients"])
@pytest.mark.parametrize("saved_after", [2, 5])
def test_it_is_resumed_bit_for_bit(name: str, saved_after: int) -> None:
    ends = []
    for stop in (None, saved_after):
        model = network()
        optimizer = split_of(name, model)
        for number in range(9):
            if number == stop:
                kept = optimizer.source.state_dict()
                new = split_of(name, model)
                new.load_state_dict(optimizer.state_dict())
                new.source.load_state_dict(kept)
                optimizer = new
            step(model, optimizer, number)
        ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert torch.equal(*ends)


def test_gradients_of_all_samples_give_the_eigenspace_of_their_covariance() -> None:
    model = network()
    loss = objective(model)
    source = GradientSubspace(loss, 3, samples=40)
    space = source.update(loss.theta())
    solved = top_eigenpairs(GradientCovariance(loss), 3, tolerance=1e-9)
    torch.testing.assert_close(space.eigenvalues, solved.eigenvalues, rtol=1e-6, atol=0)
    assert space.overlap(solved) == pytest.approx(1.0, abs=1e-8)
    assert (source.report.subspace_cost, source.report.subset) == (1.0, 40)
    source.update(loss.theta())
    assert (source.report.subspace_cost, source.report.renewed) == (0.0, False)


def test_the_space_of_a_few_samples_is_drawn_from_the_seed() -> None:
    model = network()
    loss = objective(model)
    spaces = [GradientSubspace(loss, 2, samples=8, seed=s).update(loss.theta()) for s in (0, 0, 1)]
    assert torch.equal(spaces[0].basis, spaces[1].basis)
    assert spaces[0].overlap(spaces[2]) < 0.999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: got 0"),
        ({"k": 2, "every": 0}, "every: got 0"),
        ({"k": 5, "window": 4}, "window: got 4"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        UpdateSubspace(**arguments)


def test_more_samples_than_there_are_are_refused() -> None:
    with pytest.raises(InvalidInput, match="samples: got 41"):
        GradientSubspace(objective(network()), 2, samples=41)


def test_a_vector_of_another_length_is_refused() -> None:
    source = UpdateSubspace(1, window=2)
    source.update(vector=torch.ones(3))
    with pytest.raises(InvalidInput, match="a length of 3"):
        source.update(vector=torch.ones(4))
