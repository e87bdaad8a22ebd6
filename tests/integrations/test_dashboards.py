from __future__ import annotations

import importlib.util
import json
import math
import os
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.networks import mlp
from thalweg import watch
from thalweg.integrations import dashboards
from thalweg.integrations.dashboards import Dashboard, scalars, texts
from thalweg.measure.sinks import Sinks, WatchWarning
from thalweg.measure.watcher import Watcher

ROW = {
    "step": 4,
    "sharpness": 2.5,
    "eigenvalues": [2.5, 1.0],
    "loss": math.nan,
    "preconditioned_sharpness": None,
    "caveat": "no gap",
    "failure": None,
}


def needs(module: str) -> Any:
    found = importlib.util.find_spec(module) is not None
    return pytest.mark.skipif(not found, reason=f"{module} is not installed")


def test_terms_of_a_ratio_are_no_charts() -> None:
    row = {"lr_numerator": 1.0, "lr_denominator_bulk": 2.0, "lr_sharpness": 3.0}
    assert scalars(row) == {"thalweg/lr_sharpness": 3.0}


def test_numbers_and_texts_have_names_and_what_was_not_measured_has_none() -> None:
    assert scalars(ROW) == {
        "thalweg/sharpness": 2.5,
        "thalweg/eigenvalues/1": 2.5,
        "thalweg/eigenvalues/2": 1.0,
    }
    assert texts(ROW) == {"thalweg/caveat": "no gap"}


class Recorded(Dashboard):
    def __init__(self, slow: float = 0.0, fails_at: int = -1) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.slow, self.fails_at, self.ended = slow, fails_at, False
        self.free = threading.Event()
        self.free.set()

    def send(self, row: Mapping[str, Any], step: int) -> None:
        self.free.wait()
        time.sleep(self.slow)
        if step == self.fails_at:
            raise ConnectionError("no route to host")
        self.rows.append(step)

    def end(self) -> None:
        self.ended = True


def log(rows: Sinks, count: int, pause: float = 0.0) -> None:
    for step in range(count):
        rows.log({"loss": 1.0}, step)
        time.sleep(pause)


def test_all_rows_arrive_in_their_order_and_the_end_is_said() -> None:
    sink = Recorded(slow=0.001)
    for step in range(50):
        sink.log({"loss": 1.0}, step)
    sink.close()
    sink.close()
    assert sink.rows == list(range(50))
    assert sink.ended


def test_a_slow_dashboard_costs_no_time_and_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboards, "WAITING", 3)
    monkeypatch.setattr(dashboards, "PATIENCE", 0.1)
    sink = Recorded()
    sink._rows.maxsize = 3
    sink.free.clear()
    rows = Sinks([sink])
    begin = time.monotonic()
    with pytest.warns(WatchWarning, match="rows wait for it") as caught:
        log(rows, 20)
    assert len(caught) == 1
    rows.close()
    assert time.monotonic() - begin < 5
    sink.free.set()


def test_a_dead_dashboard_is_told_once_and_gets_the_later_rows() -> None:
    sink = Recorded(fails_at=0)
    rows = Sinks([sink])
    with pytest.warns(WatchWarning, match="ConnectionError: no route to host") as caught:
        log(rows, 5, pause=0.02)
    rows.close()
    assert len(caught) == 1
    assert sink.rows == [1, 2, 3, 4]


def trained(sink: str, **options: Any) -> Watcher:
    case = mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.05)
    with watch(
        case.model,
        case.loss,
        case.data,
        optimizer,
        every=2,
        k=2,
        quiet=True,
        sinks=[sink],
        **options,
    ) as watcher:
        for _ in range(5):
            optimizer.zero_grad()
            case.loss(case.model(case.data[0]), case.data[1]).backward()
            optimizer.step()
    return watcher


@needs("tensorboard")
def test_tensorboard_shows_the_rows_at_the_steps_of_the_training(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watcher = trained(f"tensorboard:{tmp_path}")
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    shown = accumulator.Scalars("thalweg/sharpness")
    assert [event.step for event in shown] == [0, 2, 4]
    expected = [row["sharpness"] for row in watcher.history]
    assert [event.value for event in shown] == pytest.approx(expected, rel=1e-6)


@needs("tensorboard")
def test_tensorboard_shows_no_step_twice_after_two_resumes(tmp_path: Path) -> None:
    # What the program itself reads by; the public accumulator purges otherwise.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    from thalweg.integrations.tensorboard import TensorBoard

    for begin, end in ((None, 6), (4, 9), (7, 11)):
        sink = TensorBoard(tmp_path, resume_at=begin)
        for step in range(begin or 0, end):
            sink.log({"loss": float(step + end)}, step)
        sink.close()
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    shown = accumulator.Tensors("thalweg/loss")
    assert [event.step for event in shown] == list(range(11))


@needs("wandb")
@pytest.mark.slow
def test_wandb_gets_them_beside_the_trainers_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    with wandb.init(project="tests", dir=str(tmp_path)) as run:
        run.log({"train/loss": 1.0}, step=700)
        watcher = trained("wandb")
        assert wandb.run is run
        assert run.summary["thalweg/step"] == 4
        assert run.summary["thalweg/sharpness"] == watcher.history[-1]["sharpness"]
        run.log({"train/loss": 0.5}, step=800)
    assert list(tmp_path.rglob("run-*.wandb"))


@needs("trackio")
@pytest.mark.slow
def test_trackio_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path.cwd())!r})
from tests.integrations.test_dashboards import trained
watcher = trained("trackio:tests")
import json
print(json.dumps([row["sharpness"] for row in watcher.history]))
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    expected = json.loads(next(line for line in printed if line.startswith("[")))
    (database,) = tmp_path.rglob("tests.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("select step, metrics from metrics order by step").fetchall()
    assert [step for step, _ in found] == [0, 2, 4]
    values = [json.loads(metrics)["thalweg/sharpness"] for _, metrics in found]
    assert values == pytest.approx(expected)


RESUMED = """
import sys
from thalweg.integrations.trackio import Trackio
begin, end = map(int, sys.argv[1:])
sink = Trackio("tests", name="resumed")
for step in range(begin, end):
    sink.log({"loss": float(step)}, step)
sink.close()
"""


@needs("trackio")
@pytest.mark.slow
def test_a_resumed_run_of_trackio_goes_on_in_one_chart_with_no_step_twice(tmp_path: Path) -> None:
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path)}
    for begin, end in (("0", "6"), ("4", "9")):
        command = [sys.executable, "-c", RESUMED, begin, end]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    (database,) = tmp_path.rglob("tests.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("select run_name, step from metrics order by id").fetchall()
    assert found == [("resumed", step) for step in range(9)]


@needs("mlflow")
@pytest.mark.slow
def test_mlflow_gets_them_in_the_active_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
        with mlflow.start_run() as run:
            watcher = trained("mlflow")
        found = mlflow.MlflowClient().get_metric_history(run.info.run_id, "thalweg/sharpness")
    assert [metric.step for metric in found] == [0, 2, 4]
    assert [m.value for m in found] == [row["sharpness"] for row in watcher.history]
