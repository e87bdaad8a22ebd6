"""Can a study be built, how large is its problem, and how is that best multiplied by the Hessian?

Found out before there is a folder: data that cannot be read, a k that is too large, or an optimizer
that refuses the model leave nothing behind. Chunk size and way to multiply are chosen by timing, on
as few samples as tell, where the spec leaves them open. Vectorizing a block saves overheads, and so
do larger chunks: both are tried from the smallest size on, and no further once a size saves none.
The choice is written into the spec, so that every run of the study, and a resumed one, computes
alike.

Nothing that diverges here ends a study: it belongs to the run that does. The next seed is tried,
and where none tells what is to be found out, that is guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from thalweg.errors import Diverged, Interrupted, InvalidInput
from thalweg.lab.config import PhaseSpec, Spec, dump_spec, parse_spec
from thalweg.lab.config.loading import MEASURED
from thalweg.lab.execution.signs_of_life import HUNG_AFTER
from thalweg.lab.tables import parse_toml
from thalweg.registry import load_plugin

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from thalweg.lab.training import Setup
    from thalweg.measure.clock import Clock

Texts = TypeVar("Texts")
Found = TypeVar("Found")

BUDGET_SECONDS = 10.0
"""For the choice of the way to multiply."""
SMALL_CHUNKS = (8, 32, 128, 512)
"""Chunks of a tracker's subset, for which the way to multiply is measured apart."""
CHUNKS = (64, 256, 1024, 2048)
"""Chunk sizes that are tried: the larger saves overheads, the smaller may stay in the cache."""
CHUNKS_OF_A_GPU = (256, 1024, 2048, 8192)
"""Overheads are larger there."""
PASSES = 6
"""Both ways, each once to warm up; then twice the faster one."""
CLEARLY_FASTER = 0.85
SLOW_SECONDS = 1.0
"""Beside a product that takes so long overheads do not count: no larger chunk is tried."""
FEW = 8
"""Samples in the step that shows what an optimizer keeps."""
MOST_VECTORS = 2
"""Kept by an optimizer whose step has diverged: as many as Adam keeps."""


@dataclass(frozen=True)
class ProblemFacts:
    """What is known of a study's problem once it has been built.

    Attributes:
        num_parameters, num_samples, k: P, N, k.
        optimizer_vectors: vectors of length P that the last phase's optimizer keeps.
        vectorize_up_to, chunk_size: the fastest way to multiply by the Hessian, or the spec's own.
        fingerprint: SHA-256 of the samples.
        notes: what a user should know about the data.
    """

    num_parameters: int
    num_samples: int
    k: int
    optimizer_vectors: int
    vectorize_up_to: int
    chunk_size: int
    fingerprint: str
    notes: tuple[str, ...] = ()


def examine(
    spec: Spec,
    plugins: Sequence[str],
    device: str,
    *,
    inline: bool = False,
    hung_after: float = HUNG_AFTER,
) -> ProblemFacts:
    """Build everything that the runs need, with the threads of a run.

    Args:
        spec: of the study.
        plugins: modules or files to load first.
        device: where the runs compute.
        inline: build in this process, as for a spec that holds Python objects; otherwise in one of
            its own, so that this one need not import PyTorch.
        hung_after: minutes without a sign of life after which that process is ended; 0: never.

    Raises:
        InvalidInput: something cannot be built.
        Interrupted: the process was ended from outside.
    """
    if inline:
        return examine_here(spec, plugins, device)
    return _elsewhere(_examine_text, dump_spec(spec), plugins, device, hung_after)


def examine_all(
    specs: Sequence[Spec],
    plugins: Sequence[str],
    device: str,
    *,
    inline: bool = False,
    hung_after: float = HUNG_AFTER,
) -> list[ProblemFacts]:
    """The same for many specs, in one process; how to multiply is timed once for each problem.

    Raises:
        InvalidInput: one cannot be built: a line for each.
        Interrupted: the process was ended from outside.
    """
    texts = [dump_spec(spec) for spec in specs]
    if inline:
        found = _examine_texts(texts, plugins, device)
    else:
        found = _elsewhere(_examine_texts, texts, plugins, device, hung_after)
    if wrong := [facts for facts in found if isinstance(facts, str)]:
        raise InvalidInput("\n".join(dict.fromkeys(wrong)))
    return [facts for facts in found if isinstance(facts, ProblemFacts)]


def _elsewhere(
    function: Callable[[Texts, Sequence[str], str], Found],
    texts: Texts,
    plugins: Sequence[str],
    device: str,
    hung_after: float,
) -> Found:
    """What a function finds in a process of its own, to which a spec travels as text."""
    from thalweg.lab.execution.processes import call

    try:
        return call(function, (texts, plugins, device), hung_after=hung_after)
    except Interrupted as error:
        raise Interrupted(f"building the problem: {error}") from error


