"""In which chunks is a problem evaluated, and how is a block multiplied by the Hessian of one?

Chosen by timing, on as few samples as tell. Vectorizing a block saves overheads, and so do larger
chunks: both are tried from the smallest size on, and no further once a size has none to save.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from thalweg.lab.run import Setup
    from thalweg.lab.spec import Spec
    from thalweg.lab.timing import Clock

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


def choose_way_to_multiply(spec: Spec, setup: Setup, clock: Clock) -> float:
    """Set the chunk size, and up to which chunk a block of k products is one vectorized pass.

    What the spec says stays.

    Returns:
        Seconds of the product of all samples with a block (P, k).
    """
    import torch

    from thalweg.curvature import BlockProducts

    objective, given = setup.objective, spec.problem.vectorize_up_to
    generator = torch.Generator().manual_seed(0)
    shape = (objective.num_parameters, setup.k)
    block = torch.randn(*shape, generator=generator, dtype=objective.dtype).to(objective.device)
    sizes = SMALL_CHUNKS if given is None else SMALL_CHUNKS[:1]
    a_sample = _measure_vectorization(setup, block, clock, sizes)
    # Known up to here, and no further: sizes in between would be timed both ways in a run.
    up_to = objective.products.vectorize_up_to if given is None else given
    objective.products = BlockProducts(up_to)
    wanted = spec.problem.chunk_size
    chunks = CHUNKS if objective.device.type == "cpu" else CHUNKS_OF_A_GPU
    chunks = (wanted,) if wanted else chunks
    objective.chunk_size, a_sample = _fastest_chunk(setup, block, clock, chunks, a_sample)
    return a_sample * objective.num_samples


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
        is_slower = objective.products.state_dict()["beyond"] <= size
        if is_slower or size == objective.num_samples:
            break
    return a_sample


def _fastest_chunk(
    setup: Setup, block: Tensor, clock: Clock, chunks: tuple[int, ...], a_sample: float
) -> tuple[int, float]:
    """The largest chunk that is not clearly slower than another one, with seconds of a sample."""
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
    chunk = max(c for c, seconds in tried.items() if seconds * CLEARLY_FASTER <= best)
    return chunk, tried[chunk]


def _multiply(setup: Setup, block: Tensor, size: int) -> Tensor:
    """The Hessian of the loss of the first samples, times a block (P, k)."""
    import torch

    from thalweg.curvature import Hessian

    return Hessian(setup.objective, samples=torch.arange(size)) @ block
