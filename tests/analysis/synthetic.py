"""Metric tables made up after the digits study, for tests of what reads such tables.

`study` imitates the study: a trunk, then three branches from its end. The other functions are
cases in which the published statements are false, built so that the answer is known.
"""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

K = 10
PARAMETERS = 17_610
SWITCH, LENGTH, EVERY, SOLVE_EVERY = 500, 600, 5, 100
LOSS = {"start": 1.1, "switch": 0.1216, "sgd": 0.0770, "dom-sgd": 0.1237, "bulk-sgd": 0.0749}
SPECTRUM = np.r_[np.geomspace(5.5, 0.8, K), np.geomspace(0.3, 0.1, K)]
SPLITS = {"sgd": (1.0, 1.0), "dom-sgd": (1.0, 0.0), "bulk-sgd": (0.0, 1.0)}


def study(seeds: int = 3, every: int = EVERY, solve_every: int = SOLVE_EVERY) -> pd.DataFrame:
    """Metric table of trunk, SGD, Dom-SGD and Bulk-SGD for some seeds."""
    runs = [
        run(seed, branch, every=every, solve_every=solve_every)
        for seed in range(seeds)
        for branch in ("trunk", *SPLITS)
    ]
    return pd.concat(runs, ignore_index=True)


def run(
    seed: int, branch: str, *, every: int = EVERY, solve_every: int = SOLVE_EVERY
) -> pd.DataFrame:
    """Rows of one run with every column of the metric table."""
    # crc32 and the like would do too: all that counts is one stream per seed and branch.
    stream = np.random.default_rng([seed, sum(map(ord, branch))])
    trunk = branch == "trunk"
    first, length = (0, SWITCH) if trunk else (SWITCH, LENGTH)
    steps = np.arange(first, first + length + 1, every)
    part = (steps - first) / length
    rows = len(steps)
    loss = _loss(branch, seed, part, stream)
    spread = SPECTRUM[None, :] * (0.8 + 0.2 * part[:, None]) * (1 + 0.02 * seed)
    eigenvalues = spread * np.exp(0.01 * stream.standard_normal((rows, 2 * K)))
    eigenvalues = -np.sort(-eigenvalues, axis=1)
    aligned = 0.96 - 0.6 * np.exp(-part * 12) if trunk else np.full(rows, 0.96)
    chi = np.clip(aligned + 0.008 * stream.standard_normal(rows), 0, 1)
    of_batch = np.clip(chi - 0.16 + 0.03 * stream.standard_normal(rows), 0, 1)
    gradient_norm = 0.3 * np.sqrt(loss)
    dominant, bulk = gradient_norm * chi, gradient_norm * np.sqrt(1 - chi**2)
    scale = SPLITS.get(branch, (1.0, 1.0))
    made = {(1.0, 1.0): of_batch, (1.0, 0.0): np.ones(rows), (0.0, 1.0): np.zeros(rows)}[scale]
    solved = [
        row.tolist() if (step - first) % solve_every == 0 else None
        for step, row in zip(steps, eigenvalues, strict=True)
    ]
    table = pd.DataFrame(
        {
            "seed": seed,
            "branch": branch,
            "step": steps,
            "loss": loss,
            "test_loss": loss * 1.15,
            "test_accuracy": 0.97 - 0.5 * loss,
            "minibatch_loss": loss * np.exp(0.15 * stream.standard_normal(rows)),
            "learning_rate": 0.05,
            "sharpness": eigenvalues[:, 0],
            "lr_sharpness": 0.05 * eigenvalues[:, 0],
            "eigenvalues": [row[:K].tolist() for row in eigenvalues],
            "solved_eigenvalues": solved,
            "solved_residuals": [None if row is None else [1e-4] * (2 * K) for row in solved],
            "alignment_gradient": chi,
            "alignment_minibatch": of_batch,
            "alignment_proposed": of_batch,
            "alignment_update": made,
            "gradient_norm_dominant": dominant,
            "gradient_norm_bulk": bulk,
            "proposed_norm_dominant": 0.05 * dominant * 2,
            "proposed_norm_bulk": 0.05 * bulk * 3,
            "update_norm_dominant": 0.05 * dominant * 2 * scale[0],
            "update_norm_bulk": 0.05 * bulk * 3 * scale[1],
            "displacement_dominant": np.nan if trunk else 0.05 * np.sqrt(part) * scale[0],
            "displacement_bulk": np.nan if trunk else 0.6 * part * scale[1],
            "lr_numerator_dominant": 0.05 * dominant**2 * (1 + 0.3 * stream.standard_normal(rows)),
            "lr_denominator_dominant": dominant**2,
            "lr_numerator_bulk": 0.05 * bulk**2 * (1 + 0.5 * stream.standard_normal(rows)),
            "lr_denominator_bulk": bulk**2,
            "overlap_branch_point": np.nan if trunk else 1 - 0.3 * part,
            "subspace_error": 0.005 * np.exp(0.2 * stream.standard_normal(rows)),
            "subspace_gradients": 0.7 + 12.0 * (np.arange(rows) % 12 == 0),
        }
    )
    updates = [
        name
        for name in table.columns
        if name.startswith(("update_", "proposed_", "lr_numerator", "lr_denominator"))
    ]
    last = [*updates, "minibatch_loss", "alignment_minibatch", "alignment_proposed"]
    table.loc[rows - 1, [*last, "alignment_update"]] = np.nan
    return table


