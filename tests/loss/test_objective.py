from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests import dense
from tests.networks import CASES, cnn, mlp
from tests.sampling import few
from thalweg.errors import Diverged, InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian

INPUTS = torch.linspace(-1, 1, 24).reshape(8, 3)
TARGETS = torch.linspace(1, 0, 16).reshape(8, 2)


def objective(model: nn.Module, loss: Any = None, **options: Any) -> Objective:
    return Objective(model, nn.MSELoss() if loss is None else loss, (INPUTS, TARGETS), **options)


@settings(max_examples=10, deadline=None)
@given(chunk_size=st.integers(1, 15))
@pytest.mark.parametrize("name", few(1, ["mlp", "cnn", "attention"]))
def test_the_chunk_size_changes_only_the_rounding(name: str, chunk_size: int) -> None:
    case = CASES[name]().to(torch.float64)
    loss, theta = dense.flat_loss(case), dense.flat_parameters(case)
    chunked = Objective(case.model, case.loss, case.data, chunk_size=chunk_size, vectorize_up_to=0)
    whole = Objective(case.model, case.loss, case.data, chunk_size=None, vectorize_up_to=0)
    value, gradient = chunked.value_and_gradient()
    assert abs(float(chunked.value() - loss(theta))) < 1e-12
    assert abs(float(value - loss(theta))) < 1e-12
    assert dense.relative(gradient, dense.gradient(loss, theta)) < 1e-11
    vector = torch.ones(len(theta), dtype=torch.float64)
    assert dense.relative(Hessian(chunked) @ vector, Hessian(whole) @ vector) < 1e-10


