"""Whatever a backward pass evaluates again is evaluated at theta; and the model stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests import dense
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.lockstep_objective import LockstepObjective
from thalweg.loss.objective import Objective
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.tracking.tracker import SubspaceTracker

LOSS = nn.CrossEntropyLoss()
torch.manual_seed(0)
INPUTS, TARGETS = torch.randn(24, 4, dtype=torch.float64), torch.randint(0, 3, (24,))


class Plain(nn.Module):
    """The same network without any trap."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.end(self.first(inputs))

    def end(self, states: Tensor) -> Tensor:
        return self.last(torch.tanh(states))


class Checkpointed(Plain):
    def forward(self, inputs: Tensor) -> Tensor:
        return checkpoint(self.end, self.first(inputs), use_reentrant=False)  # type: ignore[return-value]


class Nested(Plain):
    def forward(self, inputs: Tensor) -> Tensor:
        def first(inputs: Tensor) -> Any:
            return self.end(checkpoint(self.first, inputs, use_reentrant=False))  # type: ignore[arg-type]

        return checkpoint(first, inputs, use_reentrant=False)  # type: ignore[return-value]


class ByFunction(Plain):
    """Checkpoints a function that it gives the weight."""

    def forward(self, inputs: Tensor) -> Tensor:
        states = torch.tanh(self.first(inputs))
        weight, bias = self.last.weight, self.last.bias
        return checkpoint(functional.linear, states, weight, bias, use_reentrant=False)  # type: ignore[return-value]


class OnHost(Plain):
    def forward(self, inputs: Tensor) -> Tensor:
        with save_on_cpu():
            return super().forward(inputs)


class Sequence(Plain):
    def forward(self, inputs: Tensor) -> Tensor:
        layers = nn.Sequential(self.first, nn.Tanh(), self.last)
        return checkpoint_sequential(layers, 2, inputs, use_reentrant=False)


