"""What the README shows must run as it stands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from thalweg import registry

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_example_on_your_own_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    example = next(block for block in blocks("python") if "SubspaceTracker" in block)
    exec(compile(example, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("sharpness") for line in lines)


def test_the_probe_of_your_own_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from thalweg.loss.objective import Objective
    from thalweg.measure.step_state import StepState
    from thalweg.spectrum.subspace import Subspace
    from thalweg.tracking.source import FixedSubspace

    # Another test's plugin may have the same name.
    monkeypatch.delitem(registry.probes, "theta_norm", raising=False)
    example = next(block for block in blocks("python") if "@register.probe" in block)
    exec(compile(example, "README.md", "exec"), {})
    probe = registry.probes.pop("theta_norm")
    data = (torch.ones(4, 2), torch.ones(4, 1))
    objective = Objective(torch.nn.Linear(2, 1), torch.nn.MSELoss(), data)
    source = FixedSubspace(Subspace(torch.eye(3)[:, :1], torch.ones(1)))
    state = StepState(0, torch.tensor([0.0, 3.0, 4.0]), objective, source, 0.1)
    assert probe.measure(state) == {"theta_norm": 5.0}


def test_the_spec_shown_is_a_spec() -> None:
    from thalweg.lab.config import parse_spec

    (shown,) = blocks("toml")
    spec = parse_spec(tomllib.loads(shown))
    assert spec.branches.keys() == {"bulk-sgd", "gd", "adam"}


def test_the_verdicts_shown_are_what_a_terminal_of_80_columns_shows() -> None:
    import io

    from rich.console import Console

    from thalweg.analysis.claims import Verdict, render_verdicts

    shown = next(block for block in blocks("text") if block.startswith("Claims, judged"))
    number = r"(\N{MINUS SIGN}?[0-9.]+)"
    row = re.compile(rf"^(\S+) +{number} \[{number}, {number}\] .*✓ holds$", flags=re.MULTILINE)
    verdicts = []
    for name, *texts in row.findall(shown):
        mean, low, high = (float(text.replace("\N{MINUS SIGN}", "-")) for text in texts)
        claim = registry.claims[name]
        said = {key: getattr(claim, key) for key in ("statement", "source", "statistic", "rule")}
        verdicts.append(
            Verdict(
                claim=name,
                **said,
                refuted_by=claim.refuted_by,
                logarithmic=claim.logarithmic,
                outcome="holds",
                values={0: mean, 1: mean, 2: mean},
                mean=mean,
                low=low,
                high=high,
            )
        )
    stream = io.StringIO()
    Console(file=stream, width=80).print(render_verdicts(verdicts))
    assert [line.rstrip() for line in stream.getvalue().splitlines()] == shown.splitlines()
    assert len(verdicts) == 6
