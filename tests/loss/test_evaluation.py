from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.networks import CASES
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian

INPUTS = torch.linspace(-1, 1, 24).reshape(8, 3)
TARGETS = torch.linspace(1, 0, 16).reshape(8, 2)


def objective(model: nn.Module, loss: Any = None, **options: Any) -> Objective:
    return Objective(model, nn.MSELoss() if loss is None else loss, (INPUTS, TARGETS), **options)


def test_nothing_of_the_models_state_is_touched() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model[2].eval()
    loss = objective(model, mode="eval", chunk_size=3)
    model(INPUTS).sum().backward()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    flags = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()

    theta = loss.theta() + 0.1
    loss.value()
    loss.gradient(theta)
    _ = Hessian(loss, theta, keep_graph=True) @ torch.eye(loss.num_parameters)

    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    found = [p.grad for p in model.parameters()]
    assert all(g is not None and torch.equal(g, h) for g, h in zip(found, gradients, strict=True))
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_layer_that_updates_its_buffers_in_place_updates_a_copy() -> None:
    model = nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten()
    )
    model.append(nn.Linear(3, 2))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    loss = objective(model)
    loss.value()
    _ = Hessian(loss) @ torch.ones(loss.num_parameters)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model(INPUTS)
    assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_flags_are_put_back_after_a_failure() -> None:
    class Failing(nn.Dropout):
        def forward(self, input: Tensor) -> Tensor:
            raise RuntimeError("out of order")

    model = nn.Sequential(nn.Linear(3, 2), Failing())
    with pytest.raises(InvalidInput, match="out of order"):
        objective(model, mode="eval").gradient()
    assert all(module.training for module in model.modules())


def test_eval_mode_is_the_function_that_the_model_is_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    model(INPUTS)  # running statistics that differ from those of a batch
    value = objective(model, mode="eval", chunk_size=3).value()
    expected = functional.mse_loss(model.eval()(INPUTS), TARGETS)
    assert torch.allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "kind"), [(nn.Dropout(0.1), "Dropout"), (nn.BatchNorm1d(4), "BatchNorm1d")]
)
def test_a_layer_in_training_mode_is_refused_by_name_with_the_mend(
    layer: nn.Module, kind: str
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(layer), nn.Linear(4, 2))
    with pytest.raises(InvalidInput, match=rf"layer '1\.0' \({kind}\).*mode='eval'"):
        objective(model)
    # A training loop switches the mode after the objective was made.
    loss = objective(model.eval())
    loss.gradient()
    model.train()
    with pytest.raises(InvalidInput, match=kind):
        loss.gradient()


def test_batch_norm_without_running_statistics_is_refused_in_every_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2, track_running_stats=False))
    for mode in (None, "eval"):
        with pytest.raises(InvalidInput, match="track_running_stats=True"):
            objective(model.eval(), mode=mode)


def test_layers_that_do_not_depend_on_the_mode_are_accepted() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.0), nn.LayerNorm(4), nn.Linear(4, 2))
    objective(model).gradient()
    images = torch.randn(4, 2, 5, 5)
    network = nn.Sequential(nn.Conv2d(2, 2, 3), nn.InstanceNorm2d(2), nn.Flatten())
    Objective(network, nn.MSELoss(), (images, torch.zeros(4, 18)), chunk_size=2).gradient()


def test_dropout_by_function_or_in_attention_is_noticed_and_the_state_put_back() -> None:
    class ByFunction(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return functional.dropout(super().forward(input), 0.5)

    class InAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(3, 1, dropout=0.5, batch_first=True)

        def forward(self, inputs: Tensor) -> Tensor:
            inputs = inputs.unsqueeze(1)
            return self.attention(inputs, inputs, inputs)[0].squeeze(1)[:, :2]

    for model in (ByFunction(3, 2), InAttention()):
        loss = objective(model)
        before = torch.get_rng_state()
        with pytest.raises(InvalidInput, match="draws random numbers"):
            loss.gradient()
        assert torch.equal(torch.get_rng_state(), before)
    objective(InAttention(), mode="eval").gradient()


def test_a_parameter_that_the_loss_does_not_use_is_named_once_and_its_part_is_zero() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs)

    loss = objective(Idle(), chunk_size=3)
    with pytest.warns(UserWarning, match="does not use parameter 'idle") as caught:
        gradient = loss.gradient()
    assert len(caught) == 2
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = Hessian(loss) @ torch.eye(loss.num_parameters)
    assert gradient[:8].all()
    assert not gradient[8:].any()
    assert not image[8:].any()
    assert not image[:, 8:].any()


def test_a_loss_cut_off_from_the_parameters_is_refused() -> None:
    loss = objective(nn.Linear(3, 2), lambda output, target: (output.detach() - target).mean())
    with pytest.raises(InvalidInput, match="does not depend on any parameter"):
        loss.gradient()


def test_a_loss_that_is_not_a_scalar_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"loss: got \(8, 2\).*a scalar tensor"):
        objective(nn.Linear(3, 2), lambda output, target: (output - target) ** 2).value()
    with pytest.raises(InvalidInput, match=r"'float'.*a scalar tensor"):
        objective(nn.Linear(3, 2), lambda output, target: 1.0).value()


def test_a_model_that_returns_its_own_loss_needs_none() -> None:
    class Output:
        def __init__(self, loss: Tensor) -> None:
            self.loss = loss

    class WithLoss(nn.Linear):
        kind = "object"

        def forward(self, inputs: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            loss = functional.mse_loss(super().forward(inputs), labels)
            return {"object": Output(loss), "mapping": {"loss": loss}, "scalar": loss}[self.kind]

    torch.manual_seed(0)
    model = WithLoss(3, 2)
    expected = functional.mse_loss(nn.Linear.forward(model, INPUTS), TARGETS)
    for kind in ("object", "mapping", "scalar"):
        model.kind = kind
        for data in ({"inputs": INPUTS, "labels": TARGETS}, (INPUTS, TARGETS)):
            assert torch.allclose(Objective(model, None, data, chunk_size=3).value(), expected)


def test_a_model_without_loss_or_scalar_is_refused() -> None:
    class Pair(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            return (super().forward(input),)

    with pytest.raises(InvalidInput, match=r"an object with \.loss"):
        Objective(Pair(3, 2), None, (INPUTS,)).value()


def test_a_bfloat16_forward_pass_keeps_products_in_float32() -> None:
    case = CASES["silu"]()
    whole = Objective(case.model, case.loss, case.data)
    rough = Objective(case.model, case.loss, case.data, forward_dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(whole.num_parameters, 3, generator=generator)
    exact, image = Hessian(whole) @ vectors, Hessian(rough) @ vectors
    assert image.dtype == rough.gradient().dtype == torch.float32
    # Eight bits of mantissa: not equal, and not far off.
    assert 1e-5 < float((image - exact).norm() / exact.norm()) < 3e-2
