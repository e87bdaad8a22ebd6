"""A parameter that the forward pass reaches by another road than the attribute follows theta."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tests import dense
from tests.loss.test_swapped import INPUTS, LOSS, TARGETS, Checkpointed, Plain, elsewhere
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss import evaluation
from thalweg.loss.guards.graph import facts_of, place_in_time
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian

Net = Callable[[], Plain]


class InAList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.held = [self.last.weight]

    def end(self, states: Tensor) -> Tensor:
        return linear(torch.tanh(states), self.held[0], self.last.bias)


class InAClosure(Plain):
    def __init__(self) -> None:
        super().__init__()
        weight = self.last.weight
        self.decode = lambda states: linear(states, weight, self.last.bias)

    def end(self, states: Tensor) -> Tensor:
        return self.decode(torch.tanh(states))


class InAPartial(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.map = functools.partial(linear, weight=self.last.weight, bias=self.last.bias)

    def end(self, states: Tensor) -> Tensor:
        return self.map(torch.tanh(states))


class AsAView(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.held = [self.last.weight.T]

    def end(self, states: Tensor) -> Tensor:
        return torch.tanh(states) @ self.held[0] + self.last.bias


class InAListAndACheckpoint(InAList):
    forward = Checkpointed.forward


class AsAnAlias(Plain):
    """What is detached is a constant of the derivative, and follows theta all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [self.last.weight, self.last.weight.detach()]

    def end(self, states: Tensor) -> Tensor:
        states = torch.tanh(states)
        return linear(states, self.held[0], self.last.bias) + linear(states, self.held[1])


class Detached(Plain):
    def end(self, states: Tensor) -> Tensor:
        states = torch.tanh(states)
        return self.last(states) + linear(states, self.last.weight.detach())


