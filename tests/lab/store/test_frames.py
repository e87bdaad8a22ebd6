from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.store.test_folders import NAME, run, study, write_steps
from thalweg.errors import InvalidInput
from thalweg.lab.store.folders import RunFolder, StudyFolder
from thalweg.lab.store.frames import load
from thalweg.lab.store.metrics import Column, MetricsWriter
from thalweg.lab.sweeps import folder
from thalweg.lab.sweeps.folder import write_sweep
from thalweg.lab.sweeps.points import Point, Sweep

__all__ = ["run", "study"]

SPEC = """
name = "main"
seeds = [0]
[problem]
hidden = [{width}]
[[phases]]
batch_size = {batch_size}
[phases.optimizer]
name = "sgd"
lr = {lr}
"""


def test_all_runs_are_loaded_into_one_frame(study: StudyFolder, tmp_path: Path) -> None:
    for seed, branch, steps in [
        (1, "trunk", range(3)),
        (0, "sgd", range(2, 4)),
        (0, "trunk", range(3)),
    ]:
        write_steps(study.run(seed, branch).create(""), steps, Column("loss"))
    frame = load(NAME, tmp_path)
    assert frame.columns.tolist() == ["seed", "branch", "step", "loss"]
    assert frame["seed"].tolist() == [0] * 5 + [1] * 3
    assert frame["branch"].tolist() == ["trunk"] * 3 + ["sgd"] * 2 + ["trunk"] * 3
    assert frame["loss"].tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert str(frame["seed"].dtype) == str(frame["step"].dtype) == "int64"


def test_runs_with_different_columns_and_without_rows_are_loaded(study: StudyFolder) -> None:
    study.run(0, "waiting").create("")
    write_steps(study.run(0, "a").create(""), range(1), Column("loss"))
    write_steps(study.run(0, "b").create(""), range(1), Column("sharpness"))
    frame = load(study)
    assert frame.columns.tolist() == ["seed", "branch", "step", "loss", "sharpness"]
    assert frame["loss"].isna().tolist() == [False, True]


def test_a_study_without_rows_is_an_empty_frame(study: StudyFolder) -> None:
    assert load(study).columns.tolist() == ["seed", "branch", "step"]


def test_a_run_is_loaded_while_it_is_written(study: StudyFolder, run: RunFolder) -> None:
    with run.locked(), MetricsWriter(run.metrics, [Column("step", "integer")]) as writer:
        for step in range(5):
            writer.log({}, step)
            writer.flush()
            assert load(study)["step"].tolist() == list(range(step + 1))
        writer.log({}, 9)
        assert len(load(study)) == 5


def made(root: Path, name: str, column: str = "loss", **settings: object) -> StudyFolder:
    text = SPEC.format(**{"width": 10, "batch_size": 50, "lr": 0.1, **settings})
    study = StudyFolder.create(root, name, text)
    write_steps(study.run(0, "trunk").create(""), range(2), Column(column))
    return study


@pytest.fixture
def two(tmp_path: Path) -> Path:
    made(tmp_path, "a", lr=0.1)
    made(tmp_path, "b", "sharpness", lr=0.3, batch_size='"all"')
    return tmp_path


def test_a_folder_of_studies_is_one_frame_with_what_differs_as_columns(two: Path) -> None:
    frame = load(two)
    columns = ["study", "batch_size", "lr", "seed", "branch", "step", "loss", "sharpness"]
    assert frame.columns.tolist() == columns
    assert frame["study"].tolist() == ["a", "a", "b", "b"]
    assert frame["lr"].tolist() == [0.1, 0.1, 0.3, 0.3]
    assert frame["batch_size"].tolist() == [50, 50, "all", "all"]
    assert frame["loss"].isna().tolist() == [False, False, True, True]
    assert frame.groupby("lr")["step"].max().tolist() == [1, 1]


def test_listed_studies_are_loaded_in_their_order(two: Path) -> None:
    assert load(["b", StudyFolder(two / "a")], two)["study"].tolist() == ["b", "b", "a", "a"]


def test_lists_are_columns_of_text(tmp_path: Path) -> None:
    for name, width in (("a", "10, 20"), ("b", "30")):
        made(tmp_path, name, width=width)
    assert load(tmp_path)["hidden"].tolist() == ["[10, 20]"] * 2 + ["[30]"] * 2


def test_a_setting_with_the_name_of_a_metric_stands_by_its_key_path(tmp_path: Path) -> None:
    for name, rate in (("a", 0.1), ("b", 0.2)):
        made(tmp_path, name, "lr", lr=rate)
    frame = load(tmp_path)
    assert frame["phases.*.optimizer.lr"].tolist() == [0.1, 0.1, 0.2, 0.2]
    assert frame["lr"].tolist() == [0.0, 1.0, 0.0, 1.0]


def test_studies_of_one_name_in_two_places_are_called_by_their_paths(tmp_path: Path) -> None:
    studies = [made(tmp_path / place, "same", lr=lr) for place, lr in (("x", 0.1), ("y", 0.2))]
    assert load(studies)["study"].unique().tolist() == [str(study.path) for study in studies]


def test_the_folder_of_a_sweep_stands_for_those_of_its_studies_that_exist(two: Path) -> None:
    made(two, "another", lr=0.9)
    rates = {"b": 0.3, "not-begun": 0.2, "a": 0.1}
    points = [Point({"lr": rate}, StudyFolder(two / name)) for name, rate in rates.items()]
    sweep = Sweep(two / "rates", "rates", (0,), tuple(points))
    write_sweep(sweep)
    assert load(sweep.path)["study"].unique().tolist() == ["b", "a"]
    assert load("rates", two)["lr"].unique().tolist() == [0.3, 0.1]


def test_the_file_of_a_sweep_is_read_once(two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = tuple(Point({"lr": 0.1}, StudyFolder(two / name)) for name in ("a", "b"))
    write_sweep(sweep := Sweep(two / "rates", "rates", (0,), points))
    read: list[Path] = []
    original = folder.read_sweep
    monkeypatch.setattr(folder, "read_sweep", lambda path: read.append(path) or original(path))
    load(sweep.path)
    assert read == [sweep.path]


def test_no_studies_are_refused(two: Path) -> None:
    with pytest.raises(InvalidInput, match="a list of one or more"):
        load([])
    with pytest.raises(InvalidInput, match="study: got 'c'"):
        load(["a", "c"], two)


def test_a_study_is_not_many(two: Path) -> None:
    assert "study" not in load(two / "a")
