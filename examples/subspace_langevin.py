"""Langevin sampling block by block: gradients to a given accuracy on an ill-conditioned Gaussian.

Subspace Langevin Monte Carlo (Maunu, Yao 2024, arXiv 2412.13928) beside plain, random-coordinate
and preconditioned Langevin, and beside blocks made of S_k and the bulk of the Hessian. On a
Gaussian every chain is linear, so the covariance of its law after n steps is known exactly: no
sampling error blurs the comparison. Each chain gets the step size at which its stationary
covariance is 5 % off. The preconditioner is the covariance of 5 P draws, as a pilot run gives it; a
seed decides it and the target's eigenvectors. A step on r of P eigenvectors counts r / P gradients.

Then Neal's funnel, v ~ N(0, 9) and two x ~ N(0, e^v), with a preconditioner that follows its width,
beside plain Langevin with the same step: 500 chains side by side, and the marginal of v, whose
first-order bias is known too.

    python examples/subspace_langevin.py [FOLDER] [--size 20] [--seeds 0 1 2]

writes FOLDER/subspace-langevin.png and .csv, by default here. Fifteen seconds on one core.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor

import thalweg
from thalweg import registry
from thalweg.analysis.claims import ClaimUse, judge_all, render_verdicts
from thalweg.analysis.claims.langevin_claims import ACCURACY
from thalweg.analysis.figures import drawing
from thalweg.contrib import (
    SubspaceLangevin,
    coordinate_blocks,
    dominant_and_bulk_blocks,
    eigenvector_blocks,
)
from thalweg.contrib.subspace_langevin import Block
from thalweg.operators import DenseOperator
from thalweg.spectrum import random_subspace

CONDITION = 1e4
FINAL_ERROR = 0.05
COLOURS = {
    "plain": "#222222",
    "random coordinate": "#8a8a8a",
    "preconditioned": "#0072b2",
    "subspace": "#d55e00",
    "dominant and bulk": "#009e73",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    parser.add_argument("--size", type=int, default=20, help="dimension P of the target")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    rows = []
    for seed in options.seeds:
        covariance, chains = target(options.size, seed)
        for branch, blocks in chains.items():
            law = LinearChain(covariance, blocks)
            h = law.step_size()
            found = law.errors(h)
            print(f"seed {seed}, {branch}: step size {h:.2g}, {len(blocks)} blocks", flush=True)
            rows += [{"seed": seed, "branch": branch, **row} for row in found]
    table = pd.DataFrame(rows)
    saves, matches = (
        registry.claims[f"subspace-langevin-{what}"]
        for what in ("saves-gradients", "matches-preconditioned")
    )
    roles = {name: name for name in ("plain", "preconditioned", "subspace")}
    verdicts = judge_all(
        [
            saves,
            ClaimUse(saves, {"subspace": "dominant and bulk"}),
            ClaimUse(saves, {"subspace": "random coordinate"}),
            matches,
        ],
        table,
        roles,
    )
    Console(width=110).print(render_verdicts(verdicts))
    costs(*target(50 * options.size, 0))
    funnel()
    table.to_csv(options.folder / "subspace-langevin.csv", index=False)
    print(f"wrote {draw(table, options.folder)}")


def target(size: int, seed: int) -> tuple[Tensor, dict[str, Sequence[Block]]]:
    """The covariance (P, P) of a Gaussian, and the blocks of each chain on it."""
    turn = random_subspace(size, size, seed, dtype=torch.float64).basis
    variances = torch.logspace(0, -math.log10(CONDITION), size)
    covariance = turn * variances @ turn.T
    draws = torch.randn(5 * size, size, generator=torch.Generator().manual_seed(seed))
    pilot = torch.cov((turn * variances.sqrt() @ draws.T).contiguous())
    # Hessian of V: S^-1. Its top eigenvectors are the narrow directions.
    hessian, k = DenseOperator(turn / variances @ turn.T), size // 2
    top = thalweg.top_eigenpairs(hessian, k + 1)
    dominant = thalweg.Subspace(top.basis[:, :k], top.eigenvalues[:k])
    return covariance, {
        "plain": coordinate_blocks(size, size),
        "random coordinate": coordinate_blocks(size),
        "preconditioned": eigenvector_blocks(pilot, size),
        "subspace": eigenvector_blocks(pilot, max(1, size // 4)),
        "dominant and bulk": dominant_and_bulk_blocks(
            dominant, float(top.eigenvalues[k]), dominant_probability=k / size
        ),
    }


class LinearChain:
    """The law of a chain on a Gaussian: vec(C) <- T vec(C) + 2 h vec(E[B]).

    T = E[(I - h B S^-1) (x) (I - h B S^-1)], over the blocks B.
    """

    def __init__(self, covariance: Tensor, blocks: Sequence[Block]) -> None:
        self.size = len(covariance)
        one, precision = torch.eye(self.size), torch.linalg.inv(covariance)
        self.mean = torch.zeros_like(one)
        self.linear = torch.zeros(self.size**2, self.size**2)
        self.square = torch.zeros_like(self.linear)
        for block in blocks:
            # P A P, column by column.
            matrix = torch.stack([block.apply(unit, 1.0) for unit in one], dim=1)
            drift = matrix @ precision
            self.mean += matrix
            self.linear += torch.kron(drift, one) + torch.kron(one, drift)
            self.square += torch.kron(drift, drift) / block.probability
        values, vectors = torch.linalg.eigh(covariance)
        self.whiten = vectors / values.sqrt() @ vectors.T
        self.gradients_a_step = sum(b.probability * b.size for b in blocks) / self.size

    def step_size(self) -> float:
        """h at which the stationary covariance is off by FINAL_ERROR; the error grows with h."""
        h = 1e-6
        # Small enough to be stable, and the error passes FINAL_ERROR long before stability ends.
        while self.error(self.stationary(h)) < FINAL_ERROR:
            h *= 1.3
        low, high = h / 1.3, h
        for _ in range(12):
            middle = math.sqrt(low * high)
            if self.error(self.stationary(middle)) < FINAL_ERROR:
                low = middle
            else:
                high = middle
        return low

    def stationary(self, h: float) -> Tensor:
        """vec(C) that a step leaves as it is."""
        return torch.linalg.solve(h * self.linear - h**2 * self.square, self.noise(h))

    def noise(self, h: float) -> Tensor:
        """vec of 2 h E[B]."""
        return 2 * h * self.mean.reshape(-1)

    def error(self, vector: Tensor) -> float:
        """norm(S^-1/2 C S^-1/2 - I) / sqrt(P), Frobenius."""
        matrix = self.whiten @ vector.view(self.size, self.size) @ self.whiten
        return float((matrix - torch.eye(self.size)).norm()) / math.sqrt(self.size)

    def errors(self, h: float) -> list[dict[str, float]]:
        """The error along the chain from x = 0, at steps 1 to 7, then doubled again and again."""
        step = torch.eye(self.size**2) - h * self.linear + h**2 * self.square
        vector, power = torch.zeros(self.size**2), torch.eye(self.size**2)
        found, latest = [], []
        for n in range(1, 8):
            vector, power = step @ vector + self.noise(h), step @ power
            found.append(self.row(n, vector))
            latest.append((n, vector, power))
        latest = latest[3:]
        while abs(found[-1]["covariance_error"] / FINAL_ERROR - 1) > 0.01:
            # C_2n = T^n C_n + C_n: the second half of the steps acts on the first's result.
            latest = [(2 * n, power @ c + c, power @ power) for n, c, power in latest]
            found += [self.row(n, reached) for n, reached, _ in latest]
        return found

    def row(self, n: int, vector: Tensor) -> dict[str, float]:
        """What the table says after n steps."""
        cost = n * self.gradients_a_step
        return {"step": n, "gradients": cost, "covariance_error": self.error(vector)}


def costs(covariance: Tensor, chains: dict[str, Sequence[Block]]) -> None:
    """Print what a step of each chain costs in time in many dimensions, the gradient left out."""
    times = {}
    for name, blocks in chains.items():
        x = torch.nn.Parameter(torch.zeros(len(covariance)))
        sampler = SubspaceLangevin([x], lr=1e-6, blocks=blocks)
        x.grad = torch.zeros_like(x)
        times[name] = seconds_of(sampler.step)
    for name, seconds in times.items():
        relative = seconds / times["plain"]
        print(
            f"a step of {name} at P = {len(covariance)}: {seconds * 1e6:.0f} microseconds,"
            f" {relative:.2f} of plain"
        )


def funnel(deviation: float = 3.0, chains: int = 500, h: float = 0.02, steps: int = 3000) -> None:
    """Print mean and variance of v in a funnel, with and without a preconditioner e^v on x."""

    def blocks_at(x: Tensor) -> Sequence[Block]:
        width = x[:chains].exp()
        return coordinate_blocks(
            len(x), chains, diagonal=torch.cat([torch.ones_like(width), width, width])
        )

    # A step of r = 3 h, a third of the coordinates at a time, leaves x a variance of
    # e^v / (1 - r / 2); the surplus pushes v up.
    surplus = 1.5 * h / (1 - 1.5 * h)
    print(f"v of a funnel: mean 0 ({deviation**2 * surplus:.2f} by the step), variance 9; found:")
    plain = coordinate_blocks(3 * chains, chains)
    for name, blocks in {"following its width": blocks_at, "plain": plain}.items():
        points = torch.nn.Parameter(torch.cat([torch.zeros(1, chains), torch.ones(2, chains)]))
        sampler = SubspaceLangevin([points], lr=h, blocks=blocks)
        for _ in range(steps):
            v, x = points.detach()[0], points.detach()[1:]
            scaled = x * (-v).exp()
            slope = v / deviation**2 + 1 - (x * scaled).sum(0) / 2
            points.grad = torch.cat([slope[None], scaled])
            sampler.step()
        v = points.detach()[0]
        error = deviation / math.sqrt(chains)
        print(f"  {name}: mean {v.mean():.2f} +- {error:.2f}, variance {v.var():.3g}")


def seconds_of(step: Callable[[], object], calls: int = 30) -> float:
    """Least processor time of a call over three rounds."""
    found = []
    for _ in range(3):
        begin = time.process_time()
        for _ in range(calls):
            step()
        found.append((time.process_time() - begin) / calls)
    return min(found)


def draw(table: pd.DataFrame, folder: Path) -> Path:
    """Error of the covariance against gradients, a line a seed."""
    path = folder / "subspace-langevin.png"
    with drawing.paper_style():
        figure = Figure(figsize=(drawing.COLUMN_WIDTH + 1, 2.6), layout="constrained")
        axes = figure.subplots()
        for (seed, branch), rows in table.groupby(["seed", "branch"], sort=False):
            label = branch if seed == table["seed"].min() else None
            # Dashes on top of a solid line that they would hide otherwise.
            under = branch != "preconditioned"
            axes.plot(
                rows["gradients"],
                rows["covariance_error"],
                color=COLOURS[str(branch)],
                linewidth=0.9 if under else 1.4,
                linestyle="solid" if under else (0, (2, 3)),
                zorder=2 if under else 3,
                label=label,
            )
        axes.axhline(ACCURACY, color=drawing.FAINT, linewidth=0.6, linestyle=(0, (5, 2)), zorder=0)
        axes.set(xscale="log", yscale="log", xlabel="gradients", ylabel="error of the covariance")
        drawing.plain_log_ticks(axes)
        figure.legend(loc="outside right center", frameon=False)
        figure.savefig(path, dpi=200)
    return path


if __name__ == "__main__":
    main()
