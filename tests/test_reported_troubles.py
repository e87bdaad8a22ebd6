"""Troubles that people reported in public threads, about torch and tools of this kind.

Each names its thread. What is right is told by differences of the gradients that torch alone gives
for a copy of the model, or by the same loss written without the trap.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import thalweg
from tests.sampling import few
from thalweg.errors import InvalidInput

CROSS_ENTROPY = nn.CrossEntropyLoss()
Loss = Callable[[Any, Any], Tensor]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def inputs_and_labels() -> tuple[Tensor, Tensor]:
    return torch.randn(12, 4).double(), torch.randint(0, 3, (12,))


def two_layers(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), *between, nn.Linear(5, 3)).double()


class Applied(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(inputs)


def torch_gradient(model: nn.Module, loss: Loss, data: tuple[Any, ...], theta: Tensor) -> Tensor:
    there = copy.deepcopy(model)
    nn.utils.vector_to_parameters(theta, there.parameters())
    parts = torch.autograd.grad(loss(there(*data[:-1]), data[-1]), list(there.parameters()))
    return torch.cat([part.reshape(-1) for part in parts])


def assert_right(
    model: nn.Module, loss: Loss, data: tuple[Any, ...], step: float = 1e-5, **options: Any
) -> None:
    """Gradient and Hessian away from the model's own theta, in one chunk and in chunks of 5."""
    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    theta = theta + 0.1 * torch.randn_like(theta)
    steps = step * torch.eye(len(theta), dtype=theta.dtype)
    ahead, behind = (
        torch.stack([torch_gradient(model, loss, data, theta + sign * e) for e in steps])
        for sign in (1, -1)
    )
    gradient, hessian = torch_gradient(model, loss, data, theta), (ahead - behind) / (2 * step)
    assert hessian.norm() > 0.01
    for chunk_size in (None, 5):
        objective = thalweg.Objective(model, loss, data, chunk_size=chunk_size, **options)
        torch.testing.assert_close(objective.gradient(theta), gradient)
        product = thalweg.Hessian(objective, theta) @ torch.eye(len(theta), dtype=theta.dtype)
        torch.testing.assert_close(product, hessian, rtol=1e-4, atol=1e-6)


class KeepsIntermediate(torch.autograd.Function):
    """x^3, whose backward pass uses an intermediate that autograd knows nothing of."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.square = inputs * inputs
        return ctx.square * inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 3 * ctx.square


class SavesOutput(torch.autograd.Function):
    """exp, whose backward pass uses its saved output."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        result = inputs.exp()
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * ctx.saved_tensors[0]


def test_an_intermediate_kept_on_the_context_has_no_second_derivative() -> None:
    """pytorch #76185: silently a wrong second derivative."""
    model = two_layers(Applied(KeepsIntermediate.apply))
    data = inputs_and_labels()
    objective = thalweg.Objective(model, CROSS_ENTROPY, data, product="exact")
    with pytest.raises(InvalidInput, match=r"KeepsIntermediate .* in layer '1'"):
        thalweg.Hessian(objective) @ torch.ones(objective.num_parameters).double()


def test_a_function_that_saves_its_output_gives_the_same_product_twice() -> None:
    """pytorch #18619: the second evaluation of a second derivative was another one."""
    model = two_layers(Applied(SavesOutput.apply))
    assert_right(model, CROSS_ENTROPY, inputs_and_labels())
    objective = thalweg.Objective(model, CROSS_ENTROPY, inputs_and_labels())
    hessian = thalweg.Hessian(objective, keep_graph=True)
    vector = torch.randn(objective.num_parameters).double()
    assert torch.equal(hessian @ vector, hessian @ vector)


