"""A model sharded by FSDP2 gives the numbers of the same model in one process, and trains on.

The reference is one process with all samples, which `tests/operators` hold against dense Hessians.
Shards are uneven: parameters of 5 and 7 rows over 2 or 3 processes, a bias of one number.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import PipelineStage
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.optim import SGD, Adam, Optimizer
from torch.utils.checkpoint import checkpoint

from tests.processes import in_processes
from tests.shards import block_like, projector
from thalweg.errors import InvalidInput, ThalwegError
from thalweg.linalg import norm, orthonormalize, random_unit
from thalweg.loss.objective import Objective
from thalweg.loss.weighted_sum import WeightedSum
from thalweg.measure.probes import probe
from thalweg.measure.step_state import StepState
from thalweg.measure.watch import watch
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.operators.restricted import Restricted, coordinates
from thalweg.optim.split import SplitUpdate
from thalweg.sharding import ShardedVector, plain, tensors_in, whole
from thalweg.spectrum.curvature_profile import curvature_profile
from thalweg.spectrum.density import spectral_density
from thalweg.spectrum.eigensolver import eigenpairs, top_eigenpairs
from thalweg.spectrum.threshold_split import split_at
from thalweg.spectrum.trace_estimation import trace
from thalweg.tracking.optimizer_metric import OptimizerMetricSource
from thalweg.tracking.tracker import SubspaceTracker

SAMPLES = 115
# Adam's metric moves so much at first that each step solves.
STEPS = {"sgd": 20, "adam": 4}
FEW_STEPS = 5
"""Of the default suite: the tracker's first solve, then steps that follow."""
CUTS = {1: (0, 115), 2: (0, 50, 115), 3: (0, 50, 102, 115), 4: (0, 50, 60, 102, 115)}
LOSS = nn.CrossEntropyLoss()
# The processes of a busy machine are slow to start.
pytestmark = pytest.mark.timeout(600)
Numbers = dict[str, Any]
# What a report has cost: checks look at a few samples of each process.
COUNTED = ("seconds", "report_gradients", "overhead")