def test_no_more_than_a_chunk_is_evaluated_at_once() -> None:
    seen: list[int] = []

    class Counting(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(len(input))
            return super().forward(input)

    objective(Counting(3, 2), chunk_size=3).gradient()
    assert max(seen) == 3
    assert seen[-3:] == [3, 3, 2]


def test_a_value_holds_no_graph_also_with_parameters_left_out() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    assert not objective(model, parameters=["0.*"]).value().requires_grad


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_divergence(value: float) -> None:
    loss = objective(nn.Linear(3, 2))
    theta = loss.theta()
    theta[0] = value
    for evaluate in (loss.value, loss.gradient):
        with pytest.raises(Diverged, match="NaN or infinite"):
            evaluate(theta)


@pytest.mark.parametrize(("device", "size"), [("cpu", 1024), ("meta", 8192)])
def test_chunks_are_larger_elsewhere_than_on_a_cpu(device: str, size: int) -> None:
    data = (torch.zeros(4, 3, device=device), torch.zeros(4, 2, device=device))
    model = nn.Linear(3, 2, device=device)
    assert Objective(model, nn.MSELoss(), data).chunk_size == size
    assert Objective(model, nn.MSELoss(), data, chunk_size=None).chunk_size is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_size": 0}, "chunk_size: got 0, allowed: an integer >= 1, 'auto', or None"),
        ({"mode": "training"}, "mode: got 'training'"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": True}, "seed: got True"),
        ({"vectorize_up_to": -1}, "vectorize_up_to: got -1"),
        ({"parameters": ["head.*"]}, r"parameters: got 'head\.\*'"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        objective(nn.Linear(3, 2), **options)


@pytest.mark.parametrize(
    "samples",
    [
        torch.tensor([0, 8]),
        torch.tensor([-1, 2]),
        torch.tensor([], dtype=torch.int64),
        torch.ones(8, dtype=torch.bool),
        torch.tensor([[1, 2]]),
        torch.tensor([1.0]),
    ],
)
def test_samples_that_are_not_there_are_refused(samples: Tensor) -> None:
    loss = objective(nn.Linear(3, 2))
    with pytest.raises(InvalidInput, match="each from 0 to 7"):
        loss.value(samples=samples)
    ragged = [(INPUTS[:5], TARGETS[:5, :1]), (INPUTS[5:], TARGETS[5:])]
    with pytest.raises(InvalidInput, match="each from 0 to 7"):
        Objective(nn.Linear(3, 2), nn.MSELoss(), ragged).gradient(samples=samples)


def test_a_theta_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(InvalidInput, match="a last dimension of 8"):
        objective(nn.Linear(3, 2)).value(torch.zeros(7))


def test_theta_decides_and_the_model_stays_where_it_is() -> None:
    case = mlp().to(torch.float64)
    loss = Objective(case.model, case.loss, case.data)
    there = loss.theta() + 0.2
    assert abs(float(loss.value(there) - dense.flat_loss(case)(there))) < 1e-12
    assert torch.equal(loss.theta(), dense.flat_parameters(case))


def test_gradients_are_there_under_no_grad() -> None:
    # An optimizer's step runs so.
    case = cnn()
    loss = Objective(case.model, case.loss, case.data)
    expected = loss.gradient()
    with torch.no_grad():
        assert torch.equal(loss.gradient(), expected)
        image = Hessian(loss) @ torch.ones(loss.num_parameters)
    assert not image.requires_grad


def test_it_says_what_it_is() -> None:
    assert repr(objective(nn.Linear(3, 2), chunk_size=4)) == ("Objective(P=8, N=8, chunk_size=4)")


def test_model_and_data_on_two_devices_are_refused() -> None:
    case = CASES["mlp"]()
    inputs, target = case.data
    with pytest.raises(InvalidInput, match="data: got 'on meta', allowed: on cpu"):
        Objective(case.model, case.loss, (inputs.to("meta"), target))
    halved = copy.deepcopy(case.model)
    halved[0].to("meta")  # type: ignore[index]
    with pytest.raises(InvalidInput, match="model: got 'parameters on cpu, meta'"):
        Objective(halved, case.loss, case.data)
    loss = Objective(case.model, case.loss, case.data)
    with pytest.raises(InvalidInput, match="theta: got 'on meta'"):
        Hessian(loss, loss.theta().to("meta"))
    with pytest.raises(InvalidInput, match="vector: got 'on meta'"):
        _ = Hessian(loss) @ loss.theta().to("meta")


class Stream(IterableDataset):
    """Samples without an end."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for number in itertools.count():
            yield torch.full((4,), float(number)), torch.zeros(3)


def of_a_generator() -> Iterator[tuple[Tensor, Tensor]]:
    loader = iter(DataLoader(Stream(), batch_size=5))
    while True:
        yield next(loader)


@pytest.mark.parametrize(
    "batches", [DataLoader(Stream(), batch_size=5), of_a_generator()], ids=["loader", "generator"]
)
def test_the_first_batches_of_a_stream_are_the_data(batches: Any) -> None:
    case = mlp()
    loss = Objective.from_batches(case.model, case.loss, batches, n=3, chunk_size=4)
    inputs = torch.arange(15.0)[:, None].expand(15, 4)
    whole = Objective(case.model, case.loss, (inputs, torch.zeros(15, 3)))
    assert loss.num_samples == 15
    assert torch.allclose(loss.value(), whole.value())
    assert torch.equal(loss.value(), loss.value())


def test_batches_of_a_shuffling_loader_are_taken_once_and_leave_no_trace() -> None:
    case = mlp()
    loader = DataLoader(TensorDataset(*case.data), batch_size=3, shuffle=True)
    before = torch.get_rng_state()
    loss = Objective.from_batches(case.model, case.loss, loader, n=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert loss.num_samples == 6
    assert torch.equal(loss.gradient(), loss.gradient())
    everything = Objective.from_batches(case.model, case.loss, loader)
    assert everything.num_samples == 11
    whole = Objective(case.model, case.loss, case.data)
    assert torch.allclose(everything.value(), whole.value())


@pytest.mark.parametrize(
    ("batches", "n", "message"),
    [
        ([], 3, "batches is empty"),
        ([(torch.ones(2, 4), torch.ones(2, 3))], 0, "n: got 0"),
        (7, 3, "batches: got 'int'"),
        (Stream(), 3, "batches that cannot|unequal|one number of samples|batch: got"),
    ],
)
def test_what_is_no_stream_of_batches_is_refused(batches: Any, n: int, message: str) -> None:
    case = mlp()
    with pytest.raises(InvalidInput, match=message):
        Objective.from_batches(case.model, case.loss, batches, n=n)
