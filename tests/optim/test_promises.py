"""What `torch.optim.Optimizer` promises holds of optimizers around others, as of a bare one."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, lr_scheduler

from tests.optim.local_training import alone
from tests.sampling import few
from thalweg.contrib.averaging_period import ConstantPeriod
from thalweg.contrib.dion import Dion
from thalweg.contrib.grad_power import GradPower
from thalweg.contrib.local_sgd import LocalSGD
from thalweg.contrib.simulated_workers import SimulatedWorkers
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.optim.combined import Combined
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.subspace import random_subspace
from thalweg.tracking.source import FixedSubspace
from thalweg.tracking.tracker import SubspaceTracker
from thalweg.tracking.wrapping import needs_closure

INPUTS = torch.linspace(-1, 1, 120).reshape(40, 3).sin().double()
TARGETS = torch.linspace(1, 0, 80).reshape(40, 2).cos().double()

Made = Callable[[list[nn.Parameter], nn.Module], Optimizer]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)
    ).double()


def sgd(parameters: list[nn.Parameter]) -> SGD:
    return SGD(parameters, lr=0.1, momentum=0.9)


def split(parameters: list[nn.Parameter], model: nn.Module) -> Optimizer:
    source = FixedSubspace(random_subspace(20, 3, 0, dtype=torch.float64))
    given = list(model.parameters())
    return SplitUpdate(sgd(parameters), source, 0.5, 2.0, parameters=given)


def tracked(parameters: list[nn.Parameter], model: nn.Module) -> Optimizer:
    # Which way to multiply is the faster one would be told by a clock, and rounding by the way.
    objective = Objective(model, nn.MSELoss(), (INPUTS, TARGETS), vectorize_up_to=0)
    return SplitUpdate(sgd(parameters), SubspaceTracker(objective, 2), 0.5, 1.0)


OPTIMIZERS: dict[str, Made] = {
    "SplitUpdate": split,
    "SplitUpdate, tracked": tracked,
    "SAM": lambda p, _: SAM(sgd(p)),
    "GradPower": lambda p, _: GradPower(sgd(p)),
    "Combined": lambda p, _: Combined([sgd(p[:1]), sgd(p[1:])]),
    "LocalSGD": lambda p, _: LocalSGD(sgd(p), ConstantPeriod(3)),
    "SimulatedWorkers": lambda p, _: SimulatedWorkers([sgd(p) for _ in "ab"], ConstantPeriod(3)),
    "Dion": lambda p, _: Dion(p, lr=0.1),
    "SAM around Combined": lambda p, _: SAM(Combined([sgd(p[:1]), GradPower(sgd(p[1:]))])),
}
AROUND = [name for name in OPTIMIZERS if name != "Dion"]


@pytest.fixture(autouse=True)
def process_group(request: pytest.FixtureRequest) -> Iterator[None]:
    if "LocalSGD" not in request.node.name:
        yield
        return
    with alone():
        yield


def built(name: str) -> tuple[nn.Sequential, Optimizer]:
    model = network()
    return model, OPTIMIZERS[name](list(model.parameters()), model)


def loss_of(model: nn.Module, number: int) -> Tensor:
    rows = (torch.arange(10) * 7 + number) % 40
    return nn.functional.mse_loss(model(INPUTS[rows]), TARGETS[rows])


def closure_of(
    model: nn.Module, number: int, scale: float = 1.0, scaler: Any = None
) -> Callable[..., Tensor]:
    def closure(*_: int) -> Tensor:
        model.zero_grad()
        loss = scale * loss_of(model, number)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss.detach()

    return closure


def step(model: nn.Module, optimizer: Optimizer, number: int, scale: float = 1.0) -> None:
    closure: Any = closure_of(model, number, scale)
    if needs_closure(optimizer):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


def theta(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def inner(optimizer: Optimizer) -> Optimizer:
    """The one inside; the first part of a Combined."""
    for name in ("base_optimizer", "wrapped", "optimizer"):
        if hasattr(optimizer, name):
            return getattr(optimizer, name)
    return optimizer.optimizers[0] if isinstance(optimizer, Combined) else optimizer


@pytest.mark.parametrize("name", few(5, OPTIMIZERS))
def test_a_copy_with_its_model_trains_on_as_the_original_does(name: str) -> None:
    model, optimizer = built(name)
    for number in range(4):
        step(model, optimizer, number)
    twin, copied = copy.deepcopy((model, optimizer))
    before = theta(model)
    for number in range(4, 8):
        step(twin, copied, number)
    assert torch.equal(theta(model), before)
    for number in range(4, 8):
        step(model, optimizer, number)
    assert torch.equal(theta(model), theta(twin))
    assert not torch.equal(theta(model), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_copy_alone_has_parameters_of_its_own(name: str) -> None:
    model, optimizer = built(name)
    step(model, optimizer, 0)
    copied = copy.deepcopy(optimizer)
    own = [p for group in copied.param_groups for p in group["params"]]
    assert not {id(p) for p in own} & {id(p) for p in model.parameters()}
    copied.zero_grad()
    before, values = theta(model), [p.detach().clone() for p in own]

    def closure(*_: int) -> None:
        copied.zero_grad()
        torch.stack([p.square().sum() for p in own]).sum().backward()

    closure()
    if needs_closure(copied):
        copied.step(closure)  # type: ignore[arg-type]
    else:
        copied.step()
    assert torch.equal(theta(model), before)
    assert all(not torch.equal(p, value) for p, value in zip(own, values, strict=True))


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name not in ("LocalSGD",)])
def test_it_can_be_pickled_where_a_bare_one_can(name: str) -> None:
    _, optimizer = built(name)
    restored = pickle.loads(pickle.dumps(optimizer))  # noqa: S301 - our own bytes
    assert type(restored) is type(optimizer)
    assert restored.param_groups[0]["lr"] == 0.1
    restored.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_file_continues_bit_for_bit(name: str) -> None:
    model, optimizer = built(name)
    for number in range(4):
        step(model, optimizer, number)
    file = io.BytesIO()
    saved = {"optimizer": optimizer.state_dict(), "model": model.state_dict()}
    source = getattr(optimizer, "source", None)
    torch.save(saved, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    twin, restored = built(name)
    twin.load_state_dict(read["model"])
    restored.load_state_dict(read["optimizer"])
    if source is not None:
        restored.source.load_state_dict(source.state_dict())  # type: ignore[attr-defined]
    for number in range(4, 8):
        step(model, optimizer, number)
        step(twin, restored, number)
    assert torch.equal(theta(model), theta(twin))


@pytest.mark.parametrize("name", few(4, AROUND))
@pytest.mark.parametrize("through", ["outer", "inner"])
def test_groups_and_state_are_one_after_either_has_loaded(name: str, through: str) -> None:
    model, optimizer = built(name)
    for number in range(3):
        step(model, optimizer, number)
    inside = inner(optimizer)
    loading = optimizer if through == "outer" else inside
    loading.load_state_dict(copy.deepcopy(loading.state_dict()))
    groups = [id(group) for group in optimizer.param_groups]
    assert all(id(group) in groups for group in inside.param_groups)
    assert optimizer.state is inside.state
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.1)
    step(model, optimizer, 3)
    scheduler.step()
    assert inside.param_groups[0]["lr"] == pytest.approx(0.01)
    assert len([held for held in optimizer.state.values() if held]) == 2
    # The moments that were loaded are those that the step uses: a twin that loaded nothing.
    twin, plain = built(name)
    for number in range(4):
        step(twin, plain, number)
    assert torch.equal(theta(model), theta(twin))


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4], 0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


def test_every_scheduler_of_torch_is_tried() -> None:
    kinds = inspect.getmembers(lr_scheduler, inspect.isclass)
    ours = {n for n, kind in kinds if issubclass(kind, lr_scheduler.LRScheduler)} - {"LRScheduler"}
    assert {n for n in ours if not n.startswith("_")} == set(SCHEDULERS)


@pytest.mark.parametrize("scheduled", ["outer", "inner"])
@pytest.mark.parametrize("scheduler", few(3, SCHEDULERS))
@pytest.mark.parametrize("name", ["SplitUpdate", "SAM", "GradPower", "LocalSGD", "Combined"])
def test_schedulers_do_as_on_a_bare_optimizer(name: str, scheduler: str, scheduled: str) -> None:
    model, optimizer = built(name)
    on = optimizer if scheduled == "outer" else inner(optimizer)
    bare_model = network()
    bare = sgd(list(bare_model.parameters()))
    ours, theirs = SCHEDULERS[scheduler](on), SCHEDULERS[scheduler](bare)
    for number in range(6):
        step(model, optimizer, number)
        step(bare_model, bare, number)
        # Warnings of a wrong order of calls are errors here.
        for each in (ours, theirs):
            each.step(1.0) if scheduler == "ReduceLROnPlateau" else each.step()
        for key in ("lr", "momentum"):
            assert inner(optimizer).param_groups[0][key] == bare.param_groups[0][key]
            assert optimizer.param_groups[0][key] == bare.param_groups[0][key]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hooks_of_steps_and_states_run_once(name: str) -> None:
    model, optimizer = built(name)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))  # type: ignore[arg-type]
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state: {key: value for key, value in state.items() if key != "note"}
    )
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    step(model, optimizer, 0)
    state = optimizer.state_dict()
    assert state["note"] == 1
    optimizer.load_state_dict(state)
    assert seen == ["before", "after", "save", "loaded"]


@pytest.mark.parametrize("name", ["SAM", "GradPower", "LocalSGD", "SimulatedWorkers", "Dion"])
def test_an_added_group_is_as_one_that_was_there_from_the_start(name: str) -> None:
    model = network()
    first, second = model.parameters()
    optimizer = OPTIMIZERS[name]([first], model)
    optimizer.add_param_group({"params": [second], "lr": 0.03})
    twin = network()
    groups: Any = [
        {"params": [p], "lr": lr} for p, lr in zip(twin.parameters(), (0.1, 0.03), strict=True)
    ]
    whole = OPTIMIZERS[name](groups, twin)
    for number in range(5):
        step(model, optimizer, number)
        step(twin, whole, number)
    assert torch.equal(theta(model), theta(twin))


def test_a_group_added_to_a_part_belongs_to_the_whole() -> None:
    model = network()
    first, second = model.parameters()
    other = nn.Parameter(torch.ones(2).double())
    combined = Combined([sgd([first]), sgd([second])])
    combined.optimizers[0].add_param_group({"params": [other], "lr": 0.5})
    assert [len(combined.param_groups), combined.param_groups[1]["lr"]] == [3, 0.5]
    other.grad = torch.ones(2).double()
    combined.step()
    assert torch.equal(other.detach(), torch.full((2,), 0.5).double())


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SimulatedWorkers"])
def test_a_gradient_scaler_changes_nothing_and_skips_what_is_infinite(name: str) -> None:
    model, optimizer = built(name)
    twin, plain = built(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(4):
        scaler.scale(loss_of(model, number)).backward()
        if number == 2:
            scaler.unscale_(optimizer)
        # A closure may scale its loss or not.
        closure = closure_of(model, number, scaler=scaler if number % 2 else None)
        scaler.step(optimizer, *((closure,) if needs_closure(optimizer) else ()))
        scaler.update()
        step(twin, plain, number)
        optimizer.zero_grad()
    assert torch.allclose(theta(model), theta(twin), rtol=1e-12)
    before = theta(model)
    scaler.scale(float("inf") * loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(theta(model), before)
    assert scaler.get_scale() == 512


@pytest.mark.parametrize("name", ["SplitUpdate", "SAM", "GradPower", "LocalSGD", "Combined"])
def test_to_maximize_is_to_minimize_the_negative(name: str) -> None:
    ends = []
    for sign in (1.0, -1.0):
        model, optimizer = built(name)
        for group in optimizer.param_groups:
            group["maximize"] = sign < 0
        for number in range(4):
            step(model, optimizer, number, sign)
        ends.append(theta(model))
    assert torch.allclose(*ends, rtol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_may_return_nothing(name: str) -> None:
    model, optimizer = built(name)
    whole = closure_of(model, 0)
    before = theta(model)

    def closure(*_: int) -> None:
        whole()

    found = optimizer.step(closure)  # type: ignore[arg-type]
    assert found is None or found == [None, None]
    assert not torch.equal(theta(model), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_cleared_either_way_and_it_says_what_it_is(name: str) -> None:
    model, optimizer = built(name)
    closure_of(model, 0)()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert type(optimizer).__name__ in repr(optimizer)
    assert "lr: 0.1" in repr(optimizer)


@pytest.mark.parametrize("name", few(1, OPTIMIZERS))
def test_its_steps_are_seen_by_the_profiler(name: str) -> None:
    model, optimizer = built(name)
    with torch.autograd.profiler.profile() as profile:
        step(model, optimizer, 0)
    names = {event.name for event in profile.function_events or ()}
    assert f"Optimizer.step#{type(optimizer).__name__}.step" in names


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"amsgrad": True}])
@pytest.mark.parametrize("around", [SAM, GradPower, lambda base: Combined([base])])
def test_settings_of_the_inner_optimizer_work_as_without(
    around: Callable[[Optimizer], Optimizer], settings: dict[str, bool]
) -> None:
    model, twin = network(), network()
    wrapped = around(Adam(model.parameters(), lr=0.1, **settings))  # type: ignore[arg-type]
    plain = around(Adam(twin.parameters(), lr=0.1, amsgrad="amsgrad" in settings))
    for number in range(3):
        step(model, wrapped, number)
        step(twin, plain, number)
    assert torch.allclose(theta(model), theta(twin), rtol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_that_fails_changes_nothing(name: str) -> None:
    model, optimizer = built(name)
    step(model, optimizer, 0)
    before, state = theta(model), copy.deepcopy(optimizer.state_dict())
    calls: list[int] = []

    def failing(*_: int) -> Tensor:
        calls.append(1)
        # The second call: at SAM's perturbed point, and of the second worker.
        if len(calls) == 2 or not needs_closure(optimizer):
            raise KeyboardInterrupt
        return closure_of(model, 1)()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)  # type: ignore[arg-type]
    assert torch.equal(theta(model), before)
    assert_equal(optimizer.state_dict(), state)


class Failing(SGD):
    """One that fails when it has moved parameters and state."""

    fails = False

    @torch.no_grad()
    def step(self, closure: object = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)  # type: ignore[arg-type]
        if self.fails:
            raise RuntimeError("no step today")
        return loss


@pytest.mark.parametrize("name", AROUND)
def test_an_inner_optimizer_that_fails_changes_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "SGD", Failing)
    model, optimizer = built(name)
    step(model, optimizer, 0)
    before, state = theta(model), copy.deepcopy(optimizer.state_dict())
    monkeypatch.setattr(Failing, "fails", True)
    with pytest.raises(RuntimeError, match="no step today"):
        step(model, optimizer, 1)
    assert torch.equal(theta(model), before)
    assert_equal(optimizer.state_dict(), state)


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert one == other


@pytest.mark.parametrize("around", [SAM, GradPower, lambda given: Combined([given])])
def test_what_is_no_optimizer_is_refused(around: Callable[[Any], Any]) -> None:
    for given, named in ((SGD, "the class SGD"), (list(network().parameters()), "list")):
        with pytest.raises(InvalidInput, match=f"{named}', allowed: an optimizer that is built"):
            around(given)