class Block(nn.Module):
    """A residual block, evaluated again in the backward pass where it is asked for."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(5), nn.Linear(5, 7), nn.Linear(7, 5)
        self.checkpointed = checkpointed

    def forward(self, inputs: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self._inner, inputs, use_reentrant=False)
        return self._inner(inputs)

    def _inner(self, inputs: Tensor) -> Tensor:
        return inputs + self.down(torch.tanh(self.up(self.norm(inputs))))


def network(checkpointed: bool = False, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = Block(checkpointed), Block(checkpointed)
    return nn.Sequential(nn.Linear(6, 5), *blocks, nn.Linear(5, 3)).to(dtype)


def in_shards(model: nn.Sequential, count: int, *, all_of_it: bool = True, **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (count,))
    for block in (model[1], model[2]):
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options) if all_of_it else model


def data(rank: int = 0, count: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([3.0, 2.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64, device="cpu")
    kind = {"generator": generator, "device": "cpu"}
    inputs = torch.randn(SAMPLES, 6, dtype=torch.float64, **kind) * scales
    targets = torch.randint(0, 3, (SAMPLES,), **kind)
    own = slice(*CUTS[count][rank : rank + 2])
    return inputs[own], targets[own]


def objective(model: nn.Module, rank: int, count: int, **options: Any) -> Objective:
    group = dist.group.WORLD if count > 1 else None
    # Chunks of the processes differ in number: they talk to one another between passes alone.
    return Objective(
        model, LOSS, data(rank, count), group=group, vectorize_up_to=0, chunk_size=20, **options
    )


def step(model: nn.Module, optimizer: Optimizer, rank: int, count: int) -> None:
    """A step of full-batch training: FSDP takes the mean over processes of what each has."""
    inputs, targets = data(rank, count)
    optimizer.zero_grad()
    (LOSS(model(inputs), targets) * (count * len(targets) / SAMPLES)).backward()
    optimizer.step()


def of_a_loss(loss: Objective) -> Numbers:
    """What is known of a loss at one point."""
    block = block_like(loss)
    hessian = Hessian(loss, keep_graph=True)
    space = top_eigenpairs(loss, 3)
    smallest = eigenpairs(loss, 2, which="smallest")
    some = torch.arange(3, 90, 4, device="cpu")
    gradient = loss.gradient()
    return {
        "theta": whole(loss.theta()),
        "value": loss.value(),
        "gradient": whole(gradient),
        "of some": whole(loss.gradient(samples=some)),
        "elsewhere": whole(loss.gradient(loss.theta() + 0.1 * block[:, 0])),
        "products": whole((hessian @ block).T),
        "again": whole((hessian @ block[:, :2]).T),
        "of the operator": whole(hessian.gradient),
        "eigenvalues": space.eigenvalues,
        "residuals": space.residuals,
        "angles": space.angles,
        "space": projector(space),
        "smallest": smallest.eigenvalues,
        "orthonormal": whole(orthonormalize(block).T),
        "alignment": torch.tensor(space.alignment(gradient)),
        "bulk": whole(space.reject(gradient)),
    }


def of_a_spectrum(loss: Objective) -> Numbers:
    """What else is known at one point, and other operators."""
    gradient = loss.gradient()
    largest = float(top_eigenpairs(loss, 1).eigenvalues[0])
    known = top_eigenpairs(loss, 2)
    split = split_at(loss, gradient, 0.3 * largest, known=known)
    names = loss.layout.names
    # Three blocks, of which some processes hold little or nothing.
    layer, biases = [n for n in names if n.startswith("2.")], [n for n in names if "bias" in n]
    blocks = [
        Restricted(Hessian(loss, keep_graph=True), coordinates(loss.layout, some))
        for some in (layer, biases, ["3.bias"])
    ]
    tops = [top_eigenpairs(block, 1) for block in blocks]
    return {
        "largest of blocks": torch.cat([top.eigenvalues for top in tops]),
        "of a layer": projector(tops[0]),
        "gauss_newton": whole(GaussNewton(loss) @ gradient),
        "covariance": whole(GradientCovariance(loss) @ gradient),
        "above": whole(split.above),
        "without a basis": whole(split_at(loss, gradient, 0.3 * largest, keep_basis=False).above),
        "profile": curvature_profile(loss, gradient).nodes,
        "trace": torch.tensor(trace(loss, num_matvecs=20, known=known).value),
        "density": spectral_density(loss, probes=2, steps=6).nodes,
    }


def of_a_training(
    model: nn.Module,
    loss: Objective,
    rank: int,
    count: int,
    optimizer: str = "sgd",
    steps: int | None = None,
) -> Numbers:
    """Bulk-SGD, its tracker and the states that it saves; or Bulk-Adam in Adam's own metric."""
    if optimizer == "sgd":
        base: Optimizer = SGD(model.parameters(), lr=0.1, momentum=0.5)
        source: Any = SubspaceTracker(loss, k=2, bulk_error=0.01)
    else:
        base = Adam(model.parameters(), lr=0.01)
        step(model, base, rank, count)
        source = OptimizerMetricSource(loss, k=2, optimizer=base)
    bulk = SplitUpdate(base, source, dominant=0.0, bulk=1.0)
    errors, costs, values = [], [], []
    for _ in range(steps or STEPS[optimizer]):
        step(model, bulk, rank, count)
        errors.append(source.report.error)
        costs.append(source.report.subspace_cost)
        values.append(source.subspace.eigenvalues)
    assert bulk.split is not None
    return {
        f"{optimizer}: theta": whole(loss.theta()),
        f"{optimizer}: split": whole(bulk.split.bulk),
        f"{optimizer}: errors": torch.tensor(errors),
        f"{optimizer}: costs": torch.tensor(costs),
        f"{optimizer}: values": torch.stack(values),
        f"{optimizer}: space": projector(source.subspace),
    }


