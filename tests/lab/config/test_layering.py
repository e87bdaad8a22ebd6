"""One spec over another: what the upper one says holds."""

from __future__ import annotations

from typing import Any

import pytest

from thalweg.errors import InvalidInput
from thalweg.lab.config import load_spec, parse_spec
from thalweg.lab.config.layering import laid_over, with_common_branch

LOWER: dict[str, Any] = {
    "name": "main",
    "problem": {"loss": {"name": "mse", "factor": 0.5}, "samples": 10},
    "phases": [{"name": "a", "optimizer": {"name": "sgd", "lr": 0.1}, "steps": 5}],
}


def test_tables_are_merged_and_values_replaced() -> None:
    both = laid_over(LOWER, {"name": "other", "problem": {"samples": 20}, "seeds": [1]})
    assert both["name"] == "other"
    assert both["problem"] == {"loss": {"name": "mse", "factor": 0.5}, "samples": 20}
    assert both["seeds"] == [1]
    assert LOWER["problem"]["samples"] == 10


def test_another_choice_replaces_the_whole_table_and_the_same_one_only_what_it_says() -> None:
    other = laid_over(LOWER, {"problem": {"loss": {"name": "cross-entropy"}}})
    assert other["problem"]["loss"] == {"name": "cross-entropy"}
    same = laid_over(LOWER, {"problem": {"loss": {"factor": 1.0}}})
    assert same["problem"]["loss"] == {"name": "mse", "factor": 1.0}


def test_phases_are_laid_over_one_by_one_and_further_ones_over_the_last() -> None:
    both = laid_over(LOWER, {"phases": [{"steps": "unset"}, {"name": "b", "optimizer": {"lr": 1}}]})
    assert both["phases"] == [
        {"name": "a", "optimizer": {"name": "sgd", "lr": 0.1}},
        {"name": "b", "optimizer": {"name": "sgd", "lr": 1}, "steps": 5},
    ]


def test_a_file_can_be_like_a_built_in_spec(tmp_path: Any) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('like = "digits"\n[problem]\nloss = { name = "cross-entropy" }\n')
    spec, base = load_spec(file), load_spec("digits")
    assert spec.problem.loss.registered_name == "cross-entropy"
    assert spec.branches == base.branches
    file.write_text('like = "digit"\n')
    with pytest.raises(InvalidInput, match=r"like: got 'digit', allowed: .*did you mean 'digits'"):
        load_spec(file)


COMMON: dict[str, Any] = {
    "steps": 9,
    "split": {"dominant": 0.0},
    "probes": {"loss": 2, "noise": "off"},
}


def test_what_all_branches_have_in_common_is_said_once() -> None:
    branches = {
        "*": COMMON,
        "a": {},
        "b": {"steps": 3, "split": {"bulk": 0.5}},
        "c": {"probes": {"noise": "unset"}},
    }
    found = with_common_branch({"name": "x", "branches": branches})
    assert found == {
        "name": "x",
        "branches": {
            "a": COMMON,
            "b": {**COMMON, "steps": 3, "split": {"dominant": 0.0, "bulk": 0.5}},
            "c": {**COMMON, "probes": {"loss": 2}},
        },
    }


def test_the_command_line_goes_before_what_branches_have_in_common() -> None:
    raw = {
        "problem": {"data": "digits", "model": "mlp", "loss": "mse"},
        "phases": [{"optimizer": {"name": "sgd", "lr": 0.1}, "steps": 5}],
        "branches": {"*": {"steps": 9}, "a": {}, "b": {}},
    }
    spec = parse_spec(raw, overrides={"branches.a.steps": 2})
    assert {name: branch.steps for name, branch in spec.branches.items()} == {"a": 2, "b": 9}
    with pytest.raises(InvalidInput, match=r"branches.*'\*'"):
        parse_spec({**raw, "branches": {"*": 5}})
