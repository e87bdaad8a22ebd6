"""The Jacobian of a whole training run: what it amplifies, carries through unchanged, forgets.

Belrose, Scherlis 2024 (arXiv 2412.07003), in their setting: an MLP 64-64-10 (GELU by tanh,
LeCun-normal kernels, biases of standard deviation 1/8) on digits / 16, 25 batches of 64 in the
same order in each of 25 epochs, momentum 0.9, learning rate 0.05 (1 + cos(pi t / 625)), mean
cross-entropy, all in float64. Another run has white-noise inputs (uniform pixels), a third shuffled
labels. The split into 1,600 and 197 images is that of the package, not that of the paper's code.
The run on the images is repeated from theta_0 moved along a singular vector of each part, by 1e-3
to 1e3, and confined to the bulk, to its complement, and to random subspaces as large as these.

    python examples/training_jacobian.py [FOLDER] [--hidden 64] [--seeds 0 1 2] [--epochs 25]
        [--branches digits shuffled-labels white-noise] [--device cpu] [--forget]

writes FOLDER/training-jacobian.png, .csv and -responses.csv, by default here, and every Jacobian as
soon as it is known, for a second run to take it from its file: 185 MB each in the paper's setting,
none with `--forget`. One Jacobian of the paper's net takes about 10 minutes on one core, and there
are three a seed; with `--hidden 8` (P = 610) all nine together take 5.
"""

import argparse
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import thalweg
from thalweg import registry
from thalweg.analysis.claims import judge_all, render_verdicts
from thalweg.analysis.figures import drawing
from thalweg.contrib import (
    SingularSpectrum,
    TrainingJacobian,
    TrainingRun,
    flattest_directions,
    perturbation_responses,
    singular_spectrum,
    trained_parameters,
    training_jacobian,
)
from thalweg.loss import LockstepObjective
from thalweg.measure.clock import now
from thalweg.operators import DenseOperator
from thalweg.problems.data.digits import Digits
from thalweg.spectrum import random_subspace

BATCH_SIZE = 64
#: The batches of 39 runs that go side by side are evaluated together.
SAMPLES_AT_ONCE = 4096
BRANCHES = ("digits", "shuffled-labels", "white-noise")
COLOURS: dict[str, str] = dict(zip(BRANCHES, ("#0072b2", "#e69f00", "#d55e00"), strict=True))
BULK = 1e-2
#: Of normal numbers, the share within two deviations.
WITHIN_TWO = math.erf(math.sqrt(2))
#: The singular vectors along which theta_0 is moved, and their colours.
DIRECTIONS = {"top": "#d55e00", "bulk": "#0072b2", "stable": "#009e73"}
#: What training is confined to, in the table and in the figure.
CONFINED = {
    "end": "nothing",
    "in_bulk": "the bulk",
    "out_of_bulk": "its complement",
    "in_random": "random",
    "out_of_random": "its complement ",
}


@dataclass
class Clock:
    """Seconds of each named part; what a device has still to do belongs to it."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begin = now(self.device)
        yield
        self.seconds[f"seconds_{name}"] = now(self.device) - begin


@dataclass(frozen=True)
class Found:
    """What is kept of a run's Jacobian, itself too large to keep them all."""

    row: dict[str, object]
    values: Tensor
    cosines: Tensor
    bulk: thalweg.Subspace | None
    responses: pd.DataFrame | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path())
    parser.add_argument("--hidden", type=int, default=64, help="neurons of the hidden layer")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--branches", nargs="+", choices=BRANCHES, default=list(BRANCHES))
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--forget", action="store_true", help="do not keep the Jacobians in files")
    options = parser.parse_args()
    # Singular values are compared to 1e-6 of 1.
    torch.set_default_dtype(torch.float64)
    options.folder.mkdir(parents=True, exist_ok=True)
    found = {
        (seed, branch): measure(branch, seed, options)
        for seed in options.seeds
        for branch in options.branches
    }
    table = with_overlaps(pd.DataFrame([each.row for each in found.values()]), found)
    shown = table.drop(columns=["step", "parameters"]).set_index(["seed", "branch"])
    print(shown.T.to_string(float_format="%.3g"))
    roles = {"plain": "digits", "white-noise": "white-noise"}
    claims = [claim for name, claim in registry.claims.items() if name.startswith("jacobian-")]
    verdicts = judge_all(claims, table, roles)
    Console(width=110).print(render_verdicts(verdicts))
    table.to_csv(options.folder / "training-jacobian.csv", index=False)
    responses = [each.responses for each in found.values() if each.responses is not None]
    if responses:
        pd.concat(responses).to_csv(options.folder / "training-jacobian-responses.csv", index=False)
    print(f"wrote {draw(table, found, options.folder)}")
    print(summary(table).to_string(index=False, float_format="%.3g", na_rep="-"))


