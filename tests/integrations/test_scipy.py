from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh

from tests import dense
from tests.networks import CASES
from thalweg.errors import InvalidInput
from thalweg.integrations.scipy import as_linear_operator
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian


def test_scipy_finds_the_eigenvalues_of_the_dense_hessian_through_it() -> None:
    case = CASES["mlp"]().to(torch.float64)
    matrix = dense.hessian(dense.flat_loss(case), dense.flat_parameters(case)).numpy()
    hessian = Hessian(Objective(case.model, case.loss, case.data), keep_graph=True)
    operator = as_linear_operator(hessian)
    assert operator.dtype == np.float64
    found = eigsh(operator, 3, which="LA", return_eigenvectors=False)
    assert np.allclose(np.sort(found), np.linalg.eigvalsh(matrix)[-3:], rtol=1e-10)


def test_blocks_and_vectors_are_multiplied() -> None:
    case = CASES["mlp"]()
    hessian = Hessian(Objective(case.model, case.loss, case.data))
    operator = as_linear_operator(hessian)
    array = np.random.default_rng(0).normal(size=(hessian.shape[0], 4))
    expected = (hessian @ torch.from_numpy(array).float()).double().numpy()
    for block in (array, np.asfortranarray(array)):
        assert np.allclose(operator @ block, expected, atol=1e-6)
    assert np.allclose(operator @ array[:, 0], expected[:, 0], atol=1e-6)
    assert np.allclose(operator.T @ array[:, 0], expected[:, 0], atol=1e-6)


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mlp"]()
    hessian = Hessian(Objective(case.model, case.loss, case.data))
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(InvalidInput, match=r"thalweg\[scipy\]"):
        as_linear_operator(hessian)
