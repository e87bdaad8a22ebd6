from __future__ import annotations

import pytest
import torch
from torch import Tensor

from thalweg.contrib.training_jacobian.jacobian import TrainingJacobian
from thalweg.contrib.training_jacobian.singular_spectrum import (
    Parts,
    flattest_directions,
    singular_spectrum,
)
from thalweg.errors import Diverged, InvalidInput
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.subspace import random_subspace

VALUES = torch.tensor([40.0, 1.5, 1.005, 1.0, 0.9995, 0.98, 0.3, 0.01]).double()


def orthogonal(seed: int, size: int = 8) -> Tensor:
    return random_subspace(size, size, seed, dtype=torch.float64).basis


def matrix(left: Tensor, right: Tensor) -> Tensor:
    return left @ torch.diag(VALUES) @ right.T


def test_it_is_the_decomposition_that_the_matrix_was_made_of() -> None:
    left, right = orthogonal(1), orthogonal(2)
    spectrum = singular_spectrum(matrix(left, right))
    assert torch.allclose(spectrum.values, VALUES, rtol=1e-12)
    signs = (spectrum.left * left).sum(0).sign()
    assert torch.allclose(spectrum.left, left * signs, atol=1e-9)
    assert torch.allclose(spectrum.right, right * signs, atol=1e-9)
    assert torch.allclose(spectrum.cosines, (left * right).sum(0), atol=1e-9)


def test_its_parts_are_counted_at_the_named_threshold() -> None:
    spectrum = singular_spectrum(torch.diag(VALUES))
    assert spectrum.parts(1e-2) == Parts(chaotic=2, bulk=3, stable=3)
    assert spectrum.parts(1e-3) == Parts(chaotic=3, bulk=2, stable=3)
    assert spectrum.parts(1e-6) == Parts(chaotic=3, bulk=1, stable=4)


def test_the_bulk_of_either_side_is_the_span_of_its_vectors() -> None:
    left, right = orthogonal(1), orthogonal(2)
    spectrum = singular_spectrum(matrix(left, right))
    for side, vectors in (("left", left), ("right", right)):
        bulk = spectrum.bulk(1e-2, side)  # type: ignore[arg-type]
        assert bulk.k == 3
        for index in range(8):
            inside = 1.0 if 2 <= index <= 4 else 0.0
            assert bulk.alignment(vectors[:, index]) == pytest.approx(inside, abs=1e-9)
    assert spectrum.nearest_to_one(3).overlap(spectrum.bulk(1e-2)) == pytest.approx(1)
    assert spectrum.nearest_to_one(4).eigenvalues.tolist() == pytest.approx(
        [1.005, 1.0, 0.9995, 0.98]
    )


def test_a_symmetric_matrix_carries_its_directions_through() -> None:
    vectors = orthogonal(3)
    spectrum = singular_spectrum(matrix(vectors, vectors))
    assert torch.allclose(spectrum.cosines, torch.ones(8).double())


def test_float32_is_decomposed_in_float64() -> None:
    spectrum = singular_spectrum(torch.diag(VALUES).float())
    assert spectrum.values.dtype == torch.float64
    assert torch.allclose(spectrum.values, VALUES, rtol=1e-6)


def test_the_flattest_directions_have_the_smallest_curvature_of_either_sign() -> None:
    vectors, curvatures = orthogonal(4), torch.tensor([9, 4, 0.2, 0.01, -0.1, -0.3, -2, -7.0])
    operator = DenseOperator(vectors @ torch.diag(curvatures.double()) @ vectors.T)
    flat = flattest_directions(operator, 3)
    assert flat.eigenvalues.tolist() == pytest.approx([0.2, 0.01, -0.1])
    assert all(flat.alignment(vectors[:, i]) == pytest.approx(1) for i in (2, 3, 4))
    assert flat.alignment(vectors[:, 5]) == pytest.approx(0, abs=1e-9)


def test_what_cannot_be_used_is_refused() -> None:
    spectrum = singular_spectrum(torch.diag(VALUES))
    for threshold in (0.0, 1.0, -1.0):
        with pytest.raises(InvalidInput, match="threshold: got"):
            spectrum.parts(threshold)
        with pytest.raises(InvalidInput, match="threshold: got"):
            spectrum.bulk(threshold)
    far = singular_spectrum(torch.diag(torch.tensor([3.0, 0.5])))
    with pytest.raises(InvalidInput, match=r"allowed: 5\.0e-01 or more"):
        far.bulk(0.1)
    for k in (0, 9):
        with pytest.raises(InvalidInput, match="k: got"):
            spectrum.nearest_to_one(k)
        with pytest.raises(InvalidInput, match="k: got"):
            flattest_directions(DenseOperator(torch.diag(VALUES)), k)
    with pytest.raises(InvalidInput, match="the whole of J"):
        singular_spectrum(torch.ones(3, 2))
    square = TrainingJacobian(torch.eye(2), torch.eye(2), torch.zeros(2), torch.zeros(2))
    with pytest.raises(InvalidInput, match="of given directions"):
        singular_spectrum(square)
    with pytest.raises(Diverged, match="NaN or infinite"):
        singular_spectrum(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
