"""Every page of the documentation: its Python runs as it stands, top to bottom, and links exist."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from tests.sampling import few
from thalweg.lab.execution.processes import Child

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "ARCHITECTURE.md"])
# In the default suite it runs with fewer steps: tests/lab/test_in_python.py.
SLOW = {"docs/lab-from-python.md"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if name_of(page) in SLOW else [])
        for page in PAGES
    ],
    ids=name_of,
)
@pytest.mark.parametrize("by", few(1, ["a process that has imported torch", "python"]))
def test_the_python_of_a_page_runs(page: Path, by: str, quick_path: Path) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    if not blocks:
        return
    script = quick_path / "page.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    # In a process of its own: pages register names.
    if by != "python":
        ending = Child(run_in, (quick_path, script), quick_path / "printed").ending()
        assert ending.exit_code == 0, (quick_path / "printed").read_text(encoding="utf-8")
        return
    done = subprocess.run(
        [sys.executable, "-W", "error", script], cwd=quick_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def run_in(folder: Path, script: Path) -> None:
    """As `python -W error` would there."""
    os.chdir(folder)
    warnings.simplefilter("error")
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_files_that_a_page_links_to_exist(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_the_table_of_the_diagnosis_is_what_is_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (ROOT / "docs" / "diagnose.md").read_text(encoding="utf-8")
    code, table = (re.findall(rf"^```{kind}\n(.*?)^```", text, re.S | re.M)[0] for kind in KINDS)
    exec(code, {"__name__": "page"})
    printed, shown = (masked(lines) for lines in (capsys.readouterr().out, table))
    assert printed == shown


KINDS = ("python", "text")


def masked(table: str) -> list[str]:
    """Its lines but for the machine's, without numbers and how wide columns are."""
    lines = table.strip().splitlines()[1:]
    return [" ".join(re.sub(r"\d+(\.\d+)?(e[+-]\d+)?", "#", line).split()) for line in lines]
