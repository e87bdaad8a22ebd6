from __future__ import annotations

import inspect
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from thalweg import contrib
from thalweg.contrib.grad_power import GradPower
from thalweg.errors import InvalidInput
from thalweg.lab.config import parse_spec
from thalweg.lab.config.optimizers import (
    RELATIVE_LR,
    SGD,
    AdamW,
    DionSettings,
    Muon,
    SAMSettings,
    TransformerBlock,
)
from thalweg.lab.training.building import can_carry_state
from thalweg.operators.restricted import TRANSFORMER_BLOCKS
from thalweg.optim.combined import Combined
from thalweg.registry import optimizers

NAMES = optimizers.names()
OF_TORCH = tuple(name for name in NAMES if name != "sam")


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_are_those_of_the_class_that_is_built(name: str):
    settings = optimizers[name](lr=0.5)
    signature = inspect.signature(settings.optimizer_class().__init__)
    ours = {"lr", "grad_power", "block_rates", *settings.not_torchs}
    for key, value in settings.model_dump(exclude=ours).items():
        assert value == signature.parameters[key].default, key


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_must_be_given(name: str):
    with pytest.raises(ValidationError, match="lr"):
        optimizers.find(name)()  # type: ignore[call-arg]


@pytest.mark.parametrize("name", OF_TORCH)
@pytest.mark.parametrize("named", [False, True])
def test_an_optimizer_steps_as_the_class_itself(name: str, named: bool):
    torch.manual_seed(0)
    start = torch.randn(4, 3)
    gradient = torch.randn(4, 3)
    settings = optimizers[name](lr=0.5)
    result = []
    for kind in ("by settings", "itself"):
        parameter = torch.nn.Parameter(start.clone())
        if kind == "by settings":
            built = settings.build([("weight", parameter)] if named else [parameter])
        else:
            built = settings.optimizer_class()([parameter], lr=0.5)  # type: ignore[call-arg]
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


WEIGHT, BIAS = torch.linspace(-1, 1, 6).reshape(2, 3), torch.linspace(0, 1, 3)
COMPANION = {"name": "adamw", "lr": 0.01, "weight_decay": 0.5}


def test_muon_gives_what_is_no_matrix_to_its_companion():
    built = torch.nn.Parameter(BIAS.clone()), torch.nn.Parameter(WEIGHT.clone())
    alone = torch.nn.Parameter(BIAS.clone()), torch.nn.Parameter(WEIGHT.clone())
    settings = Muon.model_validate({"lr": 0.02, "companion": COMPANION})
    combined = settings.build(zip(("bias", "weight"), built, strict=True))
    separate = (
        torch.optim.AdamW([alone[0]], lr=0.01, weight_decay=0.5),
        torch.optim.Muon([alone[1]], lr=0.02),
    )
    for _ in range(3):
        for parameter in (*built, *alone):
            parameter.grad = torch.ones_like(parameter)
        combined.step()
        for optimizer in separate:
            optimizer.step()
    assert torch.equal(built[0], alone[0])
    assert torch.equal(built[1], alone[1])
    assert not torch.equal(built[0], BIAS)


def test_each_group_of_muon_with_a_companion_says_its_share_of_the_learning_rate():
    settings = Muon.model_validate({"lr": 0.02, "companion": COMPANION})
    combined = settings.build([WEIGHT, BIAS])
    assert isinstance(combined, Combined)
    rates = [settings.lr * group.get("relative_lr", 1.0) for group in combined.param_groups]
    assert rates == [0.02, 0.01]


def test_muon_of_matrices_alone_has_no_use_for_its_companion():
    settings = Muon.model_validate({"lr": 0.02, "companion": COMPANION})
    assert isinstance(settings.build([("weight", WEIGHT)]), torch.optim.Muon)
    with pytest.raises(InvalidInput, match="no parameter is a matrix"):
        settings.build([("bias", BIAS)])


@pytest.mark.parametrize("kind", [Muon, DionSettings])
@pytest.mark.parametrize("name", ["muon", "dion", "sam"])
def test_a_companion_that_cannot_serve_is_refused(kind: type[Muon | DionSettings], name: str):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"lr": 0.02, "companion": {"name": name, "lr": 0.01}})
    assert [error["loc"] for error in caught.value.errors()] == [("companion",)]


def test_a_companion_is_read_from_a_spec_and_its_settings_can_be_overridden():
    raw = {
        "problem": {"data": "digits", "model": "mlp", "loss": "mse"},
        "phases": [{"optimizer": {"name": "muon", "lr": 0.02, "companion": COMPANION}, "steps": 5}],
    }
    spec = parse_spec(raw, overrides={"phases.0.optimizer.companion.lr": 0.03})
    optimizer = spec.phases[0].optimizer
    assert isinstance(optimizer, Muon)
    assert isinstance(optimizer.companion, AdamW)
    assert (optimizer.companion.lr, optimizer.companion.weight_decay) == (0.03, 0.5)
    written = optimizer.model_dump()["companion"]
    assert Muon.model_validate({"lr": 0.02, "companion": written}) == optimizer
    with pytest.raises(InvalidInput, match="companion"):
        parse_spec(raw, overrides={"phases.0.optimizer.companion.rate": 0.03})


