"""`pip install thalweg` brings torch and numpy: the engine works, the rest says what to add."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.sampling import few

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))[
    "project"
]
MODULE_OF = {"tomli-w": "tomli_w"}
LAB = [
    MODULE_OF.get(name, name)
    for name in (re.split(r"[<>=]", line)[0] for line in PROJECT["optional-dependencies"]["lab"])
]
# An import of a module that is None in `sys.modules` fails as that of one that is not installed.
WITHOUT = f"import sys; sys.modules.update(dict.fromkeys({[*LAB, 'pydantic_core']!r}))\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT + code], capture_output=True, text=True)


def test_torch_and_numpy_are_all_that_is_installed() -> None:
    names = {re.split(r"[<>=]", line)[0] for line in PROJECT["dependencies"]}
    assert names == {"torch", "numpy"}


def test_the_engine_follows_splits_and_watches() -> None:
    done = run("""
import torch, thalweg
model, loss = torch.nn.Linear(3, 2), torch.nn.MSELoss()
data = torch.randn(32, 3), torch.randn(32, 2)
objective = thalweg.Objective(model, loss, data)
tracker = thalweg.SubspaceTracker(objective, k=2)
base = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = thalweg.SplitUpdate(base, tracker, dominant=0.0, bulk=1.0)
with thalweg.watch(model, loss, data, base, every=1, k=2):
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(data[0]), data[1]).backward()
        optimizer.step()
hessian = thalweg.Hessian(objective)
print(thalweg.eigenpairs(hessian, k=2).k, thalweg.trace(hessian))
from tests.sampling import few
import thalweg.contrib, thalweg.integrations
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 ")


@pytest.mark.parametrize(
    "code",
    [
        "import thalweg.lab",
        "import thalweg.problems",
        "import thalweg.analysis",
        "import thalweg; thalweg.reproduce",
        "from thalweg.registry import register; register.model('mine')(object)",
    ],
)
def test_what_needs_the_lab_says_how_to_get_it(code: str) -> None:
    done = run(code)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "MissingExtra" in last
    assert 'pip install "thalweg[lab]"' in last


@pytest.mark.parametrize("words", ["reproduce", "list", "claims", "run my.toml"])
def test_a_command_that_needs_the_lab_says_so_in_one_line(words: str) -> None:
    done = run(f"from thalweg.cli import main; main({words.split()!r})")
    assert done.returncode == 2
    assert re.fullmatch(
        r'thalweg: .* not installed; .* pip install "thalweg\[lab\]"\n', done.stderr
    )


@pytest.mark.parametrize("words", few(2, ["env", "reproduce --help", "--help", "--version"]))
def test_what_does_not_need_the_lab_works_without_it(words: str) -> None:
    done = run(f"from thalweg.cli import main; main({words.split()!r})")
    assert done.returncode == 0, done.stderr
    assert done.stdout
