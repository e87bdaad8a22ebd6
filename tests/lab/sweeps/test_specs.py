"""The specs of a sweep's points: what may differ, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from tests.lab.small_study import RAW
from thalweg.errors import InvalidInput
from thalweg.lab.config import load_spec
from thalweg.lab.sweeps.axes import Axes
from thalweg.lab.sweeps.specs import sweep_specs


def written(folder: Path, **more: object) -> Path:
    file = folder / "small.toml"
    file.write_text(tomli_w.dumps({**RAW, **more}))
    return file


def test_each_point_is_the_base_with_its_settings(tmp_path: Path) -> None:
    axes = Axes(grid={"lr": [0.1, 0.2], "branches.bulk-sgd.split.bulk": [0.5, 1.0]})
    specs = sweep_specs(written(tmp_path), axes, overrides=["--samples", "100"])
    assert len(specs.points) == 4
    for settings, spec in specs.points:
        assert spec.problem.samples == 100
        assert spec.phases[0].optimizer.lr == settings["lr"]
        assert spec.branches["sgd"].optimizer.lr == settings["lr"]
        split = spec.branches["bulk-sgd"].split
        assert split is not None
        assert split.bulk == settings["branches.bulk-sgd.split.bulk"]


def test_a_table_of_the_file_says_axes_and_stops_other_commands(tmp_path: Path) -> None:
    file = written(tmp_path, sweep={"grid": {"lr": [0.1, 0.2]}})
    assert len(sweep_specs(file, Axes()).points) == 2
    with pytest.raises(InvalidInput, match="thalweg sweep"):
        load_spec(file)


def test_a_study_of_the_paper_is_a_base_too() -> None:
    specs = sweep_specs("noise", Axes(grid={"lr": [0.1, 0.2]}), problem="digits")
    assert {spec.name for _, spec in specs.points} == {"noise"}


@pytest.mark.parametrize(
    ("axes", "says"),
    [
        (Axes(), "no axis"),
        (Axes(grid={"lr": [0.1, -1.0]}), "at lr = -1.0: "),
        (Axes(grid={"lrr": [0.1, 0.2]}), "lrr"),
        (Axes(grid={"seeds": [0, 1]}), "give --seeds"),
        (Axes(grid={"threads": [1, 2]}), "one for the whole sweep"),
        (Axes(grid={"lr": [0.1, 0.1000]}), ""),
        (Axes(grid={"lr": [0.1], "optimizer.lr": [0.2]}), "lr and optimizer.lr"),
        (Axes(grid={"batch_size": [5], "batch-size": [10]}), "the same key"),
        (Axes(grid={"name": ["a", "b"]}), "the same study"),
        (Axes(grid={"batch_size": [20, 500]}), "at batch_size = 500: "),
    ],
)
def test_what_cannot_be_a_point_is_refused(tmp_path: Path, axes: Axes, says: str) -> None:
    if not says:
        assert len(sweep_specs(written(tmp_path), axes).points) == 1
        return
    with pytest.raises(InvalidInput) as refused:
        sweep_specs(written(tmp_path), axes)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    ("key", "option"),
    [("lr", "--lr"), ("lr", "--optimizer.lr"), ("batch_size", "--batch-size")],
)
def test_a_value_beside_its_axis_is_refused(tmp_path: Path, key: str, option: str) -> None:
    with pytest.raises(InvalidInput, match="no value beside its axis"):
        sweep_specs(written(tmp_path), Axes(grid={key: [1]}), overrides=[option, "1"])
