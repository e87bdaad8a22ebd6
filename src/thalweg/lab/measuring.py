"""What does a step of a study cost on this machine? Measured on a few steps, before time is spent.

Everything that a run needs is built here first: data that cannot be read or a k that is too large
is found out before there is a folder. The measurement also chooses how to multiply by the Hessian
and in which chunks; the choice is written into the spec, so that every run of the study, and a
resumed one, computes alike.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from thalweg.lab.spec import Spec, dump_spec, parse_spec

if TYPE_CHECKING:
    import torch

    from thalweg.lab.run import Setup

CHUNKS = (2048, 1024, 256)
"""Chunk sizes that are tried: the larger saves overheads, the smaller may stay in the cache."""
SMALL_CHUNKS = (32, 128, 512)
"""Chunks of a tracker's subset, for which the way to multiply is measured apart."""
CLEARLY_FASTER = 0.85
STEPS = 8


@dataclass(frozen=True)
class Measurement:
    """Costs in seconds, and what else was learned.

    Attributes:
        start: building a run's problem, once a run.
        gradient: one gradient of the full loss.
        step: a step of the last phase's optimizer alone.
        tracked: moving the subspace on by one step.
        solve: 2k eigenpairs from scratch.
        test: loss on the held-out data.
        vectorize_up_to, chunk_size: the fastest way to multiply by the Hessian.
        num_parameters, num_samples, k: P, N, k.
        optimizer_vectors: vectors of length P that the optimizer keeps.
        fingerprint: SHA-256 of the samples.
        notes: what a user should know about the data.
    """

    start: float
    gradient: float
    step: float
    tracked: float
    solve: float
    test: float
    vectorize_up_to: int
    chunk_size: int
    num_parameters: int
    num_samples: int
    k: int
    optimizer_vectors: int
    fingerprint: str
    notes: tuple[str, ...] = ()


def measure(spec: Spec, plugins: Sequence[str], device: str) -> Measurement:
    """Measure in a process of its own, with the threads that a run will have.

    Raises:
        InvalidInput: the problem cannot be built.
    """
    from thalweg.lab.processes import call

    return Measurement(**call(_measure, (dump_spec(spec), device, spec.threads, tuple(plugins))))


def _measure(spec_text: str, device: str, threads: int, plugins: Sequence[str]) -> dict[str, Any]:
    import torch

    from thalweg.lab.registry import load_plugin
    from thalweg.lab.run.building import build_setup, make_source, solve

    torch.set_num_threads(threads)
    for plugin in plugins:
        load_plugin(plugin)
    spec = parse_spec(tomllib.loads(spec_text), source="spec.toml")
    seed = spec.seeds[0]
    begin = time.perf_counter()
    setup = build_setup(spec, seed, device)
    start = time.perf_counter() - begin
    source = make_source(spec, setup, seed)
    objective, problem = setup.objective, setup.problem
    theta = objective.theta()
    gradient = _seconds(objective.gradient, objective.device)
    chunk, vectorize_up_to = _way_to_multiply(spec, setup)
    solving = _once(lambda: solve(objective, theta, 2 * setup.k, spec.subspace.tolerance), device)
    step, tracked, vectors = _steps(spec, setup, source, seed)
    return {
        "start": start,
        "gradient": gradient,
        "step": step,
        "tracked": tracked,
        "solve": solving,
        "test": _test_seconds(setup),
        "vectorize_up_to": vectorize_up_to,
        "chunk_size": chunk,
        "num_parameters": objective.num_parameters,
        "num_samples": objective.num_samples,
        "k": setup.k,
        "optimizer_vectors": vectors,
        "fingerprint": problem.fingerprint(),
        "notes": tuple(problem.notes),
    }


def _way_to_multiply(spec: Spec, setup: Setup) -> tuple[int, int]:
    """Set and return the chunk size, and up to which chunk a block of k products is vectorized.

    What the spec says stays.
    """
    import torch

    from thalweg.curvature import BlockProducts, Hessian

    objective, given = setup.objective, spec.problem.vectorize_up_to
    total = objective.num_samples
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(
        objective.num_parameters, setup.k, generator=generator, dtype=objective.dtype
    ).to(objective.device)
    products = objective.products
    for size in SMALL_CHUNKS:
        _ = Hessian(objective, samples=torch.arange(min(size, total))) @ block
    wanted = spec.problem.chunk_size
    # One chunk for all samples is the same as any larger one.
    chunks = [wanted] if wanted else [c for c in CHUNKS if c < 2 * total] or CHUNKS[-1:]
    seconds: list[tuple[float, int]] = []
    for chunk in chunks:
        objective.chunk_size = chunk
        product = _seconds(lambda: Hessian(objective) @ block, objective.device, times=1)
        seconds.append((product, chunk))
    first, best = seconds[0], min(seconds)
    _, chunk = best if best[0] < CLEARLY_FASTER * first[0] else first
    objective.chunk_size = chunk
    # One vector at a time never chooses: then both ways are the same.
    objective.products = BlockProducts(products.vectorize_up_to if given is None else given)
    return chunk, objective.products.vectorize_up_to


def _steps(spec: Spec, setup: Setup, source: Any, seed: int) -> tuple[float, float, int]:
    """Seconds of a training step and of moving the subspace on; vectors the optimizer keeps."""
    from thalweg.dynamics import Moment
    from thalweg.lab.run.building import make_optimizer
    from thalweg.lab.run.step import train_one_step

    phase = spec.phases[-1].model_copy(update={"split": None})
    optimizer = make_optimizer(spec, phase, setup, seed, source)
    source.update()
    training = tracking = 0.0
    for number in range(STEPS + 1):
        moment = Moment(
            step=number,
            theta=setup.objective.theta(),
            objective=setup.objective,
            source=source,
            learning_rate=phase.learning_rate(number, STEPS + 1),
        )
        device = setup.objective.device
        step = _once(lambda: train_one_step(moment, setup, optimizer, phase, seed), device)  # noqa: B023
        track = _once(source.update, device)
        if number:  # the first one warms up
            training, tracking = training + step, tracking + track
    kept = sum(
        value.numel()
        for state in optimizer.state.values()
        for value in state.values()
        if hasattr(value, "numel")
    )
    return training / STEPS, tracking / STEPS, round(kept / setup.objective.num_parameters)


def _test_seconds(setup: Setup) -> float:
    from thalweg.lab.run.step import evaluate_test

    if setup.problem.test is None:
        return 0.0
    theta, device = setup.objective.theta(), setup.objective.device
    return _seconds(lambda: evaluate_test(setup, theta), device, times=1)


def _seconds(function: Callable[[], object], device: torch.device | str, times: int = 3) -> float:
    """Mean seconds of a call, after one to warm up."""
    function()
    return sum(_once(function, device) for _ in range(times)) / times


def _once(function: Callable[[], object], device: torch.device | str) -> float:
    _wait_for(device)
    begin = time.perf_counter()
    function()
    _wait_for(device)
    return time.perf_counter() - begin


def _wait_for(device: torch.device | str) -> None:
    """A GPU works on after the call has returned."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()