class LinearThatAsksLater(torch.autograd.Function):
    """Its backward pass takes the weight from the module."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, layer: Any) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.layer = layer
        return functional.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (inputs,) = ctx.saved_tensors
        return gradient @ ctx.layer.weight, gradient.T @ inputs, gradient.sum(0), None


class AsksLater(Plain):
    def end(self, states: Tensor) -> Tensor:
        layer = self.last
        return LinearThatAsksLater.apply(torch.tanh(states), layer.weight, layer.bias, layer)  # type: ignore[return-value]


MODELS = (Checkpointed, AsksLater, Nested, ByFunction, OnHost, Sequence)


def like_plain(kind: Callable[[], nn.Module]) -> tuple[nn.Module, Plain]:
    torch.manual_seed(0)
    plain = Plain().double()
    model = kind().double()
    model.load_state_dict(plain.state_dict())
    return model, plain


def elsewhere(objective: Objective) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = objective.num_parameters
    return objective.theta() + torch.randn(size, generator=generator, dtype=torch.float64) / 2


@pytest.mark.parametrize("kind", few(2, MODELS))
@pytest.mark.parametrize("vectorize_up_to", [0, 10**6])
@pytest.mark.parametrize("keep_graph", few(1, [True, False]))
def test_a_backward_pass_evaluates_again_at_theta(
    kind: type[Plain], vectorize_up_to: int, keep_graph: bool
) -> None:
    model, plain = like_plain(kind)
    options: dict[str, Any] = {"vectorize_up_to": vectorize_up_to, "chunk_size": 9}
    objective = Objective(model, LOSS, (INPUTS, TARGETS), **options)
    expected = Objective(plain, LOSS, (INPUTS, TARGETS), **options)
    theta, here = elsewhere(objective), objective.theta()
    vectors = torch.randn(objective.num_parameters, 4, dtype=torch.float64)
    assert dense.relative(objective.gradient(theta), expected.gradient(theta)) < 1e-14
    for operator in (Hessian, GaussNewton, GradientCovariance):
        found = operator(objective, theta, keep_graph=keep_graph)
        at_home = operator(objective, here, keep_graph=keep_graph)
        truth = operator(expected, theta) @ vectors
        for _ in range(2):  # kept graphs at two points, in turn
            assert dense.relative(found @ vectors, truth) < 1e-13
            assert dense.relative(at_home @ vectors, operator(expected, here) @ vectors) < 1e-13


@pytest.mark.filterwarnings("ignore:lambda_2:thalweg.spectrum.gap.GapClosed")
def test_a_split_training_is_the_same_with_checkpoints() -> None:
    ends = []
    for kind in (Plain, Checkpointed):
        model, _ = like_plain(kind)
        objective = Objective(model, LOSS, (INPUTS, TARGETS))
        tracker = SubspaceTracker(objective, 2, exact=True)
        optimizer = SplitUpdate(torch.optim.SGD(model.parameters(), lr=0.5), tracker, 0.0, 1.0)
        for _ in range(3):
            optimizer.zero_grad()
            LOSS(model(INPUTS), TARGETS).backward()
            optimizer.step()
        ends.append(objective.theta())
    assert dense.relative(ends[1], ends[0]) < 1e-12


def test_reentrant_checkpoints_are_refused_with_the_hint_at_the_first_value() -> None:
    class Reentrant(Plain):
        def forward(self, inputs: Tensor) -> Tensor:
            return checkpoint(self.end, self.first(inputs), use_reentrant=True)  # type: ignore[return-value]

    model, _ = like_plain(Reentrant)
    with pytest.raises(InvalidInput, match="use_reentrant=False"):
        Objective(model, LOSS, (INPUTS, TARGETS), product="exact").value()


def test_runs_in_lockstep_refuse_checkpoints() -> None:
    model, plain = like_plain(Checkpointed)
    objective = Objective(model, LOSS, (INPUTS, TARGETS))
    thetas = torch.stack([objective.theta(), elsewhere(objective)])
    with pytest.raises(InvalidInput, match=r"checkpointing.*one after another"):
        LockstepObjective(objective).values_and_gradients(thetas)
    LockstepObjective(Objective(plain, LOSS, (INPUTS, TARGETS))).values_and_gradients(thetas)


class Memory(Plain):
    """Keeps what it has computed, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.kept = 0, ["before"]
        self.register_buffer("seen", torch.zeros(5))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        self.states = self.first(inputs)
        self.kept.append(self.states)  # type: ignore[arg-type]
        self.seen.add_(self.states.detach().sum(0))
        return self.end(self.states)


