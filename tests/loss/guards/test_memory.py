from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.networks import CASES
from thalweg.loss.chunk_multiplier import ChunkMultiplier
from thalweg.loss.guards.memory import (
    ChunkHalved,
    GraphsRebuilt,
    is_out_of_memory,
    within_memory,
)
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian


def test_out_of_memory_halves_the_chunk_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mlp"]()
    loss = Objective(case.model, case.loss, case.data, chunk_size=8, vectorize_up_to=0)
    expected, image = loss.gradient(), Hessian(loss) @ torch.ones(loss.num_parameters)
    forward = case.model.forward

    def greedy(inputs: Tensor) -> Tensor:
        if len(inputs) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(inputs)

    monkeypatch.setattr(case.model, "forward", greedy)
    with pytest.warns(ChunkHalved, match="out of memory with chunks of 8 samples: 4 from now on"):
        gradient = loss.gradient()
    assert torch.allclose(gradient, expected, atol=1e-6)
    assert loss.chunk_size == 4
    hessian = Hessian(loss, keep_graph=True)
    for _ in range(2):
        assert torch.allclose(hessian @ torch.ones(loss.num_parameters), image, atol=1e-5)


def test_a_product_that_runs_out_of_memory_gives_up_the_graphs_it_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["mlp"]()
    loss = Objective(case.model, case.loss, case.data, chunk_size=8, vectorize_up_to=0)
    hessian = Hessian(loss, keep_graph=True)
    expected = hessian @ torch.ones(loss.num_parameters)
    multiply = ChunkMultiplier.multiply

    def greedy(self: ChunkMultiplier, chunk: Any, vectors: Any) -> Tensor:
        if chunk.samples > 4:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return multiply(self, chunk, vectors)

    monkeypatch.setattr(ChunkMultiplier, "multiply", greedy)
    with pytest.warns(ChunkHalved):
        again = hessian @ torch.ones(loss.num_parameters)
    assert torch.allclose(again, expected, atol=1e-5)


def test_where_memory_holds_one_graph_but_not_all_they_are_built_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["mlp"]()
    loss = Objective(case.model, case.loss, case.data, chunk_size=3, vectorize_up_to=0)
    expected = Hessian(loss) @ torch.ones(loss.num_parameters)
    multiply = ChunkMultiplier.multiply
    graphs: dict[int, weakref.ref[Any]] = {}
    held: list[int] = []

    def greedy(self: ChunkMultiplier, chunk: Any, vectors: Any) -> Tensor:
        graphs[id(chunk)] = weakref.ref(chunk)
        alive = [ref() for ref in graphs.values()]
        others = [each for each in alive if each is not None and each is not chunk]
        del alive
        held.append(len(others))
        if len(others) >= 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return multiply(self, chunk, vectors)

    monkeypatch.setattr(ChunkMultiplier, "multiply", greedy)
    hessian = Hessian(loss, keep_graph=True)
    with pytest.warns(GraphsRebuilt, match="built anew for each"):
        again = hessian @ torch.ones(loss.num_parameters)
    assert torch.equal(again, expected)
    assert loss.chunk_size == 3
    assert loss.product == "exact"
    # From then on at most the one before is there still, and nothing is said again.
    held.clear()
    assert torch.equal(hessian @ torch.ones(loss.num_parameters), expected)
    assert max(held) <= 1
    assert torch.equal(hessian.gradient, loss.gradient())


def test_memory_that_does_not_suffice_for_one_sample_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = CASES["mlp"]()
    loss = Objective(case.model, case.loss, case.data)

    def greedy(inputs: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(case.model, "forward", greedy)
    with pytest.warns(ChunkHalved), pytest.raises(torch.OutOfMemoryError):
        loss.value()


@pytest.mark.parametrize(
    ("message", "known"),
    [
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_libraries_that_ask_for_memory_themselves_are_understood(message: str, known: bool) -> None:
    assert is_out_of_memory(RuntimeError(message)) is known


def test_halving_begins_at_the_samples_of_this_process() -> None:
    """Those of all processes are no chunk of any: 1,000 processes would halve ten times in vain."""

    class Ours:
        chunk_size: int | None = None
        samples, device = range(8), torch.device("cpu")
        num_samples = 8000

        def explained(self, error: Exception) -> None: ...

    ours = Ours()

    def compute() -> int:
        if ours.chunk_size is None or ours.chunk_size > 4:
            raise MemoryError
        return ours.chunk_size

    with pytest.warns(ChunkHalved, match="with chunks of 8 samples: 4 from now on"):
        assert within_memory(ours, compute) == 4
