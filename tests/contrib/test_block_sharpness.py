from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from thalweg import registry
from thalweg.contrib import block_sharpness
from thalweg.contrib.block_sharpness import MEASURED_BLOCKS
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.measure.step_state import StepState
from thalweg.operators.gauss_newton import GaussNewton
from thalweg.operators.restricted import coordinates
from thalweg.problems.data.dataset import InputShape
from thalweg.problems.losses import CrossEntropy
from thalweg.problems.models.language_model import LanguageModel
from thalweg.spectrum.subspace import Subspace
from thalweg.tracking.source import FixedSubspace

SAMPLES, CONTEXT, VOCABULARY = 12, 3, 4


def language_model() -> Objective:
    """A Transformer of 156 parameters, away from its initial parameters, where H is indefinite."""
    torch.manual_seed(0)
    settings = LanguageModel(layers=1, width=4, heads=2, feed_forward=3)
    model = settings.build(InputShape((CONTEXT,), VOCABULARY), VOCABULARY).double()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    ids = torch.randint(VOCABULARY, (SAMPLES, CONTEXT + 1))
    return Objective(model, CrossEntropy(), (ids[:, :-1], ids[:, 1:]))


def dense_hessian(objective: Objective, rows: slice = slice(None)) -> Tensor:
    """By differentiating the gradient on one flat vector."""
    layout, model = objective.layout, objective.model
    inputs, targets = (part[rows] for part in objective.samples.tensors)  # type: ignore[attr-defined]

    def loss(theta: Tensor) -> Tensor:
        named = dict(zip(layout.names, layout.unflatten(theta), strict=True))
        output = functional_call(model, named, (inputs,))
        return nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())

    with sdpa_kernel(SDPBackend.MATH):
        return hessian(loss, objective.theta())  # type: ignore[return-value]


@pytest.fixture(scope="module")
def objective() -> Objective:
    return language_model()


@pytest.fixture(scope="module")
def matrix(objective: Objective) -> Tensor:
    return dense_hessian(objective)


def block_of(matrix: Tensor, objective: Objective, names: tuple[str, ...]) -> Tensor:
    places = coordinates(objective.layout, names)
    return matrix[places][:, places]


def test_with_a_product_for_each_direction_it_is_the_dense_blocks_trace(
    objective: Objective, matrix: Tensor
) -> None:
    found = block_sharpness(objective, products=1000, largest=True)
    assert sum(value.num_parameters for value in found.values()) == objective.num_parameters
    assert set(found) == {*MEASURED_BLOCKS, "position", "head"}
    for value in found.values():
        block = block_of(matrix, objective, value.names)
        assert value.num_parameters == len(block)
        assert value.standard_error == 0
        assert value.average == pytest.approx(float(block.trace()) / len(block), rel=1e-6)
        top = float(torch.linalg.eigvalsh(block)[-1])
        assert value.largest == pytest.approx(top, rel=1e-3)


def test_few_products_come_within_their_standard_error(
    objective: Objective, matrix: Tensor
) -> None:
    for value in block_sharpness(objective, products=9, seed=1).values():
        block = block_of(matrix, objective, value.names)
        error = abs(value.average - float(block.trace()) / len(block))
        assert error <= 3 * value.standard_error + 1e-9
        assert value.largest is None


def test_the_gauss_newton_part_has_a_sharpness_of_its_own(objective: Objective) -> None:
    identity = torch.eye(objective.num_parameters, dtype=torch.float64)
    dense = GaussNewton(objective) @ identity
    found = block_sharpness(objective, products=1000, operator=GaussNewton)
    for value in found.values():
        block = block_of(dense, objective, value.names)
        assert value.average == pytest.approx(float(block.trace()) / len(block), rel=1e-6)
        assert value.average > 0


def test_a_model_without_such_blocks_is_refused_and_has_its_own() -> None:
    data = (torch.ones(4, 2), torch.ones(4, 1))
    objective = Objective(nn.Sequential(nn.Linear(2, 1)), nn.MSELoss(), data)
    with pytest.raises(InvalidInput, match=r"blocks: none of .* first are 0\.weight"):
        block_sharpness(objective)
    assert block_sharpness(objective, {"slope": ["*.weight"]})["slope"].average == 2.0


def state(objective: Objective, batches: Any = None) -> StepState:
    basis = torch.eye(objective.num_parameters, dtype=torch.float64)[:, :1]
    source = FixedSubspace(Subspace(basis, torch.ones(1).double()))
    return StepState(3, objective.theta(), objective, source, 0.1, batches=batches)


def test_the_probe_fills_a_column_for_each_block(objective: Objective, matrix: Tensor) -> None:
    probe = registry.probes["block_sharpness"]
    row = probe.measure(state(objective))
    assert set(row) == set(probe.columns)
    exact = block_sharpness(objective, products=1000)
    for block in MEASURED_BLOCKS:
        estimate = block_sharpness(objective, products=12, seed=3)[block]
        assert row[f"block_sharpness_{block}"] == pytest.approx(estimate.average, rel=1e-9)
        assert estimate.average == pytest.approx(
            exact[block].average, abs=4 * estimate.standard_error + 1e-9
        )


def test_the_probe_reads_the_samples_of_the_mini_batches(objective: Objective) -> None:
    first = [torch.tensor([0]), torch.tensor([1, 2])]
    row = registry.probes["block_sharpness"].measure(state(objective, lambda _: first))
    part = block_sharpness(objective, samples=torch.arange(3), products=12, seed=3)
    assert row["block_sharpness_norm"] == pytest.approx(part["norm"].average, rel=1e-9)
    all_of_them = [torch.arange(SAMPLES)] * 2
    whole = registry.probes["block_sharpness"].measure(state(objective, lambda _: all_of_them))
    assert whole == registry.probes["block_sharpness"].measure(state(objective))


def test_the_probe_measures_nothing_without_blocks() -> None:
    data = (torch.ones(4, 2).double(), torch.ones(4, 1).double())
    plain = Objective(nn.Sequential(nn.Linear(2, 1)).double(), nn.MSELoss(), data)
    assert registry.probes["block_sharpness"].measure(state(plain)) == {}
