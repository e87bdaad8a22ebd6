"""Exact products wherever there are any, differences where they are right, and a word about it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import thalweg
from tests import dense, networks
from thalweg.errors import InvalidInput, KinkedDifferences
from thalweg.loss.function_loss import FunctionLoss
from thalweg.loss.gradient_differences import GradientDifferences
from thalweg.loss.objective import Objective
from thalweg.loss.weighted_sum import WeightedSum
from thalweg.operators import GaussNewton, Hessian
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.tracking.tracker import SubspaceTracker

LOSS = nn.CrossEntropyLoss()


class _Fused(torch.autograd.Function):
    """Attention as fused kernels give it: a gradient, and no derivative of that."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return _attention(query, key, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        with torch.enable_grad():
            inputs = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
            return torch.autograd.grad(_attention(*inputs), inputs, grad)


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


class Transformer(nn.Module):
    """One block, with attention and an activation of one's choice."""

    def __init__(
        self, attention: Callable[..., Tensor], activation: type[nn.Module] = nn.GELU
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.qkv = nn.Embedding(7, 6), nn.Linear(6, 18)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 7)
        self.activation, self.attention = activation(), attention

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens)
        parts = self.qkv(self.norm(states)).chunk(3, dim=-1)
        mixed = self.attention(*(p.unflatten(-1, (2, 3)).transpose(1, 2) for p in parts))
        return self.head(self.activation(states + mixed.transpose(1, 2).flatten(-2))).mean(1)


def tokens() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randint(0, 7, (12, 5)), torch.randint(0, 7, (12,))


def objective(
    attention: Callable[..., Tensor] = _Fused.apply,
    activation: type[nn.Module] = nn.GELU,
    **options: Any,
) -> Objective:
    model = Transformer(attention, activation).double()
    return Objective(model, LOSS, tokens(), **options)


def ones(loss: Any) -> Tensor:
    return torch.ones(loss.num_parameters, dtype=loss.dtype)


def reference() -> Tensor:
    """H times ones of the model written out."""
    case = networks.Case(Transformer(_attention).double(), LOSS, tokens())
    loss, theta = dense.flat_loss(case), dense.flat_parameters(case)
    return dense.hessian(loss, theta) @ torch.ones_like(theta)


def test_a_model_without_second_derivative_takes_differences_by_itself() -> None:
    loss = objective()
    assert loss.product == "auto"
    image, errors = Hessian(loss).product_with_error(ones(loss))
    assert loss.product == "difference"
    assert "_Fused" in loss.choice.reason
    assert f"chunk_size=1024, product='difference' ({loss.choice.reason}))" in repr(loss)
    assert errors is not None
    assert float((image - reference()).norm()) <= float(errors)
    assert dense.relative(image, reference()) < 1e-7


def test_a_model_with_one_stays_exact_bit_for_bit() -> None:
    auto, exact = (objective(_attention, product=p) for p in ("auto", "exact"))
    assert torch.equal(Hessian(auto) @ ones(auto), Hessian(exact) @ ones(exact))
    assert (auto.product, exact.product) == ("exact", "exact")
    assert auto.state_dict() == exact.state_dict()
    assert "product" not in repr(auto)
    assert dense.relative(Hessian(auto) @ ones(auto), reference()) < 1e-12


def test_with_kinks_auto_takes_no_differences() -> None:
    loss = objective(activation=nn.ReLU)
    with pytest.raises(InvalidInput, match=r"_Fused.*'activation' \(ReLU\) has a k"):
        _ = Hessian(loss) @ ones(loss)
    assert loss.product == "auto"


def test_asked_for_across_kinks_they_warn_once_and_name_the_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    data = (torch.randn(10, 4), torch.randint(0, 3, (10,)))
    loss = Objective(model, LOSS, data, product="difference")
    with pytest.warns(KinkedDifferences, match=r"layer '1' \(ReLU\) has a kink"):
        _ = Hessian(loss) @ ones(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = Hessian(loss) @ ones(loss)
    auto = Objective(model, LOSS, data)
    _ = Hessian(auto) @ ones(auto)
    assert auto.product == "exact"


def test_asked_for_on_a_smooth_model_they_do_not_warn() -> None:
    loss = objective(_attention, product="difference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = Hessian(loss) @ ones(loss)
    assert dense.relative(image, reference()) < 1e-7


def test_exact_alone_is_refused_with_the_hint() -> None:
    loss = objective(product="exact")
    with pytest.raises(InvalidInput, match=r"_Fused .* is at fault"):
        _ = Hessian(loss) @ ones(loss)


def test_fused_attention_serves_gradients_where_differences_are_asked_for() -> None:
    seen = []

    def attention(*parts: Tensor) -> Tensor:
        seen.append(torch.backends.cuda.flash_sdp_enabled())
        return functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])

    exact = objective(attention)
    assert dense.relative(Hessian(exact) @ ones(exact), reference()) < (1e-12)
    assert not any(seen)
    seen.clear()
    loss = objective(attention, product="difference")
    assert dense.relative(Hessian(loss) @ ones(loss), reference()) < 1e-7
    assert all(seen)
    seen.clear()
    # Other operators differentiate twice all the same.
    _ = GaussNewton(loss) @ ones(loss)
    assert not any(seen)


