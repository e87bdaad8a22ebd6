"""Metric tables of the two toys, simulated step by step in NumPy without the package.

The settings are those of the studies `valley` and `quadratic`, in the small.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

Split = tuple[float, float]
SPLITS: Mapping[str, Split] = {"sgd": (1.0, 1.0), "dom-sgd": (1.0, 0.0), "bulk-sgd": (0.0, 1.0)}


def valley(
    seeds: int = 3,
    *,
    coupling: float = 60.0,
    angle: float = 0.0,
    steps: int = 2000,
    lr: float = 0.0005,
) -> pd.DataFrame:
    """GD, SGD, Dom-SGD and Bulk-SGD in the valley, turned by an angle in radians."""
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    hessian = turn @ np.diag([1000.0, 1.0]) @ turn.T
    disagreement = turn @ np.array([[0.0, coupling], [coupling, 0.0]]) @ turn.T
    top = np.outer(turn[:, 0], turn[:, 0])
    frames = []
    for seed in range(seeds):
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=steps)
        for branch, (dominant, bulk) in {"gd": (1.0, 1.0), **SPLITS}.items():
            theta, rows = turn @ np.array([0.03, 1.0]), []
            for step in range(steps + 1):
                gradient = hessian @ theta
                if step % 10 == 0:
                    rows.append(
                        {
                            "seed": seed,
                            "branch": branch,
                            "step": step,
                            "learning_rate": lr,
                            "loss": theta @ gradient / 2,
                            "position": theta.tolist(),
                            "alignment_gradient": np.linalg.norm(top @ gradient)
                            / np.linalg.norm(gradient),
                        }
                    )
                if step < steps:
                    noise = 0.0 if branch == "gd" else signs[step]
                    made = gradient + noise * disagreement @ theta
                    theta = theta - lr * (dominant * top @ made + bulk * (made - top @ made))
            frames.append(pd.DataFrame(rows))
    return pd.concat(frames, ignore_index=True)


K, D, STEEP, FLAT, RATE = 40, 400, 1.0, 0.02, 0.2
LOW, BETWEEN, HIGH = 0.02, 0.4, 1.5
DEVIATIONS = np.repeat([1.0, 9.6], [K, D - K])
SPECTRUM = np.repeat([STEEP, FLAT], [K, D - K])
TOP = SPECTRUM == STEEP
BRANCHES: Mapping[str, tuple[float, Split]] = {
    "sgd-low": (LOW, (1.0, 1.0)),
    "sgd-high": (HIGH, (1.0, 1.0)),
    **{
        f"{name}-{place}": (rate, split)
        for place, rate in (("low", LOW), ("between", BETWEEN), ("high", HIGH))
        for name, split in (("dom", (1.0, 0.0)), ("bulk", (0.0, 1.0)))
    },
}
RATE_ROLES = {
    f"{part}-{place}": f"{name}-{place}"
    for place in ("low", "between", "high")
    for part, name in (("dominant", "dom"), ("bulk", "bulk"))
}


def quadratic(
    seeds: int = 3, *, radius: float = 250.0, noise: float = 1.0, steps: int = 725
) -> pd.DataFrame:
    """The trunk and all branches on the quadratic with two curvatures; `noise` scales the noise."""
    frames = []
    for seed in range(seeds):
        stream = np.random.default_rng(seed)
        theta = stream.standard_normal(D)
        theta *= radius / np.linalg.norm(theta)

        def draw(stream: np.random.Generator = stream) -> np.ndarray:
            return noise * SPECTRUM * DEVIATIONS * stream.standard_normal(D)

        rows, theta = _descend(theta, steps, RATE, (1.0, 1.0), draw, 0, noise)
        frames.append(_frame(rows, seed, "trunk"))
        for branch, (rate, split) in BRANCHES.items():
            rows, _ = _descend(theta, 150, rate, split, draw, steps, noise)
            frames.append(_frame(rows, seed, branch))
    return pd.concat(frames, ignore_index=True)


def _descend(
    theta: np.ndarray,
    steps: int,
    rate: float,
    split: Split,
    draw: Callable[[], np.ndarray],
    first: int,
    noise: float,
) -> tuple[list[dict[str, Any]], np.ndarray]:
    variances = (noise * SPECTRUM * DEVIATIONS) ** 2
    inside, total = float(variances[TOP].sum()), float(variances.sum())
    rows = []
    scale = np.where(TOP, *split)
    for step in range(steps + 1):
        gradient = SPECTRUM * theta
        dominant, bulk = (float(np.sum(gradient[part] ** 2)) for part in (TOP, ~TOP))
        rows.append(
            {
                "step": first + step,
                "learning_rate": rate,
                "loss": float(theta @ gradient) / 2,
                "alignment_gradient": np.sqrt(dominant / (dominant + bulk)),
                "gradient_norm_dominant": np.sqrt(dominant),
                "gradient_norm_bulk": np.sqrt(bulk),
                "noise_share_dominant": inside / total if total else np.nan,
                "noise_norm": np.sqrt(total),
                "critical_lr_dominant": 2 / (STEEP * (1 + inside / dominant)),
                "critical_lr_bulk": 2 / (FLAT * (1 + (total - inside) / bulk)),
                "solved_eigenvalues": SPECTRUM[: 2 * K].tolist() if step == 0 else None,
            }
        )
        if step < steps:
            theta = theta - rate * scale * (gradient - draw())
    return rows[::2], theta


def _frame(rows: list[dict[str, Any]], seed: int, branch: str) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    frame.insert(0, "branch", branch)
    frame.insert(0, "seed", seed)
    return frame