def measure(branch: str, seed: int, options: argparse.Namespace) -> Found:
    """One run's Jacobian, its spectrum, and what the claims and the figure need of it."""
    train, test = data_of(branch, seed, options.device)
    model = network(options.hidden, seed).to(options.device)
    objective = objective_of(model, train, SAMPLES_AT_ONCE)
    training, clock = training_of(objective, options.epochs), Clock(options.device)
    name = f"jacobian-{branch}-seed{seed}-hidden{options.hidden}-epochs{options.epochs}.safetensors"
    with clock.part("jacobian"):
        run = jacobian_of(training, None if options.forget else options.folder / name)
    with clock.part("singular_values"):
        spectrum = singular_spectrum(run)
    print(
        f"seed {seed}, {branch}: {objective}, {spectrum.parts(BULK)},"
        f" Jacobian {clock.seconds['seconds_jacobian']:.1f} s,"
        f" singular values {clock.seconds['seconds_singular_values']:.1f} s",
        flush=True,
    )
    row: dict[str, object] = {"seed": seed, "branch": branch, "step": len(training.batches)}
    row |= counted(spectrum) | {
        "loss_start": float(objective.value(run.theta_0)),
        "loss_end": float(objective.value(run.theta_T)),
        "test_accuracy": accuracy(objective, run.theta_T, test),
    }
    responses = None
    if branch == "digits":
        with clock.part("hessian"):
            row |= beside_the_hessian(model, train, run, spectrum)
        with clock.part("confined"):
            row |= restricted(training, spectrum.bulk(BULK), seed, test)
        with clock.part("responses"):
            responses, limits = moved(training, run, spectrum)
        responses.insert(0, "seed", seed)
        row |= limits
    bulk = None if branch == "white-noise" else spectrum.bulk(BULK)
    return Found(
        row | clock.seconds, spectrum.values.cpu(), spectrum.cosines.cpu(), bulk, responses
    )


def objective_of(
    model: nn.Module, data: tuple[Tensor, Tensor], chunk_size: int
) -> thalweg.Objective:
    """Mean cross-entropy; products with the Hessian of a batch take all vectors at once."""
    return thalweg.Objective(
        model, nn.CrossEntropyLoss(), data, chunk_size=chunk_size, vectorize_up_to=BATCH_SIZE
    )


def training_of(objective: thalweg.Objective, epochs: int) -> TrainingRun:
    """The paper's run: its batches, in the same order in each epoch, and its learning rates."""
    batches = list(torch.arange(objective.num_samples).split(BATCH_SIZE)) * epochs

    def rate(step: int) -> float:
        return 0.05 * (1 + math.cos(math.pi * step / len(batches)))

    return TrainingRun(objective, batches, rate, momentum=0.9)


