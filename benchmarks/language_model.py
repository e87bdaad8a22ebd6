"""The top Hessian eigenpairs of a GPT-2 that was trained on a text, and what following them costs.

    python benchmarks/language_model.py solve --text tinyshakespeare.txt --device cuda
    python benchmarks/language_model.py follow --text tinyshakespeare.txt --device cuda
    python benchmarks/language_model.py largest --text tinyshakespeare.txt --device cuda
    python benchmarks/language_model.py solve --text tinyshakespeare.txt --size small  # on a CPU

`solve`: a GPT-2 (124 M parameters, from a transformers configuration) after some hundred steps of
AdamW in bfloat16, its loss over 16,384 tokens. Each row is a way to its top eigenpairs: exact
products in float32, exact with the forward pass in bfloat16, differences of gradients with fused
attention; a hand-written Lanczos with graphs rebuilt, the products of hessian-eigenthings
(`pip install --no-deps hessian-eigenthings`). k is where the gap is widest, and 10. Residuals are
from products by double backward, in float32, that share no code with Thalweg.

`follow`: the eigenspace at every step of AdamW, its cost beside a training step and beside the line
search for one number (critical sharpness), its estimated error beside that against a solve.

`largest`: k = 4 of a model with so many parameters that it just fits, by differences.

Seconds are wall time, read when the device is done; gradients are these seconds over the median
time of a float32 gradient of the same tokens in the same process. Memory is the peak that torch
allocated on a GPU, and the peak of the process on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from thalweg.integrations.huggingface_model import NextToken, next_token_loss
from thalweg.loss.objective import Objective
from thalweg.measure.clock import now
from thalweg.measure.critical_sharpness import critical_sharpness
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import NotConverged, eigenpairs
from thalweg.spectrum.gap import widest_gap
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.tracker import SubspaceTracker

SIZES = {
    "gpt2": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 256},
    "tiny": {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": 128, "n_positions": 32},
    "small": {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 512, "n_positions": 64},
    "billion": {
        "n_layer": 36,
        "n_embd": 1536,
        "n_head": 24,
        "vocab_size": 50257,
        "n_positions": 256,
    },
}


@dataclass
class Case:
    """A model, the sequences that its loss is watched over, and those that it is trained on."""

    net: NextToken
    watched: Tensor
    corpus: Tensor
    optimizer: torch.optim.Optimizer
    options: argparse.Namespace
    steps: int = 0

    @property
    def parameters(self) -> list[Tensor]:
        return list(self.net.parameters())

    @property
    def device(self) -> torch.device:
        return self.watched.device

    def train(self, steps: int) -> float:
        """So many steps of AdamW in bfloat16; the last loss."""
        loss = torch.zeros(())
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.steps)
            size = (self.options.batch_size,)
            rows = torch.randint(len(self.corpus), size, generator=generator)
            tokens = self.corpus[rows.to(self.device)]
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = next_token_loss(self.net(tokens), tokens)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.steps += 1
        return float(loss.detach())

    def objective(self, **options: Any) -> Objective:
        return Objective(
            self.net,
            next_token_loss,
            (self.watched, self.watched),
            chunk_size=self.options.chunk,
            mode="eval",
            **options,
        )


def built(options: argparse.Namespace) -> Case:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(options.seed)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**SIZES[options.size], **off)
    device = torch.device(options.device)
    net = NextToken(transformers.GPT2LMHeadModel(config)).to(device)
    letters = np.frombuffer(options.text.read_bytes(), dtype=np.uint8).astype(np.int64)
    context = config.n_positions
    count = len(letters) // context
    corpus = torch.from_numpy(letters[: count * context]).view(count, context).to(device)
    number = max(1, options.tokens // context)
    watched = corpus[:: count // number][:number].contiguous()
    optimizer = torch.optim.AdamW(net.parameters(), lr=options.lr, weight_decay=0.1)
    return Case(net, watched, corpus, optimizer, options)


# The reference: products by double backward, by hand.


def shards_of_products(case: Case) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
    """The gradient of each chunk with its graph, and its share of the mean loss."""
    for tokens in case.watched.split(case.options.chunk):
        loss = next_token_loss(case.net(tokens), tokens)
        share = len(tokens) / len(case.watched)
        yield share, torch.autograd.grad(loss, case.parameters, create_graph=True)


def product_by_hand(case: Case, rows: Tensor) -> Tensor:
    """H times each row of (m, P), in float32, the graph rebuilt for each block."""
    result = torch.zeros_like(rows)
    sizes = [p.numel() for p in case.parameters]
    with sdpa_kernel(SDPBackend.MATH):
        for share, gradient in shards_of_products(case):
            for row, image in zip(rows, result, strict=True):
                pieces = row.split(sizes)
                shaped = [part.view_as(g) for part, g in zip(pieces, gradient, strict=True)]
                found = torch.autograd.grad(gradient, case.parameters, shaped, retain_graph=True)
                image += share * torch.cat([part.reshape(-1) for part in found])
    return result


def residual_of(case: Case, space: Subspace) -> float:
    """max_i norm(H u_i - lambda_i u_i) / abs(lambda_1), by hand; vector by vector, for memory."""
    worst = 0.0
    for value, vector in zip(space.eigenvalues, space.basis.T, strict=True):
        image = product_by_hand(case, vector[None].contiguous())[0]
        worst = max(worst, float((image - value * vector).norm()))
    return worst / float(space.eigenvalues[0].abs())


# The rows.


class Row(NamedTuple):
    name: str
    k: int
    products: float
    seconds: float
    gradients: float
    residual: float
    gibibytes: float
    eigenvalues: list[float]


def exact(case: Case, k: int, tolerance: float) -> Subspace:
    objective = case.objective(product="exact")
    return eigenpairs(Hessian(objective, keep_graph=True), k, tolerance=tolerance)


def exact_bfloat16(case: Case, k: int, tolerance: float) -> Subspace:
    objective = case.objective(product="exact", forward_dtype=torch.bfloat16)
    return eigenpairs(Hessian(objective, keep_graph=True), k, tolerance=max(tolerance, 1e-2))


def differences(case: Case, k: int, tolerance: float) -> Subspace:
    return eigenpairs(Hessian(case.objective(product="difference")), k, tolerance=tolerance)


def differences_bfloat16(case: Case, k: int, tolerance: float) -> Subspace:
    objective = case.objective(product="difference", forward_dtype=torch.bfloat16)
    return eigenpairs(Hessian(objective), k, tolerance=max(tolerance, 1e-2))


def refined(case: Case, k: int, tolerance: float) -> Subspace:
    """Differences in bfloat16 to 1e-2, and exact products in float32 from there."""
    rough = differences_bfloat16(case, k, 1e-2)
    hessian = Hessian(case.objective(product="exact"), keep_graph=True)
    found = eigenpairs(hessian, k, tolerance=tolerance, start=rough.basis, check_repeated=0)
    rough_products = float(rough.num_matvecs or 0)
    return Subspace(
        found.basis,
        found.eigenvalues,
        found.residuals,
        num_matvecs=float(found.num_matvecs or 0) + rough_products,
        converged=found.converged,
    )


def by_hand(case: Case, k: int, tolerance: float) -> Subspace:
    """Lanczos with full reorthogonalization, graphs rebuilt, until the residuals are small."""
    generator = torch.Generator().manual_seed(0)
    size = sum(p.numel() for p in case.parameters)
    vector = torch.randn(size, generator=generator).to(case.device)
    rows: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        rows.append(vector / vector.norm())
        vector = product_by_hand(case, rows[-1][None])[0]
        diagonal.append(float(vector @ rows[-1]))
        for _ in range(2):
            for row in rows:
                vector = vector - row * (row @ vector)
        beside.append(float(vector.norm()))
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        off = torch.tensor(beside[:-1], dtype=torch.float64)
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        if len(rows) < k:
            continue
        estimate = float((beside[-1] * vectors[-1, -k:]).abs().max()) / float(values[-1].abs())
        if estimate <= tolerance or len(rows) >= case.options.most_products:
            chosen = vectors[:, -k:].flip(1).to(rows[0])
            basis = torch.zeros(size, k, device=case.device)
            for row, weights in zip(rows, chosen, strict=True):
                basis += row[:, None] * weights
            found = values[-k:].flip(0).to(rows[0])
            return Subspace(basis, found, num_matvecs=float(len(rows)), converged=True)


def eigenthings(case: Case, k: int, tolerance: float) -> Subspace:
    """Its Lanczos, at its defaults but for the number of steps: as many as Thalweg's products."""
    operators = importlib.import_module("hessian_eigenthings.operators")
    algorithms = importlib.import_module("hessian_eigenthings.algorithms")
    batches = [(tokens, tokens) for tokens in case.watched.split(case.options.chunk)]
    steps = case.options.steps_of_peer
    with sdpa_kernel(SDPBackend.MATH):
        operator = operators.HessianOperator(
            case.net, batches, lambda net, batch: next_token_loss(net(batch[0]), batch[1])
        )
        found = algorithms.lanczos(operator, k=k, which="LA", seed=0, max_iter=steps)
    vectors = found.eigenvectors
    if vectors.shape[0] == k:
        vectors = vectors.T
    order = found.eigenvalues.argsort(descending=True)
    basis = vectors[:, order].to(case.device, torch.float32)
    values = found.eigenvalues[order].to(case.device, torch.float32)
    return Subspace(basis, values, num_matvecs=float(steps), converged=True)