def test_a_kernel_that_the_model_insists_on_is_taken_as_it_is() -> None:
    def insisting(*parts: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])

    loss = objective(insisting)
    assert dense.relative(Hessian(loss) @ ones(loss), reference()) < 1e-7
    assert loss.product == "difference"


class Reentrant(Transformer):
    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens)

        def block(states: Tensor) -> Tensor:
            parts = self.qkv(self.norm(states)).chunk(3, dim=-1)
            mixed = self.attention(*(p.unflatten(-1, (2, 3)).transpose(1, 2) for p in parts))
            return states + mixed.transpose(1, 2).flatten(-2)

        states = checkpoint(block, states, use_reentrant=True)
        return self.head(self.activation(states)).mean(1)


def test_reentrant_checkpoints_take_differences_and_leave_gradients_alone() -> None:
    model = Reentrant(_attention).double()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    loss = Objective(model, LOSS, tokens())
    plain = objective(_attention)
    assert dense.relative(loss.gradient(), plain.gradient()) < 1e-12
    assert loss.product == "difference"
    assert "use_reentrant" in loss.choice.reason
    assert dense.relative(Hessian(loss) @ ones(loss), reference()) < 1e-7
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.parameters())
    with pytest.raises(InvalidInput, match="use_reentrant=False"):
        _ = GaussNewton(loss) @ ones(loss)


@pytest.mark.slow
def test_a_function_that_was_compiled_is_differentiated_as_it_was_before() -> None:
    torch.compiler.reset()
    compiled = torch.compile(_attention, backend="aot_eager")
    for product in ("auto", "difference"):
        loss = objective(compiled, product=product)
        assert dense.relative(Hessian(loss) @ ones(loss), reference()) < 1e-7


def test_what_was_chosen_and_its_steps_are_saved_bit_for_bit() -> None:
    first, second = objective(), objective()
    _ = Hessian(first) @ ones(first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.product == "difference"
    assert second.choice.reason == first.choice.reason
    vector = torch.randn(first.num_parameters, generator=torch.Generator().manual_seed(3)).double()
    assert torch.equal(Hessian(first) @ vector, Hessian(second) @ vector)
    assert first.state_dict() == second.state_dict()


def test_differences_are_not_continued_exactly() -> None:
    first = objective()
    _ = Hessian(first) @ ones(first)
    with pytest.raises(InvalidInput, match="product: got 'exact'"):
        objective(_attention, product="exact").load_state_dict(first.state_dict())


def test_a_tracker_resumes_bit_for_bit() -> None:
    def followed(steps: int, state: Any = None, theta: Tensor | None = None) -> Any:
        loss = objective()
        if theta is not None:
            loss.write(theta)
        tracker = SubspaceTracker(loss, 2)
        if state is not None:
            tracker.load_state_dict(state)
        generator = torch.Generator().manual_seed(steps)
        for _ in range(steps):
            loss.write(loss.theta() - 0.05 * loss.gradient())
            tracker.update()
        del generator
        return tracker, loss

    whole, _ = followed(6)
    half, loss = followed(3)
    rest, _ = followed(3, copy.deepcopy(half.state_dict()), loss.theta())
    assert torch.equal(whole.subspace.basis, rest.subspace.basis)


def test_a_plain_function_takes_them_too() -> None:
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double()
    theta = torch.tensor([0.3, -0.2, 0.5]).double()

    def fused(t: Tensor) -> Tensor:
        return torch.cdist(t[None], points).square().square().sum()

    def written_out(t: Tensor) -> Tensor:
        return (t - points).square().sum(1).square().sum()

    loss = FunctionLoss(fused, theta)
    image, errors = Hessian(loss).product_with_error(torch.eye(3).double())
    assert (loss.product, errors is not None) == ("difference", True)
    assert dense.relative(image, dense.hessian(written_out, theta)) < 1e-7
    kinked = FunctionLoss(lambda t: functional.hardsigmoid(t).sum(), theta)
    with pytest.raises(InvalidInput, match="no way either: the loss"):
        _ = Hessian(kinked) @ torch.ones(3).double()
    exact = FunctionLoss(written_out, theta)
    _ = Hessian(exact) @ torch.ones(3).double()
    assert exact.product == "exact"


def test_a_sum_of_both_kinds_knows_its_error() -> None:
    model = Transformer(_Fused.apply).double()
    terms = [
        Objective(model, LOSS, tokens()),
        Objective(model, lambda o, t: o.square().mean(), tokens(), product="exact"),
    ]
    terms[1].model = model
    total = WeightedSum([terms[0], terms[0]], [1.0, 2.0])
    image, errors = Hessian(total).product_with_error(ones(total))
    assert errors is not None
    assert float((image - 3 * reference()).norm()) <= float(errors)


def test_another_way_is_refused() -> None:
    with pytest.raises(InvalidInput, match="product: got 'both', allowed: 'auto'"):
        objective(product="both")


def test_the_solver_takes_what_there_is() -> None:
    loss = objective()
    found = top_eigenpairs(loss, 2, tolerance=1e-6)
    case = networks.Case(Transformer(_attention).double(), LOSS, tokens())
    values = torch.linalg.eigvalsh(
        dense.hessian(dense.flat_loss(case), dense.flat_parameters(case))
    )
    assert torch.allclose(found.eigenvalues, values.flip(0)[:2], rtol=1e-7)
    assert isinstance(loss.linearize(), GradientDifferences)
    assert thalweg.Objective is Objective