def test_a_product_over_two_zeros() -> None:
    """pytorch #106789: the second derivative of `prod` was zero where two factors are."""

    def with_zeros(hidden: Tensor) -> Tensor:
        zeros = hidden[:, :2] - hidden[:, :2].detach()
        return torch.cat([hidden[:, :4], torch.cat([zeros, hidden[:, 2:]], 1).prod(1, True)], 1)

    model, data = two_layers(Applied(with_zeros)), inputs_and_labels()
    objective = thalweg.Objective(model, CROSS_ENTROPY, data)
    product = thalweg.Hessian(objective) @ torch.eye(objective.num_parameters).double()

    def without_prod(hidden: Tensor) -> Tensor:
        zeros = hidden[:, :2] - hidden[:, :2].detach()
        factors = (zeros[:, 0], zeros[:, 1], *hidden[:, 2:].unbind(1))
        whole = factors[0]
        for factor in factors[1:]:
            whole = whole * factor
        return torch.cat([hidden[:, :4], whole[:, None]], 1)

    leaves = tuple(p.detach() for p in model.parameters())
    names = [name for name, _ in model.named_parameters()]
    model[1] = Applied(without_prod)  # type: ignore[operator]

    def value(theta: Tensor) -> Tensor:
        pieces = theta.split([leaf.numel() for leaf in leaves])
        swapped = {n: p.view_as(q) for n, p, q in zip(names, pieces, leaves, strict=True)}
        return CROSS_ENTROPY(torch.func.functional_call(model, swapped, data[0]), data[1])

    dense = torch.autograd.functional.hessian(value, objective.theta())
    torch.testing.assert_close(product, dense)


def test_a_norm_at_zero_has_no_second_derivative() -> None:
    """pytorch #92075: the Hessian of exp(-norm(w)^2) at 0 was wrong, or NaN."""

    class AtZero(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 4).double())

        def forward(self, inputs: Tensor) -> Tensor:
            return inputs @ self.weight.T + torch.exp(-(torch.linalg.norm(self.weight) ** 2))

    data = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    objective = thalweg.Objective(AtZero(), nn.MSELoss(), data)
    with pytest.raises(thalweg.errors.Diverged, match="product with the Hessian"):
        thalweg.Hessian(objective) @ torch.ones(12).double()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_binary_cross_entropy(reduction: str) -> None:
    """pytorch #59477: its second derivative failed with the sum."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).double()

    def loss(output: Tensor, target: Tensor) -> Tensor:
        whole = functional.binary_cross_entropy(output, target, reduction=reduction)
        return whole / len(output) if reduction == "sum" else whole

    assert_right(model, loss, (torch.randn(12, 4).double(), torch.rand(12, 3).double()))


def test_noise_that_a_checkpoint_draws_again() -> None:
    """pytorch #193671: RReLU under checkpointing has wrong gradients without a word."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = nn.Linear(4, 5), nn.Sequential(nn.RReLU(), nn.Linear(5, 3))

        def forward(self, inputs: Tensor) -> Tensor:
            return checkpoint(self.rest, self.first(inputs), use_reentrant=False)  # type: ignore[return-value]

    model = Noisy().double()
    objective = thalweg.Objective(model, CROSS_ENTROPY, inputs_and_labels())
    with pytest.raises(InvalidInput, match="random numbers"):
        objective.gradient()
    assert_right(model.eval(), CROSS_ENTROPY, inputs_and_labels())


def test_tied_layers_in_one_checkpoint() -> None:
    """pytorch #81296: a weight that two layers of a checkpoint share."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.second.weight = self.first.weight

        def hidden(self, inputs: Tensor) -> Tensor:
            return torch.tanh(self.second(torch.tanh(self.first(inputs))))

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(checkpoint(self.hidden, self.first(inputs), use_reentrant=False))

    assert_right(Tied().double(), CROSS_ENTROPY, inputs_and_labels())


def test_batch_norm_of_single_images() -> None:
    """functorch #867, #986: running statistics under per-sample derivatives."""
    layers = (nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    model, images = nn.Sequential(*layers).double(), torch.randn(6, 1, 3, 3).double()
    labels = torch.randint(0, 3, (6,))
    model(images)
    objective = thalweg.Objective(model.eval(), CROSS_ENTROPY, (images, labels))
    theta = objective.theta()
    each = [
        torch_gradient(model, CROSS_ENTROPY, (images[i : i + 1], labels[i : i + 1]), theta)
        for i in range(6)
    ]
    covariance = torch.cov(torch.stack(each, 1), correction=0)
    product = thalweg.GradientCovariance(objective) @ torch.eye(len(theta)).double()
    torch.testing.assert_close(product, covariance)


def test_class_weights_ignored_targets_and_smoothing_at_once() -> None:
    """pytorch #30984: over what a mean is taken where some targets are ignored."""
    inputs, labels = inputs_and_labels()
    labels[:7] = -100
    weight = torch.tensor([1.0, 3.0, 0.2]).double()
    loss = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1)
    assert_right(two_layers(nn.Tanh()), loss, (inputs, labels))


SELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "order": lambda h: (
        torch.stack(
            [h.max(1)[0], h.min(1)[0], h.sort(1)[0][:, 2], h.topk(2, 1)[0][:, 1], h.median(1)[0]], 1
        )
        ** 2
    ),
    "sums": lambda h: torch.stack(
        [
            h.logsumexp(1),
            h.std(1),
            h.norm(dim=1),
            h.cumsum(1)[:, 3] * h.cumprod(1)[:, 2],
            h.amax(1),
        ],
        1,
    ),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections(name: str) -> None:
    """pytorch #1712: second derivatives of operations that select entries."""
    assert_right(two_layers(Applied(SELECTIONS[name])), CROSS_ENTROPY, inputs_and_labels())


def test_determinants_and_solutions() -> None:
    """pytorch #192540: slogdet and solve, differentiated forward twice, silently wrong."""

    def solved(hidden: Tensor) -> Tensor:
        matrices = torch.einsum("ni,nj->nij", hidden, hidden) + torch.eye(5).double()
        logs = torch.linalg.slogdet(matrices)[1][:, None]
        return torch.cat([hidden[:, :2], logs, torch.linalg.solve(matrices, hidden)[:, :2]], 1)

    assert_right(two_layers(Applied(solved)), CROSS_ENTROPY, inputs_and_labels())


class Reentrant(nn.Module):
    """A checkpointed part, of the old kind."""

    def __init__(self, of_inputs: bool) -> None:
        super().__init__()
        self.first, self.last, self.of_inputs = nn.Linear(4, 5), nn.Linear(5, 3), of_inputs

    def forward(self, inputs: Tensor) -> Tensor:
        if self.of_inputs:
            return self.last(checkpoint(self.first, inputs, use_reentrant=True))
        return checkpoint(self.last, self.first(inputs), use_reentrant=True)  # type: ignore[return-value]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_checkpoint_of_the_inputs_gets_no_gradient() -> None:
    """pytorch #7617: parameters are left out without an error."""
    objective = thalweg.Objective(Reentrant(True).double(), CROSS_ENTROPY, inputs_and_labels())
    with pytest.warns(
        UserWarning, match=r"'first\.(bias|weight)', or only where no graph .*reentrant"
    ):
        objective.gradient()


def test_a_reentrant_checkpoint_has_no_second_derivative() -> None:
    """pytorch #33999: mixed derivatives through such a checkpoint were wrong."""
    model, data = Reentrant(False).double(), inputs_and_labels()
    objective = thalweg.Objective(model, CROSS_ENTROPY, data, product="exact")
    with pytest.raises(InvalidInput, match="use_reentrant=False"):
        objective.gradient()


