"""One run: what it records, how it diverges, what it leaves of the model's own state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import thalweg
from tests.lab.small_study import PLUGIN, begin, execute, small_spec
from tests.sampling import few
from thalweg.errors import Diverged, InvalidInput
from thalweg.lab.store.lock import locked
from thalweg.lab.training import Run
from thalweg.lab.training.step import Buffers, evaluate_test
from thalweg.registry import load_plugin


def test_rows_come_at_every_nth_step_and_at_the_ends(quick_path: Path) -> None:
    spec = small_spec({"probes": {"loss": 5, "test": 6}, "phases.0.steps": 12})
    study = begin(quick_path / "rows", spec)
    execute(study, spec, "trunk", "sgd")
    data = thalweg.load(study)
    assert data[data.branch == "trunk"].step.tolist() == [0, 5, 6, 10, 12]
    branch = data[data.branch == "sgd"].set_index("step")
    assert branch.index.tolist() == [12, 15, 18, 20, 24]
    assert branch.test_loss.notna().tolist() == [True, False, True, False, True]
    assert branch.loss.loc[12] == data[data.branch == "trunk"].loss.iloc[-1]


def test_nothing_is_recorded_where_nothing_is_asked_for(quick_path: Path) -> None:
    spec = small_spec({"probes": {}})
    study = begin(quick_path / "nothing", spec)
    execute(study, spec, "trunk")
    assert study.run(0, "trunk").read_metrics().num_rows == 0


# On its way out the curvature may vanish, and the gap with it.
@pytest.mark.filterwarnings("ignore::thalweg.GapClosed")
@pytest.mark.parametrize("branch", few(2, ["trunk", "bulk-sgd", "sgd", "dom-sgd"]))
@pytest.mark.parametrize("rate", few(1, [1e30, 1e4]))
def test_a_run_that_diverges_says_when_and_keeps_what_it_measured(
    quick_path: Path, branch: str, rate: float
) -> None:
    where = "phases.0" if branch == "trunk" else f"branches.{branch}"
    changes: dict[str, Any] = {f"{where}.steps": 200, "problem.model.activation": "relu"}
    if branch == "trunk":
        changes |= {"phases.0.optimizer.lr": rate}
    else:
        changes |= {f"branches.{branch}.optimizer": {"lr": rate}}
    spec = small_spec(changes)
    study = begin(quick_path / "wild", spec)
    if branch != "trunk":
        execute(study, spec, "trunk")
    with pytest.raises(Diverged):
        execute(study, spec, branch)
    run = study.run(0, branch)
    status = run.status()
    assert status is not None
    assert status.state == "diverged"
    assert status.message.startswith(f"at step {status.step}: ")
    table = run.read_metrics().to_pandas()
    assert table.step.iloc[-1] == status.step
    assert table.loss.isna().tolist() == [False] * (len(table) - 1) + [True]


def test_a_branch_without_its_trunk_is_refused(quick_path: Path) -> None:
    spec = small_spec()
    study = begin(quick_path / "study", spec)
    with pytest.raises(InvalidInput, match="trunk: it has not been begun"):
        execute(study, spec, "sgd")


def test_a_run_at_which_another_process_works_is_refused(quick_path: Path) -> None:
    spec = small_spec()
    study = begin(quick_path / "study", spec)
    with (
        locked(study.run(0, "trunk").path),
        pytest.raises(InvalidInput, match="in use by process"),
    ):
        execute(study, spec, "trunk")


def test_held_out_data_are_evaluated_without_a_trace(quick_path: Path) -> None:
    load_plugin(PLUGIN)
    spec = small_spec({"problem.model": {"name": "noisy-mlp"}})
    setup = Run(spec, begin(quick_path / "study", spec), 0, "trunk").setup
    model = setup.problem.model
    model[2].eval()  # type: ignore[index]  # a layer that the user keeps out of training
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    loss, accuracy = evaluate_test(setup, setup.objective.theta() * 2)
    assert evaluate_test(setup, setup.objective.theta() * 2) == (loss, accuracy)
    assert 0 <= (accuracy or 0) <= 1
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert (model.training, model[2].training) == (True, False)  # type: ignore[index]


def test_buffers_stay_those_of_the_step_until_it_is_over() -> None:
    layer = torch.nn.BatchNorm1d(2)
    buffers = Buffers(layer)
    layer(torch.randn(8, 2))
    moved = [buffer.clone() for buffer in layer.buffers()]
    buffers.put_aside()
    assert layer.running_mean is not None
    assert layer.running_mean.tolist() == [0.0, 0.0]
    buffers.move_on()
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), moved, strict=True))
