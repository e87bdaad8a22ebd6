"""A loss that changes from call to call is refused, whatever the source of chance or memory."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import InvalidInput
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.guards.determinism import refuse_changing
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian


def _noisy(draw: Callable[[], float]) -> nn.Module:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs * draw())

    return Noisy()


def _pairs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (24,), generator=generator)
    return torch.randn(24, 4, generator=generator), targets


_own = np.random.default_rng(0)
_calls = itertools.count()
CHANGING = {
    "Python's random": (random.random, "Python's random"),
    "now and then": (lambda: 2.0 if random.random() < 0.3 else 1.0, "Python's random"),
    "NumPy": (lambda: float(np.random.rand()), "NumPy"),
    "a generator of one's own": (lambda: float(_own.random()), "memory of former calls"),
    "a counter": (lambda: float(next(_calls)), "memory of former calls"),
    "the clock": (lambda: time.perf_counter_ns() % 1000 / 1000, "memory of former calls"),
}


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_a_loss_that_changes_is_refused_whatever_the_source(
    name: str, chunk_size: int | None
) -> None:
    draw, source = CHANGING[name]
    loss = Objective(_noisy(draw), nn.CrossEntropyLoss(), _pairs(), chunk_size=chunk_size)
    python, numpy = random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    for call in (loss.value, loss.gradient, lambda: Hessian(loss) @ torch.ones(15), loss.value):
        with pytest.raises(InvalidInput, match=f"changes from call to call.*{source}"):
            call()
    assert python == random.getstate()
    assert (numpy == np.random.get_state()[1]).all()  # type: ignore[index]


def test_numbers_drawn_to_no_effect_are_no_fault_and_the_generators_left_alone() -> None:
    draw = lambda: 1.0 if random.random() <= 1 and np.random.rand() <= 1 else 0.0  # noqa: E731
    loss = Objective(_noisy(draw), nn.CrossEntropyLoss(), _pairs(), chunk_size=7)
    python, numpy = random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    values = [float(loss.value()), float(loss.value())]
    _ = Hessian(loss) @ torch.ones(15)
    assert values[0] == values[1]
    assert python == random.getstate()
    assert (numpy == np.random.get_state()[1]).all()  # type: ignore[index]


def test_a_random_function_of_theta_is_refused() -> None:
    loss = FunctionLoss(lambda t: (t**2).sum() * random.random(), torch.ones(3))
    with pytest.raises(InvalidInput, match="changes from call to call"):
        _ = Hessian(loss) @ torch.ones(3)
    drawn = FunctionLoss(lambda t: ((t + torch.randn(3)) ** 4).sum(), torch.ones(3))
    with pytest.raises(InvalidInput, match="changes from call to call"):
        _ = Hessian(drawn) @ torch.ones(3)


def test_values_that_are_close_by_chance_are_looked_at_again() -> None:
    values = itertools.chain([1.0, 1.0 + 1e-7, 1.0 - 1e-7], itertools.repeat(1.5))

    def evaluate() -> float:
        random.random()
        return next(values)

    with pytest.raises(InvalidInput, match=r"1, then 1\.5 .*Python's random"):
        refuse_changing(evaluate, torch.device("cpu"), rough=False)
    assert refuse_changing(lambda: random.random() * 1e-7 + 1, torch.device("cpu"), rough=False)