@pytest.mark.parametrize(
    "kind",
    [
        Memory,
        lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3))),
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))),
    ],
)
def test_the_model_is_as_it_was_and_can_be_copied(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind().double()
    before = copy.deepcopy(model)
    attributes = [dict(vars(module)) for module in model.modules()]
    objective = Objective(model, LOSS, (INPUTS, TARGETS), chunk_size=9)
    theta = elsewhere(objective)
    values = [objective.value(theta) for _ in range(3)]
    _ = objective.gradient(theta), Hessian(objective, keep_graph=True) @ theta
    assert values[0] == values[1] == values[2]
    copy.deepcopy(model)
    for module, held, former in zip(model.modules(), attributes, before.modules(), strict=True):
        assert list(vars(module)) == list(held)
        assert all(value is held[name] for name, value in vars(module).items())
        assert not isinstance(module, Memory) or module.kept == ["before"] == former.kept
    state = before.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_the_forward_pass_leaves_is_found_by_what_is_evaluated_again() -> None:
    class Remembers(Plain):
        def forward(self, inputs: Tensor) -> Tensor:
            self.scale = self.first.weight.mean()
            return checkpoint(self.end, self.first(inputs), use_reentrant=False)  # type: ignore[return-value]

        def end(self, states: Tensor) -> Tensor:
            return super().end(states * self.scale)

    class Direct(Plain):
        def forward(self, inputs: Tensor) -> Tensor:
            return self.end(self.first(inputs) * self.first.weight.mean())

    model, _ = like_plain(Remembers)
    plain, _ = like_plain(Direct)
    found, expected = (Objective(m, LOSS, (INPUTS, TARGETS)) for m in (model, plain))
    theta = elsewhere(found)
    vector = torch.randn_like(theta)
    assert dense.relative(Hessian(found, theta) @ vector, Hessian(expected, theta) @ vector) < 1e-13


class Standardizes(Plain):
    def forward(self, inputs: Tensor) -> Tensor:
        inputs -= 0.5
        inputs.data.mul_(2)
        return super().forward(inputs)


def test_data_that_the_forward_pass_or_the_loss_writes_into_are_the_users() -> None:
    model, plain = like_plain(Standardizes)
    inputs, targets = INPUTS.clone(), TARGETS.clone()

    def clamped(output: Tensor, target: Tensor) -> Tensor:
        return LOSS(output, target.clamp_(max=1))

    objective = Objective(model, clamped, (inputs, targets), chunk_size=7)
    expected = LOSS(plain((INPUTS - 0.5) * 2), TARGETS.clamp(max=1))
    for _ in range(3):
        assert dense.relative(objective.value(), expected.detach()) < 1e-14
    _ = Hessian(objective) @ objective.gradient()
    assert torch.equal(inputs, INPUTS)
    assert torch.equal(targets, TARGETS)


class Embedded(nn.Module):
    def __init__(self, max_norm: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.last = nn.Embedding(6, 4, max_norm=max_norm), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.table(tokens))


def test_weights_that_the_forward_pass_would_shorten_are_refused_and_left_alone() -> None:
    tokens = torch.arange(6)
    data = (tokens, tokens % 3)
    model = Embedded(0.5)
    before = model.table.weight.detach().clone()
    for ask in (Objective.value, Objective.gradient):
        objective = Objective(model, LOSS, data)
        with pytest.raises(InvalidInput, match=r"'table\.weight'.*max_norm"):
            ask(objective)
        assert torch.equal(model.table.weight, before)
    # The hints: shorten them once, or take max_norm away.
    model(tokens)
    plain = Embedded(None)
    plain.load_state_dict(model.state_dict())
    expected = Objective(plain, LOSS, data)
    objective = Objective(model, LOSS, data)
    assert torch.equal(objective.gradient(), expected.gradient())
    vector = torch.ones(objective.num_parameters)
    assert torch.equal(Hessian(objective) @ vector, Hessian(expected) @ vector)
    theta = objective.theta() * 3
    kept = theta.clone()
    with pytest.raises(InvalidInput, match="max_norm"):
        objective.value(theta)
    assert torch.equal(theta, kept)
    model.table.max_norm = None
    assert torch.equal(objective.value(theta), expected.value(theta))


def test_writing_by_data_into_a_weight_is_refused_at_the_first_evaluation() -> None:
    class Decays(Plain):
        def forward(self, inputs: Tensor) -> Tensor:
            self.last.weight.data.mul_(0.9)
            return super().forward(inputs)

    model, _ = like_plain(Decays)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidInput, match=r"'last\.weight'"):
        Objective(model, LOSS, (INPUTS, TARGETS)).gradient()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_is_put_back_after_a_failure_in_the_backward_pass() -> None:
    class Fails(Plain):
        ready = True

        def end(self, states: Tensor) -> Tensor:
            if not Fails.ready:
                raise KeyError("out of order")
            Fails.ready = False
            return super().end(states)

        forward = Checkpointed.forward

    model, _ = like_plain(Fails)
    before = copy.deepcopy(model.state_dict())
    objective = Objective(model, LOSS, (INPUTS, TARGETS), mode="eval")
    with pytest.raises(InvalidInput, match="out of order"):
        objective.gradient(elsewhere(objective))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_eigenpairs_of_a_torchscript_module_are_those_of_the_module() -> None:
    _, plain = like_plain(Plain)
    found, expected = (
        top_eigenpairs(Hessian(Objective(m, LOSS, (INPUTS, TARGETS))), 2, tolerance=1e-9)
        for m in (torch.jit.script(plain), plain)
    )
    assert torch.allclose(found.eigenvalues, expected.eigenvalues, rtol=1e-9)
