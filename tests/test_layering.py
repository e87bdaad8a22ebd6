"""Imports run downwards only, and what is light to import stays light."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import thalweg

ROOT = Path(thalweg.__file__).parent
# From the bottom to the top; a room may import from those before it.
ROOMS = (
    "errors",
    "limits",
    "interruption",
    "environment",
    "representation",
    "registry",
    "settings",
    "surroundings",
    "sharding",
    "linalg",
    "loss",
    "operators",
    "spectrum",
    "tracking",
    "optim",
    "measure",
    "contrib",
    "integrations",
    "problems",
    "lab",
    "analysis",
    "cli",
    "__main__",
)
# Tables of names that stand elsewhere: they hand on what is asked for.
FACES = {"__init__.py", "curvature.py", "dynamics.py"}
MODULES = sorted(ROOT.rglob("*.py"))
HEAVY = ("torch", "pandas", "matplotlib", "plotly", "pyarrow", "numpy")


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "thalweg" and len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downwards_only(path: Path) -> None:
    own = room_of(name_of(path))
    if own is None:
        assert path.parent == ROOT, f"{path}: in no room"
        assert path.name in FACES, f"{path}: in no room"
        return
    for module in imported(path):
        room = room_of(module)
        if room is not None:
            assert ROOMS.index(room) <= ROOMS.index(own), f"{name_of(path)} imports {module}"


ENGINE = ROOMS[ROOMS.index("linalg") : ROOMS.index("integrations")]


@pytest.mark.parametrize("room", ENGINE)
def test_the_engine_needs_torch_alone(room: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "thalweg"}
    for path in (p for p in MODULES if room_of(name_of(p)) == room):
        foreign = {module.split(".")[0] for module in imported(path)} - allowed
        assert not foreign, f"{name_of(path)} imports {foreign}"


@pytest.mark.parametrize(
    "command",
    [
        ["-c", "import thalweg"],
        ["-c", "import thalweg.cli"],
        ["-m", "thalweg", "--help"],
        ["-m", "thalweg", "--version"],
    ],
    ids=" ".join,
)
def test_importing_and_asking_for_help_load_nothing_heavy(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True
    )
    loaded = {
        line.rsplit("|", 1)[1].strip().split(".")[0]
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "thalweg" in loaded
    assert not loaded.intersection(HEAVY)


@pytest.mark.parametrize(
    "path", [p for p in MODULES if ">>> " in p.read_text(encoding="utf-8")], ids=name_of
)
def test_the_examples_of_the_docstrings_run(path: Path) -> None:
    import torch

    module = importlib.import_module(name_of(path))
    torch.manual_seed(0)  # the examples draw their data
    assert doctest.testmod(module).failed == 0
