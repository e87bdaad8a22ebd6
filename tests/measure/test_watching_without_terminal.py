"""A terminal that is gone, and a step without gradients, end neither training nor reports."""

from __future__ import annotations

import io
import math
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.measure.test_watching_failures import LOSS, Net, data, observe, same, seeded
from thalweg.measure.sinks import WatchWarning
from thalweg.spectrum import gap


@pytest.fixture(autouse=True)
def no_gap_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap of this small problem closes here and there: of no matter."""
    monkeypatch.setattr(gap, "CLOSED", math.inf)


class Broken(io.StringIO):
    """A pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def trained(*, watched: bool, around: Any = nullcontext) -> tuple[dict[str, Any], list[Any]]:
    with seeded():
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        watcher = observe(model, optimizer, quiet=False) if watched else None
        inputs, target = data()
        for _ in range(3):
            optimizer.zero_grad()
            LOSS(model(inputs), target).backward()
            with around():
                optimizer.step()
        return model.state_dict(), [] if watcher is None else watcher.history


@pytest.mark.parametrize("stream", [Broken(), closed(), None], ids=["broken", "closed", "none"])
def test_where_nothing_can_be_said_the_training_goes_on_and_the_rows_are_there(
    stream: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = trained(watched=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.warns(WatchWarning, match="Console: step 0 could not be written"):
        found, history = trained(watched=True)
    assert same(alone, found)
    assert [row["failure"] for row in history] == [None] * 3


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_step_within_no_grad_or_inference_mode_is_reported_as_any(around: Any) -> None:
    alone, _ = trained(watched=False, around=around)
    found, history = trained(watched=True, around=around)
    _, outside = trained(watched=True)
    assert same(alone, found)
    assert [row["failure"] for row in history] == [None] * 3
    assert history[2]["sharpness"] == pytest.approx(outside[2]["sharpness"], rel=1e-5)
