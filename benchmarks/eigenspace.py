"""The top 10 eigenpairs of H from scratch: Thalweg beside other packages and hand-written recipes.

All get the same trained parameters, the same batches, and a process of their own that is killed at
`--limit` seconds. Seconds are wall time of the solve, graphs included; gradients are these seconds
over the median of several full gradients by plain autograd, timed in the same process before and
after. The residual max_i norm(H u_i - lambda_i u_i) / abs(lambda_1) is from fresh products by
double backward that share no code with Thalweg. The difference is the largest of an eigenvalue from
that of the row with the smallest residual, relative to lambda_1: missed eigenvalues show there.
What is not installed is left out, with a line that says how to install it. On a GPU the clock is
read when the device is done.

    python benchmarks/eigenspace.py mlp --data-dir DIR
    python benchmarks/eigenspace.py cnn --data-dir DIR --samples 1000 --limit 600
    python benchmarks/eigenspace.py transformer --data-dir DIR --limit 1200 --json rows.json
    python benchmarks/eigenspace.py cnn --data-dir DIR --device cuda
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from thalweg.lab.config import Spec, load_spec
from thalweg.lab.training.step import minibatch
from thalweg.loss.objective import Objective
from thalweg.measure.clock import now
from thalweg.operators.hessian import Hessian
from thalweg.problems import Problem, build_problem
from thalweg.spectrum.eigensolver import top_eigenpairs

SPECS = {"mlp": "mnist-mlp", "cnn": "cifar10-cnn", "transformer": "sst2-transformer"}

CHUNKS = {"cpu": 1024, "cuda": 8192}
"""Samples in a batch, for all: Thalweg's default, and faster than one batch for the others too."""


class Case(NamedTuple):
    """What all contestants are given: the loss over batches, at trained parameters."""

    problem: Problem
    batches: list[tuple[Tensor, Tensor]]
    k: int

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.problem.model.parameters())

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters)

    @property
    def device(self) -> torch.device:
        return self.parameters[0].device


class Found(NamedTuple):
    """Eigenvalues (k,), eigenvectors (P, k), and the products with H that they took."""

    eigenvalues: Tensor
    basis: Tensor
    products: float


@dataclass(frozen=True)
class Contestant:
    """A way to the top eigenpairs, and the packages that it needs."""

    solve: Callable[[Case], Found]
    packages: tuple[str, ...] = ("scipy",)
    install: str = "pip install scipy"


# Products by plain double backward: for the recipes, and for the residuals of all.


def gradients(case: Case, *, create_graph: bool) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
    """The gradient of each batch and its share of the mean loss."""
    for inputs, targets in case.batches:
        loss = case.problem.loss(case.problem.model(inputs), targets)
        share = len(inputs) / case.problem.num_samples
        yield share, torch.autograd.grad(loss, case.parameters, create_graph=create_graph)


def multiply(
    case: Case, graphs: Iterable[tuple[float, tuple[Tensor, ...]]], rows: Tensor
) -> Tensor:
    """H times each row of (m, P), as rows."""
    sizes = [p.numel() for p in case.parameters]
    result = torch.zeros_like(rows)
    for share, gradient in graphs:
        for row, image in zip(rows, result, strict=True):
            shaped = [
                part.reshape(g.shape) for part, g in zip(row.split(sizes), gradient, strict=True)
            ]
            product = torch.autograd.grad(gradient, case.parameters, shaped, retain_graph=True)
            image += share * flat(product)
    return result


def flat(parts: Iterable[Tensor]) -> Tensor:
    """One vector (P,); `parameters_to_vector` refuses the strides that convolutions give."""
    return torch.cat([part.reshape(-1) for part in parts])


class Product:
    """H v for a vector (P,), its graph kept or rebuilt at every product."""

    def __init__(self, case: Case, *, keep_graph: bool) -> None:
        self.case = case
        self.kept = list(gradients(case, create_graph=True)) if keep_graph else None

    def __call__(self, vector: Tensor) -> Tensor:
        graphs = self.kept or gradients(self.case, create_graph=True)
        return multiply(self.case, graphs, vector[None])[0]


