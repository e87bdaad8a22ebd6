"""One spec over another: what the upper one says holds."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from thalweg.errors import InvalidInput
from thalweg.lab.config import Spec, dump_spec, load_spec, parse_spec
from thalweg.lab.config.layering import (
    OFF,
    difference,
    laid_over,
    with_common_branch,
    with_full_branches,
)

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


def test_a_file_can_extend_a_built_in_spec(tmp_path: Any) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('extends = "digits"\n[problem]\nloss = { name = "cross-entropy" }\n')
    spec, base = load_spec(file), load_spec("digits")
    assert spec.problem.loss.registered_name == "cross-entropy"
    assert spec.branches == base.branches
    file.write_text('extends = "digit"\n')
    with pytest.raises(InvalidInput, match=r"extends: got 'digit', .*did you mean 'digits'"):
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


def spec_of(trunk: dict[str, Any], branches: dict[str, Any], **others: Any) -> Spec:
    """A small spec with these words in its last phase and in its branches."""
    phase = {"optimizer": {"name": "sgd", "lr": 0.1}, "steps": 5, **trunk}
    problem = {"data": "digits", "model": "mlp", "loss": "mse"}
    return parse_spec({"problem": problem, "phases": [phase], "branches": branches, **others})


def test_a_branch_is_laid_over_the_one_it_starts_from() -> None:
    first = {"optimizer": {"momentum": 0.5}, "clip_norm": 2.0, "until_loss": 0.1, "batch_size": 7}
    branches = {"second": {"starts_from": "first", "optimizer": {"lr": 0.3}}, "first": first}
    spec = spec_of({}, branches)
    second = spec.branch_phase("second")
    assert second.optimizer.model_dump()["momentum"] == 0.5
    assert (second.optimizer.lr, second.clip_norm, second.batch_size) == (0.3, 2.0, 7)
    assert second.until_loss is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("clip_norm", 1.0),
        ("noise", {"part": "bulk"}),
        ("split", {"dominant": 0.0}),
        ("local", {"workers": 2, "period": 3}),
    ],
)
def test_off_leaves_out_what_the_trunk_has_and_is_written(key: str, value: Any) -> None:
    spec = spec_of({key: value}, {"without": {key: "off"}, "with": {}})
    assert getattr(spec.branch_phase("without"), key) is None
    assert getattr(spec.branch_phase("with"), key) == getattr(spec.phases[0], key)
    assert tomllib.loads(dump_spec(spec))["branches"]["without"][key] == "off"


def test_a_split_is_taken_over_whole_or_not_at_all() -> None:
    spec = spec_of({"split": {"dominant": 0.0}}, {"same": {}, "other": {"split": {"bulk": 0.0}}})
    splits = [spec.branch_phase(name).split for name in ("same", "other")]
    assert [(s.dominant, s.bulk) for s in splits if s] == [(0.0, 1.0), (1.0, 0.0)]


def test_a_written_branch_says_only_what_it_does_otherwise() -> None:
    branches = {
        "same": {"batch_size": 50},
        "fast": {"optimizer": {"lr": 0.2}, "epochs": 2},
        "other": {"starts_from": "fast", "epochs": 2, "subspace": {"samples": "unset", "k": 4}},
    }
    spec = spec_of({"schedule": "cosine"}, branches, subspace={"samples": 100})
    written = tomllib.loads(dump_spec(spec))["branches"]
    assert set(written["same"]) == {"warmup_steps"}
    assert set(written["fast"]) == {"warmup_steps", "optimizer", "epochs"}
    assert written["other"].keys() == {"warmup_steps", "starts_from", "subspace"}
    assert written["other"]["subspace"] == {"k": 4, "samples": "unset"}
    assert parse_spec(tomllib.loads(dump_spec(spec))) == spec


def test_the_difference_of_two_tables_laid_over_the_lower_one_gives_the_upper_one() -> None:
    lower = {"steps": 9, "clip_norm": 1.0, "batch_size": 5}
    upper = {"epochs": 2, "batch_size": 5}
    own = difference(lower, upper, OFF)
    assert own == {"epochs": 2, "clip_norm": "off"}
    full = with_full_branches({"phases": [lower], "branches": {"x": own}})
    assert full["branches"]["x"] == {"name": "x", **upper}


def test_a_mistake_in_the_trunk_is_not_told_again_for_each_branch() -> None:
    with pytest.raises(InvalidInput) as caught:
        spec_of({"batch_size": 0}, {"a": {}, "b": {"starts_from": "a"}, "c": {"batch_size": -1}})
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines] == [
        " phases.0.batch_size",
        " branches.c.batch_size",
    ]


def test_a_key_that_can_be_off_says_so() -> None:
    message = r"branches\.a\.clip_norm: got 'of', allowed: a number > 0 or 'off'"
    with pytest.raises(InvalidInput, match=message):
        spec_of({}, {"a": {"clip_norm": "of"}})


def test_the_name_of_a_branch_is_that_of_its_table() -> None:
    with pytest.raises(InvalidInput, match=r"branches\.a\.name: got 'b', allowed: 'a'"):
        spec_of({}, {"a": {"name": "b"}})
