"""Sweeps made up in a moment: study folders written by the store's own writers, nothing trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow

from thalweg.lab.store import Status, StudyFolder
from thalweg.lab.store.metrics import Place, write_segment
from thalweg.lab.sweeps.points import Point, Sweep

Settings = dict[str, Any]
HASH = "0123456789abcdef"


def grid(**values: Sequence[Any]) -> list[Settings]:
    """Every combination, the last key varying fastest."""
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def sweep_of(root: Path, settings: Iterable[Settings], seeds: Sequence[int] = (0, 1, 2)) -> Sweep:
    """A sweep of which nothing has run."""
    points = [
        Point(chosen, StudyFolder(root / "runs" / f"point-{number}"))
        for number, chosen in enumerate(settings)
    ]
    return Sweep(root / "sweep", "made up", tuple(seeds), tuple(points))


def write_run(
    study: StudyFolder,
    seed: int,
    branch: str,
    columns: Mapping[str, Sequence[float | None]],
    state: Any = "done",
) -> None:
    """One run with these columns, a row a step."""
    run = study.run(seed, branch).create(f'seed = {seed}\nbranch = "{branch}"\n')
    steps = len(next(iter(columns.values()))) if columns else 0
    rows = steps if state == "done" else None
    run.write_status(Status(state, step=steps, run_hash=HASH, rows=rows))
    if steps:
        run.metrics.mkdir(exist_ok=True)
        table = pyarrow.table({"step": list(range(steps)), **columns})
        write_segment(run.metrics, table, Place(HASH))


def verdict(outcome: str, mean: float = 1.0, claim: str = "bulk-suffices") -> dict[str, Any]:
    """What `verdicts.json` says of a claim."""
    values = {"0": mean, "1": mean, "2": None}
    low, high = mean - 0.1, mean + 0.1
    return {"label": claim, "claim": claim, "outcome": outcome, "values": values} | {
        "mean": mean,
        "low": low,
        "high": high,
    }


def loss_of(settings: Settings, seed: int) -> float:
    """A smooth loss that diverges at high learning rates."""
    lr = settings.get("lr", 0.1)
    batch = settings.get("batch_size", 50)
    noise = lr / (batch if isinstance(batch, int) else 1000)
    if noise > 0.04:
        return math.inf
    return (1.0 / (1 + 300 * lr) + 3 * noise + 0.002) * (1 + 0.05 * (seed - 1))


def fill(
    sweep: Sweep,
    outcome: Callable[[Settings], str] | None = None,
    *,
    branches: Sequence[str] = ("trunk", "sgd"),
    loss: Callable[[Settings, int], float] = loss_of,
    claims: Sequence[str] = ("bulk-suffices",),
) -> Sweep:
    """Write all runs; where the loss is infinite they diverged.

    Args:
        outcome: of every claim, from a point's settings; None: no verdict is written.
    """
    for point in sweep.points:
        settings = dict(point.settings)
        for seed in sweep.seeds:
            for rank, branch in enumerate(branches):
                end = loss(settings, seed) * (1 + 0.3 * rank)
                columns = {
                    "loss": [2.0, end],
                    "test_accuracy": [0.1, 0.9],
                    "sharpness": [None, 5.0],
                }
                write_run(
                    point.study, seed, branch, columns, "done" if math.isfinite(end) else "diverged"
                )
        if outcome is not None:
            found = [verdict(outcome(settings), claim=claim) for claim in claims]
            point.study.write_verdicts(found)
    return sweep