# The contestants.


def thalweg(case: Case) -> Found:
    objective = Objective(case.problem.model, case.problem.loss, case.problem.train)
    space = top_eigenpairs(Hessian(objective, keep_graph=True), case.k, tolerance=1e-3)
    return Found(space.eigenvalues, space.basis, space.num_matvecs)


def curvlinops(case: Case) -> Found:
    """`HessianLinearOperator.to_scipy()` and `eigsh` at its tolerance, as in its documentation."""
    package = importlib.import_module("curvlinops")

    operator = package.HessianLinearOperator(
        case.problem.model, MeanLoss(case.problem.loss), case.parameters, case.batches
    )
    return arpack(operator.to_scipy().matvec, case, tolerance=0, dtype=np.float64)


def pyhessian(case: Case) -> Found:
    """Power iteration with deflation, at its defaults; all samples in one batch keep its graph."""
    # Not an `import` statement: the package has a class of the name of its module.
    package: Any = importlib.import_module("pyhessian.hessian")
    count = 0
    original = package.hessian_vector_product

    def counted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        return original(*arguments)

    package.hessian_vector_product = counted
    # Where the model's gradients are zero: it adds to them, so a second one is doubled.
    hessian = package.hessian(
        case.problem.model,
        case.problem.loss,
        data=case.problem.train,
        cuda=case.device.type == "cuda",
    )
    eigenvalues, vectors = hessian.eigenvalues(top_n=case.k)
    basis = torch.stack([flat(vector) for vector in vectors], dim=1)
    return Found(torch.tensor(eigenvalues), basis.detach(), count)


def arpack_by_hand(case: Case, *, keep_graph: bool) -> Found:
    product = Product(case, keep_graph=keep_graph)

    def multiplied(vector: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(vector).to(case.device)).cpu().numpy()

    return arpack(multiplied, case, 1e-4, np.float32)