def counted(spectrum: SingularSpectrum) -> dict[str, float]:
    """The largest singular value, shares of the parts, cosines within the bulk and outside."""
    size, parts = len(spectrum.values), spectrum.parts(BULK)
    inside = (spectrum.values - 1).abs() <= BULK
    return {
        "parameters": size,
        "singular_value_max": float(spectrum.values[0]),
        "chaotic_share": parts.chaotic / size,
        "stable_share": parts.stable / size,
        **{f"bulk_share_{at:.0e}": spectrum.parts(at).bulk / size for at in (1e-2, 1e-3, 1e-6)},
        "bulk_cosine": float(spectrum.cosines[inside].mean()),
        "outside_cosine": float(spectrum.cosines[~inside].mean()),
    }


def jacobian_of(training: TrainingRun, path: Path | None) -> TrainingJacobian:
    """The whole J: from its file, if an earlier run has left it there, or made and kept there."""
    start = training.theta_0
    if path is not None and path.exists():
        saved = {name: tensor.to(start.device) for name, tensor in load_file(path).items()}
        if torch.equal(saved["theta_0"], start):
            print(f"{path} is taken over", flush=True)
            return TrainingJacobian(saved["columns"], None, start, saved["theta_T"])
    run = training_jacobian(training)
    if path is not None:
        # Under another name until it is whole.
        partial = path.with_suffix(".partial")
        found = {"columns": run.columns, "theta_0": run.theta_0, "theta_T": run.theta_T}
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, partial)
        partial.replace(path)
    return run


