"""What has a sweep measured so far?"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from tests.analysis.regimes.sweeps import HASH, fill, grid, sweep_of, verdict, write_run
from thalweg.analysis.regimes.table import DAMAGED, read_table
from thalweg.lab.store import Status

LR = grid(lr=[0.01, 0.1])


def test_there_is_a_row_for_each_point_seed_and_branch(quick_path: Path) -> None:
    table = read_table(fill(sweep_of(quick_path, LR, seeds=(0, 1)), branches=("trunk", "sgd")))
    found = table.runs[["lr", "seed", "branch", "state", "steps"]].to_numpy().tolist()
    assert found == [
        [lr, seed, branch, "done", 2]
        for lr in (0.01, 0.1)
        for seed in (0, 1)
        for branch in ("trunk", "sgd")
    ]
    assert table.statistics == ["loss", "test_accuracy", "sharpness"]
    assert table.branches == ["trunk", "sgd"]


def test_a_value_is_the_last_measured_one(quick_path: Path) -> None:
    sweep = sweep_of(quick_path, LR[:1], seeds=(0,))
    columns = {"loss": [3.0, 2.0, 1.0], "sharpness": [7.0, 8.0, None], "noise_norm": [None] * 3}
    write_run(sweep.points[0].study, 0, "sgd", columns)
    (row,) = read_table(sweep).runs.to_dict("records")
    assert (row["loss"], row["sharpness"]) == (1.0, 8.0)
    assert "noise_norm" not in row


def test_what_has_not_begun_waits_with_the_branches_of_the_others(quick_path: Path) -> None:
    sweep = sweep_of(quick_path, LR, seeds=(0, 1))
    assert read_table(sweep).runs[["seed", "branch"]].to_numpy().tolist() == [[0, ""], [1, ""]] * 2
    write_run(sweep.points[0].study, 0, "sgd", {"loss": [1.0]}, "running")
    runs = read_table(sweep).runs
    # It calls itself running, and no process holds its lock.
    assert runs["state"].tolist() == ["interrupted", "waiting", "waiting", "waiting"]
    assert set(runs["branch"]) == {"sgd"}
    assert runs["loss"].tolist()[0] == 1.0
    assert np.isnan(runs["loss"].tolist()[1:]).all()


def test_the_branches_of_a_diverged_trunk_diverged(quick_path: Path) -> None:
    sweep = sweep_of(quick_path, LR[:1], seeds=(0,))
    write_run(sweep.points[0].study, 0, "trunk", {"loss": [1.0, math.inf]}, "diverged")
    write_run(sweep.points[0].study, 0, "sgd", {}, "waiting")
    assert read_table(sweep).runs["state"].tolist() == ["diverged", "diverged"]


def test_damage_is_said_and_never_raised(quick_path: Path) -> None:
    seeds = range(6)
    sweep = fill(sweep_of(quick_path, LR[:1], seeds=tuple(seeds)), branches=("sgd",))
    study = sweep.points[0].study
    segments = [next(study.run(seed, "sgd").metrics.iterdir()) for seed in seeds]
    segments[0].write_bytes(b"no parquet")
    (study.run(1, "sgd").path / "status.json").write_text("{")
    segments[2].unlink()
    study.run(3, "sgd").write_status(Status("done", run_hash="another", rows=2))
    segments[4].rename(segments[4].with_name("segment-00000000-00000009.parquet"))
    (study.path / "verdicts.json").write_text("[1]")
    table = read_table(sweep)
    assert table.runs["state"].tolist() == [DAMAGED] * 5 + ["done"]
    assert table.runs["loss"].isna().tolist() == [True] * 5 + [False]
    assert "0 of 2 measured rows" in table.runs["note"][2]
    assert table.runs["note"].map(bool).tolist() == [True] * 5 + [False]
    assert table.verdicts.empty


def test_why_a_run_failed_is_in_its_row(quick_path: Path) -> None:
    sweep = sweep_of(quick_path, LR[:1], seeds=(0,))
    run = sweep.points[0].study.run(0, "sgd").create("seed = 0\n")
    run.write_status(Status("failed", step=3, message="out of\nmemory", run_hash=HASH))
    (row,) = read_table(sweep).runs.to_dict("records")
    assert (row["state"], row["steps"], row["note"]) == ("failed", 3, "out of memory")


def test_there_is_a_row_for_each_verdict_of_each_point(quick_path: Path) -> None:
    sweep = sweep_of(quick_path, LR)
    for point in sweep.points:
        point.study.path.mkdir(parents=True)
    first, second = (point.study for point in sweep.points)
    first.write_verdicts([verdict("holds", 0.9), verdict("undecided", claim="edge")])
    odd = {**verdict("does not hold"), "mean": "inf", "low": None, "values": [1]}
    second.write_verdicts([odd, verdict("no outcome")])
    found = read_table(sweep).verdicts
    assert found[["lr", "label", "outcome", "mean", "seeds"]].to_numpy().tolist() == [
        [0.01, "bulk-suffices", "holds", 0.9, 2],
        [0.01, "edge", "undecided", 1.0, 2],
        [0.1, "bulk-suffices", "does not hold", math.inf, 0],
    ]
    assert math.isnan(found["low"][2])


def test_a_setting_called_like_a_column_has_one_of_its_own(quick_path: Path) -> None:
    sweep = sweep_of(quick_path, [{"loss": "mse", "hidden": [8, 8]}], seeds=(0,))
    write_run(sweep.points[0].study, 0, "sgd", {"loss": [0.5]})
    (row,) = read_table(sweep).runs.to_dict("records")
    assert (row["set.loss"], row["loss"]) == ("mse", 0.5)
    assert row["hidden"] == "[8, 8]"


def test_what_could_not_be_judged_for_a_divergence_has_no_verdict(quick_path: Path) -> None:
    sweep = sweep_of(quick_path, LR, seeds=(0,))
    first, second = (point.study for point in sweep.points)
    blank = {**verdict("undecided"), "mean": None, "note": "seed 0: no branch; seed 1: no branch"}
    for study in (first, second):
        write_run(study, 0, "trunk", {"loss": [0.5]})
        study.write_verdicts([blank])
    run = first.run(0, "trunk")
    run.write_status(Status("diverged", step=1, run_hash=HASH))
    table = read_table(sweep)
    assert table.diverged == {0}
    assert table.verdicts[["point", "note"]].to_numpy().tolist() == [[1, "no branch"]]