def arpack(
    product: Callable[[np.ndarray], np.ndarray], case: Case, tolerance: float, dtype: type
) -> Found:
    from scipy.sparse.linalg import LinearOperator, eigsh

    count = 0

    def counted(vector: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return product(vector.ravel())

    shape = (case.size, case.size)
    operator: Any = LinearOperator(shape, matvec=counted, dtype=dtype)  # pyright: ignore
    start = np.random.default_rng(0).standard_normal(case.size).astype(dtype)
    values, vectors = eigsh(operator, k=case.k, which="LA", tol=tolerance, v0=start)  # pyright: ignore
    return Found(torch.from_numpy(values), torch.from_numpy(vectors), count)


def lanczos(case: Case, *, keep_graph: bool, steps: int = 40) -> Found:
    """A fixed number of steps with full reorthogonalization, whatever the residual."""
    product = Product(case, keep_graph=keep_graph)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(case.size, generator=generator).to(case.device)
    basis = torch.zeros(steps, case.size, device=case.device)
    tridiagonal = torch.zeros(steps, steps, dtype=torch.float64)
    for step in range(steps):
        basis[step] = vector / vector.norm()
        vector = product(basis[step])
        tridiagonal[step, step] = float(vector @ basis[step])
        for _ in range(2):
            vector = vector - basis[: step + 1].T @ (basis[: step + 1] @ vector)
        if step + 1 < steps:
            tridiagonal[step, step + 1] = tridiagonal[step + 1, step] = float(vector.norm())
    values, vectors = torch.linalg.eigh(tridiagonal)
    basis = basis.T @ vectors[:, -case.k :].to(basis)
    return Found(values[-case.k :].float(), basis, steps)


CONTESTANTS = {
    "Thalweg": Contestant(thalweg, ()),
    "curvlinops + eigsh": Contestant(
        curvlinops,
        ("scipy", "curvlinops"),
        "pip install --no-deps curvlinops-for-pytorch einops einconv linear_operator jaxtyping"
        " wadler-lindig tqdm",
    ),
    "PyHessian": Contestant(pyhessian, ("pyhessian",), "pip install --no-deps PyHessian"),
    "ARPACK 1e-4, graph rebuilt": Contestant(partial(arpack_by_hand, keep_graph=False)),
    "ARPACK 1e-4, graph kept": Contestant(partial(arpack_by_hand, keep_graph=True)),
    "40 Lanczos steps, graph rebuilt": Contestant(partial(lanczos, keep_graph=False), ()),
    "40 Lanczos steps, graph kept": Contestant(partial(lanczos, keep_graph=True), ()),
}


class MeanLoss(torch.nn.Module):
    """The loss as curvlinops wants it: a module that says that it averages."""

    reduction = "mean"

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.loss(output, target)


# One process for each.


def work(channel: Connection, options: argparse.Namespace, theta: np.ndarray, name: str) -> None:
    """Solve, and send what is known as soon as it is: the parent kills at its limit."""
    warnings.simplefilter("ignore")
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(options.threads)
    problem = build_problem(spec_of(options).problem, options.seed, device=options.device)
    vector_to_parameters(torch.from_numpy(theta).to(options.device), problem.model.parameters())
    inputs, targets = (part.split(CHUNKS[options.device]) for part in problem.train)
    case = Case(problem, list(zip(inputs, targets, strict=True)), options.k)
    # Fused attention has no second derivative: without this the others fail on a Transformer.
    with sdpa_kernel(SDPBackend.MATH):
        import_what_torch_needs(case.device)
        seconds = seconds_of_gradient(case, options.repeats)
        channel.send({"gradient_seconds": statistics.median(seconds)})
        try:
            if case.device.type == "cuda":
                # Once untimed: a GPU loads every kernel when it is first used.
                CONTESTANTS[name].solve(case)
                case.problem.model.zero_grad()
            begin = now(case.device)
            found = CONTESTANTS[name].solve(case)
            spent = now(case.device) - begin
        except Exception as error:  # whatever another package raises belongs in its row
            channel.send({"failed": f"{type(error).__name__}: {str(error).strip()[:120]}"})
            return
        channel.send({"seconds": spent, "products": found.products})
        seconds += seconds_of_gradient(case, options.repeats)
        result = {"gradient_seconds": statistics.median(seconds)}
        channel.send(result | accuracy(case, found))


def import_what_torch_needs(device: torch.device) -> None:
    """The first product of a process makes torch import sympy: 0.3 seconds, 5 gradients."""
    x = torch.ones(1, requires_grad=True, device=device)
    (slope,) = torch.autograd.grad(x.square().sum(), x, create_graph=True)
    torch.autograd.grad(slope, x, torch.ones_like(x))


def end_with_parent() -> None:
    """A parent that is killed cannot stop this process, which would go on for hours."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def seconds_of_gradient(case: Case, repeats: int) -> list[float]:
    each = []
    for _ in range(repeats + 1):
        begin = now(case.device)
        for _ in gradients(case, create_graph=False):
            pass
        each.append(now(case.device) - begin)
    return each[1:]  # the first one warms up


def accuracy(case: Case, found: Found) -> dict[str, Any]:
    order = found.eigenvalues.argsort(descending=True)
    values = found.eigenvalues[order].to(case.device, torch.float32)
    rows = found.basis.T[order].to(case.device, torch.float32).contiguous()
    images = multiply(case, gradients(case, create_graph=True), rows)
    residuals = (images - values[:, None] * rows).norm(dim=1) / rows.norm(dim=1)
    return {
        "residual": float(residuals.max() / values.abs().max()),
        "eigenvalues": values.tolist(),
    }


def run(options: argparse.Namespace, theta: np.ndarray, name: str) -> dict[str, Any]:
    """The row of a contestant, whatever happens to it."""
    contestant = CONTESTANTS[name]
    row: dict[str, Any] = {"name": name, "status": "done"}
    missing = [p for p in contestant.packages if importlib.util.find_spec(p) is None]
    if missing:
        return row | {"status": f"not installed: {contestant.install}"}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, options, theta, name), daemon=True)
    process.start()
    sender.close()
    try:
        row |= receiver.recv()
        if not receiver.poll(options.limit):
            return row | {"status": f"stopped at {options.limit:g} s"}
        row |= receiver.recv()
        if "failed" in row:
            return row | {"status": f"failed: {row.pop('failed')}"}
        row |= receiver.recv()
    except EOFError:
        process.join()
        return row | {"status": f"failed: its process ended with {process.exitcode}"}
    finally:
        process.kill()
        process.join()
    return row | {"gradients": row["seconds"] / row["gradient_seconds"]}


def spec_of(options: argparse.Namespace) -> Spec:
    words = ["--problem.data.data_dir", options.data_dir]
    words += [] if options.samples is None else ["--problem.samples", str(options.samples)]
    return load_spec(SPECS[options.problem], words)


def trained(options: argparse.Namespace) -> tuple[Problem, np.ndarray]:
    """The problem, and its parameters (P,) after some steps of its spec's own training."""
    spec = spec_of(options)
    problem = build_problem(spec.problem, options.seed, device=options.device)
    phase = spec.phases[0]
    inputs, targets = problem.train
    optimizer = torch.optim.SGD(problem.model.parameters(), options.lr or phase.optimizer.lr)
    for step in range(options.warm_up):
        chosen = minibatch(options.seed, step, 50, problem.num_samples)
        optimizer.zero_grad()
        problem.loss(problem.model(inputs[chosen]), targets[chosen]).backward()
        optimizer.step()
    return problem, parameters_to_vector(problem.model.parameters()).detach().cpu().numpy()


def compare_eigenvalues(rows: list[dict[str, Any]]) -> None:
    """Add `difference` to each row: to the eigenvalues of the row with the smallest residual."""
    solved = [row for row in rows if "residual" in row]
    if not solved:
        return
    best = np.array(min(solved, key=lambda row: row["residual"])["eigenvalues"])
    for row in solved:
        difference = np.abs(np.array(row["eigenvalues"]) - best).max()
        row["difference"] = float(difference / np.abs(best).max())


def line(row: dict[str, Any]) -> str:
    def cell(key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    return (
        f"{row['name']:32}{cell('products', '.0f'):>9}{cell('seconds', '.2f'):>9}"
        f"{cell('gradients', '.1f'):>11}{cell('residual', '.1e'):>10}"
        f"{cell('difference', '.1e'):>12}{cell('gradient_seconds', '.4f'):>14}  {row['status']}"
    )


def main() -> None:
    options = options_of_command_line()
    # Before the processes start: BLAS reads it at its import.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    torch.set_num_threads(options.threads)
    problem, theta = trained(options)
    print(
        f"{options.problem}: {problem.num_samples} samples, P = {len(theta)}, k = {options.k},"
        f" after {options.warm_up} SGD steps; threads {options.threads}, torch {torch.__version__},"
        f" float32, {torch.cuda.get_device_name() if options.device == 'cuda' else 'CPU'}"
    )
    del problem
    heads = ("products", 9), ("seconds", 9), ("gradients", 11), ("residual", 10)
    heads += ("difference", 12), ("a gradient, s", 14)
    print(f"{'':32}" + "".join(f"{head:>{width}}" for head, width in heads) + "  status")
    rows = []
    for name in options.only or CONTESTANTS:
        rows.append(run(options, theta, name))
        print(line(rows[-1]), file=sys.stderr)  # a run that is broken off has told what it knows
    compare_eigenvalues(rows)
    for row in rows:
        print(line(row))
    if options.json is not None:
        about = vars(options) | {"json": None, "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(about, indent=1) + "\n")


def options_of_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("problem", choices=SPECS)
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--samples", type=int, help="default: as in the spec, 5,000 or 1,000")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=300, help="SGD steps, batches of 50")
    parser.add_argument("--lr", type=float, help="of the warm-up; default: as in the spec")
    parser.add_argument("--limit", type=float, default=600, help="seconds for each")
    parser.add_argument("--repeats", type=int, default=5, help="gradients timed, before and after")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
