from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from thalweg.errors import InvalidInput
from thalweg.integrations.trainer_callback import WatchingCallback
from thalweg.measure.sinks import WatchWarning


def begun(callback: WatchingCallback, resume_at: int | None = None) -> torch.optim.Optimizer:
    """Begin a training of a small model, and make two steps."""
    torch.manual_seed(0)
    model, loss = nn.Linear(3, 2), nn.MSELoss()
    data = torch.randn(20, 3), torch.randn(20, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(*data), batch_size=4)
    callback.begin(model, loss, optimizer, loader, usual_k=1, resume_at=resume_at)
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(data[0]), data[1]).backward()
        optimizer.step()
    return optimizer


def steps_in(file: Path) -> list[str]:
    return [row["step"] for row in csv.DictReader(file.read_text().splitlines())]


def test_a_training_that_begins_again_writes_its_rows_anew(tmp_path: Path) -> None:
    """As `auto_find_batch_size` does where memory was too small for the first try."""
    file = tmp_path / "rows.csv"
    callback = WatchingCallback(samples=8, every=1, file=file)
    begun(callback)
    first = callback.watcher
    begun(callback)
    assert first is not None
    assert first.closed
    assert callback.watcher is not first
    assert steps_in(file) == ["0", "1"]
    callback.end()
    with pytest.raises(InvalidInput, match="not there yet"):
        begun(callback)
    assert steps_in(file) == ["0", "1"]


def test_where_no_state_is_the_folder_is_named(tmp_path: Path) -> None:
    callback = WatchingCallback(samples=8, every=1)
    begun(callback, resume_at=3)
    with pytest.warns(WatchWarning, match=f"{tmp_path} has none, as where the run was not watched"):
        callback.restore_from(tmp_path)
    callback.save_to(tmp_path)
    callback.restore_from(tmp_path)
    assert callback.watcher is not None
    assert callback.watcher.step == 5