def of_a_watched_training(model: nn.Module, rank: int, count: int) -> Numbers:
    optimizer = Adam(model.parameters(), lr=0.01)
    group = dist.group.WORLD if count > 1 else None
    with torch.no_grad():
        # After it FSDP leaves whole parameters in the root's places.
        model(data(rank, count)[0])
    with watch(
        model, LOSS, data(rank, count), optimizer, every=3, quick_every=2, quiet=True, group=group,
        probes=["norms", "curvature_shares", "sharpness_by_block"],
    ) as watcher:  # fmt: skip
        for _ in range(4):
            step(model, optimizer, rank, count)
    assert [row["failure"] for row in watcher.history] == [None] * 3
    return {
        f"row {number}: {name}": torch.tensor(value)
        for number, row in enumerate(watcher.history)
        for name, value in row.items()
        if isinstance(value, float) and name not in COUNTED
    }


def resumed(loss: Objective) -> None:
    """A tracker's state is of plain tensors, and continues bit for bit."""
    tracker = SubspaceTracker(loss, k=2)
    tracker.update()
    file = io.BytesIO()
    torch.save(tracker.state_dict(), file)
    file.seek(0)
    other = SubspaceTracker(loss, k=2)
    other.load_state_dict(torch.load(file))
    moved = loss.theta() * 1.01
    one, two = tracker.update(moved), other.update(moved)
    assert torch.equal(plain(one.basis), plain(two.basis))
    held = [*tensors_in(_leaves(tracker.state_dict()))]
    assert not any(isinstance(tensor, ShardedVector) for tensor in held)


def _leaves(state: Any) -> list[Any]:
    if isinstance(state, dict):
        return [leaf for value in state.values() for leaf in _leaves(value)]
    if isinstance(state, (list, tuple)):
        return [leaf for value in state for leaf in _leaves(value)]
    return [state]


def trained_bits(count: int, rank: int, *, asked: bool) -> list[Tensor]:
    """The parts after some steps, with or without questions in between, wherever they come."""
    model = in_shards(network(), count)
    loss = objective(model, rank, count)
    optimizer = Adam(model.parameters(), lr=0.01)
    inputs, targets = data(rank, count)
    for number in range(4):
        optimizer.zero_grad()
        output = LOSS(model(inputs), targets)
        if asked and number % 2:
            loss.gradient()
        output.backward()
        if asked:
            top_eigenpairs(loss, 1)
            with torch.no_grad():
                model(inputs)
            assert isinstance(loss.theta(), ShardedVector)
            loss.value()
        optimizer.step()
    return [parameter.detach().to_local() for parameter in loss.parameters()]  # type: ignore[attr-defined]


REFUSED: dict[str, tuple[Callable[[Objective, int, int], Any], str]] = {
    "no group": (
        lambda loss, rank, count: Objective(loss.model, LOSS, data(rank, count), group=None),
        "group: got None, allowed: the group of the processes that hold the shards",
    ),
    "whole vector": (
        lambda loss, rank, count: (
            Hessian(loss) @ torch.ones(loss.num_parameters, dtype=loss.dtype, device="cpu")
        ),
        r"vector: got 'Tensor', allowed: a ShardedVector",
    ),
    "whole theta": (
        lambda loss, rank, count: loss.write(whole(loss.theta())),
        "theta: got 'Tensor",
    ),
    "sum": (
        lambda loss, rank, count: WeightedSum([loss]),
        "WeightedSum: got 'parameters in shards",
    ),
    "with tensor parallel": (
        lambda loss, rank, count: objective(tensor_parallel(count), rank, count),
        r"a mesh of 2 dimensions \(FSDP with tensor parallel\?\)",
    ),
    "beside tensor parallel": (
        lambda loss, rank, count: objective(beside_tensor_parallel(count), rank, count),
        r"'0.weight': got 'a DTensor that FSDP2 knows nothing of'",
    ),
    "FSDP1": (
        lambda loss, rank, count: objective(fsdp1(), rank, count),
        r"FSDP1\)', allowed: FSDP2 \(torch.distributed.fsdp.fully_shard\)",
    ),
    "stage of a pipeline": (
        lambda loss, rank, count: of_a_pipeline(rank, count, stage=True),
        "model: got 'PipelineStage', allowed: an nn.Module",
    ),
    "module of a stage": (
        lambda loss, rank, count: of_a_pipeline(rank, count, stage=False),
        "theta: rank 1 has another than rank 0; all processes ask for the loss at one point",
    ),
    "another rank's state": (
        lambda loss, rank, count: SubspaceTracker(loss, k=1).load_state_dict(
            of_another_rank(loss, rank, count)
        ),
        "saved state",
    ),
}