def built(kind: Net) -> Plain:
    """In float64 from the start: a conversion would leave captured tensors behind."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        return kind()
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("kind", "same"),
    few(
        2,
        [
            (InAList, Plain),
            (InAClosure, Plain),
            (InAPartial, Plain),
            (AsAView, Plain),
            (InAListAndACheckpoint, Plain),
            (AsAnAlias, Detached),
        ],
    ),
)
@pytest.mark.parametrize("vectorize_up_to", few(1, [0, 10**6]))
def test_gradients_and_products_are_those_of_the_model_without_the_trap(
    kind: Net, same: Net, vectorize_up_to: int
) -> None:
    model, plain = built(kind), built(same)
    options: dict[str, Any] = {"vectorize_up_to": vectorize_up_to, "chunk_size": 9}
    objective = Objective(model, LOSS, (INPUTS, TARGETS), **options)
    expected = Objective(plain, LOSS, (INPUTS, TARGETS), **options)
    before, theta = objective.theta(), elsewhere(objective)
    vectors = torch.randn(objective.num_parameters, 3, dtype=torch.float64)
    # The value first: it is asked for before there is any gradient.
    assert dense.relative(objective.value(theta), expected.value(theta)) < 1e-14
    assert dense.relative(objective.gradient(), expected.gradient()) < 1e-13
    for operator in (Hessian, GaussNewton):
        kept = operator(objective, theta, keep_graph=True)
        at_home = operator(objective, keep_graph=True)
        for _ in range(2):
            truth = operator(expected, theta) @ vectors
            assert dense.relative(kept @ vectors, truth) < 1e-13
            assert dense.relative(at_home @ vectors, operator(expected) @ vectors) < 1e-13
    assert torch.equal(objective.theta(), before)


def test_a_penalty_in_the_loss_on_parameters_that_it_holds() -> None:
    model = built(Plain)
    held = list(model.parameters())

    def penalized(output: Tensor, target: Tensor) -> Tensor:
        return LOSS(output, target) + 0.1 * sum(p.square().sum() for p in held)

    found = Objective(model, penalized, (INPUTS, TARGETS))
    without = Objective(built(Plain), LOSS, (INPUTS, TARGETS))
    theta = elsewhere(found)
    vector = torch.randn_like(theta)
    assert dense.relative(found.gradient(theta), without.gradient(theta) + 0.2 * theta) < 1e-13
    expected = Hessian(without, theta) @ vector + 0.2 * vector
    assert dense.relative(Hessian(found, theta) @ vector, expected) < 1e-13


def test_hooks_on_a_parameter_are_no_part_of_the_loss_and_stay() -> None:
    model = built(InAList)
    hook = model.last.weight.register_hook(lambda gradient: 0 * gradient)
    objective = Objective(model, LOSS, (INPUTS, TARGETS))
    expected = Objective(built(Plain), LOSS, (INPUTS, TARGETS)).gradient()
    assert dense.relative(objective.gradient(), expected) < 1e-13
    LOSS(model(INPUTS), TARGETS).backward()
    assert model.last.weight.grad is not None
    assert not model.last.weight.grad.any()
    hook.remove()


def test_a_graph_of_the_users_own_can_be_differentiated_afterwards() -> None:
    model = built(InAList)
    loss = LOSS(model(INPUTS), TARGETS)
    expected = Objective(built(Plain), LOSS, (INPUTS, TARGETS)).gradient()
    objective = Objective(model, LOSS, (INPUTS, TARGETS))
    objective.gradient(elsewhere(objective))
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert dense.relative(objective.layout.flatten(found), expected) < 1e-13


@pytest.mark.parametrize("where", ["model", "data"])
def test_what_was_computed_from_a_parameter_before_is_refused_by_name(where: str) -> None:
    model, inputs = built(Plain), INPUTS
    if where == "model":
        held = [2 * model.last.weight]
        model.end = lambda states: linear(torch.tanh(states), held[0])  # type: ignore[method-assign]
    else:
        inputs = INPUTS + model.last.weight.sum()
    objective = Objective(model, LOSS, (inputs, TARGETS))
    with pytest.raises(InvalidInput, match=r"'last\.weight'.*computed from it before"):
        objective.value()


def test_data_with_a_graph_of_another_model_are_taken() -> None:
    encoder = nn.Linear(4, 4).double()
    objective = Objective(built(Plain), LOSS, (encoder(INPUTS), TARGETS))
    expected = Objective(built(Plain), LOSS, (encoder(INPUTS).detach(), TARGETS)).gradient()
    for _ in range(2):
        assert torch.equal(objective.gradient(), expected)


def test_parameters_outside_of_theta_are_constants_wherever_they_come_from() -> None:
    model = built(InAList)
    objective = Objective(model, LOSS, (INPUTS, TARGETS), parameters="first.*")
    expected = Objective(built(Plain), LOSS, (INPUTS, TARGETS), parameters="first.*")
    assert dense.relative(objective.gradient(), expected.gradient()) < 1e-13


def test_such_a_model_in_low_precision_or_in_lockstep_is_refused() -> None:
    model = copy.deepcopy(built(Plain))
    held = [model.to(torch.bfloat16).last.weight]
    model.end = lambda states: linear(torch.tanh(states), held[0].to(states.dtype))  # type: ignore[method-assign]
    with pytest.raises(InvalidInput, match=r"'last\.weight'.*bfloat16"):
        Objective(model, LOSS, (INPUTS.bfloat16(), TARGETS)).value()
    objective = Objective(built(InAList), LOSS, (INPUTS, TARGETS))
    with pytest.raises(InvalidInput, match="beside the module's attribute"):
        LockstepObjective(objective).values_and_gradients(objective.theta().expand(2, -1))


def test_facts_of_a_graph() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    views, copies = weight.T[0], (weight * 2)[0]
    begin = place_in_time()
    names = {"weight": weight}
    facts = facts_of((views * weight.sum()).sum(), names, begin)
    assert (facts.reached, facts.computed_before) == (("weight",), ())
    assert facts_of((copies * weight).sum(), names, begin).computed_before == ("weight",)
    assert facts_of(torch.ones(2, requires_grad=True).sum(), names, begin).reached == ()
    assert not facts.sparse
    assert not facts.reentrant


def test_samples_are_evaluated_side_by_side_where_nothing_is_run_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {}
    for kind in (Plain, Checkpointed):
        objective = Objective(kind().double(), LOSS, (INPUTS, TARGETS), mode="eval")
        reads = objective.evaluator.reads_again((INPUTS, TARGETS))
        found[kind] = reads.any, reads.tensors
    assert found == {Plain: (False, False), Checkpointed: (True, True)}

    def refused(*given: Any) -> Tensor:
        raise AssertionError("one by one")

    monkeypatch.setattr(evaluation, "one_by_one", refused)
    objective = Objective(Plain().double(), LOSS, (INPUTS, TARGETS), mode="eval")
    vector = torch.ones(objective.num_parameters, dtype=objective.dtype)
    assert torch.isfinite(GradientCovariance(objective) @ vector).all()
