"""docs/your-own-data.md: its plugin and its spec fit together. Its Python is run by test_docs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from thalweg import registry
from thalweg.lab.config import load_spec
from thalweg.problems import build_problem
from thalweg.registry import load_plugin

PAGE = (Path(__file__).parents[1] / "docs" / "your-own-data.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(quick_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With the three files of the page."""
    monkeypatch.chdir(quick_path)
    makes_data, plugin, *_ = blocks("python")
    exec(makes_data, {})
    (quick_path / "my_data.py").write_text(plugin, encoding="utf-8")
    (quick_path / "my-study.toml").write_text(blocks("toml")[0], encoding="utf-8")
    return quick_path


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)


def test_the_spec_names_what_the_plugin_registers(folder: Path) -> None:
    try:
        load_plugin("my_data.py")
        problem = build_problem(load_spec("my-study.toml").problem, seed=0)
        assert problem.test is not None
        assert (problem.num_samples, len(problem.test[0]), problem.num_classes) == (120, 30, 3)
        moved = load_spec("my-study.toml", ["--data-dir", "elsewhere.csv"])
        assert moved.problem.data.data_dir == "elsewhere.csv"  # type: ignore[attr-defined]
    finally:
        registry.datasets.pop("flowers", None)


@pytest.mark.slow
def test_the_commands_run(folder: Path) -> None:
    words = ["run", "my-study.toml", "--plugin", "my_data.py", "--smoke", "-q"]
    done = subprocess.run([sys.executable, "-m", "thalweg", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "a smoke run" in done.stderr
    lacking = [sys.executable, "-m", "thalweg", "resume", "flowers"]
    done = subprocess.run(lacking, capture_output=True, text=True)
    assert done.returncode == 2
    assert "data set 'flowers': not registered" in done.stderr
    assert "its runs were made with: my_data.py" in done.stderr
