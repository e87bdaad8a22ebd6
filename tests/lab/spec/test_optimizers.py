from __future__ import annotations

import inspect

import pytest
import torch
from pydantic import ValidationError

from thalweg.errors import InvalidInput
from thalweg.lab.spec.optimizers import SGD, Muon, optimizers

NAMES = optimizers.names()


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_are_those_of_torch(name: str):
    settings = optimizers.get(name)(lr=0.5)
    signature = inspect.signature(getattr(torch.optim, settings.torch_class).__init__)
    for key, value in settings.model_dump(exclude={"lr"}).items():
        assert value == signature.parameters[key].default, key


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_must_be_given(name: str):
    with pytest.raises(ValidationError, match="lr"):
        optimizers.get(name)()  # type: ignore[call-arg]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("named", [False, True])
def test_an_optimizer_steps_as_torchs_own(name: str, named: bool):
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    gradient = torch.randn(4, 3)
    settings = optimizers.get(name)(lr=0.5)
    result = []
    for kind in ("ours", "torch's"):
        parameter = torch.nn.Parameter(start.clone())
        if kind == "ours":
            built = settings.build([("weight", parameter)] if named else [parameter])
        else:
            built = getattr(torch.optim, settings.torch_class)([parameter], lr=0.5)
        for _ in range(3):
            parameter.grad = gradient.clone()
            built.step()
        result.append(parameter.detach())
    assert torch.equal(*result)
    assert not torch.equal(result[0], start)


def test_settings_reach_the_optimizer():
    group = SGD(lr=0.5, momentum=0.9, nesterov=True).build([torch.zeros(2)]).param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.5, 0.9, True)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"lr": 0.0}, "lr"),
        ({"lr": 1.0, "momentum": 1.0}, "momentum"),
        ({"lr": 1.0, "weight_decay": -1.0}, "weight_decay"),
        ({"lr": 1.0, "nesterov": True}, "nesterov"),
        ({"lr": 1.0, "nesterov": True, "momentum": 0.9, "dampening": 0.1}, "dampening"),
    ],
)
def test_a_value_that_torch_would_refuse_is_refused_at_once(values: dict[str, float], key: str):
    with pytest.raises(ValidationError) as caught:
        SGD.model_validate(values)
    assert [error["loc"] for error in caught.value.errors()] == [(key,)]


def test_muon_names_the_parameter_that_is_no_matrix():
    parameters = [("weight", torch.zeros(2, 3)), ("layers.0.bias", torch.zeros(3))]
    with pytest.raises(InvalidInput, match=r"parameter layers\.0\.bias has shape \(3,\), allowed"):
        Muon(lr=0.1).build(parameters)
    with pytest.raises(InvalidInput, match=r"parameter number 1 has shape \(3,\)"):
        Muon(lr=0.1).build([tensor for _, tensor in parameters])
