"""The files for other clusters on docs/clusters.md: what their scripts do, by a worker's number."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PAGE = Path(__file__).parents[1] / "docs" / "clusters.md"
BLOCKS = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.S | re.M)


def script_of(file: Any) -> tuple[str, str]:
    """A file's script, and the variable that has a worker's number."""
    if "run" in file:
        return file["run"], "SKYPILOT_NODE_RANK"
    return file["spec"]["template"]["spec"]["containers"][0]["args"][0], "JOB_COMPLETION_INDEX"


@pytest.mark.skipif(sys.platform == "win32", reason="scripts for a shell")
@pytest.mark.parametrize("block", BLOCKS, ids=["Kubernetes", "SkyPilot"])
def test_the_first_worker_makes_the_sweep_and_the_others_work_on_it(
    block: str, tmp_path: Path
) -> None:
    script, variable = script_of(yaml.safe_load(block))
    script = script.replace("/shared", str(tmp_path))
    thalweg = tmp_path / "thalweg"
    thalweg.write_text('#!/bin/sh\necho "$@"\n')
    thalweg.chmod(0o755)

    def said(number: int) -> str:
        environment = {**os.environ, variable: str(number), "PATH": f"{tmp_path}:/usr/bin:/bin"}
        command = ["/bin/sh", "-c", script]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = said(0)
    assert first.startswith("sweep my-spec.toml ")
    assert "--name my-sweep" in first
    (tmp_path / "runs" / "my-sweep").mkdir(parents=True)
    (tmp_path / "runs" / "my-sweep" / "sweep.json").touch()
    assert said(1) == "work runs/my-sweep\n"