def hybrid(copies: int, count: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (copies, count // copies), mesh_dim_names=("copies", "shards"))
    model: Any = fully_shard(network(), mesh=mesh)
    return model


def tensor_parallel(count: int) -> nn.Module:
    mesh = init_device_mesh("cpu", (1, count), mesh_dim_names=("data", "parts"))
    model = parallelize_module(network(), mesh["parts"], {"0": ColwiseParallel()})
    fully_sharded: Any = fully_shard(model, mesh=mesh["data"])
    return fully_sharded


def beside_tensor_parallel(count: int) -> nn.Module:
    model: Any = in_shards(network(), count, all_of_it=False)
    mesh = init_device_mesh("cpu", (count,))
    return parallelize_module(model, mesh, {"0": ColwiseParallel()})


def fsdp1() -> nn.Module:
    # Only its class is looked at; to be built it wants an accelerator.
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(model)
    return nn.Sequential(nn.Linear(6, 3).double(), model)


def of_a_pipeline(rank: int, count: int, *, stage: bool) -> None:
    """Watch this process's stage of a pipeline, or the module in it, another one in each."""
    network = nn.Linear(6, 3 + rank)
    whole_of_it: Any = PipelineStage(network, rank, count, torch.device("cpu"))
    given = whole_of_it if stage else network
    samples, optimizer = (torch.zeros(4, 6), torch.zeros(4, 3 + rank)), SGD(network.parameters())
    watch(given, nn.MSELoss(), samples, optimizer, k=1, group=dist.group.WORLD)


def of_another_rank(loss: Objective, rank: int, count: int) -> Numbers:
    tracker = SubspaceTracker(loss, k=1)
    tracker.update()
    state = tracker.state_dict()
    state["theta"]["rank"] = (rank + 1) % count
    return state


def refusals(loss: Objective, rank: int, count: int) -> Numbers:
    said = {}
    for name, (ask, _) in REFUSED.items():
        try:
            ask(loss, rank, count)
        except InvalidInput as error:
            said[name] = str(error)
    return {"said": said}


def some_numbers(rank: int, count: int) -> Numbers:
    """For the default suite: the way through, in one start of the processes."""
    model = in_shards(network(), count)
    loss = objective(model, rank, count)
    found = of_a_loss(loss) | refusals(loss, rank, count)
    resumed(loss)
    found |= of_a_training(model, loss, rank, count, steps=FEW_STEPS)
    asked, left = (trained_bits(count, rank, asked=asked) for asked in (True, False))
    assert all(map(torch.equal, asked, left))
    return found


def of_differences(loss: Objective) -> Numbers:
    """Products by differences of gradients, in units of the error that they state."""
    block = block_like(loss)
    image, error = Hessian(loss).product_with_error(block)
    assert error is not None
    return {"image": whole(image.T), "error": error}


def differing(rank: int, count: int) -> Numbers:
    """By the gradients of a pass without hooks, and by those that FSDP gives."""
    found: Numbers = {}
    model = in_shards(network(), count)
    left = in_shards(network(), count)
    mixed = in_shards(network(), count, all_of_it=False)
    ways: dict[str, tuple[nn.Module, Any]] = {
        "difference all": (model, "difference"),
        "wrapped all": (model, "wrapped"),
        "wrapped mixed": (mixed, "wrapped"),
        "wrapped copied": (hybrid(count, count), "wrapped"),
    }
    for name, (used, product) in ways.items():
        loss = objective(used, rank, count, product=product)
        found |= {f"{name}: {key}": value for key, value in of_differences(loss).items()}
        space = top_eigenpairs(loss, 2, tolerance=1e-5)
        found[f"{name}: eigenvalues"] = space.eigenvalues
    # Products between steps leave no trace: not in parameters, gradients or the optimizer.
    loss = objective(model, rank, count, product="wrapped")  # type: ignore[arg-type]
    for each in (model, left):
        optimizer = Adam(each.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            inputs, targets = data(rank, count)
            LOSS(each(inputs), targets).backward()
            if each is model:
                _ = Hessian(loss) @ loss.gradient()
            optimizer.step()
    pairs = zip(model.parameters(), left.parameters(), strict=True)
    assert all(torch.equal(one.to_local(), other.to_local()) for one, other in pairs)
    model.set_gradient_divide_factor(7.0)
    wrong = objective(model, rank, count, product="wrapped")  # type: ignore[arg-type]
    try:
        _ = Hessian(wrong) @ wrong.gradient()
    except InvalidInput as error:
        found["said"] = str(error)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_differences_of_sharded_models_are_within_their_error(count: int, tmp_path: Path) -> None:
    exact = objective(network(), 0, 1)
    right = (Hessian(exact) @ block_like(exact)).T
    values = top_eigenpairs(exact, 2, tolerance=1e-8).eigenvalues
    for found in in_processes(count, differing, tmp_path, count):
        for name in ("difference all", "wrapped all", "wrapped mixed", "wrapped copied"):
            off = (found[f"{name}: image"] - right).norm(dim=1)
            assert bool((off < found[f"{name}: error"]).all()), name
            assert bool((found[f"{name}: error"] < 1e-5 * right.norm(dim=1)).all()), name
            torch.testing.assert_close(found[f"{name}: eigenvalues"], values, rtol=1e-7, atol=0)
        assert "off that of the loss" in found["said"]


def test_gradients_of_a_wrapper_need_one() -> None:
    with pytest.raises(InvalidInput, match=r"product: got 'wrapped'"):
        objective(network(), 0, 1, product="wrapped")  # type: ignore[arg-type]


def all_numbers(rank: int, count: int, checkpointed: bool) -> Numbers:
    model = in_shards(network(checkpointed), count)
    loss = objective(model, rank, count)
    found = of_a_loss(loss) | of_a_spectrum(loss) | of_a_training(model, loss, rank, count)
    metric = in_shards(network(checkpointed), count)
    found |= of_a_training(metric, objective(metric, rank, count), rank, count, "adam")
    found |= of_a_watched_training(in_shards(network(checkpointed), count), rank, count)
    return found


def reference(checkpointed: bool = False, *, few: bool = False) -> Numbers:
    model = network(checkpointed)
    loss = objective(model, 0, 1)
    found = of_a_loss(loss)
    if few:
        return found | of_a_training(model, loss, 0, 1, steps=FEW_STEPS)
    found |= of_a_spectrum(loss) | of_a_training(model, loss, 0, 1)
    metric = network(checkpointed)
    found |= of_a_training(metric, objective(metric, 0, 1), 0, 1, "adam")
    return found | of_a_watched_training(network(checkpointed), 0, 1)


def compare(found: list[Numbers], right: Numbers) -> None:
    for name, expected in right.items():
        for numbers in found:
            # The same bits on all ranks, and the numbers of one process.
            assert torch.equal(numbers[name], found[0][name]), name
        scale = float(expected.abs().max())
        off = float((found[0][name] - expected).abs().max()) / (scale or 1.0)
        # A residual is a difference of two products, and rounding is relative to those.
        assert off < (1e-9 if name in ("residuals", "angles") else 1e-12), (name, off)


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    found = in_processes(2, some_numbers, tmp_path, 2)
    compare(found, reference(few=True))
    for numbers in found:
        assert set(numbers["said"]) == set(REFUSED)
    for name, (_, said) in REFUSED.items():
        with pytest.raises(InvalidInput, match=said):
            raise InvalidInput(found[0]["said"][name])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("count", [2, 3])
def test_sharded_models_give_the_numbers_of_one_process(
    count: int, checkpointed: bool, tmp_path: Path
) -> None:
    found = in_processes(count, all_numbers, tmp_path, count, checkpointed)
    compare(found, reference(checkpointed))


def of_parts(rank: int, count: int) -> Numbers:
    """Modules of which some are sharded, and theta that is a part of the parameters."""
    found: Numbers = {}
    for name, all_of_it in (("mixed", False), ("all", True)):
        model = in_shards(network(), count, all_of_it=all_of_it)
        loss = objective(model, rank, count)
        found |= {f"{name}: {key}": value for key, value in of_a_loss(loss).items()}
        loss.write(1.5 * loss.theta())
        found[f"{name}: written"] = loss.value()
    model = in_shards(network(), count)
    part = objective(model, rank, count, parameters=["1.*", "3.bias"])
    found |= {f"part: {key}": value for key, value in of_a_loss(part).items()}
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    found |= {f"frozen: {k}": v for k, v in of_a_loss(objective(model, rank, count)).items()}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    lowered = in_shards(network(), count, mp_policy=policy)
    found["precise"] = whole(objective(lowered, rank, count).gradient())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_parts_of_models_give_the_numbers_of_one_process(count: int, tmp_path: Path) -> None:
    found = in_processes(count, of_parts, tmp_path, count)
    model = network()
    right = of_a_loss(objective(model, 0, 1))
    expected = {f"{name}: {key}": right[key] for name in ("mixed", "all") for key in right}
    expected["precise"] = right["gradient"]
    part = objective(model, 0, 1, parameters=["1.*", "3.bias"])
    expected |= {f"part: {key}": value for key, value in of_a_loss(part).items()}
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    expected |= {f"frozen: {k}": v for k, v in of_a_loss(objective(model, 0, 1)).items()}
    model = network()
    loss = objective(model, 0, 1)
    loss.write(1.5 * loss.theta())
    expected |= {"mixed: written": loss.value(), "all: written": loss.value()}
    compare(found, expected)


def of_copies(rank: int, count: int, copies: int) -> Numbers:
    """HSDP: each shard is held by several processes."""
    model = hybrid(copies, count)
    loss = objective(model, rank, count)
    found = of_a_loss(loss)
    # On another mesh of the same processes theta is divided otherwise.
    found["other mesh"] = whole(objective(hybrid(count, count), rank, count).gradient())
    loss.write(1.5 * loss.theta())
    return found | {"written": loss.value()}


@pytest.mark.slow
@pytest.mark.parametrize(("count", "copies"), [(2, 1), (2, 2), (4, 2)])
def test_copied_shards_give_the_numbers_of_one_process(
    count: int, copies: int, tmp_path: Path
) -> None:
    found = in_processes(count, of_copies, tmp_path, count, copies)
    loss = objective(network(), 0, 1)
    right = of_a_loss(loss)
    loss.write(1.5 * loss.theta())
    compare(found, right | {"written": loss.value(), "other mesh": right["gradient"]})


class Wrong(torch.autograd.Function):
    """x^3 with a right first derivative and a wrong second one."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs**3

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return 3 * inputs.detach() * inputs * outer[0]


class Cube(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return Wrong.apply(inputs)  # type: ignore[return-value]


def of_trouble(rank: int, count: int) -> Numbers:
    """What each process is told where one of them has trouble, and that they are together after."""
    told: dict[str, str] = {}

    def tell(name: str, ask: Callable[[], object]) -> None:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                ask()
            except (ThalwegError, ValueError) as error:
                told[name] = f"{type(error).__name__}: {error}"
        told[f"{name}, warned"] = " ".join(str(each.message) for each in said)

    model = in_shards(network(), count)
    inputs, targets = data(rank, count)
    bad = inputs.clone()
    bad[3, 0] = float("nan") if rank == 1 else bad[3, 0]
    group = dist.group.WORLD
    good = objective(model, rank, count)
    unfit = Objective(model, LOSS, (bad, targets), group=group, vectorize_up_to=0)
    tell("gradient", unfit.gradient)
    tell("product", lambda: Hessian(unfit) @ good.gradient())
    tell("tracker", lambda: SubspaceTracker(unfit, k=2).update())
    wrong: Any = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), Cube(), nn.Linear(5, 3)).double()
    wrong = fully_shard(wrong, mesh=init_device_mesh("cpu", (count,)))
    unlike = objective(wrong, rank, count, product="exact")
    tell("derivative", lambda: Hessian(unlike) @ unlike.gradient())

    apart = in_shards(network(), count, all_of_it=False)
    with torch.no_grad():
        apart[3].bias += rank
    tell("apart", objective(apart, rank, count).gradient)

    @probe("fails_on_one")
    def fails_on_one(state: StepState) -> dict[str, Any]:
        if rank == 1:
            raise ValueError("this probe")
        return {"fails_on_one": float(norm(state.theta))}

    optimizer = Adam(model.parameters(), lr=0.01)
    with watch(
        model, LOSS, (inputs, targets), optimizer, every=1, quiet=True, group=group,
        probes=["fails_on_one"],
    ) as watcher:  # fmt: skip
        tell("watch", lambda: step(model, optimizer, rank, count))
        told["rows"] = str([row["failure"] for row in watcher.history])
    return {"told": told, "gradient": whole(good.gradient())}


@pytest.mark.slow
def test_trouble_in_one_process_is_told_to_all(tmp_path: Path) -> None:
    found = in_processes(2, of_trouble, tmp_path, 2)
    assert torch.equal(found[0]["gradient"], found[1]["gradient"])
    for numbers in found:
        told = numbers["told"]
        for asked in ("gradient", "product", "tracker"):
            assert told[asked].startswith("Diverged: rank 1 of 2"), told
        assert "Hessian: a product is not that of differences of gradients" in told["derivative"]
        assert "Cube" in told["derivative"]
        assert "theta: rank 1 has another than rank 0" in told["apart"]
        assert "rank 1 of 2: ValueError: this probe" in told["rows"], told["rows"]


class OneNumber(nn.Module):
    """Fewer rows than processes: some hold nothing of a parameter, or nothing at all."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([[1.5]], dtype=torch.float64, device="cpu"))
        self.level = nn.Parameter(torch.tensor([0.5, -0.5], dtype=torch.float64, device="cpu"))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs[:, :1] @ self.slope + self.level).tanh() @ inputs.new_ones(2, 3)


def of_little(rank: int, count: int) -> Numbers:
    torch.manual_seed(0)
    model: Any = OneNumber()
    if count > 1:
        model = fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
    inputs, _ = data(rank, count)
    group = dist.group.WORLD if count > 1 else None
    loss = Objective(model, nn.MSELoss(), (inputs, inputs[:, :3]), group=group, vectorize_up_to=0)
    space = top_eigenpairs(loss, 2)
    generator = torch.Generator().manual_seed(0)
    return {
        "gradient": whole(loss.gradient()),
        "eigenvalues": space.eigenvalues,
        "space": projector(space),
        "random": whole(random_unit(3, generator, loss.sharding)),
    }


@pytest.mark.slow
def test_a_process_may_hold_nothing(tmp_path: Path) -> None:
    compare(in_processes(3, of_little, tmp_path, 3), of_little(0, 1))


def held_bytes(rank: int, count: int) -> Numbers:
    """The bytes of long vectors while the top 10 are followed: the most, and those of the state."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 3)
    model: Any = nn.Sequential(*layers).double()
    if count > 1:
        model = fully_shard(model, mesh=init_device_mesh("cpu", (count,)))
    loss = objective(model, rank, count)
    tracker = SubspaceTracker(loss, k=10)
    tracker.update()
    tracker.update(1.001 * loss.theta())
    tensors = [t for t in _leaves(tracker.state_dict()) if isinstance(t, Tensor) and t.dim() > 1]
    return {"bytes": sum(t.numel() * t.element_size() for t in tensors), "P": loss.num_parameters}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::thalweg.spectrum.gap.GapClosed")
@pytest.mark.parametrize("count", [2, 3])
def test_a_process_holds_its_share_of_a_tracker(count: int, tmp_path: Path) -> None:
    alone = held_bytes(0, 1)
    parts = [found["bytes"] for found in in_processes(count, held_bytes, tmp_path, count)]
    assert alone["bytes"] > 10 * 5 * 8 * alone["P"] / 2
    for part in parts:
        assert part < 1.05 * alone["bytes"] / count