def _examine_texts(
    texts: Sequence[str], plugins: Sequence[str], device: str
) -> list[ProblemFacts | str]:
    """What is known of each, or why it cannot be built."""
    known: dict[str, tuple[int, int]] = {}
    found: list[ProblemFacts | str] = []
    for text in texts:
        spec = _spec_in(text, plugins)
        key = problem_key(spec)
        spec = with_way_to_multiply(spec, *known.get(key, (None, None)))
        try:
            facts = examine_here(spec, plugins, device)
        except InvalidInput as error:
            found.append(str(error))
        else:
            known[key] = (facts.chunk_size, facts.vectorize_up_to)
            found.append(facts)
    return found


def problem_key(spec: Spec) -> str:
    """What two specs have in common that multiply alike: the problem and the type of numbers."""
    content = spec.problem.model_dump(mode="json", exclude={*MEASURED})
    return json.dumps([content, spec.dtype], sort_keys=True)


def with_way_to_multiply(spec: Spec, chunk_size: int | None, vectorize_up_to: int | None) -> Spec:
    """The spec with what was chosen by timing, where it leaves the choice."""
    given = {"vectorize_up_to": vectorize_up_to, "chunk_size": chunk_size}
    changed = {key: given[key] for key in MEASURED if getattr(spec.problem, key) is None}
    problem = spec.problem.model_copy(update=changed)
    return spec.model_copy(update={"problem": problem}) if changed else spec


def _examine_text(text: str, plugins: Sequence[str], device: str) -> ProblemFacts:
    """Build everything in the process that is there for it."""
    return examine_here(_spec_in(text, plugins), plugins, device)


def _spec_in(text: str, plugins: Sequence[str]) -> Spec:
    """The spec that a text holds, in names that plugins have registered."""
    for plugin in plugins:
        load_plugin(plugin)
    return parse_spec(parse_toml(text, "spec.toml"), source="spec.toml")


def examine_here(spec: Spec, plugins: Sequence[str], device: str) -> ProblemFacts:
    """Build everything in this process, whose number of threads is put back; see `examine`.

    Raises:
        InvalidInput: something cannot be built.
    """
    import torch

    from thalweg.lab.execution.machine import compute_repeatably
    from thalweg.lab.training.building import build_setup

    compute_repeatably(device)
    for plugin in plugins:
        load_plugin(plugin)
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    try:
        for seed in spec.seeds:
            with suppress(Diverged):
                return _facts(spec, build_setup(spec, seed, device), seed)
        return _guessed_facts(spec, device)
    finally:
        torch.set_num_threads(threads)


def _facts(spec: Spec, setup: Setup, seed: int) -> ProblemFacts:
    """Build everything of one seed, and find out what is to be known.

    Raises:
        Diverged: a product with the Hessian is NaN or infinite.
    """
    from thalweg.measure.clock import Clock

    _build_every_phase(spec, setup, seed)
    objective = setup.objective
    choose_way_to_multiply(spec, setup, Clock(objective.device, BUDGET_SECONDS))
    return _facts_of(setup, _vectors_kept(spec, setup, seed))


def _guessed_facts(spec: Spec, device: str) -> ProblemFacts:
    """What is known of a problem whose loss is no number at any seed's initial parameters."""
    from thalweg.lab.training.building import build_setup

    given = 1 if spec.subspace.k == "gap" else spec.subspace.k  # a gap cannot be found here
    known = spec.model_copy(update={"subspace": spec.subspace.model_copy(update={"k": given})})
    return _facts_of(build_setup(known, spec.seeds[0], device), MOST_VECTORS)


def _facts_of(setup: Setup, vectors: int) -> ProblemFacts:
    objective = setup.objective
    return ProblemFacts(
        objective.num_parameters,
        objective.num_samples,
        setup.k,
        vectors,
        objective.multiplier.vectorize_up_to,
        objective.chunk_size or objective.num_samples,
        setup.problem.fingerprint(),
        tuple(setup.problem.notes),
    )


def choose_way_to_multiply(spec: Spec, setup: Setup, clock: Clock) -> None:
    """Set the chunk size, and up to which chunk a block of k products is one vectorized pass.

    What the spec says stays; with nothing to choose, few samples are multiplied, to see that the
    loss has second derivatives.
    """
    import torch

    from thalweg.loss.chunk_multiplier import ChunkMultiplier

    objective, up_to = setup.objective, spec.problem.vectorize_up_to
    generator = torch.Generator().manual_seed(0)
    shape = (objective.num_parameters, setup.k)
    block = torch.randn(*shape, generator=generator, dtype=objective.dtype).to(objective.device)
    chunk = spec.problem.chunk_size
    if up_to is not None and chunk is not None:
        _multiply(setup, block, min(SMALL_CHUNKS[0], objective.num_samples))
        return
    sizes = SMALL_CHUNKS if up_to is None else SMALL_CHUNKS[:1]
    a_sample = _measure_vectorization(setup, block, clock, sizes)
    # Known up to here, and no further: sizes in between would be timed both ways in a run.
    up_to = objective.multiplier.vectorize_up_to if up_to is None else up_to
    objective.multiplier = ChunkMultiplier(up_to)
    if chunk is None:
        chunks = CHUNKS if objective.device.type == "cpu" else CHUNKS_OF_A_GPU
        objective.chunk_size = _fastest_chunk(setup, block, clock, chunks, a_sample)