def test_a_gradient_scaled_by_how_often_an_entry_is_used() -> None:
    """pytorch PR 66622, #190063: a gradient that is that of no loss."""
    model = nn.Sequential(
        nn.Embedding(6, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(8, 3)
    )
    data = torch.randint(0, 6, (12, 2)), torch.randint(0, 3, (12,))
    objective = thalweg.Objective(model, CROSS_ENTROPY, data)
    with pytest.raises(InvalidInput, match="scale_grad_by_freq = False"):
        objective.gradient()
    model[0].scale_grad_by_freq = False  # type: ignore[assignment]
    assert_right(model.double(), CROSS_ENTROPY, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers(kind: type[nn.LSTM] | type[nn.GRU]) -> None:
    """pytorch #20449, #25315: recurrent layers had no second derivative."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = kind(3, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.last(self.layer(inputs)[0][:, -1])

    data = torch.randn(12, 4, 3).double(), torch.randint(0, 3, (12,))
    assert_right(Recurrent().double(), CROSS_ENTROPY, data)


def test_a_contrastive_loss_is_one_of_the_whole_batch() -> None:
    """luyug/GradCache #7: the gradient of a loss that compares samples, made in parts."""

    def contrastive(output: Tensor, target: Tensor) -> Tensor:
        unit = functional.normalize(output, dim=1)
        return functional.cross_entropy(unit @ unit.T, torch.arange(len(unit)).roll(1))

    model, data = two_layers(nn.Tanh()), inputs_and_labels()
    whole = thalweg.Objective(model, contrastive, data)
    expected = torch_gradient(model, contrastive, data, whole.theta())
    torch.testing.assert_close(whole.gradient(), expected)
    with pytest.raises(InvalidInput, match="mean of the losses of two parts"):
        thalweg.Objective(model, contrastive, data, chunk_size=5).gradient()


@pytest.mark.parametrize("fused", few(1, [True, False]))
def test_attention_of_every_kind(fused: bool) -> None:
    """pytorch #116350, learn2learn #429: fused attention has no second derivative."""

    class Attention(nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.first, self.last, self.fused = nn.Linear(4, 12), nn.Linear(4, 3), fused
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, inputs: Tensor) -> Tensor:
            h = self.first(inputs).view(-1, 3, 4)
            if self.fused:
                h = functional.scaled_dot_product_attention(h, h, h, is_causal=True)
            return self.last(self.attention(h, h, h, need_weights=not self.fused)[0].mean(1))

    assert_right(Attention(fused).double(), CROSS_ENTROPY, inputs_and_labels())


def test_hooks_that_read_leave_the_loss_as_it_is() -> None:
    """pytorch #88312: a full backward hook made the second derivative fail."""
    seen: list[int] = []
    model = two_layers(nn.Tanh())
    model[1].register_full_backward_hook(lambda module, before, after: seen.append(1))  # type: ignore[index]
    assert_right(model, CROSS_ENTROPY, inputs_and_labels())
    assert seen


def test_hooks_that_change_a_gradient_are_no_part_of_the_loss() -> None:
    """pytorch #88312: the same hook, where it changes the gradient inside of the model."""
    model, data = two_layers(nn.Tanh()), inputs_and_labels()
    model[0].weight.register_hook(lambda gradient: 2 * gradient)  # type: ignore[index]
    plain = two_layers(nn.Tanh())
    plain.load_state_dict(model.state_dict())
    objective = thalweg.Objective(model, CROSS_ENTROPY, data)
    theta = objective.theta() + 0.1
    expected = torch_gradient(plain, CROSS_ENTROPY, data, theta)
    torch.testing.assert_close(objective.gradient(theta), expected)
    model[1].register_full_backward_hook(lambda module, before, after: (3 * before[0],))  # type: ignore[index]
    with pytest.raises(InvalidInput, match="layer '1'"):
        thalweg.Hessian(thalweg.Objective(model, CROSS_ENTROPY, data)) @ theta


def test_a_buffer_that_forward_writes_under_an_averaged_model() -> None:
    """pytorch #84053: the average's buffers are others than the model's, and change as it runs."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("mean", torch.tensor(0.0).double())

        def forward(self, inputs: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1
            return self.layer(inputs - self.mean)

    averaged, (inputs, labels) = AveragedModel(Centred().double()), inputs_and_labels()
    averaged.update_parameters(averaged.module)
    objective = thalweg.Objective(averaged, CROSS_ENTROPY, (inputs, labels))
    layer = averaged.module.layer
    expected = CROSS_ENTROPY(layer(inputs - 0.1), labels)
    for _ in range(2):
        torch.testing.assert_close(objective.value(), expected.detach())
    assert averaged.module.mean == 0


def test_groups_of_a_wrapper_after_loading_are_those_of_its_optimizer() -> None:
    """apex #766: a scheduler that changes other groups than those which step."""
    model, data = two_layers(nn.Tanh()), inputs_and_labels()
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tracker = thalweg.SubspaceTracker(thalweg.Objective(model, CROSS_ENTROPY, data), k=2)
    wrapper = thalweg.SplitUpdate(inner, tracker, 1.0, 1.0)
    wrapper.load_state_dict(wrapper.state_dict())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(wrapper, gamma=0.5)
    CROSS_ENTROPY(model(data[0]), data[1]).backward()
    wrapper.step()
    scheduler.step()
    assert inner.param_groups[0]["lr"] == wrapper.param_groups[0]["lr"] == 0.05


def test_sam_over_several_batches() -> None:
    """davda54/sam #3, #62: SAM of a gradient that is summed over batches."""
    model, (inputs, labels) = two_layers(nn.Tanh()), inputs_and_labels()
    twin = copy.deepcopy(model)

    def stepped(of: nn.Module, parts: int) -> Tensor:
        optimizer = thalweg.SAM(torch.optim.SGD(of.parameters(), lr=0.1), rho=0.5)

        def closure() -> Tensor:
            optimizer.zero_grad()
            whole = torch.zeros(()).double()
            for x, y in zip(inputs.chunk(parts), labels.chunk(parts), strict=True):
                loss = CROSS_ENTROPY(of(x), y) / parts
                loss.backward()
                whole += loss.detach()
            return whole

        optimizer.step(closure)
        return nn.utils.parameters_to_vector(of.parameters()).detach()

    torch.testing.assert_close(stepped(model, 3), stepped(twin, 1))
