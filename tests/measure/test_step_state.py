from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.loss.objective import Objective
from thalweg.measure.step_state import BATCHES, StepState
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.preconditioner import preconditioner
from thalweg.tracking.source import FixedSubspace, Split


class Counting(FixedSubspace):
    """A fixed subspace that counts what is asked of it."""

    updates = 0

    def update(self, theta: Tensor | None = None, vector: Tensor | None = None) -> Subspace:
        self.updates += 1
        return super().update(theta, vector)


class CountingObjective(Objective):
    evaluated = 0

    def value(self, theta: Tensor | None = None, samples: Tensor | None = None) -> Tensor:
        self.evaluated += 1
        return super().value(theta, samples)

    def value_and_gradient(
        self, theta: Tensor | None = None, samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.evaluated += 1
        return super().value_and_gradient(theta, samples)


def make_state(**changes: Any) -> StepState:
    torch.manual_seed(0)
    data = (torch.randn(9, 3), torch.randn(9, 1))
    objective = CountingObjective(nn.Linear(3, 1), nn.MSELoss(), data)
    source = Counting(Subspace(torch.eye(4)[:, :2], torch.tensor([3.0, 2.0])))
    theta = objective.theta()
    return StepState(
        **{"step": 0, "theta": theta, "objective": objective, "source": source}
        | {"learning_rate": 0.1}
        | changes
    )


def test_nothing_is_computed_that_nobody_asks_for() -> None:
    state = make_state()
    assert state.objective.evaluated == 0  # type: ignore[attr-defined]
    assert state.source.updates == 0  # type: ignore[attr-defined]
    assert not state.subspace_is_known


def test_loss_gradient_and_subspace_are_computed_once() -> None:
    state = make_state()
    gradient = state.gradient
    assert state.gradient is gradient
    assert state.loss == float(state.objective.value_and_gradient(state.theta)[0])
    assert state.objective.evaluated == 2  # type: ignore[attr-defined]
    for _ in range(3):
        state.parts(gradient)
        state.parts(state.theta)
    assert state.source.updates == 1  # type: ignore[attr-defined]
    assert state.subspace_is_known


def test_the_subspace_alone_needs_no_gradient() -> None:
    state = make_state()
    assert state.subspace.k > 0
    assert "loss_and_gradient" not in vars(state)


def test_the_loss_alone_needs_no_gradient() -> None:
    state = make_state()
    loss = state.loss
    assert "loss_and_gradient" not in vars(state)
    assert loss == pytest.approx(state.loss_and_gradient[0])


def test_a_subspace_that_the_split_moved_on_is_not_moved_again() -> None:
    state = make_state(subspace_updated=True)
    _ = state.subspace
    assert state.source.updates == 0  # type: ignore[attr-defined]
    assert state.subspace_is_known


def test_the_parts_are_those_of_the_subspace() -> None:
    state = make_state()
    vector = torch.tensor([1.0, 2.0, 3.0, 4.0])
    dominant, bulk = state.parts(vector)
    assert (dominant.tolist(), bulk.tolist()) == ([1, 2, 0, 0], [0, 0, 3, 4])
    assert state.parts(vector)[0] is dominant


def test_parts_of_vectors_that_are_gone_are_never_handed_out_for_others() -> None:
    # Python gives the identity of a freed tensor to the next one.
    state = make_state()
    for number in range(200):
        dominant, _ = state.parts(torch.full((4,), float(number)))
        assert dominant.tolist() == [number, number, 0, 0]


def test_the_split_of_the_step_serves_proposed_and_update() -> None:
    proposed, update = torch.ones(4), torch.full((4,), 2.0)
    state = make_state(proposed=proposed, update=update)
    parts = torch.tensor([5.0, 0, 0, 0]), torch.tensor([0, 0, 0, 7.0])
    state.keep_parts(Split(*parts, error=0.0, bulk_error=0.0), 0.5, 2.0)
    assert state.parts(proposed) == parts
    assert [part.tolist() for part in state.parts(update)] == [[2.5, 0, 0, 0], [0, 0, 0, 14]]
    assert state.source.updates == 0  # type: ignore[attr-defined]


def test_batches_and_their_gradients_are_computed_once() -> None:
    batches = [torch.tensor([n, n + 1]) for n in range(BATCHES)]
    asked: list[int] = []
    state = make_state(batches=lambda number: asked.append(number) or batches)
    gradients = state.batch_gradients
    assert state.batch_gradients is gradients
    assert asked == [BATCHES]
    for column, samples in zip(gradients.T, batches, strict=True):
        assert torch.equal(column, state.objective.gradient(state.theta, samples))


def test_where_a_batch_is_all_samples_its_gradient_is_the_full_one() -> None:
    state = make_state()
    assert state.batch_samples == [None]
    assert torch.equal(state.batch_gradients, state.gradient[:, None])


def test_only_a_step_of_an_optimizer_with_a_metric_has_a_subspace_in_it() -> None:
    state = make_state()
    parameters = state.objective.layout.parameters(state.objective.model)
    adam = torch.optim.Adam(parameters)
    state.objective.model(torch.ones(1, 3)).sum().backward()
    adam.step()
    for changes, has_one in (
        ({"optimizer": adam, "update": state.theta}, True),
        ({"optimizer": adam}, False),
        ({"optimizer": torch.optim.SGD(parameters), "update": state.theta}, False),
        ({"update": state.theta}, False),
    ):
        metric = make_state(objective=state.objective, **changes).metric_subspace
        assert (metric is not None) == has_one
        if metric is not None:
            assert metric.scaled.k == 2
            assert torch.equal(metric.diagonal, preconditioner(adam))
