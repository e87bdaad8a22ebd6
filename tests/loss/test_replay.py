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
from thalweg.loss.replay import Replay

OWN = torch.tensor([[4, 1, 6, 2], [0, 1, 3, 5]])


def products_and_gradients(case: Case, thetas: Tensor, rows: Tensor, *, replay: bool) -> list:
    """At two points each, so that the second one is a replay."""
    objective = Objective(case.model, case.loss, case.data)
    runs = LockstepObjective(objective, vectorize_up_to=10**9, replay=replay)
    own = OWN.to(thetas.device)
    found = []
    for points in (thetas, thetas.flip(0)):
        found.append(runs.hessian_products(points, rows, own))
        found += runs.values_and_gradients(points, own)
    return found


@pytest.mark.parametrize("name", few(1, ["cnn", "attention"]))
def test_a_replay_is_the_computation(name: str) -> None:
    case = CASES[name]().to(torch.float64)
    theta = dense.flat_parameters(case)
    thetas = theta + 0.3 * torch.randn(2, len(theta), dtype=theta.dtype)
    rows = torch.randn(2, 3, len(theta), dtype=theta.dtype)
    replayed = products_and_gradients(case, thetas, rows, replay=True)
    for found, expected in zip(
        replayed, products_and_gradients(case, thetas, rows, replay=False), strict=True
    ):
        assert dense.relative(found, expected) < 1e-12


def test_a_function_is_recorded_once_for_each_shape() -> None:
    replay, calls = Replay(), []

    def doubled(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return 2 * x

    for size in (3, 3, 4, 3):
        x = torch.randn(size)
        assert torch.equal(replay("doubled", doubled, x), 2 * x)
    assert replay.recorded == len(calls) == 2
    assert torch.equal(replay("halved", lambda x: x / 2, torch.ones(3)), torch.full((3,), 0.5))


def test_trees_of_tensors_are_arguments() -> None:
    replay = Replay()
    for batch in ({"x": torch.ones(2), "y": torch.zeros(2)}, {"x": torch.ones(2)}):
        total = replay("sum", lambda b: torch.stack(list(b.values())).sum(), batch)
        assert float(total) == 2


def test_a_buffer_that_changes_in_place_is_read_anew() -> None:
    class Scaled(nn.Linear):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__(4, 3)
            self.register_buffer("scale", torch.ones(()))

        def forward(self, input: Tensor) -> Tensor:
            return self.scale * super().forward(input)

    model, data = Scaled(), mlp().data
    runs = LockstepObjective(Objective(model, nn.MSELoss(), data), replay=True)
    thetas = torch.randn(2, 15)
    runs.values_and_gradients(thetas)
    model.scale.mul_(3)
    anew = LockstepObjective(Objective(model, nn.MSELoss(), data))
    found, expected = (r.values_and_gradients(thetas)[0] for r in (runs, anew))
    assert torch.allclose(found, expected)


def test_what_cannot_be_recorded_is_refused() -> None:
    with pytest.raises(InvalidInput, match="replay: got True, allowed: False"):
        Replay()("branch", lambda x: x if float(x.sum()) > 0 else -x, torch.ones(2))
    with pytest.raises(InvalidInput, match="something else than tensors"):
        Replay()("text", lambda x, text: x, torch.ones(2), "text")


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(CASES))
def test_a_cuda_graph_is_the_computation(name: str) -> None:
    case = CASES[name]()
    theta = dense.flat_parameters(case)
    thetas, rows = theta + 0.3 * torch.randn(2, len(theta)), torch.randn(2, 3, len(theta))
    expected = products_and_gradients(case, thetas, rows, replay=False)
    inputs, targets = case.data
    moved = Case(case.model.cuda(), case.loss, (inputs.cuda(), targets.cuda()))
    found = products_and_gradients(moved, thetas.cuda(), rows.cuda(), replay=True)
    for one, other in zip(found, expected, strict=True):
        assert dense.relative(one.cpu(), other) < 1e-4
