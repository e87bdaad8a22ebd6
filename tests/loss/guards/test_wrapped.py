"""What people wrap around a model is taken away: the derivatives are those of the model inside."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from tests import dense
from tests.loss.test_swapped import INPUTS, LOSS, TARGETS, Plain, elsewhere
from tests.sampling import few
from thalweg.errors import InvalidInput
from thalweg.loss.guards.wrapped import own_forward, patterns_inside, unwrapped
from thalweg.loss.objective import Objective
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian

DATA = (INPUTS, TARGETS)


class CompiledInside(nn.Module):
    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.first, self.last = plain.first, torch.compile(plain.last, backend="aot_eager")

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(inputs)))


def compiled_in_place(plain: Plain) -> nn.Module:
    plain.compile(backend="aot_eager")
    return plain


WRAPPERS: dict[str, Callable[[Plain], Any]] = {
    "compiled": lambda plain: torch.compile(plain, backend="aot_eager"),
    "a compiled layer": CompiledInside,
    "compiled in place": compiled_in_place,
    "in parallel": nn.DataParallel,
    "both": lambda plain: nn.DataParallel(torch.compile(plain, backend="aot_eager")),
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", few(1, dict.fromkeys(["compiled", "in parallel", *WRAPPERS])))
def test_derivatives_are_those_of_the_model_inside(name: str) -> None:
    torch.manual_seed(0)
    plain = Plain().double()
    model = WRAPPERS[name](copy.deepcopy(plain))
    with torch.no_grad():
        model(INPUTS)  # compiled by now
    found, expected = (Objective(m, LOSS, DATA, vectorize_up_to=0) for m in (model, plain))
    theta = elsewhere(found)
    block = torch.randn(found.num_parameters, 3, dtype=torch.float64)
    assert dense.relative(found.value(theta), expected.value(theta)) < 1e-14
    for operator in (Hessian, GaussNewton, GradientCovariance):
        truth = operator(expected, theta) @ block
        assert dense.relative(operator(found, theta) @ block, truth) < 1e-12
    assert dense.relative(model(INPUTS).detach(), plain(INPUTS).detach()) < 1e-12


@pytest.mark.slow
def test_a_compiled_loss_is_evaluated_as_it_was_written() -> None:
    torch.manual_seed(0)
    plain = Plain().double()
    loss = torch.compile(lambda out, to: functional.cross_entropy(out, to), backend="aot_eager")
    loss(plain(INPUTS).detach(), TARGETS)  # compiled by now
    found, expected = (Objective(plain, fn, DATA) for fn in (loss, LOSS))
    vector = torch.ones(found.num_parameters, dtype=torch.float64)
    assert dense.relative(Hessian(found) @ vector, Hessian(expected) @ vector) < 1e-13


def test_patterns_may_be_those_of_the_wrapper_or_of_the_model() -> None:
    plain = Plain().double()
    wrapped = nn.DataParallel(plain)
    for pattern in ("last.*", "module.last.*", ["module.last.weight", "*.bias"]):
        objective = Objective(wrapped, LOSS, DATA, parameters=pattern)
        assert "last.weight" in objective.layout.names
    assert unwrapped(wrapped) is unwrapped(plain) is plain
    assert patterns_inside(None) is None


def in_two(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(Plain().double())
    own = tuple(part[:9] if rank == 0 else part[9:] for part in DATA)
    with pytest.raises(InvalidInput, match=r"group: .*2 processes.*group=None"):
        Objective(model, LOSS, own)
    alone = Objective(model, LOSS, own, group=None)
    every = Objective(model, LOSS, own, group=torch.distributed.group.WORLD)
    theta = elsewhere(alone)
    found = {
        "alone": alone.gradient(theta),
        "value": every.value(theta),
        "gradient": every.gradient(theta),
        "product": Hessian(every, theta) @ theta,
        "some": every.gradient(theta, torch.tensor([2, 8, 9, 20])),
        "samples": torch.tensor([alone.num_samples, every.num_samples]),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_a_loss_where_they_are_told_to(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_two, (str(tmp_path),), nprocs=2)
    torch.manual_seed(0)
    plain = Plain().double()
    whole = Objective(plain, LOSS, DATA)
    theta = elsewhere(whole)
    some = torch.tensor([2, 8, 9, 20])
    for rank, rows in ((0, slice(9)), (1, slice(9, None))):
        found = torch.load(tmp_path / f"{rank}.pt")
        own = Objective(plain, LOSS, (INPUTS[rows], TARGETS[rows]))
        assert torch.equal(found["alone"], own.gradient(theta))
        assert found["samples"].tolist() == [own.num_samples, 24]
        assert dense.relative(found["value"], whole.value(theta)) < 1e-14
        assert dense.relative(found["gradient"], whole.gradient(theta)) < 1e-13
        assert dense.relative(found["product"], Hessian(whole, theta) @ theta) < 1e-13
        assert dense.relative(found["some"], whole.gradient(theta, some)) < 1e-13


@pytest.mark.usefixtures("fresh_accelerator")
def test_what_accelerate_puts_in_place_of_the_forward_pass_is_looked_through() -> None:
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    plain = Plain()
    model = copy.deepcopy(plain)
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare_model(model)
    inputs, targets = INPUTS.float(), TARGETS
    with torch.no_grad():
        lowered = model(inputs)
        assert not torch.equal(lowered, plain(inputs))
    found, expected = (Objective(m, LOSS, (inputs, targets)) for m in (model, plain))
    assert torch.equal(found.value(), expected.value())
    assert torch.equal(found.gradient(), expected.gradient())
    vector = torch.randn(found.num_parameters)
    assert torch.equal(Hessian(found) @ vector, Hessian(expected) @ vector)
    # The training goes on in the precision that it was prepared for.
    with torch.no_grad():
        assert torch.equal(model(inputs), lowered)


def test_a_forward_pass_that_someone_else_has_set_is_called() -> None:
    model = nn.Linear(3, 1)
    model._original_forward = model.forward
    model.forward = lambda inputs: 2 * model._original_forward(inputs)
    with own_forward(model):
        twice = model(torch.ones(1, 3))
    assert torch.equal(twice, 2 * model._original_forward(torch.ones(1, 3)))
