"""A tensor parallel model gives the numbers of the same model in one process, and trains on.

The reference is one process with the whole model and exact products, which `tests/operators` hold
against dense Hessians. Layers are cut by rows and by columns, evenly and unevenly; embedding and
normalization are whole in each process, or divided along the sequence.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.optim import SGD, Adam, Optimizer

from tests.processes import in_processes
from tests.shards import block_like, projector
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.watch import watch
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.hessian import Hessian
from thalweg.optim.split import SplitUpdate
from thalweg.sharding import plain, whole
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.tracking.optimizer_metric import OptimizerMetricSource
from thalweg.tracking.tracker import SubspaceTracker

WORDS, LENGTH, WIDTH, CLASSES = 8, 6, 6, 3
PLANS = ("plain", "sequence")
pytestmark = pytest.mark.timeout(600)
Numbers = dict[str, Any]


class Block(nn.Module):
    """A residual block, its inner layer cut by rows and then by columns."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + self.down(torch.tanh(self.up(self.norm(inputs))))


class Network(nn.Module):
    """Classes of short texts. The second block's inner width is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.first, self.second = Block(8), Block(7)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(self.words(words)))).mean(dim=1))


def network() -> Network:
    torch.manual_seed(1)
    return Network().double()


def parallel(count: int, plan: str) -> Network:
    """The same model with its layers over some processes."""
    model = network()
    layers: dict[str, Any] = {}
    for name in ("first", "second"):
        if plan == "sequence":
            layers |= {
                f"{name}.norm": SequenceParallel(),
                f"{name}.up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
                f"{name}.down": RowwiseParallel(output_layouts=Shard(1)),
            }
        else:
            layers |= {
                # Uneven parts go on as they are.
                f"{name}.up": ColwiseParallel(use_local_output=False),
                f"{name}.down": RowwiseParallel(),
            }
    if plan == "sequence":
        cut = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        layers |= {"words": cut, "norm": SequenceParallel(use_local_output=False)}
        model.head.register_forward_pre_hook(gathered)
    parallelize_module(model, init_device_mesh("cpu", (count,)), layers)
    return model


def gathered(_: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
    return (given[0].full_tensor(),)


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    kind = {"generator": generator, "device": "cpu"}
    return torch.randint(0, WORDS, (16, LENGTH), **kind), torch.randint(0, CLASSES, (16,), **kind)


def objective(model: nn.Module, count: int, chunk_size: int = 10, **options: Any) -> Objective:
    group = dist.group.WORLD if count > 1 else None
    return Objective(
        model, nn.CrossEntropyLoss(), data(), group=group, chunk_size=chunk_size,
        vectorize_up_to=0, **options,
    )  # fmt: skip


def step(model: nn.Module, optimizer: Optimizer) -> None:
    words, classes = data()
    optimizer.zero_grad()
    nn.CrossEntropyLoss()(model(words), classes).backward()
    optimizer.step()


def of_a_loss(loss: Objective) -> tuple[Numbers, Numbers]:
    """What is the same to rounding, and what is within the errors of differences."""
    block, some = block_like(loss), torch.arange(3, 15, 4, device="cpu")
    sure = {
        "theta": whole(loss.theta()),
        "value": loss.value(),
        "gradient": whole(loss.gradient()),
        "of some": whole(loss.gradient(samples=some)),
        "elsewhere": whole(loss.gradient(loss.theta() + 0.1 * block[:, 0])),
        "value elsewhere": loss.value(loss.theta() + 0.1 * block[:, 0]),
    }
    image, error = Hessian(loss).product_with_error(block)
    space = top_eigenpairs(loss, 2)
    gradient = loss.gradient()
    near = {
        "image": whole(image.T),
        "eigenvalues": space.eigenvalues,
        "space": projector(space),
        "bulk": whole(space.reject(gradient)),
    }
    return sure | ({} if error is None else {"error": error}), near


def of_a_training(model: nn.Module, loss: Objective, optimizer: str) -> Numbers:
    """Bulk-SGD by a tracker, or Bulk-Adam in Adam's own metric."""
    if optimizer == "sgd":
        base: Optimizer = SGD(model.parameters(), lr=0.1, momentum=0.5)
        source: Any = SubspaceTracker(loss, k=2, bulk_error=0.01)
    else:
        base = Adam(model.parameters(), lr=0.01)
        step(model, base)
        source = OptimizerMetricSource(loss, k=2, optimizer=base)
    bulk = SplitUpdate(base, source, dominant=0.0, bulk=1.0)
    for _ in range(3):
        step(model, bulk)
    return {f"{optimizer}: theta": whole(loss.theta())}


