"""The Jacobian of a whole training run: what it amplifies, carries through unchanged, forgets.

Belrose, Scherlis 2024 (arXiv 2412.07003), in their setting: an MLP 64-64-10 (GELU by tanh,
LeCun-normal kernels, biases of standard deviation 1/8) on digits / 16, 25 batches of 64 in the
same order in each of 25 epochs, momentum 0.9, learning rate 0.05 (1 + cos(pi t / 625)), mean
cross-entropy, all in float64. Another run has white-noise inputs (uniform pixels), a third shuffled
labels. The split into 1,600 and 197 images is that of the package, not that of the paper's code.

    python examples/training_jacobian.py [FOLDER] [--hidden 64] [--seeds 0 1 2] [--epochs 25]

writes FOLDER/training-jacobian.png and .csv, by default here. One Jacobian of the paper's net
takes about 10 minutes on one core, and there are three a seed; with `--hidden 8` (P = 610) all nine
together take 4.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

import thalweg
from thalweg.lab.claims import judge_all, render_verdicts
from thalweg.lab.claims.training_jacobian import TRAINING_JACOBIAN_CLAIMS
from thalweg.lab.figures import drawing
from thalweg.lab.problems.digits import Digits

BATCH_SIZE = 64
BRANCHES = ("digits", "shuffled-labels", "white-noise")
COLOURS = dict(zip(BRANCHES, ("#0072b2", "#e69f00", "#d55e00"), strict=True))
BULK = 1e-2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    parser.add_argument("--hidden", type=int, default=64, help="neurons of the hidden layer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=25)
    options = parser.parse_args()
    # Singular values are compared to 1e-6 of 1.
    torch.set_default_dtype(torch.float64)
    rows, spectra = [], {}
    for seed in options.seeds:
        for branch in BRANCHES:
            row, spectrum = measure(branch, seed, options.hidden, options.epochs)
            rows.append(row)
            spectra[seed, branch] = spectrum
    table = with_overlaps(pd.DataFrame(rows), spectra)
    print(table.drop(columns="step").set_index(["seed", "branch"]).T.to_string(float_format="%.3g"))
    roles = {"plain": "digits", "white-noise": "white-noise"}
    verdicts = judge_all(TRAINING_JACOBIAN_CLAIMS, table, roles)
    Console(width=110).print(render_verdicts(verdicts))
    table.to_csv(options.folder / "training-jacobian.csv", index=False)
    print(f"wrote {draw(spectra, options.folder)}")


def measure(
    branch: str, seed: int, hidden: int, epochs: int
) -> tuple[dict[str, object], thalweg.SingularSpectrum]:
    """One run's Jacobian, its spectrum, and what the claims need of it."""
    train, test = data_of(branch, seed)
    objective = thalweg.Objective(
        network(hidden, seed), nn.CrossEntropyLoss(), train, vectorize_up_to=BATCH_SIZE
    )
    batches = list(torch.arange(len(train[0])).split(BATCH_SIZE)) * epochs

    def rate(step: int) -> float:
        return 0.05 * (1 + math.cos(math.pi * step / len(batches)))

    begin = time.perf_counter()
    run = thalweg.training_jacobian(objective, batches, rate, momentum=0.9)
    spectrum = thalweg.singular_spectrum(run)
    seconds = time.perf_counter() - begin
    bulk = (spectrum.values - 1).abs() <= BULK
    parts = spectrum.parts(BULK)
    print(f"seed {seed}, {branch}: {objective}, {parts}, {seconds:.0f} s", flush=True)
    row = {
        "seed": seed,
        "branch": branch,
        "step": len(batches),
        "singular_value_max": float(spectrum.values[0]),
        "chaotic_share": parts.chaotic / len(bulk),
        "stable_share": parts.stable / len(bulk),
        **{
            f"bulk_share_{threshold:.0e}": spectrum.parts(threshold).bulk / len(bulk)
            for threshold in (1e-2, 1e-3, 1e-6)
        },
        "bulk_cosine": float(spectrum.cosines[bulk].mean()),
        "outside_cosine": float(spectrum.cosines[~bulk].mean()),
        "loss_start": float(objective.value(run.theta_0)),
        "loss_end": float(objective.value(run.theta_T)),
        "test_accuracy": accuracy(objective, run.theta_T, test),
    }
    if branch == "digits":
        row |= beside_the_hessian(objective, run, spectrum)
        row |= restricted(objective, run, spectrum, batches, rate)
    return row, spectrum


