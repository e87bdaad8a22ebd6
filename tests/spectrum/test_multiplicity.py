"""Copies of repeated eigenvalues, looked for over few samples first."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from thalweg.loss.linearization import ChunkedLinearization
from thalweg.loss.objective import Objective
from thalweg.operators.gradient_covariance import GradientCovariance
from thalweg.operators.hessian import Hessian
from thalweg.operators.loss_operator import subsampled
from thalweg.operators.preconditioned import Preconditioned
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.eigensolver import eigenpairs, top_eigenpairs
from thalweg.spectrum.krylov import Krylov, Which
from thalweg.spectrum.multiplicity import FRACTION, Deflated, few_samples_see_none

SAMPLES, INPUTS = 1024, 12


def least_squares(
    outputs: int, seed: int = 0, product: Literal["auto", "exact"] = "auto"
) -> tuple[Objective, np.ndarray]:
    """A linear model, whose Hessian is X^T X / N once for every output, and its eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([4.0, 3.0, 2.0, *np.linspace(1, 0.1, INPUTS - 3)])
    inputs = torch.randn(SAMPLES, INPUTS, generator=generator) * scales
    targets = torch.randn(SAMPLES, outputs, generator=generator)
    model = nn.Linear(INPUTS, outputs, bias=False)
    data = (inputs.double(), targets.double())
    objective = Objective(model.double(), half_squares, data, product=product)
    second_moment = (inputs.double().T @ inputs.double() / SAMPLES).numpy()
    once = scipy.linalg.eigh(second_moment, eigvals_only=True)[::-1]
    return objective, np.repeat(once, outputs)


def half_squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum(dim=1).mean() / 2


@pytest.mark.parametrize("outputs", [2, 3, 4])
def test_copies_by_a_symmetry_of_the_model_are_found(outputs: int) -> None:
    objective, eigenvalues = least_squares(outputs)
    k = 2 * outputs + 1
    blind = top_eigenpairs(Hessian(objective), k, check_repeated=0)
    assert not np.allclose(blind.eigenvalues.numpy(), eigenvalues[:k], rtol=0.05)
    found = top_eigenpairs(Hessian(objective), k, tolerance=1e-6)
    assert np.allclose(found.eigenvalues.numpy(), eigenvalues[:k], rtol=1e-6)


def test_without_copies_the_look_costs_a_quarter_of_a_product() -> None:
    objective, eigenvalues = least_squares(1)
    hessian = Hessian(objective)
    alone = top_eigenpairs(hessian, 3, check_repeated=0)
    looked = top_eigenpairs(hessian, 3, check_repeated=4)
    assert torch.equal(looked.basis, alone.basis)
    assert looked.num_matvecs == alone.num_matvecs + 4 * FRACTION
    assert hessian.num_matvecs == 2 * alone.num_matvecs
    assert np.allclose(looked.eigenvalues.numpy(), eigenvalues[:3], rtol=1e-3)


def test_what_was_found_is_told_from_what_was_missed() -> None:
    objective, eigenvalues = least_squares(1)
    vectors = scipy.linalg.eigh(dense(Hessian(objective)))[1][:, ::-1].copy()
    for missing, clear in [(None, True), (0, False), (1, False), (2, False)]:
        krylov = Krylov(Hessian(objective), 10, "largest")
        kept = [i for i in range(4) if i != missing][:3]
        krylov.expand(torch.from_numpy(vectors[:, kept].copy()))
        found = krylov.ritz(3, 1e-3, exact=True)
        assert np.allclose(found.values.numpy(), eigenvalues[kept])
        generator = torch.Generator().manual_seed(0)
        assert few_samples_see_none(krylov, found, 4, generator) is clear


def test_where_no_samples_are_or_the_smallest_are_wanted_it_does_not_say() -> None:
    objective, _ = least_squares(1)
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[DenseOperator | Hessian, Which]] = [
        (DenseOperator(torch.diag(torch.tensor([3.0, 2.0, 1.0]))), "largest"),
        (Hessian(objective), "smallest"),
    ]
    for operator, which in cases:
        krylov = Krylov(operator, 3, which)
        krylov.expand(torch.eye(operator.shape[0], dtype=operator.dtype)[:, :1])
        assert not few_samples_see_none(krylov, krylov.ritz(1, 1.0, exact=True), 2, generator)