def resumed(loss: Objective) -> None:
    """A tracker's state is of plain tensors, and continues bit for bit."""
    tracker = SubspaceTracker(loss, k=2)
    tracker.update()
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    other = SubspaceTracker(objective(loss.model, 2), k=2)
    other.load_state_dict(torch.load(file))
    moved = loss.theta() * 1.01
    one, two = tracker.update(moved), other.update(moved)
    assert torch.equal(plain(one.basis), plain(two.basis))
    assert other.objective.product == "difference"


def trained(model: nn.Module, count: int, *, asked: bool) -> list[Tensor]:
    """The parts after some steps, with or without a question between forward and backward pass."""
    optimizer = Adam(model.parameters(), lr=0.01)
    words, classes = data()
    loss = objective(model, count)
    for _ in range(3):
        optimizer.zero_grad()
        value = nn.CrossEntropyLoss()(model(words), classes)
        if asked:
            loss.gradient(1.1 * loss.theta())
        value.backward()
        optimizer.step()
    return [plain_of(parameter) for parameter in model.parameters()]


def watched(model: nn.Module, count: int) -> Numbers:
    """The same, with two reports of `watch`."""
    optimizer = Adam(model.parameters(), lr=0.01)
    group = dist.group.WORLD if count > 1 else None
    with watch(
        model, nn.CrossEntropyLoss(), data(), optimizer, every=2, quiet=True, group=group
    ) as watcher:
        for _ in range(3):
            step(model, optimizer)
    rows = watcher.history
    return {
        "parts": [plain_of(parameter) for parameter in model.parameters()],
        "failures": [row["failure"] for row in rows],
        "sharpness": torch.tensor([row["sharpness"] for row in rows], device="cpu").double(),
    }


def plain_of(parameter: Any) -> Tensor:
    found = parameter.detach()
    return found.to_local() if hasattr(found, "to_local") else found


class Straight(nn.Module):
    """Rounded, with the gradient of what is not."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + ((4 * inputs).round() / 4 - inputs).detach()


class Sharded(nn.Module):
    """A layer of its own in each process, whose part of the inputs it sees alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, words: Tensor) -> Tensor:
        rank, count = dist.get_rank(), dist.get_world_size()
        inputs = nn.functional.one_hot(words, WIDTH + 2)[..., :WIDTH].double()
        return self.up(self.norm(inputs.tensor_split(count, dim=1)[rank])).mean(dim=1)


def refusals(count: int) -> Numbers:
    mesh = init_device_mesh("cpu", (count,))
    model = parallel(count, "plain")
    loss = objective(model, count)
    unlike = parallelize_module(Sharded().double(), mesh, {"up": ColwiseParallel(
        input_layouts=Shard(1), output_layouts=Replicate()
    )})  # fmt: skip
    kinked = parallel(count, "plain")
    kinked.head = nn.Sequential(nn.ReLU(), kinked.head)  # type: ignore[assignment]
    straight = parallel(count, "plain")
    straight.head = nn.Sequential(Straight(), straight.head)  # type: ignore[assignment]
    unlike_data = tuple(part + dist.get_rank() for part in data())
    asked: dict[str, Callable[[], object]] = {
        "exact": lambda: objective(model, count, product="exact"),
        "no group": lambda: Objective(model, nn.CrossEntropyLoss(), data(), group=None),
        "no shard": lambda: objective(model, count, parameters="norm.*"),
        "whole vector": lambda: (
            Hessian(loss) @ torch.ones(loss.num_parameters, dtype=loss.dtype, device="cpu")
        ),
        "outputs": lambda: GaussNewton(loss) @ loss.gradient(),
        "other data": lambda: Objective(
            model, nn.CrossEntropyLoss(), unlike_data, group=dist.group.WORLD
        ).gradient(),
        "unlike": lambda: objective(unlike, count).gradient(),
        "kink": lambda: Hessian(objective(kinked, count)) @ loss.gradient(),
        "straight": lambda: Hessian(objective(straight, count)) @ loss.gradient(),
        "low": lambda: objective(parallel(count, "plain").bfloat16(), count),
    }
    said = {}
    for name, ask in asked.items():
        try:
            ask()
        except InvalidInput as error:
            said[name] = str(error)
    return said


