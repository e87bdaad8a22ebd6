from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from thalweg.lab.config import dump_spec, load_study
from thalweg.lab.differing_settings import (
    differences,
    differences_of,
    folder_label,
    in_words,
    settings_beside,
)
from thalweg.lab.store import StudyFolder
from thalweg.lab.tables import parse_toml
from thalweg.registry import NAME_PATTERN


def table(*words: str, study: str = "main") -> dict[str, Any]:
    return parse_toml(dump_spec(load_study(study, None, words)), "spec")


def differing(*specs: dict[str, Any]) -> list[dict[str, Any]]:
    return differences(specs).settings


def test_short_forms_are_the_names_of_what_they_set() -> None:
    one = table("--lr", "0.1", "--k", "5", "--samples", "100", "--steps", "7")
    two = table("--lr", "0.3", "--batch-size", "all", "--steps", "9")
    assert differing(one, two) == [
        {"lr": 0.1, "k": 5, "samples": 100, "steps": 7, "batch_size": 50},
        {"lr": 0.3, "k": "classes", "steps": 9, "batch_size": "all"},
    ]


def test_what_changes_no_number_is_left_out() -> None:
    other = ("--seeds", "7", "--threads", "2", "--claims", "[]", "--name", "x")
    other = (*other, "--description", "y", "--checkpoint.keep", "5", "--problem.chunk-size", "9")
    assert differing(table(), table(*other)) == [{}, {}]


def test_a_branch_is_named_where_it_differs_and_not_where_it_takes_over() -> None:
    changed = table("--lr", "0.3", "--branches.sgd.optimizer.lr", "0.7")
    assert differing(table(), changed) == [
        {"lr": 0.05, "sgd.optimizer.lr": 0.05},
        {"lr": 0.3, "sgd.optimizer.lr": 0.7},
    ]


def test_the_keys_of_one_optimizer_alone_are_left_to_its_name() -> None:
    kinds = [f"{{name='{name}', lr=0.1}}" for name in ("sgd", "adam")]
    found = differing(*[table("--phases.*.optimizer", kind) for kind in kinds])
    assert found == [{"optimizer": "sgd"}, {"optimizer": "adam"}]
    momenta = [f"{{name='sgd', lr=0.1, momentum={momentum}}}" for momentum in (0.5, 0.9)]
    found = differing(*[table("--phases.*.optimizer", kind) for kind in (*momenta, kinds[1])])
    assert [one.get("momentum") for one in found] == [0.5, 0.9, None]


def test_one_phase_of_several_is_named_by_its_path() -> None:
    phase = {"optimizer": {"name": "sgd", "lr": 0.1}, "batch_size": 5}
    other = {**phase, "batch_size": 6}
    assert differing({"phases": [phase, phase]}, {"phases": [phase, other]}) == [
        {"phases.1.batch_size": 5},
        {"phases.1.batch_size": 6},
    ]
    assert differing({"phases": [phase, phase]}, {"phases": [other, other]}) == [
        {"batch_size": 5},
        {"batch_size": 6},
    ]


def test_ends_that_several_keys_have_are_made_longer() -> None:
    specs = [{"problem": {"model": {"width": w}, "data": {"width": 3}}} for w in (1, 2)]
    assert differing(*specs) == [{"model.width": 1}, {"model.width": 2}]


def test_other_branches_are_one_setting() -> None:
    found = differing(table(), table(study="edge"))
    assert found[1]["branches"] == ["gd", "dom-gd", "bulk-gd", "bulk-gd-exact", "adam-gd"]
    assert not [name for name in found[1] if name.startswith("branches.")]


def test_true_is_not_one_and_a_list_can_differ() -> None:
    specs = [{"problem": {"x": x}} for x in (True, 1, [1, 2])]
    assert [one["x"] for one in differing(*specs)] == [True, 1, [1, 2]]


def test_one_study_differs_from_nothing() -> None:
    assert differing(table()) == [{}]
    assert differing() == []


def test_studies_of_other_kinds_are_not_compared(tmp_path: Path) -> None:
    specs = [load_study("main", None, ["--lr", lr]) for lr in ("0.1", "0.2")]
    studies = [
        StudyFolder.create(tmp_path, f"s{number}", dump_spec(spec))
        for number, spec in enumerate([*specs, load_study("edge")])
    ]
    assert settings_beside(studies) == [{"lr": 0.1}, {"lr": 0.2}, {}]
    assert "branches" in differences_of(studies).settings[0]
    (studies[1].path / "spec.toml").write_text("lr = [", encoding="utf-8")
    assert settings_beside(studies) == [{}, {}, {}]


def test_former_names_of_keys_are_no_difference(tmp_path: Path) -> None:
    texts = [f'[branches.a]\n{key} = "b"\n' for key in ("after", "starts_from")]
    studies = [StudyFolder.create(tmp_path, f"s{n}", text) for n, text in enumerate(texts)]
    assert differences_of(studies).settings == [{}, {}]


def test_very_many_settings_are_cut_in_words() -> None:
    assert in_words({"a": 1, "b": True, "c": "x"}, most=2) == "a 1, b True, 1 more"


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"lr": 0.03, "batch_size": "all"}, "lr-0.03_batch_size-all"),
        ({"lr": 1e-05}, "lr-1e-05"),
        ({"lr": 1e20}, "lr-1e20"),
        ({"phases.0.optimizer.lr": 0.1}, "lr-0.1"),
        ({"phases.0.lr": 0.1, "phases.1.lr": 0.2}, "phases.0.lr-0.1_phases.1.lr-0.2"),
        ({"problem.model.hidden": [10, 20]}, "hidden-10x20"),
        ({"optimizer": {"name": "adam", "lr": 0.1}}, "optimizer-adam-lr-0.1"),
        ({"nesterov": True}, "nesterov-true"),
        ({"x": "a/b c"}, "x-a-b-c"),
        ({"..x": "..."}, "x"),
        ({}, ""),
    ],
)
def test_a_label_is_a_part_of_a_folder_name(settings: dict[str, Any], label: str) -> None:
    assert folder_label(settings) == label
    assert not label or re.fullmatch(NAME_PATTERN, label)


def test_a_long_label_is_cut() -> None:
    label = folder_label({f"key{number}": number for number in range(100)}, longest=12)
    assert label == "key0-0_key1"


@pytest.mark.slow
def test_a_thousand_studies_are_compared_in_seconds(tmp_path: Path) -> None:
    texts = [dump_spec(load_study("main", None, ["--lr", str(lr)])) for lr in (0.1, 0.2)]
    studies = []
    for number in range(1000):
        study = StudyFolder(tmp_path / f"s{number}")
        study.path.mkdir()
        study.write_spec_text(texts[number % 2])
        studies.append(study)
    begun = time.process_time()
    assert settings_beside(studies)[0] == {"lr": 0.1}
    assert time.process_time() - begun < 15  # 2 to 3 on one core