WAYS: dict[str, Callable[[Case, int, float], Subspace]] = {
    "exact, float32": exact,
    "exact, bfloat16 forward": exact_bfloat16,
    "differences, float32": differences,
    "differences, bfloat16": differences_bfloat16,
    "differences, refined": refined,
    "by hand, graph rebuilt": by_hand,
    "hessian-eigenthings": eigenthings,
}


def solved(case: Case, name: str, k: int, gradient: float) -> Row:
    tolerance = case.options.tolerance
    reset_memory(case.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        begin = now(case.device)
        space = WAYS[name](case, k, tolerance)
        seconds = now(case.device) - begin
    peak = memory(case.device)
    products = float(space.num_matvecs or 0)
    values = space.eigenvalues.tolist()
    residual = residual_of(case, space)
    return Row(name, k, products, seconds, seconds / gradient, residual, peak, values)


def solve(case: Case) -> Iterator[dict[str, Any]]:
    gradient = seconds_of_gradient(case)
    yield {"gradient_seconds": gradient}
    first = solved(case, "exact, float32", case.options.k, gradient)
    by_gap = widest_gap(torch.tensor(first.eigenvalues))
    case.options.steps_of_peer = round(first.products)
    yield {"widest_gap_at": by_gap, "eigenvalues": first.eigenvalues}
    names = [name for name in WAYS if case.options.only in (None, name)]
    for k in dict.fromkeys((case.options.k, by_gap)):
        for name in names:
            if (name, k) == ("exact, float32", case.options.k):
                yield first._asdict()
                continue
            try:
                yield solved(case, name, k, gradient)._asdict()
            except Exception as error:  # whatever another package raises belongs in its row
                message = str(error).strip().splitlines() or [""]
                yield {"name": name, "k": k, "failed": f"{type(error).__name__}: {message[0]}"}


def follow(case: Case) -> Iterator[dict[str, Any]]:
    """The eigenspace at every step of AdamW."""
    options = case.options
    gradient = seconds_of_gradient(case)
    objective = case.objective()
    first = eigenpairs(Hessian(objective), options.k, tolerance=1e-2)
    k = options.k if options.fixed_k else widest_gap(first.eigenvalues)
    tracker = SubspaceTracker(objective, k, tolerance=1e-2, error=options.error)
    yield {"gradient_seconds": gradient, "k": k, "eigenvalues": first.eigenvalues.tolist()}
    for step in range(options.follow):
        begin = now(case.device)
        case.train(1)
        training = now(case.device) - begin
        wanted = objective.gradient()
        begin = now(case.device)
        space = tracker.update(vector=wanted)
        seconds = now(case.device) - begin
        row: dict[str, Any] = {
            "step": step,
            "training_seconds": training,
            "seconds": seconds,
            "gradients": seconds / gradient,
            "counted": tracker.report.subspace_cost,
            "estimated_error": tracker.report.error,
            "sharpness": float(space.eigenvalues[0]),
        }
        if step % options.check == 0:
            truth = eigenpairs(Hessian(objective), k, tolerance=1e-4)
            off = space.project(wanted) - truth.project(wanted)
            row["error"] = float(off.norm() / wanted.norm())
            begin = now(case.device)
            search = critical_sharpness(objective, case.optimizer)
            row["critical_sharpness"] = search.value
            row["critical_sharpness_gradients"] = (now(case.device) - begin) / gradient
        yield row


def largest(case: Case) -> Iterator[dict[str, Any]]:
    """k = 4 by differences, in bfloat16."""
    gradient = seconds_of_gradient(case)
    yield {"gradient_seconds": gradient}
    yield solved(case, "differences, bfloat16", 4, gradient)._asdict()


def seconds_of_gradient(case: Case) -> float:
    objective = case.objective()
    objective.gradient()
    each = []
    for _ in range(3):
        begin = now(case.device)
        objective.gradient()
        each.append(now(case.device) - begin)
    return statistics.median(each)


def reset_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def memory(device: torch.device) -> float:
    """The peak, in GiB; on a CPU that of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def said(row: dict[str, Any]) -> str:
    def form(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}"
        return str([round(v, 3) for v in value[:12]] if isinstance(value, list) else value)

    return "  ".join(f"{key} {form(value)}" for key, value in row.items())


def main() -> None:
    options = options_of_command_line()
    torch.set_num_threads(options.threads)
    case = built(options)
    begin = time.perf_counter()
    loss = case.train(options.train)
    facts = {
        "P": sum(p.numel() for p in case.parameters),
        "tokens": case.watched.numel(),
        "trained_steps": options.train,
        "loss": loss,
        "seconds": time.perf_counter() - begin,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU",
        "threads": options.threads,
    }
    print(said(facts), flush=True)
    rows = []
    for row in {"solve": solve, "follow": follow, "largest": largest}[options.what](case):
        print(said(row), flush=True)
        rows.append(row)
    if options.json:
        options.json.write_text(json.dumps({"facts": facts, "rows": rows}, indent=1))


def options_of_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["solve", "follow", "largest"])
    parser.add_argument("--text", type=Path, required=True, help="any text file")
    parser.add_argument("--size", choices=list(SIZES), default="gpt2")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=16384, help="that are watched")
    parser.add_argument("--train", type=int, default=200, help="steps before")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--chunk", type=int, default=16, help="sequences evaluated at once")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--fixed-k", action="store_true", help="follow k, not the widest gap")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--error", type=float, default=0.01, help="of following")
    parser.add_argument("--follow", type=int, default=30, help="steps")
    parser.add_argument("--check", type=int, default=10, help="steps between solves")
    parser.add_argument("--most-products", type=int, default=200, help="of the recipe by hand")
    parser.add_argument("--only", choices=list(WAYS), help="this way alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows there")
    options = parser.parse_args()
    if not options.text.is_file():
        parser.error(f"--text: no file {options.text}")
    return options


if __name__ == "__main__":
    sys.exit(main())
