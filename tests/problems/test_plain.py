"""Plain functions and classes are registered as they are; their parameters are the settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import InvalidInput
from thalweg.lab.config import parse_spec
from thalweg.lab.config.optimizers import OptimizerSettings
from thalweg.problems import build_problem
from thalweg.problems.problem_spec import ProblemSpec
from thalweg.registry import datasets, losses, models, optimizers, register


@pytest.fixture(autouse=True)
def _names_are_freed() -> Iterator[None]:
    """What a test registers is gone after it."""
    kinds: list[Any] = [datasets, models, losses, optimizers]
    before = [set(kind) for kind in kinds]
    yield
    for kind, known in zip(kinds, before, strict=True):
        for name in set(kind) - known:
            del kind[name]


class Net(nn.Module):
    """A module like any other."""

    def __init__(self, inputs: int, outputs: int, hidden: list[int], scale: float = 1.0) -> None:
        super().__init__()
        sizes = [inputs, *hidden, outputs]
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        self.layers, self.scale = nn.ModuleList(layers), scale

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.scale * x


def ring(points: int = 30, radius: float = 1.0) -> tuple[Tensor, Tensor]:
    """Points on a circle, and the half they are in."""
    angle = torch.linspace(0, 6, points)
    return radius * torch.stack([angle.cos(), angle.sin()], 1), (angle > np.pi).long()


def problem(**parts: Any) -> ProblemSpec:
    usual = {"data": "ring", "model": {"name": "net", "hidden": [4, 3]}, "loss": "cross-entropy"}
    return ProblemSpec.model_validate({**usual, **parts})


def test_a_function_that_returns_tensors_is_a_data_set_and_a_module_class_a_model() -> None:
    assert register.data("ring")(ring) is ring
    assert register.model("net")(Net) is Net
    spec = problem(data={"name": "ring", "points": 20, "radius": 2})
    built = build_problem(spec, 0)
    assert (built.num_samples, built.num_classes) == (20, 2)
    assert torch.equal(built.train[0], ring(20, 2.0)[0])
    assert isinstance(built.model, Net)
    assert [layer.weight.shape for layer in built.model.layers] == [(4, 2), (3, 4), (2, 3)]  # type: ignore[union-attr]
    assert spec.model_dump(exclude_none=True)["model"] == {
        "name": "net",
        "hidden": (4, 3),
        "scale": 1.0,
    }


def test_a_function_is_a_model_and_a_loss() -> None:
    register.data("ring")(lambda: (*ring(20), *ring(6)))

    @register.model("line")
    def line(bias: bool = True) -> nn.Module:
        return nn.Linear(2, 2, bias=bias)

    @register.loss("power", target="one-hot")
    def power(output: Tensor, target: Tensor, exponent: int = 2) -> Tensor:
        return (output - target).abs().pow(exponent).sum(1).mean()

    spec = problem(model={"name": "line", "bias": False}, loss={"name": "power", "exponent": 4})
    built = build_problem(spec, 0)
    assert built.test is not None
    assert len(built.test[0]) == 6
    output = built.model(built.train[0])
    assert built.loss(output, built.train[1]) == power(output, built.train[1], 4)


def test_settings_are_checked_like_any_other() -> None:
    register.data("ring")(ring)
    raw = {
        "problem": {"data": {"name": "ring", "pionts": 5}, "model": "mlp", "loss": "mse"},
        "phases": [{"optimizer": {"name": "sgd", "lr": 0.1}, "steps": 5}],
    }
    with pytest.raises(InvalidInput, match=r"problem\.data\.pionts: no such key .*did you mean 'p"):
        parse_spec(raw)
    raw["problem"]["data"] = {"name": "ring", "points": "5"}
    with pytest.raises(InvalidInput, match=r"problem\.data\.points: got '5', allowed: an integer"):
        parse_spec(raw)


class Lion(torch.optim.Optimizer):
    """The sign of an average of gradients (Chen et al. 2023)."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                assert p.grad is not None
                p.sub_(p.grad.sign(), alpha=group["lr"])


def test_a_class_of_torchs_kind_is_an_optimizer() -> None:
    assert register.optimizer("lion")(Lion) is Lion
    settings = optimizers.find("lion")(lr=0.01, betas=(0.5, 0.6))
    assert set(type(settings).model_fields) == {*OptimizerSettings.model_fields, "betas"}
    built = settings.build([("w", torch.zeros(2, requires_grad=True))])
    assert isinstance(built, Lion)
    assert built.defaults == {"lr": 0.01, "betas": (0.5, 0.6)}


def test_an_optimizer_has_a_learning_rate() -> None:
    with pytest.raises(InvalidInput, match=r"optimizer 'rateless': parameters: .* lr among them"):

        @register.optimizer("rateless")
        def rateless(params: Any, speed: float) -> None: ...


def test_a_parameter_that_no_spec_can_write_needs_a_default() -> None:
    with pytest.raises(InvalidInput, match=r"model 'generated': type of generator: .*default"):

        @register.model("generated")
        def generated(outputs: int, generator: torch.Generator) -> None: ...


def test_a_data_set_that_returns_something_else_is_told() -> None:
    register.data("three")(lambda: (1, 2, 3))
    with pytest.raises(InvalidInput, match="data set three: its function returned 3 values"):
        build_problem(problem(data="three", model="mlp"), 0)