def test_sams_step_is_that_of_sgd_with_the_gradient_at_the_perturbed_point():
    start = torch.tensor([3.0, -1.0], dtype=torch.float64)
    curvatures = torch.tensor([2.0, 0.5], dtype=torch.float64)
    theta = torch.nn.Parameter(start.clone())
    optimizer = SAMSettings(lr=0.1, rho=0.2, weight_decay=0.3).build([("theta", theta)])

    def closure() -> float:
        optimizer.zero_grad()
        loss = (curvatures * theta.square()).sum() / 2
        loss.backward()
        return float(loss.detach())

    closure()
    optimizer.step(closure)
    gradient = curvatures * start
    perturbed = start + 0.2 * gradient / gradient.norm()
    expected = start - 0.1 * (curvatures * perturbed + 0.3 * start)
    assert torch.allclose(theta, expected, rtol=1e-12)
    assert SAMSettings(lr=0.1, adaptive=True).build([theta]).adaptive  # type: ignore[attr-defined]


def test_dion_gives_what_is_no_matrix_to_its_companion():
    built = torch.nn.Parameter(WEIGHT.clone()), torch.nn.Parameter(BIAS.clone())
    alone = torch.nn.Parameter(WEIGHT.clone()), torch.nn.Parameter(BIAS.clone())
    own = {"rank": 1, "mu": 0.5, "weight_decay": 0.2, "transpose_wide": False, "seed": 3}
    settings = DionSettings.model_validate({"lr": 0.02, "companion": COMPANION, **own})
    combined = settings.build(zip(("weight", "bias"), built, strict=True))
    separate = (
        contrib.Dion([alone[0]], lr=0.02, **own),
        torch.optim.AdamW([alone[1]], lr=0.01, weight_decay=0.5),
    )
    for _ in range(3):
        for parameter in (*built, *alone):
            parameter.grad = parameter.detach().sin() + 1
        combined.step()
        for optimizer in separate:
            optimizer.step()
    assert torch.equal(built[0], alone[0])
    assert torch.equal(built[1], alone[1])
    assert combined.param_groups[1]["relative_lr"] == 0.5
    with pytest.raises(InvalidInput, match=r"optimizer dion: parameter bias has shape \(3,\)"):
        DionSettings(lr=0.1).build([("weight", WEIGHT), ("bias", BIAS)])


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_can_be_given_powers_of_the_gradient(name: str):
    settings = optimizers.find(name)(lr=0.5, grad_power=1.5)
    optimizer = settings.build([torch.nn.Parameter(WEIGHT.clone())])
    powered = optimizer.base_optimizer if name == "sam" else optimizer  # type: ignore[attr-defined]
    assert isinstance(powered, GradPower)
    assert powered.power == 1.5
    assert type(powered.wrapped) is settings.optimizer_class()


def test_a_power_is_that_of_one_optimizer_and_its_companion_has_its_own():
    def parts(values: dict[str, float], companion: dict[str, float]) -> list[bool]:
        settings = Muon.model_validate(
            {"lr": 0.02, **values, "companion": {**COMPANION, **companion}}
        )
        combined = settings.build([("weight", WEIGHT), ("bias", BIAS)])
        assert isinstance(combined, Combined)
        return [isinstance(part, GradPower) for part in combined.optimizers]

    power = {"grad_power": 1.2}
    assert parts({}, {}) == [False, False]
    assert parts(power, {}) == [True, False]
    assert parts(power, power) == [True, True]
    with pytest.raises(ValidationError, match="grad_power"):
        SGD(lr=0.1, grad_power=0.0)


BLOCKS = [
    ("token_embedding.weight", WEIGHT),
    ("norm.weight", BIAS),
    ("layers.0.feed_forward.0.weight", WEIGHT),
]


def test_blocks_of_a_transformer_can_have_rates_of_their_own():
    settings = AdamW(lr=0.01, block_rates={"norm": 2.0, "embedding": 10.0})
    groups = settings.build([(name, torch.nn.Parameter(t.clone())) for name, t in BLOCKS])
    found = {g["block"]: (g[RELATIVE_LR], g["lr"]) for g in groups.param_groups}
    assert found == {"embedding": (10.0, 0.1), "norm": (2.0, 0.02), "other": (1.0, 0.01)}


def test_a_companion_keeps_the_rates_of_its_blocks():
    settings = Muon.model_validate(
        {"lr": 0.02, "companion": {"name": "adamw", "lr": 0.01, "block_rates": {"norm": 4}}}
    )
    combined = settings.build([(name, torch.nn.Parameter(t.clone())) for name, t in BLOCKS])
    assert [g.get(RELATIVE_LR, 1.0) for g in combined.param_groups] == [1.0, 2.0]


def test_rates_are_those_of_known_blocks_and_need_names():
    assert set(get_args(TransformerBlock)) == set(TRANSFORMER_BLOCKS)
    with pytest.raises(ValidationError, match="block_rates"):
        SGD.model_validate({"lr": 0.1, "block_rates": {"attention": 2.0}})
    settings = SGD(lr=0.1, block_rates={"norm": 2.0})
    with pytest.raises(InvalidInput, match="tensors without names', allowed: pairs"):
        settings.build([torch.nn.Parameter(WEIGHT.clone())])


def test_a_state_goes_on_only_where_the_same_blocks_have_rates():
    plain, grouped = AdamW(lr=0.1), AdamW(lr=0.1, block_rates={"norm": 2.0})
    faster = AdamW(lr=0.1, block_rates={"norm": 3.0})
    other = AdamW(lr=0.1, block_rates={"head": 2.0})
    assert can_carry_state(grouped, faster)
    assert not can_carry_state(plain, grouped)
    assert not can_carry_state(grouped, other)
