"""A study's folder cannot lie: what is missing, exchanged or another run's is refused by its name.

`fixtures/format-3` holds a finished study of two seeds, a trunk and two branches.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.lab.small_study import begin, execute, small_spec
from thalweg.cli import main
from thalweg.errors import IntegrityError, InvalidInput
from thalweg.lab.execution.schedule import Task, tasks_of
from thalweg.lab.identity import run_hash
from thalweg.lab.inspection import run_rows
from thalweg.lab.preparing import check_done_runs, check_spec_of_folder, read_spec
from thalweg.lab.sharing import known_way_to_multiply, take_over
from thalweg.lab.store import StudyFolder, load
from thalweg.lab.store.checkpoint import list_checkpoints
from thalweg.lab.store.metrics import Column, MetricsWriter, list_segments, read_metrics

FIXTURES = Path(__file__).parent / "fixtures"
NAME = "present-digits-15af4e18"
COLUMNS = [Column("step", "integer")]


@pytest.fixture
def folder(quick_path: Path) -> Path:
    """A copy of the finished study, which may be written to."""
    return Path(shutil.copytree(FIXTURES / "format-3" / NAME, quick_path / "runs" / NAME))


def thalweg(*words: str, folder: Path) -> int:
    """The exit status of a command on the studies beside this one."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--root", str(folder.parent)])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def exchange(one: Path, other: Path) -> None:
    """Let two folders or files change their places."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def say_done(folder: Path, branch: str = "seed-0/trunk") -> None:
    """An unfinished run that says it is done: its last checkpoint is gone."""
    shutil.rmtree(list_checkpoints(folder / branch / "checkpoints")[-1])


def test_rows_of_exchanged_folders_are_not_read(folder: Path) -> None:
    exchange(folder / "seed-0" / "trunk", folder / "seed-1" / "trunk")
    with pytest.raises(IntegrityError, match="is that of seed 1 trunk: folders were exchanged"):
        load(folder)


def test_rows_of_a_run_without_its_table_are_not_left_out(folder: Path) -> None:
    (folder / "seed-1" / "trunk" / "run.toml").unlink()
    with pytest.raises(IntegrityError, match=r"seed-1/trunk/run\.toml: is missing"):
        load(folder)
    (row,) = [row for row in run_rows(folder.parent) if row["run"].endswith("seed-1/trunk")]
    assert row["state"] == "damaged"


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def change_spec(folder: Path) -> None:
    file = folder / "spec.toml"
    changed = file.read_text().replace("lr = 0.05", "lr = 0.06")
    assert changed != file.read_text()
    file.write_text(changed)


LIES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no metrics": (lambda f: remove_all(f / "seed-0/bulk/metrics"), "metrics"),
    "no checkpoints": (lambda f: remove_all(f / "seed-0/bulk/checkpoints"), "status.json"),
    "seeds exchanged": (lambda f: exchange(f / "seed-0", f / "seed-1"), "run.toml"),
    "branches exchanged": (
        lambda f: exchange(f / "seed-0/bulk", f / "seed-0/back"),
        "run.toml",
    ),
    "checkpoints of two seeds": (
        lambda f: exchange(f / "seed-0/bulk/checkpoints", f / "seed-1/bulk/checkpoints"),
        "step-00000020",
    ),
    "metrics of two seeds": (
        lambda f: exchange(f / "seed-0/bulk/metrics", f / "seed-1/bulk/metrics"),
        "segment-00000010-00000020.parquet",
    ),
    "checkpoints of two branches": (
        lambda f: exchange(f / "seed-0/bulk/checkpoints", f / "seed-0/back/checkpoints"),
        "step-00000025",
    ),
    "statuses of two seeds": (
        lambda f: exchange(f / "seed-0/bulk/status.json", f / "seed-1/bulk/status.json"),
        "status.json",
    ),
    "spec.toml edited": (change_spec, "spec.toml"),
    "done over an unfinished run": (say_done, "status.json"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_by_the_name_of_its_file(
    lie: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell, named = LIES[lie]
    tell(folder)
    assert thalweg("resume", NAME, folder=folder) == 4
    said = capsys.readouterr().err
    assert named in said
    assert str(folder) in said


def test_a_whole_study_is_no_lie_wherever_it_is(folder: Path, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(folder, tmp_path / "other-0123abcd")
    for study in (StudyFolder(folder), StudyFolder(elsewhere)):
        spec = read_spec(study)
        check_spec_of_folder(study, spec)
        check_done_runs(study, spec, tasks_of(spec))
        assert len(load(study)) == 2 * (11 + 11 + 6)


@pytest.mark.parametrize("form", ["format-1", "format-2"])
def test_former_folders_say_less_and_are_read(form: str) -> None:
    study = StudyFolder(FIXTURES / form / "former-digits-15af4e18")
    spec = read_spec(study)
    check_spec_of_folder(study, spec, "15af4e18")
    check_done_runs(study, spec, tasks_of(spec))
    assert len(load(study)) == 11 + 11 + 6


def test_the_hash_of_a_run_is_that_of_what_determines_its_numbers() -> None:
    one = run_hash(small_spec(), 0, "sgd", "data")
    same: list[dict[str, object]] = [
        {"branches.sgd.steps": 99},
        {"name": "other", "threads": 2, "seeds": [3], "problem.chunk_size": 10},
        {"branches.dom-sgd": "unset", "phases.0.name": "first"},
    ]
    assert all(run_hash(small_spec(changes), 0, "sgd", "data") == one for changes in same)
    others: list[dict[str, object]] = [
        {"phases.0.steps": 13},
        {"phases.0.optimizer.lr": 0.06},
        {"branches.sgd.batch_size": 10},
        {"subspace.k": 4},
        {"probes.loss": 2},
    ]
    hashes = {run_hash(small_spec(changes), 0, "sgd", "data") for changes in others}
    hashes |= {run_hash(small_spec(), 1, "sgd", "data"), run_hash(small_spec(), 0, "sgd", "no")}
    hashes.add(run_hash(small_spec(), 0, "trunk", "data"))
    assert len(hashes | {one}) == len(others) + 4


def segments(folder: Path, run: str = "r") -> MetricsWriter:
    writer = MetricsWriter(folder, COLUMNS, run)
    for step in range(writer.rows, writer.rows + 9):
        writer.log({}, step)
        if step % 3 == 2:
            writer.flush()
    return writer


@pytest.mark.parametrize("number", [0, 1])
def test_a_segment_that_is_missing_or_exchanged_is_noticed(number: int, tmp_path: Path) -> None:
    segments(tmp_path / "one")
    with MetricsWriter(tmp_path / "other", [*COLUMNS, Column("loss")], "r") as other:
        for step in range(9):
            other.log({}, step)
            if step % 3 == 2:
                other.flush()
    path = list_segments(tmp_path / "one")[number].path
    after = list_segments(tmp_path / "one")[number + 1].path.name
    shutil.copy2(tmp_path / "other" / path.name, path)
    with pytest.raises(IntegrityError, match=f"{path.name}|{after}"):
        read_metrics(tmp_path / "one", "r")
    path.unlink()
    with pytest.raises(IntegrityError, match=after):
        read_metrics(tmp_path / "one", "r")
    with pytest.raises(IntegrityError, match=after):
        MetricsWriter(tmp_path / "one", COLUMNS, "r")


def test_cutting_and_merging_keep_the_chain_whole(tmp_path: Path) -> None:
    writer = segments(tmp_path)
    writer.truncate(4)
    assert writer.rows == 4
    for step in (4, 5):
        writer.log({}, step)
        writer.flush()
    assert read_metrics(tmp_path, "r")["step"].to_pylist() == list(range(6))
    writer.compact()
    writer.log({}, 6)
    writer.close()
    assert len(list_segments(tmp_path)) == 2
    assert read_metrics(tmp_path, "r")["step"].to_pylist() == list(range(7))
    with pytest.raises(IntegrityError, match="another run"):
        read_metrics(tmp_path, "another")


def test_a_resumed_run_whose_last_rows_are_gone_says_so(quick_path: Path) -> None:
    spec = small_spec({"branches": {}, "probes": {"loss": 1}})
    study = begin(quick_path / "one", spec)
    execute(study, spec, "trunk")
    run = study.run(0, "trunk")
    shutil.rmtree(list_checkpoints(run.checkpoints)[-1])
    with MetricsWriter(run.metrics, [*COLUMNS, Column("learning_rate"), Column("loss")]) as cut:
        cut.truncate(5)
    with pytest.raises(IntegrityError, match="5 of the 8 rows"):
        execute(study, spec, "trunk")


def test_what_another_study_says_it_has_done_is_verified(quick_path: Path) -> None:
    spec = small_spec({"branches": {}, "probes": {"loss": 1}})
    first = begin(quick_path / "one", spec)
    execute(first, spec, "trunk")
    run = first.run(0, "trunk")
    tensors = list_checkpoints(run.checkpoints)[-1] / "tensors.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    second, task = begin(quick_path / "two", spec), Task(0, "trunk")
    assert take_over(second, [task]) == [task]
    assert "not taken over" in (second.run(0, "trunk").path / "log.txt").read_text()
    tensors.write_bytes(whole)
    assert take_over(second, [task]) == []


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


@pytest.mark.parametrize("file", ["spec.toml", "seed-0/trunk/status.json", "seed-0/trunk/run.toml"])
@pytest.mark.parametrize("harm", [damage, lambda file: file.write_bytes(b"")])
def test_a_damaged_neighbour_blocks_nothing(
    harm: Callable[[Path], None], file: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(folder / file)
    (folder / "verdicts.json").write_bytes(b"{")
    spec = small_spec()
    study = begin(folder.parent / "two", spec)
    assert take_over(study, tasks_of(spec)) == tasks_of(spec)
    known_way_to_multiply(spec, folder.parent)
    assert len(run_rows(folder.parent)) == 10
    assert thalweg("list", folder=folder) == 0
    assert ("damaged" in capsys.readouterr().out) == ("status" in file)
    assert thalweg("claims", folder=folder) == 0


def test_a_later_format_is_refused_with_the_mend(folder: Path) -> None:
    file = folder / "seed-0/trunk/status.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 4}))
    with pytest.raises(InvalidInput, match="pip install --upgrade thalweg"):
        StudyFolder(folder).run(0, "trunk").status()
    assert thalweg("resume", NAME, folder=folder) == 2
