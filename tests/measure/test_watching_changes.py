"""What real trainings do while they are watched: warm-up from 0, unfreezing, fused scalers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import InvalidInput
from thalweg.measure.sinks import WatchWarning
from thalweg.measure.watch import watch
from thalweg.measure.watcher import UNMOVED

LOSS = nn.CrossEntropyLoss()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 4, generator=generator), torch.randint(0, 3, (24,), generator=generator)


def rows_of(
    optimizer_of: Callable[[nn.Sequential], torch.optim.Optimizer],
    between: Callable[[nn.Sequential, torch.optim.Optimizer, int], Any] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """The rows of a training of four steps; its parameters are those without a watch."""
    found: list[Tensor] = []
    rows: list[dict[str, Any]] = []
    for watched in (False, True):
        model = network()
        optimizer = optimizer_of(model)
        watcher = None
        if watched:
            given = {"every": 1, "quick_every": 1, "k": 2, "quiet": True} | options
            watcher = watch(model, LOSS, data(), optimizer, **given)
        for step in range(4):
            if between is not None:
                between(model, optimizer, step)
            optimizer.zero_grad()
            LOSS(model(data()[0]), data()[1]).backward()
            optimizer.step()
        found.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        rows = [] if watcher is None else watcher.history
    assert torch.equal(*found)
    return rows


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_learning_rate_of_zero_is_a_caveat_and_no_failure(kind: Any) -> None:
    def warmed(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.01 * step

    with warnings.catch_warnings():
        warnings.simplefilter("error", WatchWarning)
        rows = rows_of(lambda model: kind(model.parameters(), lr=0.0), warmed)
    assert [row["failure"] for row in rows] == [None] * 4
    first, second = rows[0], rows[1]
    assert UNMOVED in first["caveat"]
    assert "critical sharpness: at lr = 0" in first["caveat"]
    assert math.isnan(first["critical_sharpness"])
    assert first["sharpness"] > 0
    assert math.isinf(first["stability_threshold"])
    assert UNMOVED not in (second["caveat"] or "")
    assert second["critical_sharpness"] > 0


def unfrozen(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
    model[0].requires_grad_(step >= 2)


def added(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
    if step == 2:
        optimizer.add_param_group({"params": list(model[0].parameters())})


def frozen(model: nn.Sequential, optimizer: torch.optim.Optimizer, step: int) -> None:
    model[0].requires_grad_(step < 2)


def of_all(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def of_the_last(model: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.SGD(model[2].parameters(), lr=0.1)


def of_all_with_a_frozen_one(model: nn.Sequential) -> torch.optim.Optimizer:
    model[0].requires_grad_(False)
    return of_all(model)


@pytest.mark.parametrize(
    ("optimizer", "change", "said"),
    [
        (of_all_with_a_frozen_one, unfrozen, "0.bias, 0.weight are trained by now, and are not"),
        (of_the_last, added, "0.bias, 0.weight are trained by now, and are not"),
        (of_all, frozen, "0.bias, 0.weight are no longer trained, and are still"),
    ],
    ids=["unfrozen", "a-group-added", "frozen"],
)
def test_other_parameters_than_at_the_beginning_are_a_caveat_and_one_warning(
    optimizer: Any, change: Any, said: str
) -> None:
    with pytest.warns(WatchWarning, match="step 2: 0.bias, 0.weight") as caught:
        rows = rows_of(optimizer, change)
    assert sum("in these numbers" in str(warning.message) for warning in caught) == 1
    assert [said in (row["caveat"] or "") for row in rows] == [False, False, True, True]


@pytest.mark.parametrize(
    ("change", "optimizer"), [(unfrozen, of_all_with_a_frozen_one), (frozen, of_all)]
)
def test_who_watches_a_part_hears_of_that_alone(change: Any, optimizer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", WatchWarning)
        rows = rows_of(optimizer, change, parameters="2.weight")
    assert not any("in these numbers" in (row["caveat"] or "") for row in rows)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_gradient_under_a_scaler_is_that_without(fused: bool) -> None:
    """A fused optimizer is given scaled gradients, and skips a step inside of it."""
    norms: dict[bool, list[Any]] = {}
    for scaled in (False, True):
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        with watch(
            model, LOSS, data(), optimizer, every=1, quick_every=1, k=2, quiet=True
        ) as watcher:
            for step in range(4):
                optimizer.zero_grad()
                loss = LOSS(model(data()[0]), data()[1])
                scaler.scale(loss * (math.inf if scaled and step == 3 else 1.0)).backward()
                scaler.step(optimizer)
                scaler.update()
        norms[scaled] = [row["minibatch_gradient_norm"] for row in watcher.history]
        if scaled:
            assert len(watcher.history) == (4 if fused else 3)
            assert (UNMOVED in (watcher.history[-1]["caveat"] or "")) == fused
    assert norms[True][:3] == pytest.approx(norms[False][:3], rel=1e-6)


def test_a_state_of_another_watch_is_refused_and_changes_nothing() -> None:
    def watched(samples: int = 24, width: int = 5, k: int = 2) -> Any:
        model = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 3))
        few = tuple(part[:samples] for part in data())
        return watch(model, LOSS, few, of_all(model), every=1, k=k, quiet=True)

    state = watched().state_dict()
    for other, said in (
        (watched(samples=12), "num_samples of the saved state: got 24, allowed: 12"),
        (watched(width=6), "num_parameters of the saved state: got 43"),
        (watched(k=1), "k of the saved state: got 2, allowed: 1"),
    ):
        with pytest.raises(InvalidInput, match=said):
            other.load_state_dict(state | {"step": 7})
        assert other.step == 0
    same = watched()
    for wrong in ({}, None, {"step": 3}, {"model": {}}):
        with pytest.raises(InvalidInput, match=r"what watcher.state_dict\(\) gave"):
            same.load_state_dict(wrong)
    same.load_state_dict(state | {"step": 7})
    assert same.step == 7


def test_the_first_samples_may_all_be_ignored_by_the_loss() -> None:
    model = network()
    inputs, targets = data()
    ignored = targets.clone()
    ignored[:17] = LOSS.ignore_index
    watched = watch(model, LOSS, (inputs, ignored), of_all(model), quiet=True)
    alone = LOSS(model(inputs[17:]), targets[17:])
    objective = watched.objective
    assert float(objective.value_and_gradient(objective.theta())[0]) == pytest.approx(
        float(alone.detach()), rel=1e-6
    )