def test_the_look_is_the_same_operator_over_some_of_its_samples() -> None:
    objective, _ = least_squares(2)
    own = torch.arange(0, SAMPLES, 2)
    hessian = Hessian(objective, samples=own)
    few = subsampled(hessian, 0.25, torch.Generator().manual_seed(0))
    assert isinstance(few, Hessian)
    assert few.samples is not None
    assert len(few.samples) == len(own) // 4
    assert set(few.samples.tolist()) <= set(own.tolist())
    assert torch.equal(few @ torch.eye(2 * INPUTS).double(), few_by_hand(objective, few.samples))
    around = Preconditioned(hessian, torch.full((2 * INPUTS,), 4.0).double())
    scaled = subsampled(around, 0.25, torch.Generator().manual_seed(0))
    assert scaled is not None
    ones = torch.ones(2 * INPUTS).double()
    assert torch.allclose(scaled @ ones, (few @ ones) / 4)


def test_too_few_samples_or_batches_are_not_subsampled() -> None:
    objective, _ = least_squares(1)
    generator = torch.Generator().manual_seed(0)
    assert subsampled(Hessian(objective), 1 / 64, generator) is None
    assert subsampled(GradientCovariance(objective, batch_size=2), 0.5, generator) is None
    assert subsampled(GradientCovariance(objective), 0.5, generator) is not None


def test_a_loss_that_ignores_the_few_samples_is_asked_over_all() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, 4, generator=generator)
    targets = torch.full((SAMPLES,), -100)
    targets[:3] = torch.tensor([0, 1, 2])
    objective = Objective(nn.Linear(4, 3), nn.CrossEntropyLoss(), (inputs, targets))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = top_eigenpairs(Hessian(objective), 1)
    largest = scipy.linalg.eigh(dense(Hessian(objective)), eigvals_only=True)[-1]
    assert float(found.eigenvalues[0]) == pytest.approx(largest, rel=1e-3)


def test_few_samples_whose_loss_is_not_a_number_are_no_divergence() -> None:
    def masked(output: Tensor, target: Tensor) -> Tensor:
        mask = target[:, 1:]
        return (mask * (output - target[:, :1]) ** 2).sum() / mask.sum()

    generator = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(SAMPLES, 4, generator=generator), torch.zeros(SAMPLES, 2)
    targets[:3] = 1.0
    hessian = Hessian(Objective(nn.Linear(4, 1), masked, (inputs, targets)))
    largest = scipy.linalg.eigh(dense(hessian), eigvals_only=True)[-1]
    assert float(top_eigenpairs(hessian, 1).eigenvalues[0]) == pytest.approx(largest, rel=1e-3)


@pytest.mark.parametrize("keep_graph", [False, True])
def test_the_look_keeps_graphs_where_the_operator_does(keep_graph: bool) -> None:
    objective, _ = least_squares(1, product="exact")
    hessian = Hessian(objective, keep_graph=keep_graph)
    few = subsampled(hessian, 0.25, torch.Generator().manual_seed(0))
    assert isinstance(few, Hessian)
    _ = few @ torch.ones(INPUTS).double()
    linearization = few._at_theta()
    assert isinstance(linearization, ChunkedLinearization)
    assert (linearization._kept is not None) == keep_graph
    assert hessian._linearization is None


def test_deflation_takes_the_subspace_out() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    deflated = Deflated(DenseOperator(matrix), torch.eye(3)[:1], rounding=1e-6)
    assert torch.equal(deflated @ torch.eye(3), torch.diag(torch.tensor([0.0, 2.0, 1.0])))


def dense(operator: Hessian) -> np.ndarray:
    matrix = (operator @ torch.eye(operator.shape[0], dtype=operator.dtype)).double().numpy()
    return (matrix + matrix.T) / 2


def few_by_hand(objective: Objective, samples: Tensor) -> Tensor:
    return Hessian(objective, samples=samples) @ torch.eye(2 * INPUTS).double()


def test_tokens_of_a_few_sequences_are_as_good_as_samples() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Tanh(), nn.Linear(6, 7))
    tokens = torch.randint(0, 7, (32, 17))

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    sequences = Objective(model, loss, (tokens[:, :-1], tokens[:, 1:]))
    assert sequences.targets_per_sample == 16
    few = Hessian(sequences).subsampled(1 / 16, torch.Generator().manual_seed(0))
    assert few is not None
    assert len(few.samples) == 2  # of 16 targets each
    values = Objective(model[2], nn.MSELoss(), (torch.randn(32, 6), torch.randn(32, 7)))  # type: ignore[index]
    assert values.targets_per_sample == 1
    assert Hessian(values).subsampled(1 / 16, torch.Generator()) is None
    # The solve is spared the four products with all samples, and is as exact.
    space = eigenpairs(sequences, 2, tolerance=1e-5)
    assert space.num_matvecs != round(space.num_matvecs)
    truth = eigenpairs(sequences, 2, tolerance=1e-6, check_repeated=10)
    torch.testing.assert_close(space.eigenvalues, truth.eigenvalues, rtol=1e-4, atol=0)