def _loss(branch: str, seed: int, part: np.ndarray, stream: np.random.Generator) -> np.ndarray:
    """Loss along a run: geometric between its ends, wiggling, the same at the branch point."""
    if branch == "trunk":
        shape, start, end = 1 - np.exp(-4 * part), LOSS["start"], LOSS["switch"]
        shape = shape / shape[-1]
    else:
        shape, start, end = part, LOSS["switch"], LOSS[branch] * (1 + 0.01 * (seed - 1))
    wiggle = 0.01 * stream.standard_normal(len(part)) * ((part > 0) & (part < 1))
    return 0.98 ** (seed - 1) * start * (end / start) ** shape * np.exp(wiggle)


def random_directions(seeds: int = 3) -> pd.DataFrame:
    """The study with k random directions in place of S_k: chi is near sqrt(k / P)."""
    stream = np.random.default_rng(0)
    data = study(seeds, every=20)
    gradients = stream.standard_normal((len(data), PARAMETERS))
    # The first k coordinates of a normal vector are its part along k random directions.
    data["alignment_gradient"] = np.linalg.norm(gradients[:, :K], axis=1) / np.linalg.norm(
        gradients, axis=1
    )
    return data


def least_squares(seeds: int = 3, floor: float = 0.01) -> pd.DataFrame:
    """Gradient descent on a least squares problem whose Hessian has rank k, and its two splits.

    L = (1/2) norm(A (theta - theta*))^2 + floor, A of rank k: the gradient lies in S_k, so the
    dominant branch is the plain one and the bulk branch does not move.
    """
    frames = []
    for seed in range(seeds):
        stream = np.random.default_rng(seed)
        basis = np.linalg.qr(stream.standard_normal((30, K)))[0]
        curvature = np.linspace(1.0, 0.5, K)
        for branch, (dominant, bulk) in SPLITS.items():
            theta = np.random.default_rng(100 + seed).standard_normal(30)
            losses = []
            for _ in range(101):
                along = basis.T @ theta
                losses.append(0.5 * float(curvature @ along**2) + floor)
                gradient = basis @ (curvature * along)
                top = basis @ (basis.T @ gradient)
                theta = theta - 0.05 * (dominant * top + bulk * (gradient - top))
            frame = pd.DataFrame(
                {"step": np.arange(101), "loss": losses, "alignment_gradient": 1.0}
            )
            frame.insert(0, "branch", branch)
            frame.insert(0, "seed", seed)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def with_spectrum(spectrum: np.ndarray, seeds: int = 3) -> pd.DataFrame:
    """The study with one given spectrum (2k,) at each of its solves."""
    data = study(seeds)
    data["solved_eigenvalues"] = [
        None if row is None else [float(value) for value in spectrum]
        for row in data["solved_eigenvalues"]
    ]
    return data


