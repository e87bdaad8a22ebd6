"""Which workers can a phase have?"""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from tests.lab.small_study import small_spec
from thalweg.contrib.averaging_period import ConstantPeriod, QuadraticRule
from thalweg.errors import InvalidInput
from thalweg.lab.config import PhaseSpec, dump_spec, parse_spec

BARE = {"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 20, "steps": 12}


def phase(local: dict[str, Any], **others: Any) -> PhaseSpec:
    return PhaseSpec.model_validate({**BARE, "local": local, **others})


def test_the_rule_is_that_which_the_settings_name() -> None:
    constant = phase({"workers": 4, "period": 8}).local
    growing = phase({"workers": 4, "alpha": 0.1, "minimum": 4, "power": 3.0}).local
    assert constant is not None
    assert growing is not None
    assert constant.schedule(5) == ConstantPeriod(8)
    assert growing.schedule(5) == QuadraticRule(0.1, 4, 3.0, warmup_steps=5)


def test_an_epoch_is_a_pass_by_all_workers_together() -> None:
    said = {"steps": None, "epochs": 3}
    assert phase({"workers": 4, "period": 8}, **said).most_steps(200) == 3 * 3  # ceil(200 / 80)
    assert PhaseSpec.model_validate({**BARE, **said}).most_steps(200) == 3 * 10


def test_a_branch_takes_over_the_workers_unless_it_says_off() -> None:
    spec = small_spec(
        {
            "phases.0.local": {"workers": 2, "period": 3},
            "branches": {
                "same": {"steps": 5},
                "more": {"steps": 5, "local": {"workers": 4, "alpha": 0.1}},
                "none": {"steps": 5, "local": "off"},
            },
        }
    )
    found = {name: spec.branch_phase(name).local for name in spec.branches}
    assert found["same"] == spec.phases[0].local
    assert found["more"] is not None
    assert (found["more"].workers, found["more"].period) == (4, None)
    assert found["none"] is None
    assert parse_spec(tomllib.loads(dump_spec(spec))) == spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"local": {"workers": 2}}, "either period or alpha"),
        ({"local": {"workers": 2, "period": 3, "alpha": 0.1}}, "either period or alpha"),
        ({"local": {"workers": 2, "period": 3, "minimum": 2}}, "with alpha only"),
        ({"local": {"workers": 0, "period": 3}}, "workers"),
        ({"batch_size": "all"}, "workers differ by it alone"),
        ({"noise": {"part": "all"}}, "noise"),
        ({"split": {"dominant": 0.0}}, "split"),
    ],
)
def test_what_workers_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    said = {"local": {"workers": 2, "period": 3}, **changes}
    with pytest.raises(InvalidInput, match=message):
        small_spec({f"phases.0.{key}": value for key, value in said.items()})
