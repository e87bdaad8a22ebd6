"""The whole spectrum of a loss's Hessian: its density with an error band, and its trace.

The eigenvalues that stand clear are solved for and enter exactly; random probes see the rest. The
trace comes twice, from Hutch++ and from the density's mean, each with its standard error.

    python examples/spectrum.py [FOLDER]     # writes FOLDER/spectrum.png, by default here
"""

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import nn

import thalweg


def main(folder: Path) -> None:
    torch.manual_seed(0)
    labels = torch.arange(500) % 4
    inputs = (1 + 0.3 * torch.randn(4, 20))[labels] + torch.randn(500, 20)
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 4))
    objective = thalweg.Objective(model, nn.MSELoss(), (inputs, torch.eye(4)[labels]))
    hessian = thalweg.Hessian(objective, keep_graph=True)

    top = thalweg.top_eigenpairs(hessian, 4)
    spectrum = thalweg.spectral_density(hessian, probes=10, steps=40, known=top)
    smallest, largest = spectrum.extremes
    print(f"eigenvalues from {smallest:.3f} to {largest:.3f}")
    by_probes = thalweg.trace(hessian, num_matvecs=60, known=top)
    mean, size = spectrum.moment(1), objective.num_parameters
    print(f"trace by Hutch++     {by_probes.value:.2f} +- {by_probes.standard_error:.2f}")
    print(f"trace by the density {size * mean.value:.2f} +- {size * mean.standard_error:.2f}")

    width = (largest - smallest) / 100
    grid = torch.linspace(smallest - 5 * width, largest + 5 * width, 500).double()
    density = spectrum.density(grid, width)
    area = torch.trapezoid(density.value, grid)
    print(f"area under the density {area:.3f}")

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    low, high = (density.value + sign * 2 * density.standard_error for sign in (-1, 1))
    axes.fill_between(grid, low.clamp(min=1e-5), high, alpha=0.3, label="2 standard errors")
    axes.plot(grid, density.value, label="density")
    axes.plot(top.eigenvalues, [2e-4] * top.k, "k|", label="eigenpairs solved for")
    axes.set(yscale="log", ylim=(1e-4, None), xlabel="eigenvalue of the Hessian", ylabel="density")
    axes.legend()
    path = folder / "spectrum.png"
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
