from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(kind: str, how: str, folder: Path) -> list[dict[str, Any]]:
    file = folder / how
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", "tests.integrations.two_processes"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, kind, how, str(file)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(file.with_suffix(f".{rank}").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["huggingface", "lightning"])
def test_on_two_processes_all_report_together_and_training_is_as_without(
    kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("transformers" if kind == "huggingface" else "lightning")
    alone, watched = (run(kind, how, tmp_path) for how in ("alone", "watched"))
    for rank in range(2):
        assert watched[rank]["theta"] == alone[rank]["theta"] == alone[0]["theta"]
        rows = watched[rank]["rows"]
        assert [row["step"] for row in rows] == [0, 2, 4]
        assert [row["failure"] for row in rows] == [None] * 3
    hidden = {"seconds", "alignment_minibatch"}
    for own, other in zip(*(each["rows"] for each in watched), strict=True):
        assert {k: v for k, v in own.items() if k not in hidden} == {
            k: v for k, v in other.items() if k not in hidden
        }