REFUSED = {
    "exact": r"product: got 'exact', allowed: 'auto' or 'difference'; second derivatives",
    "no group": "group: got None, allowed: the group of the processes that hold the shards",
    "no shard": "parameters: got 'none that is a DTensor'",
    "whole vector": r"vector: got 'Tensor', allowed: a ShardedVector",
    "outputs": "GaussNewton, GradientCovariance and others",
    "other data": "data: rank 1 has another than rank 0; the processes of a tensor parallel",
    "unlike": "parameter 'norm.weight': each process holds all of it, and has another gradient",
    "kink": r"layer 'head.0' \(ReLU\) has a kink",
    "straight": r"are wrong, without an error; differences .* \(a straight-through one is not\)",
    "low": "model: got 'one in low precision'",
}


def some_numbers(rank: int, count: int) -> Numbers:
    """For the default suite: the way through, in one start of the processes."""
    loss = objective(parallel(count, "plain"), count)
    assert loss.product == "auto"
    image, error = Hessian(loss).product_with_error(block_like(loss))
    asked, left = (trained(parallel(count, "plain"), count, asked=asked) for asked in (True, False))
    assert all(map(torch.equal, asked, left))
    return {
        "gradient": whole(loss.gradient()),
        "image": whole(image.T),
        "error": error,
        "repr": repr(loss),
        "said": refusals(count),
    }


def loss_numbers(rank: int, count: int, plan: str) -> Numbers:
    sure, near = of_a_loss(objective(parallel(count, plan), count))
    return {"sure": sure, "near": near}


def training_numbers(rank: int, count: int, plan: str) -> Numbers:
    near: Numbers = {}
    for optimizer in ("sgd", "adam"):
        model = parallel(count, plan)
        near |= of_a_training(model, objective(model, count, 16), optimizer)
    resumed(objective(parallel(count, plan), count, 16))
    found = watched(parallel(count, plan), count)
    left = trained(parallel(count, plan), count, asked=False)
    assert all(map(torch.equal, found["parts"], left))
    assert found["failures"] == [None, None]
    return near | {"sharpness": found["sharpness"]}


def compare(found: Numbers, right: Numbers, tolerance: float) -> None:
    assert set(found) == set(right)
    for name, expected in right.items():
        off = float((found[name] - expected).norm() / expected.norm())
        assert off < tolerance, (name, off)


def test_two_processes_give_the_products_of_one(tmp_path: Path) -> None:
    exact = objective(network(), 1)
    right = (Hessian(exact) @ block_like(exact)).T
    for found in in_processes(2, some_numbers, tmp_path, 2):
        gradient = exact.gradient()
        assert float((found["gradient"] - gradient).norm() / gradient.norm()) < 1e-12
        assert bool(((found["image"] - right).norm(dim=1) < found["error"]).all())
        assert bool((found["error"] < 1e-7 * right.norm(dim=1)).all())
        assert "second derivatives through tensor parallel layers" in found["repr"]
        assert set(found["said"]) == set(REFUSED)
        for name, said in REFUSED.items():
            with pytest.raises(InvalidInput, match=said):
                raise InvalidInput(found["said"][name])


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("count", [2, 3])
def test_tensor_parallel_losses_are_those_of_one_process(
    count: int, plan: str, tmp_path: Path
) -> None:
    sure, near = of_a_loss(objective(network(), 1))
    for found in in_processes(count, loss_numbers, tmp_path, count, plan):
        error = found["sure"].pop("error")
        compare(found["sure"], sure, 1e-12)
        assert bool(((found["near"]["image"] - near["image"]).norm(dim=1) < error).all())
        assert bool((error < 1e-7 * near["image"].norm(dim=1)).all())
        compare(found["near"], near, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_trackers_splits_and_reports_are_those_of_one_process(plan: str, tmp_path: Path) -> None:
    right: Numbers = {}
    for optimizer in ("sgd", "adam"):
        model = network()
        right |= of_a_training(model, objective(model, 1, 16), optimizer)
    right["sharpness"] = watched(network(), 1)["sharpness"]
    for found in in_processes(2, training_numbers, tmp_path, 2, plan):
        compare(found, right, 1e-6)
