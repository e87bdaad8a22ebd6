from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from tests.networks import digits
from thalweg.errors import InvalidInput
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.operators.symmetric import DenseOperator
from thalweg.spectrum.eigensolver import top_eigenpairs
from thalweg.spectrum.gap import GapClosed, next_eigenpair, widest_gap
from thalweg.tracking.tracker import SubspaceTracker


def rotated(values: list[float]) -> tuple[DenseOperator, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = len(values)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = (vectors * torch.tensor(values, dtype=torch.float64)) @ vectors.T
    return DenseOperator(matrix), vectors


def test_the_widest_gap_is_that_of_ratios_of_positive_eigenvalues() -> None:
    assert widest_gap(torch.tensor([9.0, 8.0, 7.0, 1.0, 0.5])) == 3
    assert widest_gap(torch.tensor([9.0, 8.0, -1.0, -5.0])) == 1
    assert widest_gap(torch.tensor([3.0])) == 1


@pytest.mark.parametrize(
    ("eigenvalues", "message"),
    [
        ([], r"eigenvalues: got \(0,\), allowed: a shape \(n,\)"),
        ([[2.0, 1.0]], r"eigenvalues: got \(1, 2\)"),
        ([1.0, 2.0], "numbers in descending order"),
        ([float("nan")], "numbers in descending order"),
    ],
)
def test_no_gap_is_looked_for_in_what_is_no_spectrum(eigenvalues: list, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        widest_gap(torch.tensor(eigenvalues))


def test_the_next_eigenvalue_is_found_from_below() -> None:
    values = [9.0, 6.0, 4.0, 1.5, *torch.linspace(1.0, -3.0, 40).tolist()]
    operator, vectors = rotated(values)
    found = next_eigenpair(operator, vectors[:, :3].T.contiguous(), 9.0)
    assert 1.3 < found.value <= 1.5 + 1e-12
    assert found.num_matvecs <= 15
    again = next_eigenpair(operator, vectors[:, :3].T.contiguous(), 9.0, found.vector)
    assert found.value <= again.value <= 1.5 + 1e-12


def test_a_spectrum_that_ends_with_the_subspace_has_nothing_next() -> None:
    operator, vectors = rotated([5.0, 4.0, *[0.0] * 10])
    found = next_eigenpair(operator, vectors[:, :2].T.contiguous(), 5.0)
    assert abs(found.value) < 1e-12


def test_a_tracker_knows_the_next_eigenvalue_and_says_so_where_the_gap_is_closed() -> None:
    case = digits()
    objective = Objective(case.model, case.loss, case.data, vectorize_up_to=200)
    spectrum = top_eigenpairs(Hessian(objective, keep_graph=True), 16, tolerance=1e-4).eigenvalues
    ratios = spectrum[1:] / spectrum[:-1]
    closed, wide = int(ratios.argmax()) + 1, int(ratios[1:].argmin()) + 2
    assert ratios[closed - 1] > 0.96 > 0.9 > ratios[wide - 1]
    with pytest.warns(GapClosed, match=rf"lambda_{closed} = .* lambda_{closed + 1} = .* close up"):
        SubspaceTracker(objective, closed).update()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker = SubspaceTracker(objective, wide)
        tracker.update()
    following = float(spectrum[wide])
    assert 0.9 * following < tracker.report.next_eigenvalue <= following * (1 + 1e-5)
    # Without thorough looks too: what lies below comes along with every product.
    unasked = SubspaceTracker(objective, closed, gap_every=0)
    with pytest.warns(GapClosed):
        unasked.update()
    following = float(spectrum[closed])
    assert 0.9 * following < unasked.report.next_eigenvalue <= following * (1 + 1e-5)
