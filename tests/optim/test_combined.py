from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Muon, Optimizer

from tests.optim.resuming import save_and_restore
from thalweg.errors import InvalidInput
from thalweg.optim.combined import Combined
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.source import FixedSubspace

INPUTS = torch.linspace(-1, 1, 120).reshape(40, 3).sin()
TARGETS = torch.linspace(1, 0, 80).reshape(40, 2).cos()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def parts(model: nn.Module) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    return [Muon(matrices, lr=0.02), AdamW(vectors, lr=0.01)]


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def backward(model: nn.Module, step: int) -> None:
    rows = (torch.arange(10) * 7 + step) % 40
    model.zero_grad()
    nn.functional.mse_loss(model(INPUTS[rows]), TARGETS[rows]).backward()


def test_it_steps_as_its_optimizers_one_by_one_bit_for_bit() -> None:
    alone, together = network(), network()
    separate, combined = parts(alone), Combined(parts(together))
    for step in range(10):
        backward(alone, step)
        backward(together, step)
        for optimizer in separate:
            optimizer.step()
        combined.step()
        assert torch.equal(flat(alone), flat(together))


def test_its_state_can_be_saved_and_restored_exactly() -> None:
    model, resumed = network(), network()
    combined = Combined(parts(model))
    for step in range(4):
        backward(model, step)
        combined.step()
    saved = copy.deepcopy(combined.state_dict())
    assert sorted(saved["state"]) == [0, 1, 2, 3]
    resumed.load_state_dict(model.state_dict())
    restored = Combined(parts(resumed))
    restored.load_state_dict(saved)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert combined.state[one].keys() == restored.state[other].keys()
        for key, value in combined.state[one].items():
            assert torch.equal(value, restored.state[other][key])
    for step in range(4, 8):
        for one, optimizer in ((model, combined), (resumed, restored)):
            backward(one, step)
            optimizer.step()
    assert torch.equal(flat(model), flat(resumed))


def test_the_parameter_groups_are_those_of_its_optimizers_also_after_loading() -> None:
    combined = Combined(parts(network()))
    combined.load_state_dict(copy.deepcopy(combined.state_dict()))
    muon, adamw = combined.optimizers
    assert [id(g) for g in combined.param_groups] == [
        id(g) for g in (*muon.param_groups, *adamw.param_groups)
    ]
    assert [group["lr"] for group in combined.param_groups] == [0.02, 0.01]
    assert combined.state is muon.state is adamw.state
    assert "betas" not in combined.param_groups[0]


@pytest.mark.parametrize("wrapped", ["split", "sam"])
def test_what_wraps_it_can_be_saved_and_restored(wrapped: str) -> None:
    def build() -> tuple[nn.Module, Optimizer]:
        model = network()
        combined = Combined(parts(model))
        if wrapped == "sam":
            return model, SAM(combined)
        source = FixedSubspace(random_subspace(26, 3, 0))
        return model, SplitUpdate(combined, source, 0.0, 1.0, parameters=list(model.parameters()))

    def step(model: nn.Module, optimizer: Optimizer, number: int) -> None:
        backward(model, number)
        if wrapped == "sam":
            optimizer.step(lambda: backward(model, number))  # type: ignore[arg-type]
        else:
            optimizer.step()

    optimizer, _ = save_and_restore(build, step)
    moments = [state for state in optimizer.state.values() if state]
    assert len(moments) == 4


def test_a_split_scales_the_whole_update() -> None:
    models = [network(), network()]
    alone = Combined(parts(models[0]))
    source = FixedSubspace(random_subspace(26, 3, 0))
    parameters = list(models[1].parameters())
    split = SplitUpdate(Combined(parts(models[1])), source, 0.25, 2.0, parameters=parameters)
    before = flat(models[0])
    for model, optimizer in zip(models, (alone, split), strict=True):
        backward(model, 0)
        optimizer.step()
    proposed = flat(models[0]) - before
    space = source.subspace
    expected = before + 0.25 * space.project(proposed) + 2 * (proposed - space.project(proposed))
    assert torch.allclose(flat(models[1]), expected, atol=1e-6)


def test_a_closure_is_evaluated_once_with_gradients() -> None:
    model = network()
    combined = Combined(parts(model))
    calls: list[float] = []

    def closure() -> Tensor:
        combined.zero_grad()
        loss = nn.functional.mse_loss(model(INPUTS), TARGETS)
        loss.backward()
        calls.append(float(loss.detach()))
        return loss

    before = flat(model)
    assert [float(combined.step(closure).detach())] == calls
    assert not torch.equal(flat(model), before)


def test_what_cannot_be_combined_is_refused() -> None:
    model = network()
    matrix, vector = model[0].weight, model[0].bias
    plain = SGD([vector], lr=0.1)
    with pytest.raises(InvalidInput, match=r"shape \(4, 3\) is in numbers 0 and 1"):
        Combined([Muon([matrix]), SGD([vector, matrix], lr=0.1)])
    with pytest.raises(InvalidInput, match="at least one optimizer"):
        Combined([])
    with pytest.raises(InvalidInput, match="LBFGS"):
        Combined([plain, LBFGS([matrix])])
    source = FixedSubspace(random_subspace(4, 1, 0))
    for wrapper in (SAM(plain), SplitUpdate(plain, source), Combined([plain])):
        with pytest.raises(InvalidInput, match="wrap the Combined instead"):
            Combined([wrapper, Muon([matrix])])


def test_a_state_of_other_groups_and_a_later_group_are_refused() -> None:
    combined = Combined(parts(network()))
    with pytest.raises(InvalidInput, match="got '1 parameter groups', allowed: 2"):
        combined.load_state_dict(SGD(network().parameters(), lr=0.1).state_dict())
    with pytest.raises(InvalidInput, match="combine them anew"):
        combined.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
