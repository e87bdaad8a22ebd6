from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import InputShape
from thalweg.registry import models

GREY, COLOUR, TOKENS = InputShape((1, 8, 8)), InputShape((3, 32, 32)), InputShape((6,), 11)

CASES: list[tuple[str, dict[str, Any], InputShape]] = [
    ("mlp", {"hidden": (5,)}, GREY),
    ("mlp", {"hidden": (5, 4), "bias": False, "activation": "softplus"}, GREY),
    ("mlp", {"hidden": ()}, InputShape((3,))),
    ("cnn", {"width": 3}, GREY),
    ("cnn", {"width": 3, "depth": 3, "pooling": "avg", "activation": "gelu"}, GREY),
    ("cnn", {"width": 3, "pooling": "none", "stride": 2, "kernel": 5, "bias": False}, GREY),
    ("transformer", {"width": 8, "heads": 2, "feed_forward": 7}, TOKENS),
    ("transformer", {"width": 8, "feed_forward": 7, "norm": "first", "pooling": "cls"}, TOKENS),
    ("transformer", {"width": 8, "position": "sinusoidal", "activation": "silu"}, TOKENS),
    ("transformer", {"width": 9, "heads": 3, "position": "sinusoidal", "layers": 1}, TOKENS),
    ("transformer", {"width": 8, "position": "none", "pooling": "cls"}, TOKENS),
    ("vgg11", {"width": 2, "classifier": (4,), "initialization": "he"}, COLOUR),
    ("vgg11", {"width": 2, "norm": "group", "groups": 2, "pooling": "avg"}, COLOUR),
    ("vgg11", {"width": 2, "norm": "batch", "classifier": ()}, InputShape((1, 40, 33))),
    ("resnet8", {"width": 4, "groups": 2}, GREY),
    ("resnet8", {"width": 4, "norm": "batch", "shortcut": "pad", "activation": "tanh"}, COLOUR),
]


def build(name: str, settings: dict[str, Any], inputs: InputShape, outputs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return models.get(name).model_validate(settings).build(inputs, outputs).double()


def some_inputs(inputs: InputShape, number: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if inputs.vocabulary is None:
        return torch.randn(number, *inputs.shape, generator=generator, dtype=torch.float64)
    ids = torch.randint(1, inputs.vocabulary, (number, *inputs.shape), generator=generator)
    ids[0, 4:] = 0
    return ids


@pytest.mark.parametrize(("name", "settings", "inputs"), CASES, ids=lambda x: str(x)[:60])
def test_outputs_have_the_shape_asked_for_and_use_every_parameter(
    name: str, settings: dict[str, Any], inputs: InputShape
) -> None:
    model = build(name, settings, inputs)
    output = model(some_inputs(inputs))
    assert output.shape == (3, 4)
    gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize(("name", "settings", "inputs"), CASES, ids=lambda x: str(x)[:60])
def test_double_backward_agrees_with_differences_of_gradients(
    name: str, settings: dict[str, Any], inputs: InputShape
) -> None:
    # A smooth activation, as differences across a kink of ReLU say nothing.
    model = build(name, {"activation": "silu"} | settings, inputs).eval()
    parameters = list(model.parameters())
    data = some_inputs(inputs)
    generator = torch.Generator().manual_seed(2)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def gradient() -> list[Tensor]:
        loss = model(data).sin().sum()
        return list(torch.autograd.grad(loss, parameters, create_graph=True))

    with sdpa_kernel(SDPBackend.MATH):
        along = sum((g * d).sum() for g, d in zip(gradient(), direction, strict=True))
        assert isinstance(along, Tensor)
        product = torch.autograd.grad(along, parameters, materialize_grads=True)
        sides = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for parameter, d in zip(parameters, direction, strict=True):
                    parameter += step * d
            sides.append([g.detach() for g in gradient()])
    expected = torch.cat([(a - b).ravel() / 2e-6 for a, b in zip(sides[0], sides[1], strict=True)])
    found = torch.cat([p.ravel() for p in product])
    assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-7


def test_the_papers_mlp_has_its_size() -> None:
    model = build("mlp", {}, InputShape((1, 28, 28)), 10)
    assert sum(p.numel() for p in model.parameters()) == 784 * 200 + 200 + 200 * 201 + 10 * 201


def test_the_papers_cnn_has_its_size() -> None:
    model = build("cnn", {}, COLOUR, 10)
    expected = (3 * 9 + 1) * 32 + (32 * 9 + 1) * 32 + (32 * 64 + 1) * 10
    assert sum(p.numel() for p in model.parameters()) == expected


def test_vgg11_has_the_size_of_the_public_one_for_cifar10() -> None:
    model = build("vgg11", {}, COLOUR, 10)
    convolutions = [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512)] + [(512, 512)] * 3
    linear = [(512, 512), (512, 512), (512, 10)]
    expected = sum((9 * a + 1) * b for a, b in convolutions) + sum((a + 1) * b for a, b in linear)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("settings", [{"norm": "last"}, {"norm": "first", "pooling": "cls"}])
def test_padding_does_not_change_the_output(settings: dict) -> None:
    settings = {"width": 8, "position": "sinusoidal", **settings}
    padded = build("transformer", settings, TOKENS)
    short = build("transformer", settings, InputShape((4,), 11))
    ids = torch.tensor([[3, 4, 5, 6, 0, 0]])
    torch.testing.assert_close(padded(ids), short(ids[:, :4]))


def test_layers_that_would_be_random_are_there_only_on_request() -> None:
    def dropouts(dropout: float) -> int:
        model = build("transformer", {"width": 8, "dropout": dropout}, TOKENS)
        return sum(isinstance(module, nn.Dropout) for module in model.modules())

    assert dropouts(0.0) == 0
    assert dropouts(0.1) == 5


def test_a_resnet_block_without_training_signal_passes_its_input_on() -> None:
    model = build("resnet8", {"width": 4, "groups": 2, "activation": "identity"}, GREY)
    block = next(iter(model.get_submodule("blocks").children()))
    nn.init.zeros_(block.get_parameter("second_norm.weight"))
    images = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(block(images), images)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("mlp", {"hidden": (0,)}, "greater than or equal to 1"),
        ("mlp", {"activation": "cosine"}, "tanh"),
        ("cnn", {"kernel": 2}, "an odd number"),
        ("transformer", {"width": 10, "heads": 4}, "a divisor of width, 10"),
        ("transformer", {"dropout": 1.0}, "less than 1"),
        ("vgg11", {"width": 4, "norm": "group"}, "a divisor of width, 4"),
        ("resnet8", {"groups": 5}, "a divisor of width, 16"),
        ("resnet8", {"depth": 8}, "not permitted"),
    ],
)
def test_impossible_settings_are_refused(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        models.get(name).model_validate(settings)


@pytest.mark.parametrize(
    ("name", "settings", "inputs", "message"),
    [
        ("mlp", {}, TOKENS, "choose model transformer"),
        ("cnn", {}, TOKENS, "choose model transformer"),
        ("cnn", {}, InputShape((20,)), "choose model mlp"),
        ("cnn", {"depth": 4}, GREY, "images of 8x8 pixels vanish in layer 4 of 4"),
        ("vgg11", {}, InputShape((1, 28, 28)), "at least 32x32"),
        ("resnet8", {}, InputShape((20,)), "choose model mlp"),
        ("transformer", {}, GREY, "not token ids"),
    ],
)
def test_inputs_that_a_model_cannot_take_are_refused(
    name: str, settings: dict, inputs: InputShape, message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        build(name, settings, inputs)