def expected_progress() -> float:
    """Dom's share of the plain branch's log-decrease in `study`, windows and seeds aside."""
    return math.log(LOSS["switch"] / LOSS["dom-sgd"]) / math.log(LOSS["switch"] / LOSS["sgd"])


def with_later_probes(data: pd.DataFrame) -> pd.DataFrame:
    """The study with the columns of the probes that only some studies ask for."""
    chi, late = data["alignment_gradient"], data["step"] / data["step"].max()
    shares = [[0.3 * x**2, 0.5 * x**2, 0.6 * x**2, 0.7 * x**2, x**2] for x in chi]
    return data.assign(
        gradient_shares=shares,
        minibatch_shares=shares,
        update_shares=shares,
        gradient_curvature=0.5 * data["sharpness"],
        update_curvature=0.3 * data["sharpness"],
        noise_share_dominant=0.5 + 0.4 * late * chi,
        noise_norm=0.1,
        critical_lr_dominant=0.02 / (0.5 + late),
        critical_lr_bulk=0.6 / (0.5 + late),
        batch_sharpness=1.5 * data["sharpness"],
        stability_threshold=2 / data["learning_rate"],
        stability_ratio=data["lr_sharpness"] / 2 * 4,
        preconditioned_sharpness=data["sharpness"],
        alignment_gradient_own_metric=chi**0.2,
        alignment_proposed_own_metric=chi**0.3,
    )


def with_branches(data: pd.DataFrame, of: dict[str, str], end: float = 1.0) -> pd.DataFrame:
    """The study with further branches: `of` maps a new name to the branch it is a copy of.

    The loss of each further one ends at a higher factor, up to `end`, of that of its original.
    """
    frames = [data]
    for place, (name, original) in enumerate(of.items()):
        copy = data[data["branch"] == original].assign(branch=name)
        first, last = copy["step"].min(), copy["step"].max()
        part = (copy["step"] - first) / (last - first)
        copy["loss"] *= end ** (part * (place + 1) / len(of))
        frames.append(copy)
    return pd.concat(frames, ignore_index=True)


def optimizers(seeds: int = 3) -> pd.DataFrame:
    """A study of seven optimizers, each with its splits on the live and on a frozen basis."""
    names = ("momentum", "nesterov", "rmsprop", "adam", "adamw", "muon")
    of = {}
    for name in names:
        of |= {f"{name}-start": "trunk", name: "sgd"}
        own = ("-own", "-own-frozen") if name in ("adam", "rmsprop") else ()
        for end in ("", "-frozen", *own):
            of |= {f"dom-{name}{end}": "dom-sgd", f"bulk-{name}{end}": "bulk-sgd"}
    of |= {"dom-sgd-frozen": "dom-sgd", "bulk-sgd-frozen": "bulk-sgd"}
    data = with_branches(with_later_probes(study(seeds, 20)), of, 2.0)
    return data.query("branch != 'trunk'").reset_index(drop=True)


def variants(seeds: int = 3) -> pd.DataFrame:
    """A study of one optimizer with ten variants of its subspace."""
    tails = ("k15", "k20", "k30", "random", "next", "frozen")
    tails += ("every-10", "every-100", "subset", "exact")
    of = {"sgd-random": "sgd", "sgd-next": "sgd"}
    for tail in tails:
        of |= {f"dom-sgd-{tail}": "dom-sgd", f"bulk-sgd-{tail}": "bulk-sgd"}
    return with_branches(with_later_probes(study(seeds, 20)), of, 1.5)