def data_of(
    branch: str, seed: int, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
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
    # Drawn on the CPU: the same on every device.
    train, test = (images.to(device), labels.to(device)), (test_images, test_labels)
    return train, (test[0].to(device), test[1].to(device))


def network(hidden: int, seed: int) -> nn.Sequential:
    """The net 64-hidden-10; LeCun-normal means truncated at two deviations, as in flax."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, 10))
    for layer in (model[0], model[2]):
        assert isinstance(layer, nn.Linear)
        # 0.8796 is the deviation of a standard normal number truncated at 2.
        deviation = layer.in_features**-0.5 / 0.87962566
        # By the inverse of the distribution: `nn.init.trunc_normal_` draws other numbers in other
        # versions of torch.
        nn.init.uniform_(layer.weight, -WITHIN_TWO, WITHIN_TWO)
        layer.weight.data.erfinv_().mul_(deviation * math.sqrt(2))
        nn.init.normal_(layer.bias, std=1 / 8)
    return model


def accuracy(objective: thalweg.Objective, theta: Tensor, data: tuple[Tensor, Tensor]) -> float:
    """Share of correct answers at theta."""
    objective.layout.write(objective.model, theta)
    return float((objective.model(data[0]).argmax(1) == data[1]).double().mean())


def beside_the_hessian(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    run: TrainingJacobian,
    spectrum: SingularSpectrum,
) -> dict[str, float]:
    """Overlap of the bulk with the flattest directions of the Hessian, before and after."""
    # All directions at once on a few samples.
    runs = LockstepObjective(objective_of(model, data, BATCH_SIZE), vectorize_up_to=BATCH_SIZE)
    bulk = {"start": spectrum.bulk(BULK), "end": spectrum.bulk(BULK, side="left")}
    found = {}
    for name, theta in (("start", run.theta_0), ("end", run.theta_T)):
        one = torch.eye(len(theta), device=theta.device)[None]
        hessian = DenseOperator(runs.hessian_products(theta[None], one)[0])
        flat = flattest_directions(hessian, bulk[name].k)
        found[f"overlap_hessian_{name}"] = flat.overlap(bulk[name])
    return found


def restricted(
    training: TrainingRun, bulk: thalweg.Subspace, seed: int, test: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Loss and test accuracy of the same run within the bulk and a random subspace, and outside."""
    objective, start = training.objective, training.theta_0
    random = random_subspace(len(start), bulk.k, seed, dtype=start.dtype).to(start.device)
    confined = {"in_bulk": bulk.project, "out_of_bulk": bulk.reject}
    confined |= {"in_random": random.project, "out_of_random": random.reject}

    def within(rows: Tensor) -> Tensor:
        projectors = confined.values()
        return torch.stack([each(row) for each, row in zip(projectors, rows, strict=True)])

    ends = trained_parameters(training, start.repeat(len(confined), 1), within=within)
    found = {}
    for name, end in zip(confined, ends, strict=True):
        found[f"loss_{name}"] = float(objective.value(end))
        found[f"test_accuracy_{name}"] = accuracy(objective, end, test)
    return found


def moved(
    training: TrainingRun,
    run: TrainingJacobian,
    spectrum: SingularSpectrum,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Responses to theta_0 moved along the first vector, one of the bulk, one of the stable ones.

    That of the bulk has the median abs(sigma - 1): some are 1 for want of any gradient, as where a
    pixel never changes. That of the stable ones has the median rank.
    """
    parts = spectrum.parts(BULK)
    order = (spectrum.values - 1).abs().argsort(stable=True)
    ranks = {"top": 0, "bulk": int(order[parts.bulk // 2])}
    if parts.stable:
        ranks["stable"] = len(spectrum.values) - 1 - parts.stable // 2
    directions = spectrum.right[:, list(ranks.values())]
    # Libraries differ in the signs of singular vectors: here the largest entry is positive.
    directions = directions * directions.gather(0, directions.abs().argmax(0)[None]).sign()
    found = perturbation_responses(training, run, directions)
    rows = [
        {
            "direction": name,
            "rank": rank,
            "singular_value": float(spectrum.values[rank]),
            "size": float(size),
            "along": float(found.along[i, j]),
            "beside": float(found.beside[i, j]),
            "error": float(found.error[i, j]),
        }
        for i, (name, rank) in enumerate(ranks.items())
        for j, size in enumerate(found.sizes)
    ]
    limits = found.linear_up_to(0.1).tolist()
    named = {f"linear_up_to_{name}": limit for name, limit in zip(ranks, limits, strict=True)}
    return pd.DataFrame(rows), named


def with_overlaps(table: pd.DataFrame, found: Mapping[tuple[int, str], Found]) -> pd.DataFrame:
    """Add how far the bulk overlaps those of other seeds, and that with shuffled labels."""
    bulks = {key: each.bulk for key, each in found.items() if each.bulk is not None}
    seeds = sorted({seed for seed, branch in bulks if branch == "digits"})
    for seed in seeds:
        own = bulks[seed, "digits"]
        others = {
            "seeds": [bulks[other, "digits"] for other in seeds if other != seed],
            "shuffled": [bulks[key] for key in bulks if key == (seed, "shuffled-labels")],
        }
        at = (table["seed"] == seed) & (table["branch"] == "digits")
        for name, beside in others.items():
            if beside:
                size = own.basis.shape[0]
                table.loc[at, f"overlap_{name}"] = np.mean([own.overlap(each) for each in beside])
                chances = [max(own.k, each.k) / size for each in beside]
                table.loc[at, f"chance_{name}"] = np.mean(chances)
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """A line a run: counts of singular values, overlaps, and the seconds of each part."""
    lines = table[["seed", "branch"]].assign(sigma_1=table["singular_value_max"])
    shares = {"chaotic": "chaotic_share", "stable": "stable_share"}
    shares |= {f"within {at}": f"bulk_share_{at}" for at in ("1e-02", "1e-03", "1e-06")}
    for name, share in shares.items():
        lines[name] = (table[share] * table["parameters"]).round().astype(int)
    for column in table.columns[table.columns.str.startswith(("overlap_", "seconds_"))]:
        lines[column.replace("_", " ").replace("seconds ", "s: ")] = table[column]
    return lines


def draw(table: pd.DataFrame, found: Mapping[tuple[int, str], Found], folder: Path) -> Path:
    """The spectrum and its vectors above; responses and restricted training below."""
    path = folder / "training-jacobian.png"
    with drawing.paper_style():
        figure = Figure(figsize=(drawing.PAGE_WIDTH, 4.6), layout="constrained")
        above, below = figure.subplots(2, 3)
        draw_spectra(above, found)
        draw_responses(below[:2], [each for each in found.values() if each.responses is not None])
        draw_restricted(below[2], pd.DataFrame(table[table["branch"] == "digits"]))
        names = above[0].get_legend_handles_labels()
        figure.legend(*names, loc="outside upper center", ncols=3, frameon=False)
        figure.savefig(path, dpi=200)
    return path


def draw_spectra(panels: np.ndarray, found: Mapping[tuple[int, str], Found]) -> None:
    """Singular values, their distance from 1, and cosines of left and right vectors."""
    values, distances, cosines = panels
    for (seed, branch), each in found.items():
        index = torch.linspace(0, 1, len(each.values))
        look = {"color": COLOURS[branch], "linewidth": 0.9}
        label = branch.replace("-", " ") if seed == min(found)[0] else None
        values.plot(index, each.values.clamp(min=1e-6), label=label, **look)
        distances.plot(index, (each.values - 1).abs().clamp(min=1e-9), **look)
        if branch == "digits":
            dots = {"color": COLOURS[branch], "markersize": 1.2, "alpha": 0.4}
            cosines.plot(index, each.cosines, ".", markeredgewidth=0, **dots)
    values.set(yscale="log", ylabel=r"singular value $\sigma_i$")
    values.axhline(1, color=drawing.FAINT, linewidth=0.6, zorder=0)
    distances.set(yscale="log", ylabel=r"distance $|\sigma_i - 1|$")
    distances.axhline(BULK, color=drawing.FAINT, linewidth=0.6, zorder=0)
    cosines.set(ylim=(-1.05, 1.05), ylabel=r"cosine of $u_i$ and $v_i$, digits")
    for axes in panels:
        axes.set_xlabel("rank $i / P$")


def draw_responses(panels: np.ndarray, found: list[Found]) -> None:
    """Response along u over that of the Jacobian, and its whole error, against the size."""
    gains, errors = panels
    for number, each in enumerate(found):
        assert each.responses is not None
        for name, rows in each.responses.groupby("direction", sort=False):
            look = {
                "color": DIRECTIONS[str(name)],
                "linewidth": 0.9,
                "marker": ".",
                "markersize": 3,
            }
            ratio = rows["along"] / (rows["singular_value"] * rows["size"])
            gains.plot(rows["size"], ratio, **look)
            label = None if number else {"top": "first vector"}.get(str(name), str(name))
            errors.plot(rows["size"], rows["error"], label=label, **look)
    gains.axhline(1, color=drawing.FAINT, linewidth=0.6, zorder=0)
    gains.set(ylim=(-0.2, 1.6), ylabel=r"$\langle u_i, \delta\rangle \,/\, \sigma_i s$")
    errors.axhline(0.1, color=drawing.FAINT, linewidth=0.6, zorder=0)
    errors.set(yscale="log", ylabel=r"$\|\delta - s J v_i\| \,/\, \|s J v_i\|$")
    if found:
        errors.legend(frameon=False, fontsize=7, loc="lower right")
    for axes in panels:
        axes.set(xscale="log", xlabel=r"size $s$ of the change along $v_i$")


def draw_restricted(axes: Axes, digits: pd.DataFrame) -> None:
    """Training loss at the end, a dot a seed."""
    names = [name for name in CONFINED if f"loss_{name}" in digits]
    for place, name in enumerate(names):
        losses = digits[f"loss_{name}"]
        axes.plot([place] * len(losses), losses, ".", color=COLOURS["digits"], markersize=5)
    axes.set(yscale="log", ylabel="training loss", xlabel="training confined to")
    axes.set(xlim=(-0.5, len(CONFINED) - 0.5))
    axes.set_xticks(range(len(names)), [CONFINED[name] for name in names], rotation=35, ha="right")
    if len(digits):
        low, high = axes.get_ylim()
        axes.set_ylim(low, 1.8 * high)
        drawing.mark_value(axes, float(np.mean(digits["loss_start"])), "before training")


if __name__ == "__main__":
    main()
