"""Training in several processes is watched as one, and is bit for bit what it is unwatched."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.processes import in_processes
from thalweg.measure.sinks import WatchWarning
from thalweg.measure.step_state import StepState
from thalweg.measure.watch import watch
from thalweg.registry import probes

STEPS = 12
LOSS = nn.CrossEntropyLoss()


class Net(nn.Module):
    """Batch norm and dropout, and what can be made to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3)
        )
        self.broken = False

    def forward(self, inputs: Tensor) -> Tensor:
        if self.broken and not self.training:
            raise KeyError("a bad sample")
        return self.layers(inputs)


def rows(rank: int) -> tuple[Tensor, Tensor]:
    """The samples of this process; 40 and 24."""
    torch.manual_seed(1)
    inputs = torch.randn(64, 6) * torch.linspace(2.0, 0.5, 6)
    targets = inputs[:, :3].argmax(1)
    part = slice(0, 40) if rank == 0 else slice(40, None)
    return inputs[part], targets[part]


def stumbling(state: StepState) -> dict[str, Any]:
    """A probe of the user's that fails in the second process, between two sums."""
    if state.step == 8 and dist.get_rank() == 1:
        raise LookupError("of a probe")
    return {"twice": 2 * float(state.objective.value(state.theta))}


def train(rank: int, folder: str, watched: bool) -> dict[str, Any]:
    inputs, targets = rows(rank)
    torch.manual_seed(2)
    model = DistributedDataParallel(Net())
    torch.manual_seed(3 + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    watcher = None
    if watched:
        if "twice" not in probes:
            probes.add("twice", stumbling, columns=["twice"])
        file = Path(folder) / "rows.csv"
        options: Any = {"k": 2, "every": 2, "file": file, "group": dist.group.WORLD}
        watcher = watch(model, LOSS, (inputs, targets), optimizer, **options, probes=["twice"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            # A bad sample is met in one process at step 4.
            model.module.broken = rank == 1 and step == 4
            chosen = torch.randint(0, len(inputs), (8,))
            optimizer.zero_grad()
            LOSS(model(inputs[chosen]), targets[chosen]).backward()
            optimizer.step()
    found: dict[str, Any] = {"state": model.module.state_dict(), "drawn": torch.rand(3)}
    if watcher is not None:
        watcher.close()
        hidden = ("seconds", "alignment_minibatch")
        found["rows"] = [
            {name: value for name, value in row.items() if name not in hidden}
            for row in watcher.history
        ]
        found["warned"] = [str(w.message) for w in caught if w.category is WatchWarning]
    return found


@pytest.mark.slow
def test_a_watched_training_in_processes_is_that_without(tmp_path: Path) -> None:
    alone = in_processes(2, train, tmp_path / "alone", str(tmp_path), False)
    found = in_processes(2, train, tmp_path / "watched", str(tmp_path), True)
    for one, other in zip(alone, found, strict=True):
        assert torch.equal(one["drawn"], other["drawn"])
        for name, tensor in one["state"].items():
            assert torch.equal(tensor, other["state"][name]), name
    first, second = found
    assert repr(first["rows"]) == repr(second["rows"])
    failures = [row["failure"] for row in first["rows"]]
    assert failures[2].startswith(
        "rank 1 of 2: the model (Net) fails in the forward pass: KeyError"
    )
    assert failures[4].endswith("rank 1 of 2: LookupError: of a probe")
    assert [failure is None for failure in failures] == [True, True, False, True, False, True]
    # The first process alone writes.
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(failures)
    assert len(first["warned"]) == 2
    assert second["warned"] == []


def quick_rows(rank: int) -> dict[str, Any]:
    inputs, targets = rows(rank)
    torch.manual_seed(2)
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    options: Any = {"k": 2, "budget": 2.0, "quiet": True, "group": dist.group.WORLD}
    watcher = watch(model, LOSS, (inputs, targets), optimizer, **options)
    # Unlike numbers of samples: the budget is that of both together.
    part = slice(0, 16 if rank == 0 else 8)
    for _ in range(240):
        optimizer.zero_grad()
        LOSS(model(inputs[part]), targets[part]).backward()
        optimizer.step()
    hidden = ("seconds", "caveat")
    found = [{k: v for k, v in row.items() if k not in hidden} for row in watcher.history]
    spacing = watcher.state_dict()["tiers"]
    return {"rows": repr(found), "spacing": repr({k: v["spacing"] for k, v in spacing.items()}),
            "full": [row["sharpness"] is not None for row in watcher.history],
            "failures": [row["failure"] for row in watcher.history]}  # fmt: skip


@pytest.mark.slow
def test_a_budget_spaces_quick_rows_alike_in_all_processes(tmp_path: Path) -> None:
    first, second = in_processes(2, quick_rows, tmp_path)
    assert first == second
    assert set(first["full"]) == {True, False}
    assert set(first["failures"]) == {None}


def fail_always(rank: int, folder: str) -> dict[str, Any]:
    torch.manual_seed(2)
    model = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = watch(
        model, LOSS, rows(rank), optimizer, k=2, every=1, quiet=True, group=dist.group.WORLD
    )
    model.module.broken = rank == 1
    inputs, targets = rows(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(5):
            optimizer.zero_grad()
            LOSS(model(inputs), targets).backward()
            optimizer.step()
    full = Path(folder)  # a folder is no file
    text = ""
    try:
        watch(
            model, LOSS, rows(rank), optimizer, k=2, file=full, quiet=True, group=dist.group.WORLD
        )
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    return {"ended": watcher.ended, "reports": len(watcher.history), "refused": text}


@pytest.mark.slow
def test_reports_end_together_and_what_one_process_refuses_all_refuse(tmp_path: Path) -> None:
    for found in in_processes(2, fail_always, tmp_path, str(tmp_path)):
        assert found["ended"]
        assert found["reports"] == 3
        assert "rank 0 of 2" in found["refused"] or "rank 1 of 2" in found["refused"]
