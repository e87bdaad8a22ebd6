"""A study in its folder: what is run, what is kept, extended, refused; the choices of a spec."""

from __future__ import annotations

import io
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import thalweg
from tests.lab.small_study import PLUGIN, begin, execute, small_spec
from tests.problems.data_files import write_mnist
from tests.sampling import few
from thalweg.errors import IntegrityError, InvalidInput
from thalweg.lab import study as study_module
from thalweg.lab.config import Spec
from thalweg.lab.execution.schedule import tasks_of
from thalweg.lab.identity import run_hash
from thalweg.lab.preparing import read_spec
from thalweg.lab.progress import Progress
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.checkpoint import latest_checkpoint, load_checkpoint
from thalweg.lab.study import StudyResult, reproduction_spec, resume, roles_of, run
from thalweg.lab.training import Run
from thalweg.registry import load_plugin

SHORT: dict[str, Any] = {
    "phases.0.steps": 3,
    "branches": {"sgd": {"steps": 3}},
    "probes": {"loss": 1},
}


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts, figures and report have tests of their own."""

    def conclude(study: StudyFolder, spec: Spec, outcome: Any = None) -> StudyResult:
        return StudyResult(study, {}, outcome or study_module.Outcome())

    monkeypatch.setattr(study_module, "conclude", conclude)


def parameters(study: StudyFolder, branch: str) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(study.run(0, branch).checkpoints)
    assert newest is not None
    tensors = load_checkpoint(newest).tensors
    start = "parameters/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def last_steps(result: StudyResult) -> dict[tuple[int, str], int]:
    return result.data.groupby(["seed", "branch"]).step.max().to_dict()


def test_seeds_and_steps_asked_for_later_are_added_to_what_is_there(quick_path: Path) -> None:
    first = run(small_spec(SHORT), root=quick_path)
    assert last_steps(first) == {(0, "trunk"): 3, (0, "sgd"): 6}
    longer = small_spec({**SHORT, "branches.sgd.steps": 5, "seeds": [1]})
    second = run(longer, root=quick_path)
    assert second.study == first.study
    # What was asked for is seed 1 alone: the branch of seed 0 is longer by name only.
    assert last_steps(second) == {
        (0, "trunk"): 3,
        (0, "sgd"): 6,
        (1, "trunk"): 3,
        (1, "sgd"): 8,
    }
    assert tomllib.loads(second.study.spec_text)["seeds"] == [0, 1]
    third = resume(second.study.path)
    assert last_steps(third)[0, "sgd"] == 8


def test_runs_of_another_version_are_kept_and_said_to_be(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small_spec({**SHORT, "branches": {}})
    text = io.StringIO()
    run(spec, root=quick_path, progress=Progress(Console(file=text, width=500)))
    assert "kept" not in text.getvalue()
    monkeypatch.setattr(thalweg, "__version__", "9.9")
    run(spec, root=quick_path, progress=Progress(Console(file=text, width=500)))
    assert text.getvalue().count("1 run is kept as made by thalweg ") == 1
    assert "this is thalweg 9.9, torch " in text.getvalue()


def test_fewer_steps_than_are_done_shorten_nothing(quick_path: Path) -> None:
    run(small_spec(SHORT), root=quick_path)
    again = run(small_spec({**SHORT, "branches.sgd.steps": 2}), root=quick_path)
    assert last_steps(again) == {(0, "trunk"): 3, (0, "sgd"): 6}
    assert read_spec(again.study).branches["sgd"].steps == 3


def test_an_unknown_executor_is_refused_before_anything_is_made(quick_path: Path) -> None:
    with pytest.raises(InvalidInput, match="executor: got 'lockstepp', allowed: one of"):
        run(small_spec(), root=quick_path, executor="lockstepp")
    assert list(quick_path.iterdir()) == []


def test_a_moved_study_is_resumed_where_it_is(quick_path: Path) -> None:
    study = run(small_spec(SHORT), root=quick_path / "before").study
    moved = quick_path / "after" / "my-study"
    moved.parent.mkdir()
    study.path.rename(moved)
    (moved / "seed-0" / "sgd" / "status.json").unlink()
    result = resume(moved)
    assert result.study.path == moved
    assert list(result.outcome.endings) == [tasks_of(small_spec(SHORT))[1]]
    assert list(moved.parent.iterdir()) == [moved]


def test_data_that_has_changed_is_refused(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = small_spec(SHORT)
    study = run(spec, root=quick_path).study
    folder = study.run(0, "sgd")
    known = tomllib.loads(folder.run_text)["data_fingerprint"]
    made_with = folder.run_text.replace(known, "0" * 64)
    made_with = made_with.replace(folder.hash, run_hash(read_spec(study), 0, "sgd", "0" * 64))
    folder.write_run_text(made_with)
    (folder.path / "status.json").unlink()
    with pytest.raises(IntegrityError, match="was made with other data"):
        run(spec, root=quick_path)
    with pytest.raises(IntegrityError, match="the data has changed"):
        Run(spec, study, 0, "sgd", fingerprint="0" * 64)


def test_what_was_chosen_by_measuring_is_written_down_and_kept(quick_path: Path) -> None:
    free = {"problem.chunk_size": None, "problem.vectorize_up_to": None}
    spec = small_spec({**SHORT, **free})
    study = run(spec, root=quick_path).study
    chosen = tomllib.loads(study.spec_text)["problem"]
    assert chosen["vectorize_up_to"] >= 0
    assert chosen["chunk_size"] >= 1
    text = study.spec_text
    run(spec, root=quick_path)
    assert study.spec_text == text


def test_paths_in_a_spec_hold_from_every_folder(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (quick_path / "data").mkdir()
    write_mnist(quick_path / "data", "train", 40)
    monkeypatch.chdir(quick_path)
    changes = {**SHORT, "problem.data": {"name": "mnist", "data_dir": "data"}}
    study = run(
        small_spec({**changes, "problem.samples": 20, "problem.test_samples": None}), root="runs"
    ).study
    written = tomllib.loads(study.spec_text)["problem"]["data"]["data_dir"]
    assert written == str(quick_path / "data")


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_a_run_starts_from_the_users_parameters(quick_path: Path, ending: str) -> None:
    spec = small_spec(SHORT)
    given = {
        name: t + 0.5
        for name, t in Run(spec, begin(quick_path / "x", spec), 0, "trunk")
        .setup.problem.model.state_dict()
        .items()
    }
    path = quick_path / f"mine.{ending}"
    save_file(given, path) if ending == "safetensors" else torch.save(given, path)
    spec = small_spec({**SHORT, "initial_checkpoint": str(path), "phases.0.optimizer.lr": 1e-12})
    study = run(spec, root=quick_path / "runs").study
    found = parameters(study, "trunk")
    assert all(torch.allclose(found[name], given[name]) for name in given)


def test_parameters_that_do_not_fit_are_named(quick_path: Path) -> None:
    path = quick_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    spec = small_spec({**SHORT, "initial_checkpoint": str(path)})
    with pytest.raises(InvalidInput, match=r"other\.safetensors: .*Missing key"):
        run(spec, root=quick_path / "runs")


def test_a_users_data_model_and_probe_work_in_the_runs_own_processes(quick_path: Path) -> None:
    load_plugin(PLUGIN)
    spec = small_spec(
        {
            **SHORT,
            "problem": {"data": "waves", "model": {"name": "noisy-mlp"}, "loss": "mse"},
            "subspace.k": 2,
            "probes": {"loss": 1, "theta_norm": 1, "alignment_gradient": 1, "test": 1},
        }
    )
    data = run(spec, root=quick_path, plugins=[PLUGIN]).data
    assert data.theta_norm.gt(0).all()
    assert data.alignment_gradient.between(0, 1).all()
    assert data.test_accuracy.isna().all(), "a regression has no accuracy"


def test_k_must_be_given_without_classes_or_chosen_by_gap(quick_path: Path) -> None:
    load_plugin(PLUGIN)
    problem = {"data": "waves", "model": {"name": "mlp", "hidden": [5]}, "loss": "mse"}
    spec = small_spec({**SHORT, "problem": problem, "subspace.k": "classes"})
    with pytest.raises(InvalidInput, match=r"subspace\.k: 'classes' was asked for"):
        run(spec, root=quick_path, plugins=[PLUGIN])
    spec = small_spec(
        {**SHORT, "problem": problem, "subspace.k": "gap", "probes": {"sharpness": 1}}
    )
    data = run(spec, root=quick_path, plugins=[PLUGIN]).data
    assert data.eigenvalues.map(len).nunique() == 1


def test_the_trunk_goes_through_its_phases(quick_path: Path) -> None:
    spec = small_spec(
        {
            "phases": [
                {
                    "name": "warm",
                    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
                    "schedule": "linear",
                    "warmup_steps": 2,
                    "steps": 5,
                    "clip_norm": 0.5,
                    "batch_size": 20,
                },
                {
                    "name": "adam",
                    "optimizer": {"name": "adam", "lr": 0.01},
                    "epochs": 1,
                    "batch_size": 50,
                    "split": {"dominant": 0.5, "bulk": 1.0},
                },
                {
                    "name": "whole",
                    "optimizer": {"name": "sgd", "lr": 0.1},
                    "batch_size": "all",
                    "steps": 50,
                    "until_loss": 0.33,
                },
            ],
            "branches": {"frozen": {"steps": 2, "split": {"dominant": 0.0, "basis": "frozen"}}},
            "probes": {"loss": 1, "norms": 1, "minibatch_loss": 1},
        }
    )
    study = begin(quick_path / "phases", spec)
    execute(study, spec, "trunk", "frozen")
    data = thalweg.load(study)
    trunk = data[data.branch == "trunk"].set_index("step")
    rates = trunk.learning_rate
    assert rates.loc[:4].tolist() == pytest.approx([0.05, 0.1, 0.1, 0.1 * 2 / 3, 0.1 / 3])
    assert rates.loc[5:8].tolist() == [0.01] * 4, "an epoch of 200 samples, 50 a batch"
    log = (study.run(0, "trunk").path / "log.txt").read_text(encoding="utf-8")
    assert "another kind of optimizer" in log
    scaled = trunk.loc[6]
    assert scaled.update_norm_dominant == pytest.approx(scaled.proposed_norm_dominant / 2)
    last = trunk.index.max()
    assert 10 < last < 59
    assert trunk.loss.loc[last] <= 0.33 < trunk.loss.loc[9 : last - 1].min()
    full = trunk.loc[10]
    assert full.minibatch_loss == pytest.approx(full.loss, rel=1e-6)


@pytest.mark.parametrize("source", few(1, ["exact", "random", "next"]))
def test_other_subspaces_split_and_measure_like_the_tracked_one(
    quick_path: Path, source: str
) -> None:
    spec = small_spec({"subspace.source": source, "phases.0.steps": 2})
    study = begin(quick_path / source, spec)
    execute(study, spec, "trunk", "dom-sgd")
    data = thalweg.load(study).query("branch == 'dom-sgd'")
    assert data.alignment_update.dropna().tolist() == pytest.approx([1.0] * 5, abs=1e-4)
    if source == "random":
        chance = (3 / 922) ** 0.5
        assert data.alignment_gradient.mean() < 5 * chance


def test_saved_bases_are_orthonormal_and_belong_to_their_step(quick_path: Path) -> None:
    spec = small_spec({"checkpoint.save_bases": True, "checkpoint.keep": 1, "phases.0.steps": 9})
    study = begin(quick_path / "bases", spec)
    execute(study, spec, "trunk")
    folder = study.run(0, "trunk").path / "bases"
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [
        "step-00000004.safetensors",
        "step-00000008.safetensors",
        "step-00000009.safetensors",
    ]
    saved = load_file(files[-1])
    assert saved["basis"].shape[1] == 3
    assert torch.allclose(saved["basis"].T @ saved["basis"], torch.eye(3), atol=1e-5)
    run = Run(spec, study, 0, "trunk")
    run.setup.problem.model.load_state_dict(parameters(study, "trunk"))
    hessian = thalweg.Hessian(run.setup.objective)
    values = (saved["basis"] * (hessian @ saved["basis"])).sum(0)
    assert torch.allclose(values, saved["eigenvalues"], rtol=1e-3)


def test_a_branch_of_the_same_optimizer_keeps_its_momentum_under_its_own_settings(
    quick_path: Path,
) -> None:
    spec = small_spec(
        {
            "phases.0.optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
            "branches": {
                "slow": {"steps": 1, "optimizer": {"momentum": 0.5}},
                "none": {"steps": 1, "optimizer": {"momentum": 0.0}},
            },
            "probes": {"loss": 1},
        }
    )
    study = begin(quick_path / "momentum", spec)
    execute(study, spec, "trunk")
    run = Run(spec, study, 0, "slow")
    run._start_branch()
    group = run.optimizer.param_groups[0]
    assert group["momentum"] == 0.5
    trunk = load_checkpoint(latest_checkpoint(study.run(0, "trunk").checkpoints) or Path())
    kept = [t for name, t in trunk.tensors.items() if name.endswith("momentum_buffer")]
    own = [state["momentum_buffer"] for state in run.optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(kept, own, strict=True))
    plain = Run(spec, study, 0, "none")
    plain._start_branch()
    assert not plain.optimizer.state


def test_roles_go_by_what_branches_do_not_by_their_names() -> None:
    spec = small_spec(
        {
            "branches": {
                "a": {"split": {"dominant": 0.0}},
                "b": {},
                "c": {"split": {"bulk": 0.0, "basis": "frozen"}},
                "d": {"split": {"bulk": 0.0}},
            }
        }
    )
    assert roles_of(spec) == {"bulk": "a", "plain": "b", "dominant": "d"}


def test_reproduce_takes_the_problem_of_that_name_with_its_data() -> None:
    spec = reproduction_spec("main", "mnist", data_dir="/data", overrides={"seeds": [4]})
    assert (spec.problem.data.registered_name, spec.seeds) == ("mnist", (4,))
    assert spec.problem.data.model_dump()["data_dir"] == "/data"


def test_the_public_face_is_complete_and_light() -> None:
    assert all(getattr(thalweg, name) is not None for name in thalweg.__all__)
    assert set(thalweg.__all__) <= set(dir(thalweg))
    code = "import sys, thalweg; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Hesian'"):
        thalweg.Hesian  # type: ignore[attr-defined]  # noqa: B018