def data_of(branch: str, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test data of a branch: images (n, 64) in [0, 1] and labels (n,)."""
    digits = Digits(held_out=197).build()
    images, labels, test_images, test_labels = (
        torch.from_numpy(np.asarray(part))
        for part in (
            digits.train_inputs,
            digits.train_labels,
            digits.test_inputs,
            digits.test_labels,
        )
    )
    images, test_images = (
        part.flatten(1).double() / digits.scale for part in (images, test_images)
    )
    draws = torch.Generator().manual_seed(1000 + seed)
    if branch == "white-noise":
        images = torch.rand(images.shape, generator=draws)
    if branch == "shuffled-labels":
        labels = labels[torch.randperm(len(labels), generator=draws)]
    return (images, labels), (test_images, test_labels)


def network(hidden: int, seed: int) -> nn.Sequential:
    """The net 64-hidden-10; LeCun-normal means truncated at two deviations, as in flax."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, 10))
    for layer in (model[0], model[2]):
        assert isinstance(layer, nn.Linear)
        # 0.8796 is the deviation of a standard normal number truncated at 2.
        deviation = layer.in_features**-0.5 / 0.87962566
        nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        nn.init.normal_(layer.bias, std=1 / 8)
    return model


def accuracy(objective: thalweg.Objective, theta: Tensor, data: tuple[Tensor, Tensor]) -> float:
    """Share of correct answers at theta."""
    objective.layout.write(objective.model, theta)
    return float((objective.model(data[0]).argmax(1) == data[1]).double().mean())


def beside_the_hessian(
    objective: thalweg.Objective, run: thalweg.TrainingJacobian, spectrum: thalweg.SingularSpectrum
) -> dict[str, float]:
    """Overlap of the bulk with the flattest directions of the Hessian, before and after."""
    bulk = {"start": spectrum.bulk(BULK), "end": spectrum.bulk(BULK, side="left")}
    found = {}
    for name, theta in (("start", run.theta_0), ("end", run.theta_T)):
        flat = thalweg.flattest_directions(thalweg.Hessian(objective, theta), bulk[name].k)
        found[f"overlap_hessian_{name}"] = flat.overlap(bulk[name])
    return found


def restricted(
    objective: thalweg.Objective,
    run: thalweg.TrainingJacobian,
    spectrum: thalweg.SingularSpectrum,
    batches: list[Tensor],
    rate: Callable[[int], float],
) -> dict[str, float]:
    """The training loss after the same run within the bulk, and within its complement."""
    model, bulk = objective.model, thalweg.FixedSubspace(spectrum.bulk(BULK))
    found = {}
    for name, inside, outside in (("loss_in_bulk", 1.0, 0.0), ("loss_out_of_bulk", 0.0, 1.0)):
        objective.layout.write(model, run.theta_0)
        base = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
        optimizer = thalweg.SplitUpdate(base, bulk, dominant=inside, bulk=outside)
        for step, batch in enumerate(batches):
            base.param_groups[0]["lr"] = rate(step)
            gradient = objective.gradient(samples=batch)
            parameters = objective.layout.parameters(model)
            for parameter, part in zip(
                parameters, objective.layout.unflatten(gradient), strict=True
            ):
                parameter.grad = part
            optimizer.step()
        found[name] = float(objective.value())
    return found


def with_overlaps(
    table: pd.DataFrame, spectra: Mapping[tuple[int, str], thalweg.SingularSpectrum]
) -> pd.DataFrame:
    """Add how far the bulk overlaps those of other seeds, and that with shuffled labels."""
    bulks = {
        key: spectrum.bulk(BULK) for key, spectrum in spectra.items() if key[1] != "white-noise"
    }
    seeds = sorted({seed for seed, _ in bulks})
    for seed in seeds:
        own, shuffled = bulks[seed, "digits"], bulks[seed, "shuffled-labels"]
        others = {
            "seeds": [bulks[other, "digits"] for other in seeds if other != seed],
            "shuffled": [shuffled],
        }
        at = (table["seed"] == seed) & (table["branch"] == "digits")
        for name, found in others.items():
            if found:
                size = own.basis.shape[0]
                table.loc[at, f"overlap_{name}"] = np.mean([own.overlap(other) for other in found])
                chances = [max(own.k, other.k) / size for other in found]
                table.loc[at, f"chance_{name}"] = np.mean(chances)
    return table


def draw(spectra: Mapping[tuple[int, str], thalweg.SingularSpectrum], folder: Path) -> Path:
    """Singular values, their distance from 1, and cosines of left and right vectors."""
    path = folder / "training-jacobian.png"
    with drawing.paper_style():
        figure = Figure(figsize=(drawing.PAGE_WIDTH, 2.3), layout="constrained")
        values, distances, cosines = figure.subplots(1, 3)
        for (seed, branch), spectrum in spectra.items():
            index = torch.linspace(0, 1, len(spectrum.values))
            look = {"color": COLOURS[branch], "linewidth": 0.9}
            label = branch.replace("-", " ") if seed == min(spectra)[0] else None
            values.plot(index, spectrum.values.clamp(min=1e-6), label=label, **look)
            distances.plot(index, (spectrum.values - 1).abs().clamp(min=1e-9), **look)
            if branch == "digits":
                dots = {"color": COLOURS[branch], "markersize": 1.2, "alpha": 0.4}
                cosines.plot(index, spectrum.cosines, ".", markeredgewidth=0, **dots)
        values.set(yscale="log", ylabel=r"singular value $\sigma_i$")
        values.axhline(1, color=drawing.FAINT, linewidth=0.6, zorder=0)
        distances.set(yscale="log", ylabel=r"distance $|\sigma_i - 1|$")
        distances.axhline(BULK, color=drawing.FAINT, linewidth=0.6, zorder=0)
        cosines.set(ylim=(-1.05, 1.05), ylabel=r"cosine of $u_i$ and $v_i$, digits")
        for axes in (values, distances, cosines):
            axes.set_xlabel("rank $i / P$")
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=200)
    return path


if __name__ == "__main__":
    main()
