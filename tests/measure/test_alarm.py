from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.networks import mlp
from thalweg import watch
from thalweg.errors import InvalidInput
from thalweg.measure.alarm import Alarm
from thalweg.measure.sinks import WatchWarning


def fed(alarm: Alarm, values: list[Any]) -> list[bool]:
    raised = []
    for step, value in enumerate(values):
        alarm.log({"margin": value}, step)
        raised.append(alarm.raised)
    return raised


@pytest.mark.filterwarnings("ignore")
def test_it_goes_off_after_so_many_reports_in_a_row_and_again_after_a_pause() -> None:
    called: list[float] = []
    alarm = Alarm("margin", below=0.0, reports=2, then=lambda row: called.append(row["margin"]))
    values = [-1, 1, -1, -2, -3, 0.0, -4, -5]
    expected = [False, False, False, True, True, False, False, True]
    assert fed(alarm, values) == expected
    assert alarm.steps == [3, 7]
    assert called == [-2, -5]


@pytest.mark.filterwarnings("ignore")
def test_what_was_not_measured_is_passed_over() -> None:
    alarm = Alarm("margin", above=1.0, reports=2)
    assert fed(alarm, [2.0, None, math.nan, 2.0]) == [False, False, False, True]
    alarm.log({"loss": 1.0}, 9)
    assert alarm.raised


def test_it_says_what_and_where() -> None:
    with pytest.warns(WatchWarning, match=r"step 0: margin is -0.5, below -0.2$"):
        fed(Alarm("margin", below=-0.2, reports=1), [-0.5])
    for wrong in (
        {},
        {"below": 0.0, "above": 1.0},
        {"below": 0.0, "reports": 0},
        {"below": 0.0, "reports": 1.5},
        {"above": "high"},
    ):
        with pytest.raises(InvalidInput):
            Alarm("margin", **wrong)


def watch_rows(alarm: Alarm) -> None:
    for step in range(3):
        alarm.log({"sharpness": None, "loss": 1.0}, step)


def test_a_column_that_is_not_there_is_said_once() -> None:
    alarm = Alarm("sharpnes", above=1.0)
    with pytest.warns(WatchWarning, match="never goes off.*did you mean 'sharpness'") as caught:
        watch_rows(alarm)
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore")
def test_a_watched_run_can_lower_its_learning_rate() -> None:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=3.0)

    def halve(row: Any) -> None:
        optimizer.param_groups[0]["lr"] /= 10

    alarm = Alarm("stability_margin", below=0.0, reports=1, then=halve)
    options: dict[str, Any] = {"every": 1, "k": 1, "quiet": True, "sinks": [alarm]}
    with watch(case.model, case.loss, case.data, optimizer, **options) as watcher:
        for _ in range(3):
            optimizer.zero_grad()
            case.loss(case.model(case.data[0]), case.data[1]).backward()
            optimizer.step()
    assert alarm.steps == [0]
    assert [row["learning_rate"] for row in watcher.history] == pytest.approx([3.0, 0.3, 0.3])
    assert watcher.history[0]["stability_margin"] < 0 < watcher.history[-1]["stability_margin"]