def _measure_vectorization(
    setup: Setup, block: Tensor, clock: Clock, sizes: tuple[int, ...]
) -> float:
    """Let the objective time both ways on chunks of these sizes; seconds of a sample.

    Vectorizing gains the most on the smallest: where it does not on one size, no larger one is
    tried.
    """
    objective, a_sample = setup.objective, 0.0
    for size in sizes:
        size = min(size, objective.num_samples)
        if a_sample and not clock.affords(PASSES * size * a_sample):
            break
        _multiply(setup, block, size)
        a_sample = clock.seconds(partial(_multiply, setup, block, size)) / size
        is_slower = objective.multiplier.state_dict()["beyond"] <= size
        if is_slower or size == objective.num_samples:
            break
    return a_sample


def _fastest_chunk(
    setup: Setup, block: Tensor, clock: Clock, chunks: tuple[int, ...], a_sample: float
) -> int:
    """The largest chunk that is not clearly slower than another one."""
    total = setup.objective.num_samples
    tried: dict[int, float] = {}
    for chunk in chunks:
        # One chunk for all samples is the same as any larger one.
        if tried and chunk >= 2 * total:
            break
        size = min(max(1, int(SLOW_SECONDS / a_sample)), total, max(*CHUNKS, chunk))
        if tried and size < min(chunk, total):
            break
        setup.objective.chunk_size = chunk
        _multiply(setup, block, min(size, SMALL_CHUNKS[0]))  # warms up
        a_sample = clock.seconds(partial(_multiply, setup, block, size)) / size
        tried[chunk] = a_sample
        if a_sample * CLEARLY_FASTER > min(tried.values()):
            break
    best = min(tried.values())
    return max(chunk for chunk, seconds in tried.items() if seconds * CLEARLY_FASTER <= best)


def _multiply(setup: Setup, block: Tensor, size: int) -> Tensor:
    """The Hessian of the loss of the first samples, times a block (P, k)."""
    import torch

    from thalweg.operators.hessian import Hessian

    return Hessian(setup.objective, samples=torch.arange(size)) @ block


def _build_every_phase(spec: Spec, setup: Setup, seed: int) -> None:
    """Build k, subspace and optimizer of the trunk's phases and of every branch.

    Raises:
        InvalidInput: one of them cannot be built.
    """
    from thalweg.lab.training.building import make_optimizer, make_source, number_of_directions
    from thalweg.spectrum.subspace import random_subspace

    objective = setup.objective
    drawn = random_subspace(objective.num_parameters, 1, seed=0, dtype=objective.dtype)
    somewhere = drawn.to(objective.device)
    runs = [(spec, phase) for phase in spec.phases]
    runs += [(spec.of_branch(name), spec.branch_phase(name)) for name in spec.branches]
    for own, phase in runs:
        own_setup = setup
        if own.subspace.k != spec.subspace.k:
            k = number_of_directions(own, setup.problem, objective)
            own_setup = replace(setup, k=k)
        source = make_source(own, own_setup, seed)
        make_optimizer(own, phase, own_setup, seed, source, somewhere)


def _vectors_kept(spec: Spec, setup: Setup, seed: int) -> int:
    """Vectors of length P that the last phase's optimizer keeps: seen after a step."""
    try:
        optimizer = _optimizer_after_a_step(spec, spec.phases[-1], setup, seed)
    except Diverged:
        return MOST_VECTORS
    kept = sum(
        value.numel()
        for state in optimizer.state.values()
        for value in state.values()
        if hasattr(value, "numel")
    )
    return round(kept / setup.objective.num_parameters)


def _optimizer_after_a_step(spec: Spec, phase: PhaseSpec, setup: Setup, seed: int) -> Optimizer:
    """An optimizer that has made a step on few samples, without split, noise and workers."""
    from thalweg.lab.training.building import make_optimizer, make_source
    from thalweg.lab.training.step import make_update
    from thalweg.measure.step_state import StepState

    objective, given = setup.objective, phase.batch_size
    size = min(FEW, objective.num_samples if given == "all" else given)
    alone = {"split": None, "noise": None, "local": None, "batch_size": size}
    phase = phase.model_copy(update=alone)
    source = make_source(spec, setup, seed)  # never asked
    optimizer = make_optimizer(spec, phase, setup, seed, source)
    moment = StepState(
        step=0,
        theta=objective.theta(),
        objective=objective,
        source=source,
        learning_rate=phase.learning_rate(0, 1),
        optimizer=optimizer,
        k=setup.k,
    )
    make_update(moment, setup, optimizer, phase, seed)
    return optimizer
