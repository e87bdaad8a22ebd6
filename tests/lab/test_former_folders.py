"""A study folder that an earlier version wrote is loaded, listed, judged and continued.

`fixtures/format-1` was made by version 0.1.0: a trunk with a rule, a branch without the trunk's
clipping, and a branch that starts after it; its figures and report were removed.
"""

from __future__ import annotations

import json
import shutil
import tomllib
import warnings
from pathlib import Path

import pytest

from thalweg import load
from thalweg.cli import main
from thalweg.lab.config import load_spec
from thalweg.lab.preparing import read_spec, study_name
from thalweg.lab.store import open_study

NAME = "former-digits-15af4e18"
FORMER = Path(__file__).parent / "fixtures" / "format-1" / NAME


@pytest.fixture
def folder(quick_path: Path) -> Path:
    """A copy, which may be written to."""
    return Path(shutil.copytree(FORMER, quick_path / "runs" / NAME))


def thalweg(folder: Path, *words: str) -> None:
    """The command, on the studies beside this one."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--root", str(folder.parent)])
    assert ended.value.code == 0


def test_its_spec_is_read_without_a_warning_and_its_folder_keeps_its_name(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spec = read_spec(open_study(folder))
    assert study_name(spec) == NAME
    assert spec.phases[0].alignment_ema == 0.8
    assert spec.before("back") == "bulk"
    bulk, back = spec.branch_phase("bulk"), spec.branch_phase("back")
    assert (bulk.clip_norm, back.clip_norm, back.alignment_ema) == (None, None, 0.8)
    assert (bulk.steps, back.steps, back.optimizer.lr) == (10, 5, 0.02)


def test_its_measurements_are_loaded(folder: Path) -> None:
    rows = load(folder)
    assert list(rows.groupby("branch", sort=False).step.max().items()) == [
        ("trunk", 10),
        ("back", 25),
        ("bulk", 20),
    ]
    assert rows.loss.notna().all()


def test_it_is_listed_and_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    thalweg(folder, "list", "--json")
    assert [run["state"] for run in json.loads(capsys.readouterr().out)] == ["done"] * 3
    thalweg(folder, "show", NAME)
    assert "bulk" in capsys.readouterr().out


def test_it_is_judged_anew_and_done_when_continued(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thalweg(folder, "report", NAME)
    assert (folder / "report.html").is_file()
    thalweg(folder, "resume", NAME)
    assert "all runs are done" in capsys.readouterr().err
    written = tomllib.loads((folder / "spec.toml").read_text())
    assert written["format"] == 2
    assert written["branches"]["back"]["starts_from"] == "bulk"
    assert read_spec(open_study(folder)) == read_spec(open_study(FORMER))


def test_the_same_settings_asked_for_today_are_those_of_the_folder() -> None:
    asked = load_spec(FORMER.parent / "asked.toml")
    assert study_name(asked) == NAME
