"""`thalweg check` finds what is not as written, and nothing else; `--repair` loses nothing good."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.lab.small_study import begin, differing, execute, left, small_spec
from tests.lab.test_whole_folders import FIXTURES, LIES, NAME, exchange, folder, thalweg
from thalweg.errors import IntegrityError, InvalidInput
from thalweg.lab.checking import check, repair
from thalweg.lab.execution.schedule import tasks_of
from thalweg.lab.preparing import check_done_runs, read_spec
from thalweg.lab.store import StudyFolder
from thalweg.lab.store.checkpoint import list_checkpoints

__all__ = ["folder"]

FORMER = "former-digits-15af4e18"


def contents(folder: Path) -> dict[str, str]:
    """The digests of all files in a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.mark.parametrize("form", ["format-1", "format-2"])
def test_a_former_folder_is_not_verifiable_and_no_fault(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = FIXTURES / form / FORMER
    assert thalweg("check", str(path), folder=path) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("not verifiable") == 3


def test_a_whole_study_is_good_copied_renamed_zipped_and_read_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", folder.parent, NAME)
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    renamed = folder.rename(folder.parent / "results-20261130")
    for path in (tmp_path / "unpacked" / NAME, renamed):
        for part in path.rglob("*"):
            part.chmod(0o555 if part.is_dir() else 0o444)
        before = contents(path)
        assert thalweg("check", str(path), folder=path) == 0
        assert capsys.readouterr().out == ""
        assert contents(path) == before
        assert not check(StudyFolder(path)).notes
        for part in path.rglob("*"):
            part.chmod(0o755 if part.is_dir() else 0o644)


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_found_by_its_name(
    lie: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell, named = LIES[lie]
    tell(folder)
    before = contents(folder)
    assert thalweg("check", NAME, folder=folder) == 4
    said = capsys.readouterr()
    assert named in said.out
    assert all(str(folder) in line for line in said.out.splitlines())
    assert "--repair" in said.err
    assert contents(folder) == before


@pytest.mark.parametrize("lie", LIES)
def test_repair_moves_aside_and_leaves_a_folder_without_lies(
    lie: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tell, _ = LIES[lie]
    tell(folder)
    files = sorted(contents(folder).values())
    assert thalweg("check", NAME, "--repair", folder=folder) == 0
    said = capsys.readouterr().err
    assert "will be run again" in said or "goes on with its runs" in said
    kept = sorted(contents(folder).values())
    written = [digest for digest in files if digest not in kept]
    # Only a log to which a line was added is not as it was.
    assert len(written) <= len(list(folder.glob("seed-*/*/log.txt")))
    study = StudyFolder(folder)
    if (folder / "spec.toml").is_file():
        assert not check(study).findings
        spec = read_spec(study)
        check_done_runs(study, spec, tasks_of(spec))


FILES = (
    "seed-0/trunk/checkpoints/step-00000010/tensors.safetensors",
    "seed-0/trunk/checkpoints/step-00000010/state.json",
    "seed-0/trunk/checkpoints/step-00000010/manifest.json",
    "seed-0/trunk/checkpoints/step-00000008/manifest.json",
    "seed-0/trunk/metrics/segment-00000000-00000010.parquet",
    "seed-0/trunk/status.json",
    "seed-0/trunk/run.toml",
    "env.json",
    "spec.toml",
)
# A bit tells only where there is a digest; these two may be missing.
DAMAGES = [
    *((harm, file) for harm in ("cut", "emptied") for file in FILES),
    *(("removed", file) for file in FILES if file not in (FILES[5], FILES[7])),
    *(("a bit", file) for file in FILES[:4]),
]


@pytest.mark.parametrize("file", [FILES[5], FILES[7]])
def test_what_is_written_anew_may_be_missing(file: str, folder: Path) -> None:
    (folder / file).unlink()
    assert not check(StudyFolder(folder)).findings


@pytest.mark.parametrize(("harm", "file"), DAMAGES)
def test_a_damaged_file_is_found(harm: str, file: str, folder: Path) -> None:
    path = folder / file
    content = bytearray(path.read_bytes())
    if harm == "a bit":
        content[len(content) // 2] ^= 1
    path.write_bytes({"cut": content[:-9], "emptied": b"", "a bit": content}.get(harm, b""))
    if harm == "removed":
        path.unlink()
    if path.name == "run.toml" and harm == "cut":
        path.write_bytes(content[:40])
    if path.name == "spec.toml" and harm == "cut":
        path.write_bytes(content[:-200])
    findings = check(StudyFolder(folder)).findings
    assert any(path.is_relative_to(found.path) for found in findings)


def test_one_bit_of_the_datas_fingerprint_is_told_of_run_toml(folder: Path) -> None:
    file = folder / "seed-1/bulk/run.toml"
    text = file.read_text()
    file.write_text(text.replace('fingerprint = "fb3c', 'fingerprint = "fb2c'))
    assert file.read_text() != text
    assert [found.path for found in check(StudyFolder(folder)).findings] == [file]


def test_another_number_in_a_status_is_found(folder: Path) -> None:
    run = StudyFolder(folder).run(0, "trunk")
    status = run.status()
    assert status is not None
    run.write_status(status)
    assert run.status() == status
    assert not check(StudyFolder(folder)).findings
    file = run.path / "status.json"
    file.write_text(file.read_text().replace('"loss": 0.', '"loss": 1.'))
    assert [found.path for found in check(StudyFolder(folder)).findings] == [file]
    with pytest.raises(IntegrityError, match=r"status\.json: damaged, its SHA-256"):
        run.status()


def test_a_spec_that_is_made_to_be_large_in_memory_is_not_read(folder: Path) -> None:
    file = folder / "spec.toml"
    file.write_text("a" + ".a" * 40_000 + " = 1\n" + file.read_text())
    findings = check(StudyFolder(folder)).findings
    assert any(found.path == file and "THALWEG_LIMITS" in found.what for found in findings)


def test_a_finished_trunk_with_a_damaged_end_is_run_again_by_what_the_message_names(
    quick_path: Path,
) -> None:
    spec = small_spec({"branches": {"sgd": {"steps": 3}}, "probes": {"loss": 1}})
    study = begin(quick_path / "one", spec)
    execute(study, spec, "trunk")
    whole = left(study, "trunk")
    run = study.run(0, "trunk")
    for number in range(2):
        tensors = list_checkpoints(run.checkpoints)[-1] / "tensors.safetensors"
        tensors.write_bytes(tensors.read_bytes()[:-1])
        with pytest.raises(IntegrityError, match=r"check .* --repair, then thalweg resume"):
            execute(study, spec, "sgd")
        if number:  # every checkpoint
            for path in list_checkpoints(run.checkpoints):
                (path / "state.json").write_bytes(b"{}")
        _, done = repair(study)
        assert ("from its start" if number else "from step 8") in done[0]
        execute(study, spec, "trunk")
        assert not differing(whole, left(study, "trunk"))
        assert not check(study).findings
    execute(study, spec, "sgd")


def test_a_run_at_work_is_left_alone(folder: Path) -> None:
    study = StudyFolder(folder)
    exchange(folder / "seed-0/bulk/metrics", folder / "seed-1/bulk/metrics")
    with study.run(0, "bulk").locked(), study.run(1, "bulk").locked():
        checked = check(study)
    assert not checked.findings
    assert sum("running now" in note for note in checked.notes) == 2


def test_a_later_format_is_refused_with_the_mend(folder: Path) -> None:
    file = folder / "seed-0/trunk/run.toml"
    file.write_text(file.read_text().replace("format = 3", "format = 4"))
    with pytest.raises(InvalidInput, match="pip install --upgrade thalweg"):
        check(StudyFolder(folder))


def test_findings_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "seed-0/trunk/status.json").write_bytes(b"")
    assert thalweg("check", NAME, "--json", folder=folder) == 4
    [finding] = json.loads(capsys.readouterr().out)["findings"]
    assert finding["path"].endswith("seed-0/trunk/status.json")
