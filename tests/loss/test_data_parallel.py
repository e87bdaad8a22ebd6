"""A loss whose samples are divided among processes gives the numbers of one process with them all.

Uneven parts, one of a few samples, subsets that one process holds alone; with activation
checkpointing, weighted classes, ignored targets. The reference is one process with all samples,
where `tests/operators` hold the products against dense Hessians.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.processes import in_processes, joined
from thalweg.loss.objective import Objective
from thalweg.loss.reduce import AcrossProcesses
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.optim.split import SplitUpdate
from thalweg.spectrum.curvature_profile import curvature_profile
from thalweg.spectrum.density import spectral_density
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.tracking.gradient_subspaces import GradientSubspace
from thalweg.tracking.threshold_source import ThresholdSource
from thalweg.tracking.tracker import SubspaceTracker

CLASSES, SAMPLES = 4, 120
# Where the samples of each process end; the last has the fewest.
CUTS = {2: (0, 75, 120), 3: (0, 60, 113, 120)}
STEPS = 20


class Net(nn.Module):
    """Three layers, the middle one evaluated again in the backward pass where it is asked for."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, CLASSES)
        self.middle = nn.Linear(10, 10)
        self.checkpointed = checkpointed

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        if self.checkpointed:
            hidden = checkpoint(self._inner, hidden, use_reentrant=False)
        else:
            hidden = self._inner(hidden)
        return self.last(hidden)

    def _inner(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.middle(hidden))


def net(checkpointed: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(checkpointed).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    scales = torch.linspace(3.0, 0.5, 6, dtype=torch.float64)
    inputs = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64) * scales
    # Ordered by class, so that the processes hold different ones.
    return inputs, (inputs[:, 0].argsort().argsort() * CLASSES) // SAMPLES


def own_rows(rank: int, count: int) -> slice:
    return slice(*CUTS[count][rank : rank + 2])


def own(rank: int, count: int) -> tuple[Tensor, ...]:
    return tuple(part[own_rows(rank, count)] for part in data())


def ignoring(output: Tensor, target: Tensor) -> Tensor:
    """A loss of the user's that averages over targets that count: every third, none of the last."""
    hidden = torch.arange(len(target)) % 3 == 1
    return functional.cross_entropy(output, torch.where(hidden, -100, target))


def with_ignored(target: Tensor) -> Tensor:
    target = target.clone()
    target[::3] = -100
    target[CUTS[3][2] :] = -100
    return target


LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mean": nn.CrossEntropyLoss,
    "weighted": lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5, 3.0]).double()),
}


def objective(rank: int, count: int, kind: str, checkpointed: bool) -> Objective:
    """Over this process's samples; of all, where there is one."""
    inputs, targets = data()
    loss: Any = LOSSES[kind]() if kind in LOSSES else nn.CrossEntropyLoss()
    if kind == "ignored":
        targets = with_ignored(targets)
    elif kind == "found":
        # No loss of torch, so that what it averages over has to be found.
        targets = with_ignored(targets)
        loss = lambda output, target: functional.cross_entropy(output, target)  # noqa: E731
    rows = slice(None) if count == 1 else own_rows(rank, count)
    return Objective(
        net(checkpointed),
        loss,
        (inputs[rows], targets[rows]),
        vectorize_up_to=0,
        chunk_size=32,
        group=None if count == 1 else dist.group.WORLD,
    )


