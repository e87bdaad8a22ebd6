"""Phases end at bounds, by rules and by hand, each at the step it should."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.lab.small_study import small_spec
from thalweg.lab.training.progression import Progression

PHASE: dict[str, Any] = {"optimizer": {"name": "sgd", "lr": 1.0}, "batch_size": 20}


def progression(folder: Path, *phases: dict[str, Any]) -> tuple[Progression, list[str]]:
    raw = [{**PHASE, "name": f"p{n}", "steps": 10, **given} for n, given in enumerate(phases)]
    said: list[str] = []
    phases_of_spec = small_spec({"phases": raw, "branches": {}}).phases
    return Progression(phases_of_spec, 200, folder / "end-phase", said.append), said


def moment(chi: float = 0.0, loss: float = 1.0) -> Any:
    return SimpleNamespace(
        subspace=SimpleNamespace(alignment=lambda gradient: chi), gradient=None, loss=loss
    )


def steps_until_end(run: Progression, chis: list[float] | None = None) -> int:
    while run.step_remains():
        step = run.position.step
        if not run.ends(moment((chis or [0.0])[min(step, len(chis or [0]) - 1)])):
            run.position.step += 1
    return run.position.step


def test_bounds_add_up_and_each_phase_has_its_own_schedule(tmp_path: Path) -> None:
    linear = {"steps": 4, "schedule": "linear"}
    run, _ = progression(tmp_path, linear, {"epochs": 2, "steps": None})
    rates = []
    while run.step_remains():
        rates.append((run.position.phase, run.learning_rate))
        run.position.step += 1
    assert rates[:5] == [(0, 1.0), (0, 0.75), (0, 0.5), (0, 0.25), (1, 1.0)]
    assert len(rates) == 4 + 20
    assert run.end_step == 24


def test_the_rule_fires_when_the_moving_average_reaches_its_value(tmp_path: Path) -> None:
    run, said = progression(tmp_path, {"until_alignment": 0.95, "steps": 100})
    # From 0: after n + 1 values 1 - 0.9^(n + 1) - 0.05 * 0.9^n, which is 0.95 from n = 28 on.
    assert steps_until_end(run, [0.5, *[1.0] * 99]) == 28
    assert "averaged alignment 0.95" in said[0]
    assert run.position.finished


def test_the_rule_does_not_fire_on_a_few_first_steps(tmp_path: Path) -> None:
    run, _ = progression(tmp_path, {"until_alignment": 0.95, "steps": 100})
    assert steps_until_end(run, [*[1.0] * 20, 0.5]) == 100


def test_a_rule_that_never_fires_ends_at_its_deadline_with_a_warning(tmp_path: Path) -> None:
    run, said = progression(tmp_path, {"until_alignment": 0.95, "steps": 5})
    assert steps_until_end(run, [0.5]) == 5
    assert said == ["warning: " + run.position.message]
    assert "its rule never fired (averaged alignment 0.205)" in run.position.message


def test_a_phase_ends_at_a_loss_before_the_step_is_made(tmp_path: Path) -> None:
    run, _ = progression(tmp_path, {"until_loss": 0.5}, {})
    run.position.step = 3
    assert run.step_remains()
    assert run.ends(moment(loss=0.5))
    assert (run.position.phase, run.position.phase_start) == (1, 3)


def ends(run: Progression) -> bool:
    """Whether it ends, after a look at the requests, as before every step."""
    run.ends_by_hand = run.is_requested()
    return run.ends(moment())


def test_a_request_is_followed_once_also_after_a_resume(tmp_path: Path) -> None:
    run, _ = progression(tmp_path, {}, {}, {})
    request = tmp_path / "end-phase"
    request.write_text("one\n", encoding="utf-8")
    assert ends(run)
    assert not ends(run), "killed here, the request is still there"
    resumed, _ = progression(tmp_path, {}, {}, {})
    resumed.load_state_dict(run.state_dict())
    assert not ends(resumed)
    resumed.forget_request()
    assert not request.exists()
    request.write_text("two\n", encoding="utf-8")
    assert ends(resumed)


def test_a_finished_run_goes_on_when_its_bound_is_raised_and_only_then(tmp_path: Path) -> None:
    run, _ = progression(tmp_path, {"steps": 4})
    assert steps_until_end(run) == 4
    same, _ = progression(tmp_path, {"steps": 4})
    longer, _ = progression(tmp_path, {"steps": 6})
    shorter, _ = progression(tmp_path, {"steps": 2})
    for resumed, goes_on in ((same, False), (longer, True), (shorter, False)):
        resumed.load_state_dict(run.state_dict())
        assert resumed.step_remains() is goes_on


@pytest.mark.parametrize("start", [0, 7])
def test_a_branch_counts_its_steps_from_its_own_beginning(tmp_path: Path, start: int) -> None:
    run, _ = progression(tmp_path, {"steps": 3})
    run.begin_at(start)
    assert run.end_step == start + 3
    assert steps_until_end(run) == start + 3