def block(size: int) -> Tensor:
    return torch.randn(size, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def measured(loss: Objective) -> dict[str, Tensor]:
    """What the numbers of one process and of several have to agree in."""
    theta = loss.theta()
    value, gradient = loss.value_and_gradient()
    found = {"value": value, "gradient": gradient, "product": Hessian(loss) @ block(len(theta))}
    # Samples of the last process alone, and some of each.
    for name, few in (("last", [113, 115, 119]), ("some", [100, 3, 70, 119])):
        samples = torch.tensor(few)
        if loss.batch_weight is None or name == "some":
            found[f"gradient {name}"] = loss.gradient(samples=samples)
            found[f"product {name}"] = Hessian(loss, samples=samples) @ block(len(theta))
    found["gauss_newton"] = GaussNewton(loss) @ block(len(theta))
    found["covariance"] = GradientCovariance(loss) @ block(len(theta))
    space = top_eigenpairs(Hessian(loss), 3, tolerance=1e-10)
    found |= {"eigenvalues": space.eigenvalues, "basis": space.basis}
    return found


def followed(loss: Objective) -> dict[str, Tensor]:
    """A tracker over steps, and Bulk-SGD."""
    tracker = SubspaceTracker(loss, k=2, seed=1)
    theta = loss.theta()
    found = {}
    for step in range(6):
        space = tracker.update(theta * (1 + 0.01 * step))
        found[f"tracked {step}"] = space.basis
        found[f"tracked values {step}"] = space.eigenvalues
    optimizer = SplitUpdate(
        torch.optim.SGD(loss.parameters(), lr=0.05),
        SubspaceTracker(loss, k=2, seed=2),
        dominant=0.0,
        bulk=1.0,
    )
    for _ in range(STEPS):
        _, gradient = loss.value_and_gradient()
        for parameter, part in zip(loss.parameters(), loss.layout.unflatten(gradient), strict=True):
            parameter.grad = part.clone()
        optimizer.step()
    return found | {"theta": loss.theta()}


def further(loss: Objective) -> dict[str, Tensor]:
    """What else is made of products."""
    gradient = loss.gradient()
    source = ThresholdSource(loss, 0.3, relative=True, seed=0)
    source.update(vector=gradient)
    gradients = GradientSubspace(loss, 2, samples=40)
    gradients.update()
    grid = torch.linspace(-1, 5, 20, dtype=torch.float64)
    spectrum = spectral_density(Hessian(loss), probes=2, steps=10)
    profile = curvature_profile(Hessian(loss), gradient)
    return {
        "threshold": source.split(gradient).dominant,
        "of gradients": gradients.split(gradient).dominant,
        "density": spectrum.density(grid, 0.5).value,
        "shares": torch.tensor([profile.mean, profile.share_above(0.1).value]).double(),
    }


SPACES = {"basis", *(f"tracked {step}" for step in range(6))}
ASKED = {"measured": measured, "followed": followed, "further": further}


def ask(
    rank: int, count: int, kind: str, checkpointed: bool, asked: tuple[str, ...]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name in asked:
        found |= ASKED[name](objective(rank, count, kind, checkpointed))
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compare(tmp_path: Path, count: int, kind: str, checkpointed: bool, *asked: str) -> None:
    expected = ask(0, 1, kind, checkpointed, asked)
    ranks = in_processes(count, ask, tmp_path, count, kind, checkpointed, asked)
    for name, truth in expected.items():
        for found in ranks:
            assert torch.equal(found[name], ranks[0][name]), name  # the same bits everywhere
        assert ranks[0][name].shape == truth.shape
        if name in SPACES:
            # The signs of its vectors are the solver's.
            found = ranks[0][name]
            assert relative(found @ (found.T @ truth), truth) < 1e-12, name
        else:
            assert relative(ranks[0][name], truth) < 1e-12, name


def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    compare(tmp_path, 2, "weighted", False, "measured")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["mean", "weighted", "ignored", "found"])
@pytest.mark.parametrize("count", CUTS)
def test_processes_give_the_numbers_of_one(
    tmp_path: Path, count: int, kind: str, checkpointed: bool
) -> None:
    compare(tmp_path, count, kind, checkpointed, *ASKED)


# What fails in one process.


class Stumbling(nn.Module):
    """A linear model that raises, or gives NaN, where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(6, CLASSES).double()
        self.trouble: Exception | float | None = None
        self.most = SAMPLES

    def forward(self, inputs: Tensor) -> Tensor:
        if isinstance(self.trouble, Exception):
            raise self.trouble
        if len(inputs) > self.most:
            raise MemoryError("can't allocate memory")
        return self.inner(inputs) * (1.0 if self.trouble is None else self.trouble)


class Unreadable(torch.utils.data.Dataset):
    """One whose samples cannot be read after the first look at them."""

    def __init__(self, rows: tuple[Tensor, ...]) -> None:
        self.rows, self.readable = rows, True

    def __len__(self) -> int:
        return len(self.rows[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        if not self.readable:
            raise OSError("no such file")
        return tuple(part[index] for part in self.rows)


def error_of(asked: Callable[[], Any]) -> str:
    try:
        asked()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def stumble(rank: int) -> dict[str, Any]:
    """What each of three processes says where one of them fails, in one way after another."""
    world, rows, count = dist.group.WORLD, own(rank, 3), 3
    told: dict[str, Any] = {}
    model, loss = Stumbling(), nn.CrossEntropyLoss()
    ours = Objective(model, loss, rows, group=world, vectorize_up_to=0)
    right = ours.gradient()
    hessian, vector = Hessian(ours), block(ours.num_parameters)[:, 0]
    product = hessian @ vector

    def troubled(who: int, trouble: Any, asked: Callable[[], Any]) -> str:
        model.trouble = trouble if rank == who else None
        text = error_of(asked)
        model.trouble = None
        # All go on together afterwards.
        assert relative(ours.gradient(), right) < 1e-12
        assert relative(hessian @ vector, product) < 1e-12
        return text

    told["value"] = troubled(1, KeyError("a bad sample"), ours.value)
    told["gradient"] = troubled(2, float("nan"), ours.gradient)
    told["product"] = troubled(0, float("inf"), lambda: Hessian(ours) @ vector)
    told["memory"] = troubled(1, MemoryError("of this process"), ours.gradient)
    told["operator"] = troubled(2, KeyError("x"), lambda: GaussNewton(ours) @ vector)
    told["space"] = troubled(1, KeyError("x"), lambda: SubspaceTracker(ours, 2).update())

    # Where memory does not suffice one process goes on in smaller chunks, and no other.
    model.most = 9 if rank == 1 else SAMPLES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        halved = Objective(model, loss, rows, group=world, vectorize_up_to=0, chunk_size=64)
        told["halved"] = relative(halved.gradient(), right)
        told["chunk size"] = float(halved.chunk_size or 0)
    model.most = SAMPLES

    few = tuple(part[:0] if rank == 2 else part for part in rows)
    told["empty"] = error_of(lambda: Objective(model, loss, few, group=world))
    dataset = Unreadable(rows)
    read = Objective(model, loss, dataset, group=world, vectorize_up_to=0)
    assert relative(read.gradient(), right) < 1e-14
    dataset.readable = rank != 1
    told["unreadable"] = error_of(read.value)

    def weigh(batch: Any) -> float:
        if rank == 2:
            raise LookupError("no weight")
        return len(batch[0])

    weighed = Objective(model, loss, rows, group=world, batch_weight=weigh, check=False)
    told["weight"] = error_of(weighed.gradient)

    changing = nn.Sequential(model, nn.Dropout(0.5) if rank == 1 else nn.Identity())
    told["random"] = error_of(lambda: Objective(changing, loss, rows, group=world).value())
    moved = Stumbling()
    with torch.no_grad():
        moved.inner.bias.add_(float(rank == 2))
    told["elsewhere"] = error_of(lambda: Objective(moved, loss, rows, group=world).value())

    # One exchange a product of a block.
    assert isinstance(ours.reduction, AcrossProcesses)
    before = ours.reduction.num_sums, ours.reduction.num_bytes
    _ = hessian @ block(ours.num_parameters)
    told["sums"] = ours.reduction.num_sums - before[0]
    told["bytes"] = (ours.reduction.num_bytes - before[1]) / ours.num_parameters
    return told | {"count": count}


@pytest.mark.slow
def test_what_fails_in_one_process_is_raised_in_all(tmp_path: Path) -> None:
    ranks = in_processes(3, stumble, tmp_path)
    fails = "the model (Stumbling) fails in the forward pass: KeyError: "
    expected = {
        "value": f"InvalidInput: rank 1 of 3: {fails}'a bad sample'",
        "gradient": "Diverged: rank 2 of 3: the loss is NaN or infinite",
        "product": "Diverged: rank 0 of 3: the loss is NaN or infinite",
        "memory": "ProcessOutOfMemory: rank 1 of 3: MemoryError: of this process",
        "operator": f"InvalidInput: rank 2 of 3: {fails}'x'",
        "space": f"InvalidInput: rank 1 of 3: {fails}'x'",
        "unreadable": "ProcessFailed: rank 1 of 3: OSError: no such file",
        "weight": "ProcessFailed: rank 2 of 3: LookupError: no weight",
        "empty": "InvalidInput: rank 2 of 3: data: it holds no sample",
        "random": "InvalidInput: rank 1 of 3: layer '1' (Dropout)",
        "elsewhere": "InvalidInput: theta: rank 2 has another than rank 0;",
    }
    for found in ranks:
        for name, text in expected.items():
            assert found[name].startswith(text), name
            assert found[name] == ranks[0][name]
        assert found["sums"] == 1
        assert found["bytes"] == 3 * 8  # three vectors of float64
        assert found["halved"] < 1e-12
    # Its 53 samples, halved three times.
    assert [found["chunk size"] for found in ranks] == [64.0, 7.0, 64.0]


def lose(rank: int, folder: str) -> None:
    """Of two processes the second is killed in the middle of a product, by the system."""
    torch.set_num_threads(1)
    joined(rank, 2, folder)
    model = Stumbling()
    ours = Objective(model, nn.CrossEntropyLoss(), own(rank, 2), group=dist.group.WORLD)
    hessian = Hessian(ours)
    _ = hessian.gradient
    begin = time.monotonic()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    text = error_of(lambda: hessian @ hessian.gradient)
    seconds = time.monotonic() - begin
    Path(folder, "told").write_text(f"{seconds}\n{text}")


@pytest.mark.slow
def test_where_a_process_is_killed_the_others_end_with_one_line(tmp_path: Path) -> None:
    both = torch.multiprocessing.spawn(lose, (str(tmp_path),), nprocs=2, join=False)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        both.join(grace_period=60)
    seconds, text = (tmp_path / "told").read_text().split("\n")
    assert float(seconds) < 10
    assert text.startswith("ProcessLost: rank 0 has lost another process of its group")


def on_a_gpu(rank: int) -> dict[str, Any]:
    """As `measured`, by NCCL on the one GPU that there is: a group of one."""
    inputs, targets = (part.cuda() for part in data())
    ours = Objective(
        net().cuda(), LOSSES["weighted"]().cuda(), (inputs, targets), group=dist.group.WORLD
    )
    hessian = Hessian(ours)
    vector = block(ours.num_parameters).cuda()
    told = error_of(lambda: ours.reduction.settle(KeyError("x")))
    return {
        "gradient": ours.gradient().cpu(),
        "product": (hessian @ vector).cpu(),
        "told": told,
    }


@pytest.mark.gpu
def test_sums_are_closed_by_nccl(tmp_path: Path) -> None:
    (found,) = in_processes(1, on_a_gpu, tmp_path, backend="nccl")
    whole = objective(0, 1, "weighted", False)
    assert relative(found["gradient"], whole.gradient()) < 1e-10
    assert relative(found["product"], Hessian(whole) @ block(whole.num_parameters)) < 1e-10
    assert "KeyError" in found["told"]
